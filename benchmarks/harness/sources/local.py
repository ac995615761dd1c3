"""Find the user's folders: sets below the data root, models below the model root."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.harness.base import DATA_ROOT, MODEL_ROOT, ROOT

USER_SUFFIXES = (
    ".json",
    ".jsonl",
)  # file name endings of the user's instruction sets below the data root


def local_path(name: str, source: Mapping[str, Any]) -> Path | None:
    """Return the path of a set's csv or folder; None if missing.

    The folder is below the data root, with the name in ``source`` or the name of the set.
    """
    root = os.environ.get(DATA_ROOT)
    if "csv" in source:
        return ROOT / source["csv"] if (ROOT / source["csv"]).is_file() else None
    if not root or not {"folder", "mnist"} & set(source):
        return None
    folders = [Path(root) / called for called in (source.get("folder", "MNIST/raw"), name)]
    return next((folder for folder in folders if folder.is_dir()), None)


def user_file(name: str) -> Path | None:
    """Return the user's file of a set of instructions; None if missing."""
    root = os.environ.get(DATA_ROOT)
    files = [Path(root) / f"{name}{suffix}" for suffix in USER_SUFFIXES] if root else []
    return next((file for file in files if file.is_file()), None)


def expected_path(source: Mapping[str, Any]) -> str:
    """Return the path where a set's files belong."""
    if "csv" in source:
        return str(ROOT / source["csv"])
    root = os.environ.get(DATA_ROOT)
    return str(Path(root) / source["folder"]) if root else f"<data_root>/{source['folder']}"


def user_model_folder(name: str) -> Path | None:
    """Return the folder of a model's name below the model root; None if missing."""
    root = os.environ.get(MODEL_ROOT)
    folder = Path(root) / name if root else None
    return folder if folder and folder.is_dir() else None
