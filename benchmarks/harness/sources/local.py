"""The user's own folders: of a set below the data root, of a model below the model root."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.harness.base.paths import DATA_ROOT, MODEL_ROOT, ROOT

OWN_SUFFIXES = (".json", ".jsonl")  # of a set of instructions below the data root


def local_folder(name: str, source: Mapping[str, Any]) -> Path | None:
    """The set's folder, if the user has one: in the project, or below the data root under its makers' name or its own."""
    root = os.environ.get(DATA_ROOT)
    if "path" in source:
        return ROOT / source["path"] if (ROOT / source["path"]).is_dir() else None
    if not root or not {"folder", "mnist"} & set(source):
        return None
    folders = [Path(root) / called for called in (source.get("folder", "MNIST/raw"), name)]
    return next((folder for folder in folders if folder.is_dir()), None)


def own_file(name: str) -> Path | None:
    """The user's one file of a set of instructions, if there is one."""
    root = os.environ.get(DATA_ROOT)
    files = [Path(root) / f"{name}{suffix}" for suffix in OWN_SUFFIXES] if root else []
    return next((file for file in files if file.is_file()), None)


def wanted_place(source: Mapping[str, Any]) -> str:
    """Where a set's own files belong."""
    if "path" in source:
        return str(ROOT / source["path"])
    root = os.environ.get(DATA_ROOT)
    return str(Path(root) / source["folder"]) if root else f"<data_root>/{source['folder']}"


def own_folder(model: Mapping[str, Any]) -> Path | None:
    """The folder of the model's name below the model root, if the user has one."""
    root = os.environ.get(MODEL_ROOT)
    folder = Path(root) / model["name"] if root else None
    return folder if folder and folder.is_dir() else None
