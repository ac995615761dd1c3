"""Find the user's folders: data sets below the data root, models below the model root."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.harness.base import DATA_ROOT, MODEL_ROOT, ROOT

# endings of the file names of the user's instruction sets below the data root
USER_SUFFIXES = (".json", ".jsonl")
# the folder and the files of MNIST below the data root, as torchvision names them
_MNIST_FOLDER = "MNIST/raw"
_MNIST_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


def local_path(name: str, source: Mapping[str, Any]) -> Path | None:
    """Return the path of a data set's csv or folder; None if missing.

    A csv is in the checkout. A folder is below the data root, and has the name in ``source`` or the
    name of the data set. MNIST's folder has a fixed name, and must contain all of its files.
    """
    if "csv" in source:
        file = ROOT / source["csv"]
        return file if file.is_file() else None
    root = os.environ.get(DATA_ROOT)
    if not root:
        return None
    if source.get("mnist"):
        return _mnist_folder(Path(root))
    if "folder" not in source:  # comes from the hub or a package
        return None
    # the user may also have named the folder after the data set
    for folder_name in (source["folder"], name):
        folder = Path(root) / folder_name
        if folder.is_dir():
            return folder
    return None


def _mnist_folder(root: Path) -> Path | None:
    """Return MNIST's folder below the data root; None if one of its files is missing."""
    folder = root / _MNIST_FOLDER
    for file_name in _MNIST_FILES:
        if not (folder / file_name).is_file():
            return None
    return folder


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
    folder = _MNIST_FOLDER if source.get("mnist") else source["folder"]
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
