"""Load text classification sets: from a user's folder or csv, from a package, or from the hub."""

from __future__ import annotations

import glob
import hashlib
import math
import random
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
from datasets.info import DatasetInfosDict
from numpy.typing import NDArray

from benchmarks.harness.base import ROOT, DataError, derive_seed, first_line
from benchmarks.harness.config.sets import SetPart
from benchmarks.harness.sources.hub import commit_of, hub_name
from benchmarks.harness.sources.local import expected_path, local_path
from benchmarks.harness.sources.packages import find_package
from benchmarks.harness.sources.vader import PACKAGE, load_vader
from benchmarks.text.definition import RunTask, Splits, TaskEntry
from emoe.errors import did_you_mean

_BUILDERS = {
    "parquet": "parquet",
    "arrow": "arrow",
    "jsonl": "json",
    "json": "json",
    "csv": "csv",
}  # in this order
_DEV_SHARE, _TEST_SHARE = 0.15, 0.15  # of a csv without a column `split`

_NO_LABEL = {"", "-1", "nan", "none", "null"}  # missing labels, unless the task has such a class
_WHOLE = re.compile(r"^(-?\d+)\.0*$")


@dataclass(frozen=True)
class TextSplit:
    """Hold the rows of one split.

    Attributes:
        texts: One tuple per row, with one text or a pair.
        labels: The class numbers, or the scores of a regression.
        dropped: The number of omitted rows, which lack a gold label or a text.
        source: The file, package or hub id.
    """

    texts: list[tuple[str, ...]]
    labels: list[int] | list[float]
    dropped: int = 0
    source: str = ""

    def __len__(self) -> int:
        return len(self.texts)

    def sample(self, rows: int | None, seed_name: str) -> TextSplit:
        """Draw ``rows`` rows, the same for every run; None keeps all rows."""
        if rows is None or rows >= len(self):
            return self
        return self._rows(
            sorted(random.Random(derive_seed("rows", seed_name)).sample(range(len(self)), rows))
        )

    def hold_out(self, share: float, seed_name: str) -> tuple[TextSplit, TextSplit]:
        """Hold out a share of the rows, the same for every run; return the other rows and the held-out ones."""
        count = round(len(self) * share)
        if not 0 < count < len(self):
            raise DataError(
                f"{self.source}: a share of {share:g} of {len(self)} rows cannot be held out"
            )
        chosen = set(
            random.Random(derive_seed("held out", seed_name)).sample(range(len(self)), count)
        )
        return self._rows([i for i in range(len(self)) if i not in chosen]), self._rows(
            sorted(chosen)
        )

    def stratified_sample(self, share: float, seed_name: str) -> TextSplit:
        """Draw a share of the rows of every class (for a regression: rounded score), the same for every run.

        Every class keeps at least one row. A smaller share is a subset of a larger one.
        """
        by_class: dict[int, list[int]] = {}
        for row, label in enumerate(self.labels):
            by_class.setdefault(round(label), []).append(row)
        chosen: list[int] = []
        for label, rows in sorted(by_class.items()):
            random.Random(derive_seed("part", seed_name, label)).shuffle(rows)
            chosen += rows[: max(1, round(share * len(rows)))]
        return self._rows(sorted(chosen))

    def _rows(self, chosen: Sequence[int]) -> TextSplit:
        return replace(
            self, texts=[self.texts[i] for i in chosen], labels=[self.labels[i] for i in chosen]
        )

    @property
    def has_classes(self) -> bool:
        """Return True if labels are class numbers, not regression scores."""
        return all(isinstance(label, int) for label in self.labels)

    @property
    def class_numbers(self) -> NDArray[np.int64]:
        """Return the class of each row, ``[rows]``; all -1 for a regression."""
        return np.asarray(self.labels if self.has_classes else [-1] * len(self), dtype=np.int64)

    def summary(self) -> dict[str, Any]:
        """Return source, digest and row counts, in total and by class (for a regression: the range of scores)."""
        digest = hashlib.sha256()
        for row in zip(self.texts, self.labels, strict=True):
            digest.update(repr(row).encode())
        summary: dict[str, Any] = {
            "source": self.source,
            "digest": digest.hexdigest()[:16],
            "rows": len(self),
        }
        summary["dropped"] = self.dropped
        if self.has_classes:
            summary["labels"] = {
                str(label): count for label, count in sorted(Counter(self.labels).items())
            }
        else:
            summary["range"] = [min(self.labels), max(self.labels)]
        return summary


def resolve_part(splits: Splits, part: str) -> str:
    """Return the part to read: ``dev`` instead of ``test`` if the task has no test split."""
    return "dev" if part == "test" and splits.test is None else part


def describe_rows(name: str, part: str, split: TextSplit, entry: TaskEntry) -> SetPart:
    """Describe the rows of a task's part, with the row counts of its makers and the paper's authors."""
    counts, labels = Counter(split.labels), f"{min(split.labels):g} to {max(split.labels):g}"
    if split.has_classes:
        labels = ", ".join(
            f"{label} {counts[number]:,}" for number, label in enumerate(entry.labels)
        )
    return SetPart(
        name,
        part,
        rows=len(split),
        dropped=split.dropped,
        expected=entry.rows.get(part),
        labels=labels,
        source=split.source,
        published=entry.published_rows if part == "test" else None,
    )


def load_part(
    task: RunTask,
    part: str,
    rows: int | None,
    entries: Mapping[str, TaskEntry] | None = None,
    say: Callable[[str], None] | None = None,
) -> TextSplit:
    """Load the ``train``, ``dev`` or ``test`` part of a task, and sample ``rows`` rows; None keeps all.

    Args:
        task: The task.
        part: The part.
        rows: The number of rows.
        entries: The tasks of ``tasks.yaml``, with their row counts.
        say: The function that prints a warning if the set has an unexpected row count.
    """
    part = resolve_part(task.splits, part)
    split = load_split(task, part)
    entry = (entries or {}).get(task.name)
    if say and entry and (note := describe_rows(task.name, part, split, entry).note):
        say(f"warning: {note}")
    return split.sample(rows, f"{task.name}/{part}")


def load_split(task: RunTask, part: str) -> TextSplit:
    """Load the ``train``, ``dev`` or ``test`` part of a task.

    The set's folder below the data root (``EMOE_DATA_ROOT``) has precedence over the hub.

    Raises:
        DataError: The set, a column or a split is missing, or a label is not one of the task's.
    """
    split: str | None = getattr(task.splits, part)
    if split is None:
        raise DataError(f"task '{task.name}' has no {part} split")
    source = task.source
    if source.vader_sentiment:
        strength = source.vader_label == "strength"
        texts, labels, dropped = load_vader(source.vader_sentiment, split, strength=strength)
        name = ", ".join(filter(None, (source.vader_sentiment, source.vader_label, split)))
        return TextSplit(
            [(text,) for text in texts],
            labels,
            dropped,
            f"{PACKAGE} {find_package(PACKAGE).version}, {name}",
        )
    tables = _read_tables(task, split)
    rows = [row for table in tables for row in _complete_rows(table, task)]
    name, total = (
        ", ".join(table.source for table in tables),
        sum(len(table.cells) for table in tables),
    )
    if not rows:
        raise DataError(f"{name} has no row with text and label ({total} without)")
    return TextSplit(
        [texts for texts, _ in rows], [label for _, label in rows], total - len(rows), name
    )


@dataclass(frozen=True)
class _Table:
    """Hold the rows of one file, or of one split on the hub.

    Attributes:
        source: The file, or the hub id and split.
        cells: The cells, with the file's column names.
        class_names: The names of the classes in the order of the file's numbers, if they are stored.
    """

    source: str
    cells: pd.DataFrame
    class_names: Sequence[str] | None = None

    def column(self, name: str, task: RunTask) -> str:
        """Return the name of a task's column in this table: ``name`` or its first alias."""
        aliases = [alias for alias, column in task.column_aliases.items() if column == name]
        for column in (name, *aliases):
            if column in self.cells:
                return column
        raise DataError(f"{self.source} has no column '{name}'{did_you_mean(name, self.cells)}")


def _read_tables(task: RunTask, split: str) -> list[_Table]:
    """Read a split from the user's folder, else from the hub; ``a+b`` names two splits."""
    if task.source.csv:
        return [_csv_split(ROOT / task.source.csv, task, split)]
    folder, splits = local_path(task.name, task.source.model_dump()), split.split("+")
    if folder is None:
        return [_read_hub(task, name) for name in splits]
    if (folder / "state.json").exists() or (folder / "dataset_dict.json").exists():
        return _read_saved(folder, task, splits)
    return [table for name in splits for table in _read_folder(folder, task, name)]


def _read_hub(task: RunTask, split: str) -> _Table:
    source = task.source
    folder = expected_path(source.model_dump())
    if source.hub is None:
        raise DataError(
            f"{folder} is missing; `python -m benchmarks data --check` says how to get '{task.name}'"
        )
    try:
        dataset = datasets.load_dataset(
            source.hub, source.config, split=split, revision=source.revision
        )
    except Exception as error:  # the hub raises many types
        raise DataError(
            f"could not load '{source.hub}' ({source.config}) from the hub: {type(error).__name__}: {error}\n"
            f"Without the hub, put its files into {folder} (config/README.md)"
        ) from error
    name = hub_name(source.hub, source.revision, commit_of(dataset))
    return _to_table(dataset, f"{name} ({source.config}), split {split}", task)


def _read_saved(folder: Path, task: RunTask, splits: Sequence[str]) -> list[_Table]:
    """Read the splits of a set from ``datasets``' ``save_to_disk``, or a whole set without splits."""
    with _name_file_in_errors(folder):
        saved: Any = datasets.load_from_disk(str(folder))
        if isinstance(saved, datasets.DatasetDict):
            return [_to_table(saved[split], f"{folder} [{split}]", task) for split in splits]
        if task.splits.train is not None:
            raise DataError(
                f"{folder} has no splits, but '{task.name}' needs several: save a DatasetDict"
            )
        return [_to_table(saved, str(folder), task)]


def _read_folder(folder: Path, task: RunTask, split: str) -> list[_Table]:
    """Read a split from files with the hub's names, in the first available format."""
    folders = (
        [folder, folder / task.source.config, folder / "data"] if task.source.config else [folder]
    )
    for subfolder in folders:
        for suffix in _BUILDERS:
            for name in (
                split,
                f"{split}-*-of-*",
                f"{split}/[0-9]*",
            ):  # the last is the hub's conversion to Parquet
                if files := sorted(subfolder.glob(f"{name}.{suffix}")):
                    if "*-of-" in name and not files[0].stem.endswith(f"-of-{len(files):05}"):
                        raise DataError(f"{subfolder} lacks a piece of the split '{split}'")
                    return [_read_file(file, folders, task) for file in files]
    wanted = ", ".join(f"{split}.{suffix}" for suffix in _BUILDERS)
    convert = (
        "; `python tools/convert_glue_x.py` converts its makers' files" if task.raw_formats else ""
    )
    raise DataError(
        f"{folder} has no file for the split '{split}': wanted one of {wanted}{convert}"
    )


def _read_file(file: Path, folders: Sequence[Path], task: RunTask) -> _Table:
    """Read a file. If it has no class names, take them from README.md or ``dataset_infos.json`` in the folders."""
    with _name_file_in_errors(file):
        if file.suffix == ".csv":
            table = _Table(str(file), read_csv(file))
        else:
            builder, files = _BUILDERS[file.suffix.removeprefix(".")], glob.escape(str(file))
            dataset = datasets.load_dataset(
                builder, data_files=files, split="train", streaming=True
            )  # without a cache
            table = _to_table(dataset, str(file), task)
        for folder in folders if table.class_names is None else ():
            infos = DatasetInfosDict.from_directory(str(folder))
            info = infos.get(task.source.config) or infos.get("default")
            feature = (
                info.features.get(table.column(task.label, task))
                if info and info.features
                else None
            )
            if isinstance(feature, datasets.ClassLabel):
                return replace(table, class_names=feature.names)
        return table


def read_csv(file: Path) -> pd.DataFrame:
    """Read a csv as text cells; short rows lack their last cells.

    Raises:
        DataError: The file cannot be read.
    """
    with _name_file_in_errors(file), warnings.catch_warnings():
        warnings.simplefilter(
            "error", pd.errors.ParserWarning
        )  # the first row has more cells than the header
        return pd.read_csv(
            file, dtype=str, na_filter=False, index_col=False, engine="python", encoding="utf-8-sig"
        )


def _csv_split(file: Path, task: RunTask, split: str) -> _Table:
    """Read the rows of a split from one csv, by its column ``split`` or else by a hash of the text."""
    table = _Table(str(file), read_csv(file))
    cells = table.cells
    splits = (
        cells["split"]
        if "split" in cells
        else cells[table.column(task.fields[0], task)].map(_split_by_hash)
    )
    if split not in set(splits):
        raise DataError(
            f"{file} has no row of the split '{split}'{did_you_mean(split, splits.unique())}"
        )
    return replace(table, cells=cells[splits == split])


def _split_by_hash(text: str) -> str:
    """Choose the split of a text by its hash, independently of other rows."""
    fraction = int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48
    return (
        "dev"
        if fraction < _DEV_SHARE
        else "test"
        if fraction < _DEV_SHARE + _TEST_SHARE
        else "train"
    )


def _to_table(dataset: Any, source: str, task: RunTask) -> _Table:
    """Convert a set of ``datasets`` to a table, with its class names if it has them."""
    batches = list(dataset.with_format("arrow").iter(batch_size=10_000))
    cells = pa.concat_tables(batches, promote_options="default").to_pydict()
    table = _Table(source, pd.DataFrame(cells, dtype=object))
    feature = (dataset.features or {}).get(table.column(task.label, task))
    return (
        replace(table, class_names=feature.names)
        if isinstance(feature, datasets.ClassLabel)
        else table
    )


@contextmanager
def _name_file_in_errors(path: Path) -> Iterator[None]:
    """Convert errors of libraries on a damaged file to a one-line :class:`DataError` with its name."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # libraries raise many types
        raise DataError(f"{path} cannot be read: {first_line(error)}") from error


def _complete_rows(table: _Table, task: RunTask) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield the texts and the label of each row of a table that has all texts and a gold label."""
    names = {str(number): name for number, name in enumerate(table.class_names or ())}
    missing = {label_text(value) for value in task.unlabelled}
    classes = _class_numbers(table, task)
    low, high = task.range or (-math.inf, math.inf)
    columns = table.cells[[table.column(name, task) for name in (*task.fields, task.label)]]
    for row, *cells, value in columns.itertuples(name=None):
        texts = tuple(str(cell) for cell in cells if cell is not None and cell == cell)
        written = label_text(value)
        label = label_text(names.get(written, written))
        if len(texts) < len(cells) or not "".join(texts).strip() or label in missing:
            continue
        if label in classes:
            yield texts, classes[label]
        elif not classes and low <= (score := float(pd.to_numeric(label, errors="coerce"))) <= high:
            yield texts, score
        elif label.casefold() not in _NO_LABEL:
            hint = (
                did_you_mean(label, classes)
                if classes
                else f"; it must be a number from {low:g} to {high:g}"
            )
            raise DataError(
                f"{table.source}, row {row + 1}: '{label}' is no label of task '{task.name}'{hint}"
            )


def label_text(value: object) -> str:
    """Convert a label to text, without surrounding blanks; ``1.0`` becomes ``1``."""
    return _WHOLE.sub(r"\1", "" if value is None else str(value).strip())


def _class_numbers(table: _Table, task: RunTask) -> dict[str, int]:
    """Map spellings of labels to class numbers.

    Numbers are class numbers, unless the task's class names are numbers or the file has class names.
    """
    names = task.labels
    by_number = {str(number): name for number, name in enumerate(names)}
    if any(label_text(name).lstrip("-").isdecimal() for name in (*names, *task.label_names)):
        by_number = {}
    spellings = task.label_names | {name: name for name in names}
    if table.class_names is None:
        spellings = by_number | spellings
    elif by_number and set(table.class_names) == {
        str(number) for number in range(len(table.class_names))
    }:
        spellings = by_number
    else:  # the names may come from the makers' files
        for layout in task.raw_formats or ():
            spellings = layout.label_names | spellings
    return {label_text(spelling): names.index(name) for spelling, name in spellings.items()}
