"""Read a text set's rows: from the hub, or from a local folder in any common format or the set's own."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.harness.hub import commit_of, named
from benchmarks.harness.packages import DataError
from benchmarks.harness.paths import DATA_ROOT
from emoe.errors import did_you_mean

OWN_SUFFIXES = (".json", ".jsonl")  # of a set of instructions below the data root


@dataclass(frozen=True)
class FileRows:
    """Rows under the task's column names.

    Attributes:
        frame: the rows; other columns may stand beside the task's.
        where: file, or hub id and split.
        label_names: what these files call the labels, where they have names of their own.
    """

    frame: pd.DataFrame
    where: str
    label_names: Mapping[str, str] = field(default_factory=dict)


Rows = list[FileRows]


def read_rows(task: Mapping[str, Any], split: str) -> Rows:
    """The rows of a split, from the user's folder where there is one, else from the hub.

    Args:
        task: a task's spec.
        split: its name; ``a+b`` is both.

    Raises:
        DataError: the set, a file or a split is missing, or a file is damaged.
    """
    folder = local_folder(task)
    if folder is None:
        return [_read_hub(task, split)]
    if (folder / "state.json").exists():  # one saved set without splits is the whole
        if task["splits"]["train"] is not None:
            raise DataError(
                f"{folder} is one saved set without splits, but '{task['name']}' is trained on one split and scored on another: "
                "save a DatasetDict with its splits"
            )
        return [FileRows(_saved(folder), str(folder))]
    return [found for part in split.split("+") for found in _read_split(folder, task, part)]


def local_folder(task: Mapping[str, Any]) -> Path | None:
    """The set's folder below the data root, if the user has one: under its makers' name, or the task's."""
    root = os.environ.get(DATA_ROOT)
    source = task["source"]
    if not root or not {"folder", "mnist"} & set(source):
        return None
    folders = [Path(root) / name for name in (source.get("folder", "MNIST/raw"), task["name"])]
    return next((folder for folder in folders if folder.is_dir()), None)


def own_file(name: str) -> Path | None:
    """The user's one file of a set of instructions, if there is one."""
    root = os.environ.get(DATA_ROOT)
    files = [Path(root) / f"{name}{suffix}" for suffix in OWN_SUFFIXES] if root else []
    return next((file for file in files if file.is_file()), None)


def wanted_place(source: Mapping[str, Any]) -> str:
    """Where a set's own files belong."""
    root = os.environ.get(DATA_ROOT)
    return str(Path(root) / source["folder"]) if root else f"<data_root>/{source['folder']}"


def _read_hub(task: Mapping[str, Any], split: str) -> FileRows:
    import datasets

    source = task["source"]
    place = wanted_place(source)
    if "hub" not in source:
        raise DataError(
            f"the set '{task['name']}' is not on the hub and not in {place}; `python -m benchmarks data --check` says how to get it"
        )
    try:
        loaded = datasets.load_dataset(source["hub"], source["config"], split=split, revision=source["revision"])
    except Exception as error:  # the hub raises many kinds; all mean the same to the user
        raise DataError(
            f"could not load '{source['hub']}' ({source['config']}) from the hub: {type(error).__name__}: {error}\n"
            f"Without the hub, put the set's own files into {place}"
        ) from error
    place = named(source["hub"], source["revision"], commit_of(loaded))
    return FileRows(_frame(loaded), f"{place} ({source['config']}), split {split}")


def _frame(loaded: Any) -> pd.DataFrame:
    frame = loaded.to_pandas()
    assert isinstance(frame, pd.DataFrame)  # noqa: S101
    return frame


def _saved(folder: Path, split: str | None = None) -> pd.DataFrame:
    """A set written by ``datasets``' ``save_to_disk``, or one split of it."""
    import datasets

    try:
        loaded = datasets.load_from_disk(str(folder))
    except (ValueError, OSError) as error:
        raise DataError(f"{folder} cannot be read: {error}") from error
    if split is None:
        return _frame(loaded)
    if split not in loaded:
        raise DataError(f"{folder} has no split '{split}'{did_you_mean(split, loaded)}")
    return _frame(loaded[split])


_HUB_READERS: dict[str, Callable[[Path], pd.DataFrame]] = {
    "parquet": pd.read_parquet,
    "jsonl": lambda path: pd.read_json(path, lines=True),
    "csv": lambda path: pd.read_csv(path, keep_default_na=False),
}


def _read_split(folder: Path, task: Mapping[str, Any], split: str) -> Rows:
    """Read one split: saved ``datasets``, parquet, JSON lines or CSV under the hub's names, or the set's own files."""
    if (folder / "dataset_dict.json").exists():
        return [FileRows(_saved(folder, split), f"{folder} [{split}]")]
    layouts = [layout for layout in task.get("own", ()) if split in layout["files"]]
    config = task["source"].get("config")
    for place in [folder, *([folder / config, folder / "data"] if config else [])]:
        for suffix, read in _HUB_READERS.items():
            forms = (f"{split}.{suffix}", f"{split}-*.{suffix}", f"{split}/*.{suffix}")
            files = sorted({file for form in forms for file in place.glob(form)})
            # a set's own CSV may have such a name too, but has no header
            if files and not (suffix == "csv" and layouts and not _has_columns(files[0], task)):
                return [FileRows(_guarded(read, file), str(file)) for file in files]
    for layout in layouts:
        file = folder / layout["files"][split]
        if file.exists():
            return [FileRows(_read_own(file, layout, split), str(file), layout["label_names"])]
    wanted = [*(f"{split}.{suffix}" for suffix in _HUB_READERS), *(layout["files"][split] for layout in layouts)]
    present = sorted(path.name for path in folder.iterdir())
    raise DataError(
        f"{folder} has no file for the split '{split}': wanted one of {', '.join(wanted)}; it holds {', '.join(present) or 'nothing'}"
    )


def _has_columns(file: Path, task: Mapping[str, Any]) -> bool:
    columns = _guarded(lambda path: pd.read_csv(path, nrows=0), file).columns
    return {*task["fields"], task["label"]} <= {task["also_named"].get(name, name) for name in columns}


def _guarded(read: Callable[[Path], pd.DataFrame], file: Path) -> pd.DataFrame:
    try:
        return read(file)
    except (ValueError, OSError) as error:  # what pandas and pyarrow raise on damaged files
        raise DataError(f"{file} cannot be read: {error}") from error


def _read_own(file: Path, layout: Mapping[str, Any], split: str) -> pd.DataFrame:
    """A set's own file, every value text; columns are renamed to the task's names."""
    if layout["format"] == "folders":
        return _guarded(lambda folder: _read_folders(folder, layout), file)
    frame = _guarded(lambda path: _table(path, layout), file).fillna("")  # rows that end early
    where, columns = layout.get("where"), layout["columns"]
    for name, column in [*columns.items(), *([("where", where["column"])] if where else [])]:
        if column not in frame.columns:
            raise DataError(f"{file} has no column '{column}' for '{name}'{did_you_mean(column, frame.columns)}")
    if where:
        frame = frame[frame[where["column"]] == where["values"][split]]
    return frame.rename(columns={column: name for name, column in columns.items()})[list(columns)].reset_index(
        drop=True
    )


def _table(file: Path, layout: Mapping[str, Any]) -> pd.DataFrame:
    if layout["format"] == "jsonl":
        return pd.read_json(file, lines=True, dtype=False, convert_dates=False)
    quoted = layout["format"] == "csv"
    return pd.read_csv(
        file,
        sep="," if quoted else "\t",
        header=0 if layout["header"] else None,
        quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE,
        dtype=str,
        keep_default_na=False,
        encoding="utf-8",
        encoding_errors=layout["encoding_errors"],
        usecols=None if layout["header"] else list(layout["columns"].values()),
    )


def _read_folders(folder: Path, layout: Mapping[str, Any]) -> pd.DataFrame:
    """One text file a row, below a folder of its label's name."""
    (field,) = layout["columns"]
    rows = []
    for label in layout["label_names"]:
        files = sorted((folder / label).glob("*.txt"))
        if not files:
            raise DataError(f"{folder / label} holds no .txt file")
        rows += [{field: path.read_text(encoding="utf-8"), "label": label} for path in files]
    return pd.DataFrame(rows)
