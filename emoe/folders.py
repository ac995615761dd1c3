"""Model folders on disk, and on the hub: which class loads them, and what else lies in them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from torch import nn

from emoe.checkpoint import CONFIG_FILE, WEIGHT_FILES, load_stock
from emoe.errors import CheckpointError

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
    if not (folder / "config.json").exists():
        raise CheckpointError(f"{folder} holds no config.json, so it is no model's folder")
    if not any((folder / name).exists() for name in WEIGHT_FILES):
        raise CheckpointError(f"{folder} holds no {' or '.join(WEIGHT_FILES)}; other formats are not read")
    return folder


def loader_for(folder: Path) -> Any:
    """What loads a folder with its head: the transformers class that wrote it, or ``timm.create_model``.

    Raises:
        CheckpointError: a damaged ``config.json``, or a class that transformers does not have.
    """
    file = folder / "config.json"
    try:
        settings = json.loads(file.read_text())
    except (ValueError, RecursionError) as error:  # no JSON, no text, or nested too deeply
        raise CheckpointError(f"{file} is damaged: {error}") from error
    if not isinstance(settings, dict):
        raise CheckpointError(f"{file} is damaged: it holds no object")
    if "architecture" in settings:
        import timm

        return timm.create_model
    import transformers

    names = settings.get("architectures") or ["AutoModel"]
    found = getattr(transformers, names[0], None)
    if found is None:
        raise CheckpointError(
            f"{file} names the class '{names[0]}', which transformers does not have; load it in Python"
        )
    return found


def load_dense(folder: Path) -> nn.Module:
    """Load an ordinary checkpoint in the precision that it has.

    Raises:
        CheckpointError: it holds experts already, or its weights are damaged.
    """
    if (folder / CONFIG_FILE).exists():
        raise CheckpointError(f"{folder} holds experts already; fold them back first (python -m emoe to-dense)")
    return load_stock(loader_for(folder), folder).eval()


def check_new(folder: Path) -> None:
    """Refuse to write into a folder that has something in it (:class:`CheckpointError`)."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder} exists and is not empty; name a new folder")


def copy_companions(source: Path, target: Path) -> None:
    """Copy tokenizer, templates and the like, which belong to the model but are not written with its weights."""
    files = [
        path.relative_to(source)
        for path in sorted(source.rglob("*"))
        if path.is_file()
        and path.suffix in _COMPANIONS
        and not path.name.endswith(".index.json")
        and path.name != CONFIG_FILE
        and not (target / path.relative_to(source)).exists()
    ]
    for file in files:
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / file, target / file)
