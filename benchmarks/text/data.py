"""Load text classification sets: from a user's folder or csv, from a package, or from the hub."""

from __future__ import annotations

import csv
import functools
import glob
import hashlib
import math
import random
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import yaml
from numpy.typing import NDArray

from benchmarks.harness.base import ROOT, DataError, derive_seed, first_line
from benchmarks.harness.config.sets import SetPart
from benchmarks.harness.sources.hub import commit_of, hub_name
from benchmarks.harness.sources.local import local_folder, wanted_place
from benchmarks.harness.sources.vader import PACKAGE, VERSION, load_vader
from benchmarks.text.definition import RunTask, Splits, TaskEntry
from emoe.errors import did_you_mean

BUILDERS = {"parquet": "parquet", "arrow": "arrow", "jsonl": "json", "json": "json", "csv": "csv"}  # in this order
DEV_SHARE, TEST_SHARE = 0.15, 0.15  # of a csv without a column `split`

_NO_LABEL = {"", "-1", "nan", "none", "null"}  # unless the task has a class of this name
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)  # Python also reads 1_0
_WHOLE = re.compile(r"(-?\d+)\.0*")
_LIBRARY_ERRORS = (pa.ArrowException, yaml.YAMLError, pd.errors.ParserWarning, StopIteration)
_ROWS_AT_ONCE = 10_000


@dataclass(frozen=True)
class TextSplit:
    """Rows of one split.

    Attributes:
        texts: One tuple a row, with one text or a pair.
        labels: Class numbers, or the numbers of a regression.
        dropped: The count of rows left out because they lack a gold label or a text.
        source: The file, package or hub id.
    """

    texts: list[tuple[str, ...]]
    labels: list[int] | list[float]
    dropped: int = 0
    source: str = ""

    def __len__(self) -> int:
        return len(self.texts)

    def head(self, rows: int | None, seed_name: str) -> TextSplit:
        """Draw ``rows`` rows, the same for every run; return all of them for None."""
        if rows is None or rows >= len(self):
            return self
        return self._rows(sorted(random.Random(derive_seed("rows", seed_name)).sample(range(len(self)), rows)))

    def divided(self, share: float, seed_name: str) -> tuple[TextSplit, TextSplit]:
        """Hold out a share of the rows, the same for every run; return the other rows and the share."""
        count = round(len(self) * share)
        if not 0 < count < len(self):
            raise DataError(f"{self.source}: a share of {share:g} of {len(self)} rows cannot be held out")
        chosen = set(random.Random(derive_seed("held out", seed_name)).sample(range(len(self)), count))
        return self._rows([i for i in range(len(self)) if i not in chosen]), self._rows(sorted(chosen))

    def part(self, share: float, seed_name: str) -> TextSplit:
        """Draw a share of the rows of every class (of a regression: of every whole score), the same for every run.

        Every class keeps a row at least. A smaller share is a subset of a larger one.
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
        return replace(self, texts=[self.texts[i] for i in chosen], labels=[self.labels[i] for i in chosen])

    @functools.cached_property
    def texts_digest(self) -> str:
        """Return the sha256 of the texts."""
        return _digest(self.texts)

    @property
    def has_classes(self) -> bool:
        """Return True if labels are class numbers, not the numbers of a regression."""
        return all(isinstance(label, int) for label in self.labels)

    @property
    def class_numbers(self) -> NDArray[np.int64]:
        """Return the class of each row; -1 for each row of a regression."""
        return np.asarray(self.labels if self.has_classes else [-1] * len(self), dtype=np.int64)

    def summary(self) -> dict[str, Any]:
        """Return source, digest and counts of the rows, by class (of a regression: their range)."""
        digest = _digest(zip(self.texts, self.labels, strict=True))[:16]
        summary: dict[str, Any] = {"source": self.source, "digest": digest, "rows": len(self), "dropped": self.dropped}
        if self.has_classes:
            summary["labels"] = {str(label): count for label, count in sorted(Counter(self.labels).items())}
        else:
            summary["range"] = [min(self.labels), max(self.labels)]
        return summary


def _digest(rows: Iterable[object]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(repr(row).encode())
    return digest.hexdigest()


def part_read(splits: Splits, part: str) -> str:
    """Return the part that is read for a part: without a test split, the dev split is reported."""
    return "dev" if part == "test" and splits.test is None else part


def compare_rows(name: str, part: str, split: TextSplit, entry: TaskEntry) -> SetPart:
    """Compare the rows of a part with the counts of its makers and of the paper's authors.

    Args:
        name: The name of the task.
        part: The part's name.
        split: The rows.
        entry: The task's entry in ``tasks.yaml``.
    """
    if split.has_classes:
        counts = Counter(split.labels)
        labels = ", ".join(f"{label} {counts[number]:,}" for number, label in enumerate(entry.labels))
    else:
        labels = f"{min(split.labels):g} to {max(split.labels):g}"
    return SetPart(
        name,
        part,
        len(split),
        split.dropped,
        getattr(entry.rows, part),
        labels,
        split.source,
        published=entry.published_rows if part == "test" else None,
        # an empty label is no row of the makers
        counts_dropped=any(label != "" for label in entry.unlabelled),
    )


def load_part(
    task: RunTask,
    part: str,
    rows: int | None,
    known: Mapping[str, TaskEntry] | None = None,
    say: Callable[[str], None] | None = None,
) -> TextSplit:
    """Load the ``train``, ``dev`` or ``test`` part of a task, cut to ``rows``.

    Args:
        task: The task's spec.
        part: The part's name.
        rows: The row count; None for all.
        known: The tasks of ``tasks.yaml``, with their row counts.
        say: The function that takes a warning if the row count is another one.
    """
    part = part_read(task.splits, part)
    split = load_split(task, part)
    if say and known and task.name in known and (note := compare_rows(task.name, part, split, known[task.name]).note):
        say(f"warning: {note}")
    return split.head(rows, f"{task.name}/{part}")


def load_split(task: RunTask, part: str) -> TextSplit:
    """Load the ``train``, ``dev`` or ``test`` part of a task.

    The set's folder below the data root (environment variable ``EMOE_DATA_ROOT``) comes before the hub.

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
        return TextSplit([(text,) for text in texts], labels, dropped, f"{PACKAGE} {VERSION}, {name}")
    return _checked_split(_read_tables(task, split), task)


@dataclass(frozen=True)
class Table:
    """Columns of one file, or of one split on the hub.

    Attributes:
        source: The file, or the hub id and split.
        columns: The values by the file's column names.
        class_names: The stored class names by the names of their columns.
        rows: The number of each row in the file.
    """

    source: str
    columns: Mapping[str, Sequence[Any]]
    class_names: Mapping[str, Sequence[str]]
    rows: Sequence[int]


def _read_tables(task: RunTask, split: str) -> list[Table]:
    """Read a split from the user's folder, else from the hub; ``a+b`` names two splits."""
    if task.source.csv:
        return [_csv_split(ROOT / task.source.csv, task, split)]
    folder, splits = local_folder(task.name, task.source.model_dump()), split.split("+")
    if folder is None:
        return [_read_hub(task, name) for name in splits]
    if (folder / "state.json").exists():
        if task.splits.train is not None:
            raise DataError(
                f"{folder} is one saved set without splits, but '{task.name}' is trained on one split and scored on "
                "another: save a DatasetDict with its splits"
            )
        return [_read_saved(folder, None)]
    if (folder / "dataset_dict.json").exists():
        return [_read_saved(folder, name) for name in splits]
    return [table for name in splits for table in _read_folder(folder, task, name)]


def _read_hub(task: RunTask, split: str) -> Table:
    import datasets

    source = task.source
    folder = wanted_place(source.model_dump())
    if source.hub is None:
        raise DataError(
            f"the set '{task.name}' is not on the hub and not in {folder}; "
            "`python -m benchmarks data --check` says how to get it"
        )
    try:
        dataset = datasets.load_dataset(source.hub, source.config, split=split, revision=source.revision)
    except Exception as error:  # the hub raises many kinds; all mean the same to the user
        raise DataError(
            f"could not load '{source.hub}' ({source.config}) from the hub: {type(error).__name__}: {error}\n"
            f"Without the hub, put its files into {folder} (config/README.md)"
        ) from error
    name = hub_name(source.hub, source.revision, commit_of(dataset))
    return _to_table(dataset, f"{name} ({source.config}), split {split}")


def _read_saved(folder: Path, split: str | None) -> Table:
    """Read a set that ``datasets`` saved with ``save_to_disk``, or one split of it."""
    import datasets

    with _errors_named(folder):
        dataset = datasets.load_from_disk(str(folder))
        if split is None:
            return _to_table(dataset, str(folder))
        if split not in dataset:
            raise DataError(f"{folder} has no split '{split}'{did_you_mean(split, dataset)}")
        return _to_table(dataset[split], f"{folder} [{split}]")


def _read_folder(folder: Path, task: RunTask, split: str) -> list[Table]:
    """Read a split from files under the hub's names, in the first format that is there."""
    config = task.source.config
    folders = [folder, *([folder / config, folder / "data"] if config else [])]
    for subfolder in folders:
        for suffix in BUILDERS:
            if files := _split_files(subfolder, split, suffix):
                return [_read_file(file, [*dict.fromkeys((*folders, file.parent))], task) for file in files]
    present = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
    wanted = ", ".join(f"{split}.{suffix}" for suffix in BUILDERS)
    convert = "; `python tools/convert_glue_x.py` converts its makers' files" if task.raw_formats else ""
    raise DataError(
        f"{folder} has no file for the split '{split}': wanted one of {wanted}; it holds {present}{convert}"
    )


def _split_files(folder: Path, split: str, suffix: str) -> list[Path]:
    """Find the files of a split: one file, numbered pieces, or all files in a folder of its name.

    Raises:
        DataError: The split is there in two of these forms, or a piece is missing.
    """
    piece = re.compile(rf"{re.escape(split)}-(\d+)-of-(\d+)\.{suffix}")
    files = sorted(folder.glob(f"*.{suffix}"))
    pieces = [file for file in files if piece.fullmatch(file.name)]
    inside = [file for file in sorted(folder.glob(f"{split}/*.{suffix}")) if not file.name.startswith(".")]
    forms = [form for form in ([file for file in files if file.stem == split], pieces, inside) if form]
    if len(forms) > 1:
        first, second = (form[0].relative_to(folder) for form in forms[:2])
        raise DataError(f"{folder} has the split '{split}' twice: {first} and {second}; leave one of them")
    expected = [f"{split}-{i:05}-of-{len(pieces):05}.{suffix}" for i in range(len(pieces))]
    if [file.name for file in pieces] != expected:
        raise DataError(f"{folder} lacks a piece of the split '{split}': {', '.join(file.name for file in pieces)}")
    return forms[0] if forms else []


def _read_file(file: Path, folders: Sequence[Path], task: RunTask) -> Table:
    """Read a file with the builder of its format; nothing of it is executed, cached or looked up elsewhere.

    Args:
        file: The file.
        folders: The folders of the set, which may hold the class names of its labels.
        task: The task.
    """
    import datasets

    options: dict[str, Any] = {}
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # the error below says it once
    with _errors_named(file), warnings.catch_warnings():
        warnings.simplefilter("error", pd.errors.ParserWarning)  # the first row has more cells than the header
        if file.suffix == ".csv":  # all its cells are text, and rows that end early lack their last ones
            names = _csv_header(file)
            features = datasets.Features({name: datasets.Value("string") for name in names})
            options = {"names": names, "header": 0, "index_col": False, "features": features}
            options |= {"na_filter": False, "engine": "python"}
        builder = BUILDERS[file.suffix.removeprefix(".")]
        dataset = datasets.load_dataset(
            builder, data_files=glob.escape(str(file)), split="train", streaming=True, **options
        )
        table = _to_table(dataset, str(file))
        label_columns = [name for name in table.columns if task.column_aliases.get(name, name) == task.label]
        for name in label_columns:
            table = _with_names_beside(table, name, folders, task.source.config)
    return table


def _csv_header(file: Path) -> list[str]:
    with file.open(encoding="utf-8-sig", newline="") as lines:
        names = next(csv.reader(lines), [])
    return [name or f"unnamed {number}" for number, name in enumerate(names)]


def _csv_split(file: Path, task: RunTask, split: str) -> Table:
    """Read the rows of a split from one csv: by its column ``split``, else by the hash of the text."""
    table = _read_file(file, [], task)
    if "split" in table.columns:
        splits = table.columns["split"]
    else:
        texts = _column(table, task.fields[0], task)
        splits = [_drawn_split(str(text)) for text in texts]
    rows = [row for row, name in enumerate(splits) if name == split]
    if not rows:
        raise DataError(f"{file} has no row of the split '{split}'{did_you_mean(split, dict.fromkeys(splits))}")
    columns = {name: [values[row] for row in rows] for name, values in table.columns.items()}
    return replace(table, columns=columns, rows=[row + 1 for row in rows])


def _drawn_split(text: str) -> str:
    """Draw the split of a text by its hash, so other rows never move it."""
    fraction = int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48
    return "dev" if fraction < DEV_SHARE else "test" if fraction < DEV_SHARE + TEST_SHARE else "train"


def _to_table(dataset: Any, source: str) -> Table:
    """Read all rows of a set of ``datasets``; of columns with class names, the names instead of the numbers."""
    from datasets import ClassLabel

    columns: dict[str, list[Any]] = {}
    for batch in dataset.with_format("arrow").iter(batch_size=_ROWS_AT_ONCE):
        for name in batch.column_names:
            columns.setdefault(name, []).extend(batch[name].to_pylist())
    if not columns:
        raise DataError(f"{source} is empty")
    features = dataset.features or {}
    names = {name: features[name].names for name in columns if isinstance(features.get(name), ClassLabel)}
    columns |= {name: [_class_name(value, names[name]) for value in columns[name]] for name in names}
    return Table(source, columns, names, range(1, 1 + max(map(len, columns.values()))))


def _class_name(value: object, names: Sequence[str]) -> object:
    """Return the name of a class by its number; other values (-1, a missing label) as they are."""
    text = label_text(value)
    return names[int(text)] if text.isdecimal() and int(text) < len(names) else value


def _with_names_beside(table: Table, column: str, folders: Sequence[Path], config: str | None) -> Table:
    """Replace numbers of a label column by the class names in the set's README.md or ``dataset_info(s).json``.

    Raises:
        DataError: Two files disagree, or the names are themselves numbers that the file's numbers may mean.
    """
    stored = table.class_names.get(column)
    named = [(table.source, stored)] if stored else []
    named += [pair for folder in folders for pair in _names_beside(folder, config, column)]
    for source, names in named[1:]:
        if names != named[0][1]:
            raise DataError(
                f"{source} calls the classes of '{column}' {', '.join(names)}, and {named[0][0]} "
                f"{', '.join(named[0][1])}; correct one of them"
            )
    values = table.columns[column]
    if stored or not named or not any(_NUMBER.fullmatch(label_text(value)) for value in values):
        return table
    source, names = named[0]
    misleading = any(name.isdecimal() and int(name) != number for number, name in enumerate(names))
    if misleading and any(isinstance(value, str) for value in values):
        raise DataError(
            f"{source} calls the classes of '{column}' {', '.join(names)}: a number in {table.source} may be a name "
            "or count from 0; remove the names"
        )
    columns = {**table.columns, column: [_class_name(value, names) for value in values]}
    return replace(table, columns=columns, class_names={**table.class_names, column: names})


def _names_beside(folder: Path, config: str | None, column: str) -> Iterator[tuple[str, Sequence[str]]]:
    """Yield each file in a folder that names the classes of a column, and the names."""
    from datasets import ClassLabel, DatasetInfo
    from datasets.info import DatasetInfosDict

    infos = {"README.md or dataset_infos.json": dict(DatasetInfosDict.from_directory(str(folder)))}
    if (folder / "dataset_info.json").exists():
        infos["dataset_info.json"] = {"default": DatasetInfo.from_directory(str(folder))}
    for file, by_config in infos.items():
        chosen = next((name for name in (config, "default") if name in by_config), None)
        for name, info in by_config.items():
            feature = (info.features or {}).get(column)
            if chosen in (None, name) and isinstance(feature, ClassLabel):
                yield f"{folder / file} ({name})", feature.names


@contextmanager
def _errors_named(path: Path) -> Iterator[None]:
    """Turn errors of libraries on a damaged file into one line with its name."""
    try:
        yield
    except DataError:
        raise
    except RecursionError as error:
        raise DataError(f"{path} cannot be read: it is nested too deeply") from error
    except (ValueError, OSError, KeyError, AttributeError, TypeError, *_LIBRARY_ERRORS) as error:
        raise DataError(f"{path} cannot be read: {first_line(error)}") from error


def _checked_split(tables: Sequence[Table], task: RunTask) -> TextSplit:
    """Join tables into a split, without rows that lack a gold label or a text."""
    texts: list[tuple[str, ...]] = []
    labels: list[Any] = []
    total = 0
    for table in tables:
        read_label = _label_reader(table, task)
        columns = [_column(table, name, task) for name in (*task.fields, task.label)]
        total += len(table.rows)
        for row, (*cells, value) in zip(table.rows, zip(*columns, strict=True), strict=True):
            present = tuple(str(cell) for cell in cells if cell is not None and cell == cell)
            for cell in cells:
                if cell is not None and not isinstance(cell, str | int | float):
                    raise DataError(f"{table.source}, row {row}: a cell is {type(cell).__name__}, not text")
            complete = len(present) == len(cells) and "".join(present).strip()
            label = read_label(row, value) if complete else None
            if label is not None:
                texts.append(present)
                labels.append(label)
    source = ", ".join(table.source for table in tables)
    if not texts:
        raise DataError(f"{source} has no row with text and label ({total} without)")
    return TextSplit(texts, labels, total - len(texts), source)


def _column(table: Table, name: str, task: RunTask) -> Sequence[Any]:
    """Return a column by its name or one of its aliases.

    Raises:
        DataError: The column is missing, or is there under two names.
    """
    names = [column for column in table.columns if name in (column, task.column_aliases.get(column))]
    if len(names) > 1:
        raise DataError(
            f"{table.source} has two columns for '{name}': '{names[0]}' and '{names[1]}'; leave one of them"
        )
    if not names:
        raise DataError(f"{table.source} has no column '{name}'{did_you_mean(name, table.columns)}")
    return table.columns[names[0]]


def label_text(value: object) -> str:
    """Write a label as text, without blanks around it and zeros behind a whole number."""
    text = "" if value is None else str(value).strip()
    whole = _WHOLE.fullmatch(text)
    return whole[1] if whole else text


def _label_reader(table: Table, task: RunTask) -> Callable[[int, object], int | float | None]:
    """Return a function that reads the label of a row as a number, or as None if it is missing."""
    unlabelled = {label_text(value) for value in task.unlabelled}
    classes = _classes(table, task)

    def read(row: int, value: object) -> int | float | None:
        text = label_text(value)
        if text in unlabelled:
            return None
        number = classes.get(text) if task.labels else _score(text, task)
        if number is None and text.casefold() not in _NO_LABEL:
            valid = did_you_mean(value, classes or task.labels) if task.labels else _scale(task)
            raise DataError(f"{table.source}, row {row}: '{value}' is no label of task '{task.name}'{valid}")
        return number

    return read


def _classes(table: Table, task: RunTask) -> dict[str, int]:
    """Map the spellings of the classes to their numbers.

    A number stands for the class of that number unless classes are themselves called by numbers. If the file stores
    class names, only these are spellings, and a name that is none of the task's has no class.
    """
    names = task.labels
    stored = next(
        (
            table.class_names[column]
            for column in table.class_names
            if task.column_aliases.get(column, column) == task.label
        ),
        None,
    )
    has_numbers = not any(label_text(name).lstrip("-").isdecimal() for name in (*names, *task.label_names))
    numbers = {str(number): name for number, name in enumerate(names)} if has_numbers else {}
    if stored is None:
        spellings = [numbers, task.label_names, {name: name for name in names}]
    elif has_numbers and sorted(stored) == sorted(map(str, range(len(stored)))):
        spellings = [numbers]
    else:
        makers = [layout.label_names for layout in task.raw_formats or ()]
        spellings = [*makers, task.label_names, {name: name for name in names}]
    numbers_of = {label_text(spelled): names.index(name) for pairs in spellings for spelled, name in pairs.items()}
    return {spelled: numbers_of[spelled] for spelled in map(label_text, stored or numbers_of) if spelled in numbers_of}


def _score(text: str, task: RunTask) -> float | None:
    """Read a regression's label; None if it is no number in the task's range."""
    if not _NUMBER.fullmatch(text):
        return None
    low, high = task.range or (-math.inf, math.inf)
    number = float(text)
    return number if math.isfinite(number) and low <= number <= high else None


def _scale(task: RunTask) -> str:
    return "; it must be a number" + (" from {:g} to {:g}".format(*task.range) if task.range else "")
