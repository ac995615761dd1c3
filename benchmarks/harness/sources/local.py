"""Find the user's folders: data sets below the data root, models below the model root."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.harness.base import DATA_ROOT, MODEL_ROOT, ROOT

# endings of the file names of the user's instruction sets below the data root
USER_SUFFIXES = (".json", ".jsonl")


def local_path(name: str, source: Mapping[str, Any]) -> Path | None:
    """Return the path of a data set's csv or folder; None if missing.

    A csv is in the checkout. A folder is below the data root, and has the name in ``source`` or the
    name of the data set.
    """
    if "csv" in source:
        file = ROOT / source["csv"]
        return file if file.is_file() else None
    root = os.environ.get(DATA_ROOT)
    if not root:
        return None
    if "folder" in source:
        usual_name = source["folder"]
    elif "mnist" in source:
        usual_name = "MNIST/raw"  # as torchvision names it
    else:  # comes from the hub or a package
        return None
    # the user may also have named the folder after the data set
    for folder_name in (usual_name, name):
        folder = Path(root) / folder_name
        if folder.is_dir():
            return folder
    return None


def user_file(name: str) -> Path | None:
    """Return the file of instructions that the user put below the data root; None if missing.

    ``name`` is the name of the set.
    """
    root = os.environ.get(DATA_ROOT)
    if not root:
        return None
    for suffix in USER_SUFFIXES:
        file = Path(root) / f"{name}{suffix}"
        if file.is_file():
            return file
    return None


def expected_path(source: Mapping[str, Any]) -> str:
    """Return the path where the csv or folder of a data set belongs, for messages."""
    if "csv" in source:
        return str(ROOT / source["csv"])
    folder = source["folder"]
    root = os.environ.get(DATA_ROOT)
    if not root:
        return f"<data_root>/{folder}"
    return str(Path(root) / folder)


def user_model_folder(name: str) -> Path | None:
    """Return the folder below the model root with the name of a model; None if missing."""
    root = os.environ.get(MODEL_ROOT)
    if not root:
        return None
    folder = Path(root) / name
    return folder if folder.is_dir() else None
