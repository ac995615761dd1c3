"""Read and write model folders: JSON, safetensors and the model's own library.

No code of a folder is executed, unless the caller passes ``trust_remote_code=True``.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import stat
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
WEIGHT_FILE = "model.safetensors"
WEIGHT_INDEX_FILE = "model.safetensors.index.json"  # of weights in several files
# suffixes of settings, tokenizers and templates
_COMPANIONS = (".json", ".txt", ".model", ".jinja")
DOWNLOADED = ["*.safetensors", *(f"*{suffix}" for suffix in _COMPANIONS)]

HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only")

# a function that returns the names of some of a model's tensors
FindTensors = Callable[[nn.Module], set[str]]


def class_and_message(error: BaseException) -> str:
    """Return an error's class and message on one line of limited length."""
    words = str(error).split()
    message = " ".join(words)
    return f"{type(error).__name__}: {message[:300]}"


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Raise a one-line :class:`CheckpointError` if the ``with`` block cannot read a file.

    It is also raised if the path is not a file.
    """
    try:
        if path.exists() and not path.is_file():
            raise OSError("it is not a file")  # opening a named pipe would wait for ever
        yield
    except (SafetensorError, OSError, ValueError, KeyError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is missing or damaged: {class_and_message(error)}"
        ) from error


@contextmanager
def _writable(path: Path) -> Iterator[None]:
    """Correct the errors and file permissions of safetensors, which writes in the ``with`` block.

    If safetensors cannot write, raise a one-line :class:`CheckpointError`. After the block, new
    files get the permissions that the umask allows. A file that replaces an older one gets the
    permissions of the older file.

    Args:
        path: file to which the block writes, or folder in which it writes safetensors files.
    """
    permissions_before = _permissions_of_tensor_files(path)
    try:
        yield
    except SafetensorError as error:
        raise CheckpointError(f"{path} cannot be written: {class_and_message(error)}") from error

    # safetensors lets only the owner read a file, even if it replaces an older one.
    # Setting the umask is the only portable way to read it. Until it is set back, files of other
    # threads are only for the owner.
    umask = os.umask(0o077)
    os.umask(umask)
    permissions_of_new_file = 0o666 & ~umask
    for file, permissions in _permissions_of_tensor_files(path).items():
        wanted = permissions_before.get(file, permissions_of_new_file)
        # The block did not write the folder's other files, which have the wanted permissions. They
        # may belong to another user, so do not touch them.
        if permissions != wanted:
            file.chmod(wanted)


def _permissions_of_tensor_files(path: Path) -> dict[Path, int]:
    """Return the permissions of a file, or of each safetensors file in a folder, by path.

    Files that do not exist are left out.
    """
    candidates = [path]
    if path.is_dir():
        candidates = list(path.glob("*.safetensors"))
    permissions = {}
    for file in candidates:
        if file.exists():  # a link may name a file that is gone
            permissions[file] = stat.S_IMODE(file.stat().st_mode)
    return permissions


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object (raises :class:`CheckpointError`)."""
    with _readable(path):
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it does not hold an object")
        return content


def read_settings(folder: Path) -> dict[str, Any]:
    """Read a folder's ``config.json``. Without the file, return an empty dictionary.

    A damaged file raises :class:`CheckpointError`.
    """
    path = folder / STOCK_CONFIG_FILE
    if not path.exists():
        return {}
    return read_object(path)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read all tensors of a safetensors file (raises :class:`CheckpointError`)."""
    with _readable(path):
        return load_file(path)


def read_metadata(path: Path) -> dict[str, str]:
    """Read the metadata of a safetensors file (raises :class:`CheckpointError`).

    The result is empty if the file has no metadata.
    """
    with _readable(path), safe_open(path, framework="pt") as file:
        return file.metadata() or {}


def write_tensors(
    tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """Write tensors to a safetensors file (raises :class:`CheckpointError`)."""
    with _writable(path):
        save_file(tensors, path, metadata=metadata)


def tensor_digest(tensor: Tensor) -> str:
    """Return the sha256 hash of a tensor's dtype, shape and bytes, in hexadecimal."""
    plain = tensor.detach().cpu().contiguous()
    form = f"{plain.dtype}{tuple(plain.shape)}"
    digest = hashlib.sha256(form.encode())
    # as bytes, because NumPy has no bfloat16
    content = plain.flatten().view(torch.uint8)
    digest.update(content.numpy().data)
    return digest.hexdigest()


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files that hold a folder's weights: one file, or all shards.

    Raises :class:`CheckpointError` if the folder has no such files, or if the index of the shards
    is damaged.
    """
    single = folder / WEIGHT_FILE
    index = folder / WEIGHT_INDEX_FILE
    if single.exists():
        return [single]
    if not index.exists():
        raise CheckpointError(
            f"{folder} holds no {WEIGHT_FILE} or {WEIGHT_INDEX_FILE}; other formats are not read"
        )

    file_of_tensor = read_object(index).get("weight_map")
    if not isinstance(file_of_tensor, dict):
        raise CheckpointError(f"{index} has no 'weight_map', which maps tensors to files")
    names = sorted({str(name) for name in file_of_tensor.values()})
    for name in names:
        # a path could lead out of the folder
        is_path = Path(name).name != name
        if is_path or not name.endswith(".safetensors"):
            raise CheckpointError(
                f"{index} names '{name:.80}', which must be a .safetensors file of this folder"
            )
    return [folder / name for name in names]


def tensor_files(paths: Iterable[Path]) -> dict[str, Path]:
    """Map each tensor's name to the safetensors file that holds it.

    If several files hold a tensor of the same name, the last file is used. A damaged file raises
    :class:`CheckpointError`.
    """
    file_of_tensor = {}
    for path in paths:
        with _readable(path), safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 -- not a dictionary
                file_of_tensor[name] = path
    return file_of_tensor


class Weights:
    """A folder's weights, of which single tensors can be read.

    Attributes:
        files: the file of each tensor, by the tensor's name.
    """

    def __init__(self, folder: Path) -> None:
        self.files = tensor_files(weight_files(folder))

    def __getitem__(self, name: str) -> Tensor:
        path = self.files[name]
        with _readable(path), safe_open(path, framework="pt") as file:
            return cast(Tensor, file.get_tensor(name))

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape without reading its values."""
        path = self.files[name]
        with _readable(path), safe_open(path, framework="pt") as file:
            return tuple(file.get_slice(name).get_shape())


def model_folder(model: str, options: Mapping[str, Any] | None = None) -> Path:
    """Return a model's folder. If the model is a hub id, download it.

    Args:
        model: folder or hub id.
        options: options of a loader. The download uses ``revision``, ``token``, ``cache_dir`` and
            ``local_files_only``. All other options are ignored.

    Raises:
        CheckpointError: the hub has no such model, or :func:`check_loadable` rejects the folder.
    """
    folder = Path(model)
    if not folder.is_dir():
        folder = _download(model, options or {})
    check_loadable(folder)
    return folder


def _download(model: str, options: Mapping[str, Any]) -> Path:
    """Download a model from the hub, and return its folder (raises :class:`CheckpointError`)."""
    from huggingface_hub import snapshot_download

    hub_options = {name: value for name, value in options.items() if name in HUB_OPTIONS}
    try:
        return Path(snapshot_download(model, allow_patterns=DOWNLOADED, **hub_options))
    except (OSError, ValueError) as error:  # the errors of the hub are subclasses
        raise CheckpointError(
            f"'{model}' is not a folder, and the hub gave no model: {class_and_message(error)}"
        ) from error


def loader_for(folder: Path) -> Any:
    """Return the transformers class that a folder names, or ``timm.create_model``.

    Raises :class:`CheckpointError` if transformers has no such class.
    """
    settings = read_settings(folder)
    if "architecture" in settings:  # timm's own key
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
    """Return the name of the transformers class that wrote a folder.

    None if ``config.json`` names no class. Raises :class:`CheckpointError` if the entry is damaged.
    """
    names = read_settings(folder).get("architectures")
    if names is None or names == []:
        return None
    if not isinstance(names, list):
        raise CheckpointError(
            f"{folder / STOCK_CONFIG_FILE}: 'architectures' is {names!r:.80}, not a list of names"
        )
    return str(names[0])


def check_loadable(folder: Path) -> None:
    """Raise :class:`CheckpointError` if a folder cannot be loaded, or would execute code.

    Such a folder holds adapters, names code from a hub, has a named pipe as a settings file, or
    lacks readable safetensors files.
    """
    check_companions(folder)
    if (folder / "adapter_config.json").exists():
        raise CheckpointError(
            f"{folder} holds adapters, not a model: "
            "load their model with emoe.from_pretrained first"
        )

    # An attention whose name has a slash is a repository with code. The whole text is searched,
    # because nested models have settings too. The value is a name, or an object with one name for
    # each part of the model. The regex matches `"attn_implementation": "owner/code"` and
    # `"attn_implementation": {"text_config": "owner/code"}`.
    settings = json.dumps(read_settings(folder))
    if re.search(r'attn_implementation\w*": (\{[^}]*": )?"[^"]*/', settings):
        raise CheckpointError(
            f"{folder}: 'attn_implementation' names code from a hub; remove the key"
        )
    Weights(folder)  # reads all headers, and its error names a damaged file


def check_companions(folder: Path) -> None:
    """Raise :class:`CheckpointError` if a settings or tokenizer file is not an ordinary file.

    A library would wait for ever for the content of a named pipe.
    """
    for path in folder.iterdir():
        is_special = path.exists() and not path.is_file() and not path.is_dir()
        if is_special and path.suffix in _COMPANIONS:
            raise CheckpointError(f"{path} is not a file; remove it")


def load_stock(
    loader: Any,
    folder: Path,
    *,
    find_stored_elsewhere: FindTensors | None = None,
    new_head: bool = True,
    **options: Any,
) -> Any:
    """Load a checkpoint with its own library: safetensors only.

    No code of the checkpoint is executed, unless ``options`` have ``trust_remote_code=True``.

    Args:
        loader: transformers class, ``timm.create_model`` or function that builds a plain module.
        folder: folder of the checkpoint.
        find_stored_elsewhere: function that returns the names of the tensors that
            :mod:`emoe.loader` reads from another file of the folder. The weights must contain all
            other tensors of the model. Only for transformers.
        new_head: accept a transformers checkpoint without the weights of the model's head.
        **options: options of the loader. ``ignore_mismatched_sizes`` accepts a head of another
            shape, timm's ``num_classes`` a new head.

    Returns:
        The model. With the option ``output_loading_info=True``, also transformers' report.

    Raises:
        CheckpointError: the folder is damaged, or holds another model's weights.
    """
    check_loadable(folder)
    if is_transformers_class(loader):
        with _one_line_errors(loader, folder):
            return _load_with_transformers(loader, folder, find_stored_elsewhere, new_head, options)

    # timm 1.0.20 cannot choose among several safetensors files
    has_one_file = len(list(folder.glob("*.safetensors"))) == 1
    if _is_timm(loader) and has_one_file:
        return _load_with_timm(loader, folder, options)

    model = build_without_weights(loader, folder, **options)
    stored = read_tensors(folder / WEIGHT_FILE)
    may_be_missing = requested_head_names(model, options)
    load_state_(model, stored, folder, may_be_missing)
    return model


def _load_with_timm(loader: Any, folder: Path, options: Mapping[str, Any]) -> Any:
    """Load a checkpoint with timm, and check that timm has loaded the stored head.

    The arguments are those of :func:`load_stock`.
    """
    _check_num_classes(folder, options)
    with _one_line_errors(loader, folder):
        model = loader(f"local-dir:{folder}", pretrained=True, **options)
    if "num_classes" not in options:  # with this option, the caller asks for a new head
        _check_stored_heads_are_loaded(model, folder)
    return model


def is_transformers_class(kind: object) -> bool:
    """Check if a value is a model class of transformers, or one of its classes like ``AutoModel``.

    Other libraries' classes may also have ``from_pretrained`` and ``save_pretrained``, for example
    from ``PyTorchModelHubMixin``.
    """
    if not isinstance(kind, type):
        return False
    # by the names of the modules, because transformers need not be installed
    return any(base.__module__.startswith("transformers.") for base in kind.__mro__)


def build_without_weights(loader: Any, folder: Path, **options: Any) -> nn.Module:
    """Build the timm or plain model of a folder without loading its weights.

    ``loader`` is timm's ``create_model``, or the user's own function that builds a plain model.

    Raises :class:`CheckpointError` if :func:`check_loadable` rejects the folder, or timm cannot
    build the model.
    """
    check_loadable(folder)
    if not _is_timm(loader):
        # errors of the user's own function are not caught
        return cast(nn.Module, loader(**options))
    _check_num_classes(folder, options)
    with _one_line_errors(loader, folder):
        return cast(nn.Module, loader(f"local-dir:{folder}", pretrained=False, **options))


def _is_timm(loader: Any) -> bool:
    """Check if a loader is a function of timm."""
    module_name = str(getattr(loader, "__module__", None))
    return module_name.startswith("timm.")


@contextmanager
def _one_line_errors(loader: Any, folder: Path) -> Iterator[None]:
    """Raise :class:`CheckpointError` for any error of a model's library."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # a damaged configuration raises anything
        raise CheckpointError(
            f"{folder} cannot be loaded by {loader.__name__}: {class_and_message(error)}"
        ) from error


def _check_num_classes(folder: Path, options: Mapping[str, Any]) -> None:
    """Raise :class:`CheckpointError` if ``num_classes`` in a timm folder does not fit its weights.

    timm would then create a new head without a message. With a ``num_classes`` in ``options``,
    which asks for a new head, nothing is checked.
    """
    if "num_classes" in options:
        return
    settings = read_settings(folder)
    pretrained_settings = settings.get("pretrained_cfg")
    if not isinstance(pretrained_settings, dict):
        return
    head_name = pretrained_settings.get("classifier")
    # without this entry, or with several heads, there is nothing to compare
    if not isinstance(head_name, str):
        return

    num_stored = _rows_of_weight(Weights(folder), head_name)
    # timm prefers the number among the model's arguments
    arguments = settings.get("model_args")
    settings_by_name = {"num_classes": settings}
    if isinstance(arguments, dict):
        settings_by_name["model_args: num_classes"] = arguments
    for name, values in settings_by_name.items():
        num_classes = values.get("num_classes")
        if num_classes is not None and num_classes != num_stored:
            path = folder / STOCK_CONFIG_FILE
            raise CheckpointError(
                f"{path}: {name} is {num_classes!r:.80}, but the weights have a head of "
                f"{num_stored}"
            )


def requested_head_names(model: nn.Module, options: Mapping[str, Any]) -> set[str]:
    """Return the names of the tensors in a new head that a caller of timm asks for.

    These tensors need not be stored. A caller asks for a new head with ``num_classes`` in
    ``options``. Without it, the result is empty.
    """
    if "num_classes" not in options:
        return set()
    prefixes = tuple(f"{head}." for head in _timm_heads(model))
    return {name for name in model.state_dict() if name.startswith(prefixes)}


def _timm_heads(model: Any) -> tuple[str, ...]:
    """Return the names of the head modules of a timm model; empty for any other model."""
    pretrained_settings = getattr(model, "pretrained_cfg", None) or {}
    heads = pretrained_settings.get("classifier") or ()
    if isinstance(heads, str):
        return (heads,)
    return tuple(heads)


def _check_stored_heads_are_loaded(model: nn.Module, folder: Path) -> None:
    """Raise :class:`CheckpointError` if timm replaced a stored head by a new one.

    timm does so without a message if two settings name different numbers of classes.
    """
    weights = Weights(folder)
    state = model.state_dict()
    for head in _timm_heads(model):
        name = f"{head}.weight"
        if name not in weights.files:
            continue
        stored = weights[name]
        loaded = state.get(name)
        is_loaded = False
        if loaded is not None:
            stored_as_loaded = stored.to(loaded.dtype)
            is_loaded = _are_same(loaded.cpu(), stored_as_loaded)
        if not is_loaded:
            path = folder / STOCK_CONFIG_FILE
            raise CheckpointError(
                f"{path}: timm did not load the stored {head} of {len(stored)} classes; set "
                "num_classes to this number everywhere"
            )


def _are_same(first: Tensor, second: Tensor) -> bool:
    """Check if two tensors have the same shape and values; nan equals nan."""
    if first.shape != second.shape:
        return False
    return torch.allclose(first, second, rtol=0, atol=0, equal_nan=True)


def _rows_of_weight(weights: Weights, module: str) -> int:
    """Return the first dimension of a module's weight, 0 if there is no weight or dimension."""
    name = f"{module}.weight"
    if name not in weights.files:
        return 0
    shape = weights.shape(name)
    return shape[0] if shape else 0


def _load_with_transformers(
    loader: Any,
    folder: Path,
    find_stored_elsewhere: FindTensors | None,
    new_head: bool,
    options: Mapping[str, Any],
) -> Any:
    """Load a checkpoint with transformers, and check that its weights are complete.

    The arguments and the result are those of :func:`load_stock`.
    """
    loader_options = {
        # the caller's options may replace this one, but not those below
        "trust_remote_code": False,
        **options,
        "use_safetensors": True,
        # the loader then also returns the names of missing and mismatched tensors
        "output_loading_info": True,
        # sizes are checked below, because transformers' error does not name the tensors
        "ignore_mismatched_sizes": True,
    }
    # transformers would report tensors of another file as missing
    silence = quiet() if find_stored_elsewhere else nullcontext()
    with silence:
        model, info = loader.from_pretrained(str(folder), **loader_options)

    # the tensors that transformers has not loaded, except those of another file
    stored_elsewhere: set[str] = set()
    if find_stored_elsewhere:
        stored_elsewhere = find_stored_elsewhere(model)
    missing = set(info["missing_keys"]) - stored_elsewhere
    # transformers lists each name with the two shapes
    names_of_other_shape = {name for name, *_shapes in info["mismatched_keys"]}
    mismatched = names_of_other_shape - stored_elsewhere

    # the caller may accept a head that is not stored
    new_head_names: set[str] = set()
    if new_head:
        new_head_names = _missing_head_names(model, missing, folder)
    # transformers' own warning was silenced above
    if find_stored_elsewhere and new_head_names:
        listed = ", ".join(sorted(new_head_names))
        logging.getLogger("emoe").warning("%s has no %s: train this new head", folder, listed)

    # the caller may accept a head whose stored tensors have another shape
    reshaped_head_names: set[str] = set()
    if options.get("ignore_mismatched_sizes"):
        reshaped_head_names = _head_names(model, mismatched)

    # all other tensors must be stored in the model's shape
    not_loaded = missing | mismatched
    accepted = new_head_names | reshaped_head_names
    _check_complete(not_loaded - accepted, folder)

    # the folder has all of the model's tensors that are not missing, and some that the model lacks
    stored_in_model = set(model.state_dict()) - missing
    not_in_model = set(info["unexpected_keys"])
    check_layers(model, stored_in_model | not_in_model, folder)

    if options.get("output_loading_info"):
        return model, info
    return model


def _missing_head_names(model: Any, missing: Iterable[str], folder: Path) -> set[str]:
    """Return the names in ``missing`` that belong to the head of a transformers model.

    The result is empty if the model's own class wrote the folder: then its head cannot be missing.

    Args:
        model: the loaded model.
        missing: names of the model's tensors that the folder lacks.
        folder: folder of the checkpoint.
    """
    # a checkpoint that another class wrote may lack the head, which transformers then initialises
    if writer_of(folder) == type(model).__name__:
        return set()
    return _head_names(model, missing)


def _head_names(model: Any, names: Iterable[str]) -> set[str]:
    """Return the names in ``names`` that belong to the head or pooler of a transformers model."""
    # Names begin with the base model's name, such as "bert.", except in the head. A base model
    # itself has no head, and its names have no such prefix.
    base_prefix = f"{model.base_model_prefix}."
    if model.base_model is model:
        base_prefix = ""
    heads = set()
    for name in names:
        is_pooler = ".pooler." in f".{name}"  # the pooler may come first in the name
        if is_pooler or not name.startswith(base_prefix):
            heads.add(name)
    return heads


def check_layers(model: nn.Module, stored: Iterable[str], folder: Path) -> None:
    """Raise :class:`CheckpointError` if the weights have more or fewer layers than the model.

    Args:
        model: the model that the configuration describes, or that the user's function builds.
        stored: names of the stored tensors.
        folder: folder of the checkpoint, for the message.
    """
    # The weights may be a base model's, whose names lack the prefix "bert.", for example. So names
    # are compared without this prefix.
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    stored_names = {name.removeprefix(prefix) for name in stored}
    model_names = {name.removeprefix(prefix) for name in model.state_dict()}
    config_file = folder / STOCK_CONFIG_FILE
    source = str(config_file)
    if not config_file.exists():  # a plain PyTorch model
        source = f"{folder}: the function that builds the model"
    name = _name_in_absent_layer(stored_names, model_names)
    if name is not None:
        raise CheckpointError(f"{source} counts fewer layers than the weights, which have {name}")
    name = _name_in_absent_layer(model_names, stored_names)
    if name is not None:
        raise CheckpointError(f"{source} counts more layers than the weights, which lack {name}")


def _name_in_absent_layer(names: Iterable[str], others: Collection[str]) -> str | None:
    """Return the first name in ``names`` of a tensor in a layer that ``others`` lack, or None.

    ``others`` must have the same tensor in another layer. So tensors outside the list of layers,
    such as those of a head, are skipped.
    """
    layers_of_others: set[str] = set()
    for other in others:
        layers_of_others.update(_layers_of(other))
    # the same text for all tensors whose names differ only in the layer's number
    patterns_of_others = {_without_numbers(other) for other in others}
    for name in sorted(names):
        absent_layers = set(_layers_of(name)) - layers_of_others
        others_have_pattern = _without_numbers(name) in patterns_of_others
        if absent_layers and others_have_pattern:
            return name
    return None


def _layers_of(name: str) -> list[str]:
    """Return each beginning of a tensor's name that ends with a number.

    For ``stages.2.blocks.5.weight`` they are ``stages.2`` and ``stages.2.blocks.5``.
    """
    return [name[: match.end()] for match in re.finditer(r"\.\d+(?=\.)", name)]


def _without_numbers(name: str) -> str:
    """Replace each number in a tensor's name by ``#``, so that the name is equal in all layers.

    For example, ``layer.11.weight`` becomes ``layer.#.weight``.
    """
    return re.sub(r"\d+", "#", name)


def load_state_(
    model: nn.Module,
    stored: Mapping[str, Tensor],
    folder: Path,
    may_be_missing: Collection[str] = (),
) -> None:
    """Load stored tensors into a plain or timm model.

    Raise :class:`CheckpointError` if a tensor of the model is missing or has another shape, or if
    the weights have more layers than the model. Tensors whose names are in ``may_be_missing`` may
    be missing or have another shape; they keep their values. They are new, or the caller loads them
    later.
    """
    # tensors that may be missing count as stored, so that their layers are not reported
    stored_or_allowed = {*stored, *may_be_missing}
    check_layers(model, stored_or_allowed, folder)
    state = model.state_dict()
    fitting = {}
    for name, tensor in stored.items():
        if name in state and tensor.shape == state[name].shape:
            fitting[name] = tensor
    missing = set(state) - set(fitting)
    _check_complete(missing - set(may_be_missing), folder)
    model.load_state_dict(fitting, strict=False)


def _check_complete(missing: Collection[str], folder: Path) -> None:
    """Raise :class:`CheckpointError` that names the first tensor in ``missing``, if there is one.

    These are the model's tensors that the folder lacks, or stores in another shape.
    """
    if missing:
        name = min(missing)
        raise CheckpointError(
            f"the weights in {folder} lack {name}, or have other shapes: they are not this model's"
        )


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' warnings and progress bars within a ``with`` block."""
    from transformers.utils import logging as transformers_logging

    level = transformers_logging.get_verbosity()
    has_bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if has_bars:
            transformers_logging.enable_progress_bar()


def save_weights(model: nn.Module, folder: Path, state: dict[str, Tensor] | None = None) -> None:
    """Save a transformers model with ``save_pretrained``, and other models as one file of tensors.

    The folder of a timm model also gets a ``config.json``, from which timm builds the model.

    Args:
        model: model to save.
        folder: folder to write to.
        state: tensors to write instead of the model's own state.

    Raises:
        ConversionError: something else than ``device_map`` has offloaded weights.
        CheckpointError: safetensors cannot write the file.
        OSError: the folder or another file cannot be written.
    """
    if state is None:
        state = model.state_dict()
    is_offloaded = any(tensor.is_meta for tensor in state.values())
    # transformers itself gathers the weights that device_map has offloaded
    if is_offloaded and not hasattr(model, "hf_device_map"):
        raise ConversionError(
            "these weights are offloaded; call accelerate.hooks.remove_hook_from_submodules first"
        )

    folder.mkdir(parents=True, exist_ok=True)
    if is_transformers_class(type(model)):
        with _writable(folder):
            cast(Any, model).save_pretrained(folder, state_dict=state)
        return

    is_timm = hasattr(model, "pretrained_cfg")
    if is_timm:
        _save_timm_config(model, folder)
    _save_plain_tensors(state, folder)


def _save_timm_config(model: nn.Module, folder: Path) -> None:
    """Write the ``config.json`` of a timm model."""
    # private, because timm's public functions also write the weights
    from timm.models._hub import save_config_for_hf

    path: Any = folder / STOCK_CONFIG_FILE  # declared as a string, but older releases need a path
    save_config_for_hf(model, path)


def _save_plain_tensors(state: Mapping[str, Tensor], folder: Path) -> None:
    """Write tensors to the folder's ``model.safetensors``."""
    # clones, so that tied tensors are written under each of their names
    clones = {
        name: tensor.detach().clone(memory_format=torch.contiguous_format)
        for name, tensor in state.items()
    }
    write_tensors(clones, folder / WEIGHT_FILE)


def check_new(folder: Path) -> None:
    """Raise :class:`CheckpointError` if a path exists and is not an empty folder.

    The current folder is refused too, because a shell would stay in the folder that is replaced.
    """
    if not folder.exists():
        return
    if folder.resolve() == Path.cwd():
        raise CheckpointError(f"{folder} is the current folder; name a new folder")
    is_empty_folder = folder.is_dir() and not any(folder.iterdir())
    if not is_empty_folder:
        raise CheckpointError(f"{folder} exists and is not empty; name a new folder")


@contextmanager
def new_folder(folder: Path, source: Path) -> Iterator[Path]:
    """Yield a temporary folder to write a model to, and rename it to ``folder`` at the end.

    The temporary folder already holds copies of the settings, tokenizer and templates in
    ``source``. An error leaves ``folder`` as it was. Raises :class:`CheckpointError` if
    :func:`check_new` refuses ``folder``.
    """
    check_new(folder)
    companions = _find_companions(source)
    # a folder cannot replace a link, so the folder that the link names is replaced
    target = folder.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as scratch:
        temporary = Path(scratch) / target.name
        temporary.mkdir()
        for path in companions:
            copy = temporary / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
        yield temporary
        temporary.replace(target)


def _find_companions(source: Path) -> list[Path]:
    """Return the settings, tokenizers and templates in a folder and its subfolders.

    Emoe's own files and the index of the weights are left out, because saving writes them anew.
    Links that lead out of the folder are left out too.
    """
    root = source.resolve()
    # In the hub's cache, the files in `snapshots/REVISION` are links into the folder `blobs`. Both
    # folders are below the same root.
    if root.parent.name == "snapshots":
        root = root.parents[1]

    companions = []
    for path in source.rglob("*"):
        is_written_anew = path.name.startswith("emoe_") or path.name.endswith(".index.json")
        is_companion = path.suffix in _COMPANIONS and not is_written_anew
        if is_companion and path.is_file() and path.resolve().is_relative_to(root):
            companions.append(path)
    return companions
