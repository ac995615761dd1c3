"""Model folders on disk, and on the hub: which class loads them, and what else lies in them."""

from __future__ import annotations

import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

from torch import nn

from emoe.errors import CheckpointError
from emoe.marks import read_mark
from emoe.sidecars import CONFIG_FILE
from emoe.stock import load_stock, refuse_adapters
from emoe.weights import STOCK_CONFIG_FILE, one_line, read_object, shorten, weight_files

# Weights and settings, tokenizers and templates. Nothing that would have to be unpickled.
_PATTERNS = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")
_COMPANIONS = (".json", ".txt", ".model", ".jinja")


def model_folder(model: str) -> Path:
    """The folder of a model that is named by folder or hub id; from the hub it is downloaded into the hub's cache.

    Raises:
        CheckpointError: neither a folder nor a model that the hub gives out, or no safetensors in it.
    """
    folder = Path(model)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        try:
            folder = Path(snapshot_download(model, allow_patterns=list(_PATTERNS)))
        except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            reason = str(error).strip().splitlines()[0]
            raise CheckpointError(
                f"'{model}' is no folder, and the hub gives out no model of that name: {reason}"
            ) from error
    refuse_adapters(folder)
    if not (folder / STOCK_CONFIG_FILE).exists():
        raise CheckpointError(f"{folder} holds no {STOCK_CONFIG_FILE}, so it is no model's folder")
    weight_files(folder)
    return folder


def loader_for(folder: Path) -> Any:
    """What loads a folder with its head: the transformers class that wrote it, or ``timm.create_model``.

    Raises:
        CheckpointError: a damaged ``config.json``, or no class of transformers that a model can be of.
    """
    file = folder / STOCK_CONFIG_FILE
    settings = read_object(file)
    if "architecture" in settings:
        import timm

        return timm.create_model
    names = settings.get("architectures")
    if names is None or names == []:
        names = ["AutoModel"]
    if not isinstance(names, list) or not isinstance(names[0], str):
        raise CheckpointError(f"{file} is damaged: 'architectures' is no list of names: {shorten(repr(names), 80)}")
    return _model_class(names[0], file)


def _model_class(name: str, file: Path) -> Any:
    """A class of transformers by its name.

    Raises:
        CheckpointError: transformers has no such class, or it is none that loads models.
    """
    import transformers

    try:
        found = getattr(transformers, name, None)
    except (ImportError, RuntimeError) as error:  # its module needs another library
        raise CheckpointError(f"{file} names the class '{name}', which does not load: {one_line(error)}") from error
    if found is None:
        raise CheckpointError(
            f"{file} names the class '{shorten(name, 80)}', which transformers does not have; load it in Python"
        )
    whole = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
    if not (whole and found.forward is not nn.Module.forward) and found is not transformers.AutoModel:
        raise CheckpointError(f"{file} names '{name}' as the model's class, which is none")
    return found


def holds_experts(folder: Path) -> bool:
    """Whether a model's folder says that it has experts."""
    return (folder / CONFIG_FILE).exists() or read_mark(folder) is not None


def load_dense(folder: Path) -> nn.Module:
    """Load an ordinary checkpoint in the precision that it has.

    Raises:
        CheckpointError: it holds experts already, or its weights are damaged.
    """
    if holds_experts(folder):
        raise CheckpointError(f"{folder} holds experts already; fold them back first (python -m emoe to-dense)")
    return load_stock(loader_for(folder), folder).eval()


def check_new(folder: Path) -> None:
    """Refuse to write into a folder that has something in it (:class:`CheckpointError`)."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder} exists and is not empty; name a new folder")


def copy_companions(source: Path, target: Path, written: Collection[str]) -> list[Path]:
    """Copy tokenizer, templates and the like, which belong to the model but are not written with its weights.

    Args:
        source: the model's folder.
        target: another one.
        written: names of files that are written there, and not to be copied.

    Returns:
        Files that were left out, because they are links that lead out of the folder.
    """
    files = [
        path.relative_to(source)
        for path in sorted(source.rglob("*"))
        if path.is_file()
        and path.suffix in _COMPANIONS
        and not path.name.endswith(".index.json")
        and path.name != CONFIG_FILE
        and str(path.relative_to(source)) not in written
    ]
    places = _storage(source)
    outside = [file for file in files if not any((source / file).resolve().is_relative_to(place) for place in places)]
    for file in files:
        if file not in outside:
            (target / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / file, target / file)
    return outside


def _storage(folder: Path) -> list[Path]:
    """Where a folder's own files lie: in it, or in the hub's cache, which links a snapshot's to the blobs beside it."""
    folder = folder.resolve()
    return [folder, folder.parents[1] / "blobs"] if folder.parent.name == "snapshots" else [folder]
