"""Text classification sets: from the hub, a local folder in any common format, or a package."""

from __future__ import annotations

import csv
import hashlib
import math
import os
import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.harness.packages import DataError
from benchmarks.harness.paths import DATA_ROOT
from benchmarks.harness.rated import PACKAGE, VERSION, load_rated
from benchmarks.harness.seeds import derive_seed
from emoe.errors import did_you_mean


@dataclass(frozen=True)
class TextSplit:
    """Rows of one split.

    Attributes:
        texts: one tuple a row, of one text or of a pair.
        labels: class numbers, or numbers for a regression.
        dropped: rows without a gold label, left out.
        source: where they came from.
    """

    texts: list[tuple[str, ...]]
    labels: list[int] | list[float]
    dropped: int = 0
    source: str = ""

    def __len__(self) -> int:
        return len(self.texts)

    def head(self, rows: int | None, seed_name: str) -> TextSplit:
        """``rows`` rows drawn once and for all (not by the run's seed); all of them for None."""
        if rows is None or rows >= len(self):
            return self
        chosen = sorted(random.Random(derive_seed("rows", seed_name)).sample(range(len(self)), rows))
        return replace(self, texts=[self.texts[i] for i in chosen], labels=[self.labels[i] for i in chosen])

    def summary(self) -> dict[str, Any]:
        """Source, a digest of the rows, their number, dropped rows, and rows by class (or a regression's range)."""
        digest = hashlib.sha256(repr((self.texts, self.labels)).encode()).hexdigest()[:16]
        found: dict[str, Any] = {"source": self.source, "digest": digest, "rows": len(self), "dropped": self.dropped}
        if all(isinstance(label, int) for label in self.labels):
            found["labels"] = {str(label): count for label, count in sorted(Counter(self.labels).items())}
        else:
            found["range"] = [min(self.labels), max(self.labels)]
        return found


def load_split(task: Mapping[str, Any], part: str) -> TextSplit:
    """Load the ``train``, ``dev`` or ``test`` part of a task.

    A folder of the set's name below the data root (environment variable ``EMOE_DATA_ROOT``) is used
    when there is one, else the hub.

    Raises:
        DataError: the set, a column or a split is missing, or a label is not one of the task's.
    """
    split = task["splits"][part]
    if split is None:
        raise DataError(f"task '{task['name']}' has no {part} split")
    source = task["source"]
    if "rated" in source:
        texts, labels, dropped = load_rated(source["rated"], split)
        return TextSplit(
            [(text,) for text in texts], labels, dropped, f"{PACKAGE} {VERSION}, {source['rated']}, {split}"
        )
    folder = local_folder(source)
    if folder is not None:
        rows, where = _read_folder(folder, task, split)
    else:
        rows, where = _read_hub(source, split), f"{source['hub']} ({source.get('config')}), split {split}"
    return _to_split(rows, task, where)


def local_folder(source: Mapping[str, Any]) -> Path | None:
    """The set's folder below the data root, if the user has one."""
    root = os.environ.get(DATA_ROOT)
    if not root or "folder" not in source:
        return None
    folder = Path(root) / source["folder"]
    return folder if folder.is_dir() else None


def _read_hub(source: Mapping[str, Any], split: str) -> pd.DataFrame:
    import datasets

    try:
        loaded = datasets.load_dataset(
            source["hub"], source.get("config"), split=split, revision=source.get("revision")
        )
    except Exception as error:  # the hub raises many kinds; all mean the same to the user
        root = os.environ.get(DATA_ROOT)
        place = (
            Path(root) / source["folder"] if root else f"<data_root>/{source['folder']} and set data_root in config/"
        )
        raise DataError(
            f"could not load '{source['hub']}' ({source.get('config')}) from the hub: {type(error).__name__}: {error}\n"
            f"Without the hub, put the set's own files into {place}"
        ) from error
    return _frame(loaded)


def _frame(loaded: Any) -> pd.DataFrame:
    frame = loaded.to_pandas()
    assert isinstance(frame, pd.DataFrame)  # noqa: S101
    return frame


def _read_folder(folder: Path, task: Mapping[str, Any], split: str) -> tuple[pd.DataFrame, str]:
    """Read a split from a local folder: saved `datasets`, parquet, JSON lines, CSV, or the set's own TSV."""
    if (folder / "dataset_dict.json").exists():
        import datasets

        loaded = datasets.load_from_disk(str(folder))
        if split not in loaded:
            raise DataError(f"{folder} has no split '{split}'{did_you_mean(split, loaded)}")
        return _frame(loaded[split]), f"{folder} [{split}]"
    config = task["source"].get("config")
    readers: dict[str, Callable[[Path], pd.DataFrame]] = {
        "parquet": pd.read_parquet,
        "jsonl": lambda path: pd.read_json(path, lines=True),
        "csv": lambda path: pd.read_csv(path, keep_default_na=False),
    }
    for place in [folder, *([folder / config, folder / "data"] if config else [])]:
        for suffix, read in readers.items():
            files = sorted({*place.glob(f"{split}.{suffix}"), *place.glob(f"{split}-*.{suffix}")})
            if files:
                return pd.concat([_guarded(read, file) for file in files], ignore_index=True), str(files[0])
    layout = task.get("tsv")
    if layout and split in layout["files"]:
        file = folder / layout["files"][split]
        if file.exists():
            return _read_tsv(file, layout), str(file)
    wanted = [
        f"{split}.parquet",
        f"{split}.jsonl",
        f"{split}.csv",
        *([layout["files"].get(split, "")] if layout else []),
    ]
    present = sorted(path.name for path in folder.iterdir())
    raise DataError(
        f"{folder} has no file for the split '{split}': wanted one of {', '.join(filter(None, wanted))}; it holds {', '.join(present) or 'nothing'}"
    )


def _guarded(read: Callable[[Path], pd.DataFrame], file: Path) -> pd.DataFrame:
    try:
        return read(file)
    except (ValueError, OSError) as error:  # what pandas and pyarrow raise on damaged files
        raise DataError(f"{file} cannot be read: {error}") from error


def _read_tsv(file: Path, layout: Mapping[str, Any]) -> pd.DataFrame:
    """A set's own TSV: no quoting, every value text. Columns are renamed to the task's names."""
    header = layout["header"]

    def read(path: Path) -> pd.DataFrame:
        return pd.read_csv(
            path,
            sep="\t",
            header=0 if header else None,
            quoting=csv.QUOTE_NONE,
            dtype=str,
            keep_default_na=False,
            encoding="utf-8",
            usecols=list(layout["columns"].values()) if not header else None,
        )

    frame = _guarded(read, file).fillna("")  # rows that end early
    for name, column in layout["columns"].items():
        if column not in frame.columns:
            raise DataError(f"{file} has no column '{column}' for '{name}'{did_you_mean(column, frame.columns)}")
    return frame.rename(columns={column: name for name, column in layout["columns"].items()})[list(layout["columns"])]


def _to_split(rows: pd.DataFrame, task: Mapping[str, Any], where: str) -> TextSplit:
    for column in (*task["fields"], task["label"]):
        if column not in rows.columns:
            raise DataError(f"{where} has no column '{column}'{did_you_mean(column, rows.columns)}")
    raw = rows[task["label"]].tolist()
    unlabelled = set(task["unlabelled"])
    keep = [i for i, value in enumerate(raw) if value not in unlabelled]
    convert = _class_number if task["labels"] else _number
    labels = [convert(raw[i], task, where, i) for i in keep]
    columns = [rows[field].tolist() for field in task["fields"]]
    return TextSplit([tuple(str(column[i]) for column in columns) for i in keep], labels, len(raw) - len(keep), where)


def _class_number(value: object, task: Mapping[str, Any], where: str, row: int) -> int:
    names: Sequence[str] = task["labels"]
    text = str(value).strip()
    text = task["label_names"].get(text, text)
    if text in names:
        return names.index(text)
    if text.isdigit() and int(text) < len(names):
        return int(text)
    raise _wrong_label(value, [*names, *map(str, range(len(names)))], task, where, row)


def _number(value: Any, task: Mapping[str, Any], where: str, row: int) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise _wrong_label(value, ["a finite number"], task, where, row)
    return number


def _wrong_label(value: object, options: Iterable[str], task: Mapping[str, Any], where: str, row: int) -> DataError:
    return DataError(
        f"{where}, row {row + 1}: '{value}' is no label of task '{task['name']}'{did_you_mean(value, options)}"
    )
