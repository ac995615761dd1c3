"""Read and write model folders: JSON, safetensors and the model's own library, without executing code."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from emoe.errors import CheckpointError, ConversionError

STOCK_CONFIG_FILE = "config.json"
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json")
_COMPANIONS = (".json", ".txt", ".model", ".jinja")  # settings, tokenizers and templates
DOWNLOADED = ["*.safetensors", *(f"*{suffix}" for suffix in _COMPANIONS)]

HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only")

Restored = Callable[
    [nn.Module], set[str]
]  # returns the names of the tensors that the caller loads later


def one_line(error: BaseException) -> str:
    """Return an error's class and message on one line of limited length."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Raise a one-line :class:`CheckpointError` if a path is not a file, or cannot be read."""
    try:
        if path.exists() and not path.is_file():
            raise OSError("it is not a file")  # opening a named pipe would wait for ever
        yield
    except (SafetensorError, OSError, ValueError, KeyError, RecursionError) as error:
        raise CheckpointError(f"{path} is missing or damaged: {one_line(error)}") from error


@contextmanager
def _writable(path: Path) -> Iterator[None]:
    """Raise a one-line :class:`CheckpointError` if safetensors cannot write, and apply the umask to its files."""
    try:
        yield
    except SafetensorError as error:
        raise CheckpointError(f"{path} cannot be written: {one_line(error)}") from error
    umask = os.umask(0)  # the only way to read it
    os.umask(umask)
    for file in path.glob("*.safetensors") if path.is_dir() else [path]:
        file.chmod(0o666 & ~umask)  # safetensors lets only the owner read


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object (raises :class:`CheckpointError`)."""
    with _readable(path):
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it does not hold an object")
        return content


def read_settings(folder: Path) -> dict[str, Any]:
    """Read a folder's ``config.json``; empty if missing (raises :class:`CheckpointError`)."""
    path = folder / STOCK_CONFIG_FILE
    return read_object(path) if path.exists() else {}


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read all tensors of a safetensors file (raises :class:`CheckpointError`)."""
    with _readable(path):
        return load_file(path)


def read_metadata(path: Path) -> dict[str, str]:
    """Read the metadata of a safetensors file; empty if missing (raises :class:`CheckpointError`)."""
    with _readable(path), safe_open(path, framework="pt") as file:
        return file.metadata() or {}


def write_tensors(
    tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file with the umask's permissions (raises :class:`CheckpointError`)."""
    with _writable(path):
        save_file(tensors, path, metadata=metadata)


def tensor_digest(tensor: Tensor) -> str:
    """Hash a tensor's dtype, shape and bytes with sha256."""
    plain = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{plain.dtype}{tuple(plain.shape)}".encode())
    digest.update(plain.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a folder's weights (raises :class:`CheckpointError`)."""
    single, index = (folder / name for name in WEIGHT_FILES)
    if single.exists():
        return [single]
    if not index.exists():
        raise CheckpointError(
            f"{folder} holds no {' or '.join(WEIGHT_FILES)}; other formats are not read"
        )
    shards = read_object(index).get("weight_map")
    names = sorted({str(name) for name in shards.values()}) if isinstance(shards, dict) else [""]
    if unsafe := [
        name for name in names if Path(name).name != name or not name.endswith(".safetensors")
    ]:
        raise CheckpointError(
            f"{index} names '{unsafe[0]:.80}', which must be a .safetensors file of this folder"
        )
    return [folder / name for name in names]


def tensor_files(paths: Iterable[Path]) -> dict[str, Path]:
    """Map the names of the tensors in safetensors files to their files (raises :class:`CheckpointError`)."""
    names: dict[str, Path] = {}
    for path in paths:
        with _readable(path), safe_open(path, framework="pt") as file:
            names |= dict.fromkeys(file.keys(), path)
    return names


class Weights:
    """Read single tensors of a folder's weights. ``files`` maps their names to the files."""

    def __init__(self, folder: Path) -> None:
        self.files = tensor_files(weight_files(folder))

    def __getitem__(self, name: str) -> Tensor:
        with _readable(self.files[name]), safe_open(self.files[name], framework="pt") as file:
            return cast(Tensor, file.get_tensor(name))

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape without reading its values."""
        with _readable(self.files[name]), safe_open(self.files[name], framework="pt") as file:
            return tuple(file.get_slice(name).get_shape())


def model_folder(model: str, options: Mapping[str, Any] | None = None) -> Path:
    """Return a model's folder, downloaded if the model is a hub id (raises :class:`CheckpointError`).

    Args:
        model: folder or hub id.
        options: a loader's options, of which ``revision``, ``token``, ``cache_dir`` and ``local_files_only`` count.
    """
    folder = Path(model)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        given = {name: value for name, value in (options or {}).items() if name in HUB_OPTIONS}
        try:
            folder = Path(snapshot_download(model, allow_patterns=DOWNLOADED, **given))
        except (OSError, ValueError) as error:  # the errors of the hub are subclasses
            raise CheckpointError(
                f"'{model}' is not a folder, and the hub gave no model: {one_line(error)}"
            ) from error
    check_loadable(folder)
    return folder


def loader_for(folder: Path) -> Any:
    """Return the transformers class that a folder names, or ``timm.create_model`` (raises :class:`CheckpointError`)."""
    settings = read_settings(folder)
    if "architecture" in settings:
        import timm

        return timm.create_model
    import transformers

    name = writer_of(folder) or "AutoModel"
    loader = getattr(transformers, name, None)
    if not hasattr(loader, "from_pretrained"):
        raise CheckpointError(
            f"{folder}: 'architectures' names '{name:.80}', which is not a model of transformers"
        )
    return loader


def writer_of(folder: Path) -> str | None:
    """Return the name of the transformers class that wrote a folder, None if it names none."""
    names = read_settings(folder).get("architectures")
    if names is None or names == []:
        return None
    if not isinstance(names, list):
        raise CheckpointError(
            f"{folder / STOCK_CONFIG_FILE}: 'architectures' is {names!r:.80}, not a list of names"
        )
    return str(names[0])


def check_loadable(folder: Path) -> None:
    """Raise :class:`CheckpointError` if a library would load another model, code, or other file formats."""
    check_companions(folder)
    if (folder / "adapter_config.json").exists():
        raise CheckpointError(
            f"{folder} holds adapters, not a model: load their model with emoe.from_pretrained first"
        )
    # includes nested models; a value may be an object with one name per part of the model
    if re.search(
        r'attn_implementation\w*": (\{[^}]*": )?"[^"]*/', json.dumps(read_settings(folder))
    ):
        raise CheckpointError(
            f"{folder}: 'attn_implementation' names code from a hub; remove the key"
        )
    Weights(folder)  # its error names the damaged file


def check_companions(folder: Path) -> None:
    """Raise :class:`CheckpointError` if a settings file is a named pipe: libraries would wait for its content."""
    for path in folder.iterdir():
        is_special = path.exists() and not path.is_file() and not path.is_dir()
        if is_special and path.suffix in _COMPANIONS:
            raise CheckpointError(f"{path} is not a file; remove it")


def load_stock(
    loader: Any,
    folder: Path,
    *,
    restored: Restored | None = None,
    new_head: bool = True,
    **options: Any,
) -> Any:
    """Load a checkpoint with its own library: safetensors only, and no code of the checkpoint.

    Args:
        loader: transformers class, ``timm.create_model`` or function that builds a plain module.
        folder: folder of the checkpoint (raises :class:`CheckpointError` if it is damaged or another model's).
        restored: function that names tensors that :mod:`emoe.loader` reads from another file of the folder. All others
            must be stored.
        new_head: accept a transformers checkpoint without the weights of the model's head.
        **options: options of the loader. ``ignore_mismatched_sizes`` accepts a head of another shape, timm's
            ``num_classes`` a new head.

    Returns:
        The model. With the option ``output_loading_info=True``, also transformers' report.
    """
    check_loadable(folder)
    if hasattr(loader, "from_pretrained"):
        with _one_line_errors(loader, folder):
            return _load_with_transformers(loader, folder, restored, new_head, options)
    # timm 1.0.20 cannot choose among several safetensors files
    if _is_timm(loader) and len(list(folder.glob("*.safetensors"))) == 1:
        check_head(folder, options)
        with _one_line_errors(loader, folder):
            return loader(f"local-dir:{folder}", pretrained=True, **options)
    model = build_without_weights(loader, folder, **options)
    load_state_(model, read_tensors(folder / WEIGHT_FILES[0]), folder)
    return model


def build_without_weights(loader: Any, folder: Path, **options: Any) -> nn.Module:
    """Build the timm or plain model of a folder (raises :class:`CheckpointError`)."""
    check_loadable(folder)
    if not _is_timm(loader):
        return cast(nn.Module, loader(**options))  # do not catch errors of the user's function
    check_head(folder, options)
    with _one_line_errors(loader, folder):
        return cast(nn.Module, loader(f"local-dir:{folder}", pretrained=False, **options))


def _is_timm(loader: Any) -> bool:
    return str(getattr(loader, "__module__", None)).startswith("timm.")


@contextmanager
def _one_line_errors(loader: Any, folder: Path) -> Iterator[None]:
    """Raise :class:`CheckpointError` for any error of a model's library."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # a damaged configuration raises anything
        raise CheckpointError(
            f"{folder} cannot be loaded by {loader.__name__}: {one_line(error)}"
        ) from error


def check_head(folder: Path, options: Mapping[str, Any]) -> None:
    """Raise :class:`CheckpointError` if a timm folder's number of classes is not its stored head's.

    timm would draw a new head without a message. The option ``num_classes`` asks for one.
    """
    settings = read_settings(folder)
    pretrained = settings.get("pretrained_cfg")
    head = pretrained.get("classifier") if isinstance(pretrained, dict) else None
    classes = settings.get("num_classes")
    if "num_classes" in options or classes is None or not isinstance(head, str):
        return
    weights = Weights(folder)
    name = f"{head}.weight"
    shape = weights.shape(name) if name in weights.files else (0,)
    stored = shape[0] if shape else 0
    if classes != stored:
        path = folder / STOCK_CONFIG_FILE
        raise CheckpointError(
            f"{path}: num_classes is {classes!r:.80}, but the weights have a head of {stored}"
        )


def _load_with_transformers(
    loader: Any, folder: Path, restored: Restored | None, new_head: bool, options: dict[str, Any]
) -> Any:
    # sizes are checked below, because transformers' error does not name the tensors
    fixed = {"use_safetensors": True, "output_loading_info": True, "ignore_mismatched_sizes": True}
    with (
        quiet() if restored else nullcontext()
    ):  # transformers would report what the caller restores
        model, info = loader.from_pretrained(
            str(folder), **{"trust_remote_code": False, **options, **fixed}
        )
    expected = restored(model) if restored else set()
    missing = set(info["missing_keys"]) - expected
    mismatched = {name for name, *_ in info["mismatched_keys"]} - expected
    body = "" if model.base_model is model else f"{model.base_model_prefix}."
    heads = {
        name
        for name in missing | mismatched
        if not name.startswith(body) or ".pooler." in f".{name}"
    }
    drawn = missing & heads if new_head and writer_of(folder) != type(model).__name__ else set()
    if restored and drawn:
        logging.getLogger("emoe").warning(
            "%s has no %s: train this new head", folder, ", ".join(sorted(drawn))
        )
    resized = mismatched & heads if options.get("ignore_mismatched_sizes") else set()
    _check_complete((missing | mismatched) - drawn - resized, folder)
    _check_layers(model, info["unexpected_keys"], folder)
    return (model, info) if options.get("output_loading_info") else model


def _check_layers(model: nn.Module, unexpected: Iterable[str], folder: Path) -> None:
    """Raise :class:`CheckpointError` if the weights have more layers than the model's configuration."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    kinds = {_without_numbers(name).removeprefix(prefix) for name in model.state_dict()}
    for name in sorted(unexpected):
        if re.search(r"\.\d+\.", name) and _without_numbers(name).removeprefix(prefix) in kinds:
            path = folder / STOCK_CONFIG_FILE
            raise CheckpointError(f"{path} counts fewer layers than the weights, which have {name}")


def _without_numbers(name: str) -> str:
    """Return a tensor's name with all layer numbers replaced by a sign."""
    return re.sub(r"\d+", "#", name)


def load_state_(
    model: nn.Module, stored: Mapping[str, Tensor], folder: Path, restored: Collection[str] = ()
) -> None:
    """Load the stored tensors of a plain or timm model. All but the restored ones must have the model's shapes."""
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    state = {name: tensor for name, tensor in stored.items() if tensor.shape == shapes.get(name)}
    _check_complete(shapes.keys() - state.keys() - set(restored), folder)
    model.load_state_dict(state, strict=False)


def _check_complete(missing: Collection[str], folder: Path) -> None:
    """Raise :class:`CheckpointError` if a folder's weights lack tensors or have them in other shapes."""
    if missing:
        name = min(missing)
        raise CheckpointError(
            f"the weights in {folder} lack {name}, or have other shapes: they are not this model's"
        )


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the reports and progress bars of transformers."""
    from transformers.utils import logging as reports

    level, has_bars = reports.get_verbosity(), reports.is_progress_bar_enabled()
    reports.set_verbosity_error()
    reports.disable_progress_bar()
    try:
        yield
    finally:
        reports.set_verbosity(level)
        if has_bars:
            reports.enable_progress_bar()


def save_weights(model: nn.Module, folder: Path, state: dict[str, Tensor] | None = None) -> None:
    """Save a model with its own library, or a plain module's tensors; ``state`` replaces the model's state."""
    state = model.state_dict() if state is None else state
    if any(tensor.is_meta for tensor in state.values()) and not hasattr(model, "hf_device_map"):
        raise ConversionError(
            "these weights are offloaded; call accelerate.hooks.remove_hook_from_submodules first"
        )
    folder.mkdir(parents=True, exist_ok=True)
    if hasattr(model, "save_pretrained"):
        with _writable(folder):
            cast(Any, model).save_pretrained(folder, state_dict=state)
        return
    if hasattr(model, "pretrained_cfg"):
        from timm.models._hub import save_config_for_hf

        save_config_for_hf(
            model, cast(Any, folder / STOCK_CONFIG_FILE)
        )  # older releases need a path
    # clones, so that tied tensors are written under each of their names
    plain = {
        name: tensor.detach().clone(memory_format=torch.contiguous_format)
        for name, tensor in state.items()
    }
    write_tensors(plain, folder / WEIGHT_FILES[0])


def check_new(folder: Path) -> None:
    """Raise :class:`CheckpointError` if a folder is not empty."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder} exists and is not empty; name a new folder")


@contextmanager
def new_folder(folder: Path, source: Path) -> Iterator[Path]:
    """Write to a temporary folder with the companions of the source, and rename it at the end."""
    check_new(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    root = source.resolve()
    root = (
        root.parents[1] if root.parent.name == "snapshots" else root
    )  # the hub's cache links to files in `blobs`
    companions = [
        path for path in source.rglob("*") if path.suffix in _COMPANIONS and path.is_file()
    ]
    companions = [path for path in companions if path.resolve().is_relative_to(root)]
    with TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as scratch:
        temporary = Path(scratch) / folder.name
        temporary.mkdir()
        for path in companions:
            if not path.name.startswith("emoe_") and not path.name.endswith(".index.json"):
                copy = temporary / path.relative_to(source)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copy)
        yield temporary
        temporary.replace(folder)
