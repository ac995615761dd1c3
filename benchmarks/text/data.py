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
from typing import Any, NamedTuple

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

# the builder of `datasets` by file ending; a folder's first available format is read
_BUILDERS = {
    "parquet": "parquet",
    "arrow": "arrow",
    "jsonl": "json",
    "json": "json",
    "csv": "csv",
}
# values of a csv's column `split`
_CSV_SPLITS = ("train", "dev", "test")
# shares of the rows of a csv without a column `split`
_DEV_SHARE = 0.15
_TEST_SHARE = 0.15

# a row with one of these labels has no gold label, unless the task has a class of this name
_NO_LABEL = {"", "-1", "nan", "none", "null"}
# a whole number with zeros after the point, such as 1.0; the group is the part before the point
_WHOLE = re.compile(r"^(-?\d+)\.0*$")


@dataclass(frozen=True)
class TextSplit:
    """The texts and labels of one split of a data set.

    Attributes:
        texts: One tuple per row, with one or two texts.
        labels: The class numbers, or the scores of a regression.
        dropped: The number of rows that were left out, because they have no text, no gold label, or
            a near-neutral rating.
        source: The file, package or hub id.
    """

    texts: list[tuple[str, ...]]
    labels: list[int] | list[float]
    dropped: int = 0
    source: str = ""

    def __len__(self) -> int:
        return len(self.texts)

    def sample(self, num_rows: int | None, seed_name: str) -> TextSplit:
        """Sample ``num_rows`` random rows; None keeps all rows.

        ``seed_name`` seeds the random numbers, so equal names give equal rows. The rows keep their
        order.
        """
        if num_rows is None or num_rows >= len(self):
            return self
        draw = random.Random(derive_seed("rows", seed_name))
        chosen = draw.sample(range(len(self)), num_rows)
        return self._rows(sorted(chosen))

    def hold_out(self, share: float, seed_name: str) -> tuple[TextSplit, TextSplit]:
        """Hold out a share of random rows, the same in every run.

        ``seed_name`` seeds the random numbers.

        Returns:
            The kept rows, and the held-out rows.

        Raises:
            DataError: The share rounds to no row, or to all rows.
        """
        count = round(len(self) * share)
        if not 0 < count < len(self):
            raise DataError(
                f"{self.source}: a share of {share:g} of {len(self)} rows cannot be held out"
            )
        draw = random.Random(derive_seed("held out", seed_name))
        held_out = set(draw.sample(range(len(self)), count))
        kept = [row for row in range(len(self)) if row not in held_out]
        return self._rows(kept), self._rows(sorted(held_out))

    def stratified_sample(self, share: float, seed_name: str) -> TextSplit:
        """Sample a share of the rows of every class.

        A larger share contains all rows of a smaller one. Every class keeps at least one row. In a
        regression, rounded scores serve as classes. ``seed_name`` seeds the random numbers, so
        equal names give equal rows.
        """
        by_class: dict[int, list[int]] = {}
        for row, label in enumerate(self.labels):
            rows = by_class.setdefault(round(label), [])
            rows.append(row)

        chosen: list[int] = []
        for label, rows in sorted(by_class.items()):
            # Shuffle the rows, and keep the first ones. Their order does not depend on the share,
            # so a smaller share is a subset of a larger one.
            draw = random.Random(derive_seed("part", seed_name, label))
            draw.shuffle(rows)
            count = max(1, round(share * len(rows)))
            chosen += rows[:count]
        return self._rows(sorted(chosen))

    def _rows(self, chosen: Sequence[int]) -> TextSplit:
        """Return a split with only the chosen rows, in the order of ``chosen``."""
        texts = [self.texts[row] for row in chosen]
        labels = [self.labels[row] for row in chosen]
        return replace(self, texts=texts, labels=labels)

    @property
    def has_classes(self) -> bool:
        """Return True if labels are class numbers, not regression scores."""
        return all(isinstance(label, int) for label in self.labels)

    @property
    def class_numbers(self) -> NDArray[np.int64]:
        """Return the class of each row, ``[rows]``; all -1 for a regression."""
        if not self.has_classes:
            return np.full(len(self), -1, dtype=np.int64)
        return np.asarray(self.labels, dtype=np.int64)

    @property
    def digest(self) -> str:
        """Return 16 hex digits of a hash, which is equal for the same rows in the same order."""
        digest = hashlib.sha256()
        for row in zip(self.texts, self.labels, strict=True):
            digest.update(repr(row).encode())
        return digest.hexdigest()[:16]

    def summary(self) -> dict[str, Any]:
        """Describe the split for ``data`` in ``metrics.json``: source, digest, and numbers of rows.

        ``labels`` counts the rows of each class. A regression has the ``range`` of its scores
        instead.
        """
        label_summary: dict[str, Any]
        if self.has_classes:
            counts = sorted(Counter(self.labels).items())
            label_summary = {"labels": {str(label): count for label, count in counts}}
        else:
            label_summary = {"range": [min(self.labels), max(self.labels)]}
        return {
            "source": self.source,
            "digest": self.digest,
            "rows": len(self),
            "dropped": self.dropped,
            **label_summary,
        }


def summarise_splits(
    splits: Mapping[str, TextSplit], ood: Mapping[str, TextSplit]
) -> dict[str, dict[str, Any]]:
    """Summarise all rows of a run for ``data`` in ``metrics.json``.

    Args:
        splits: The splits of the training tasks, by their names in ``data``.
        ood: The sets out of domain, by name. In ``data`` the names begin with ``ood:``.
    """
    summaries = {name: split.summary() for name, split in splits.items()}
    for name, split in ood.items():
        summaries[f"ood:{name}"] = split.summary()
    return summaries


def resolve_part(splits: Splits, part: str) -> str:
    """Return the part to read: ``dev`` if the ``test`` split is missing, else ``part`` itself."""
    if part == "test" and splits.test is None:
        return "dev"
    return part


def describe_rows(name: str, part: str, split: TextSplit, entry: TaskEntry) -> SetPart:
    """Describe the loaded rows of a task's ``train``, ``dev`` or ``test`` part.

    Args:
        name: The name of the task.
        part: The name of the part.
        split: The rows of the part.
        entry: The task, with the row counts that its makers and the paper's authors report.
    """
    if split.has_classes:
        counts = Counter(split.labels)
        # such as "negative 428, positive 444"
        class_counts = []
        for number, class_name in enumerate(entry.labels):
            class_counts.append(f"{class_name} {counts[number]:,}")
        labels = ", ".join(class_counts)
    else:
        # the scores of a regression
        labels = f"{min(split.labels):g} to {max(split.labels):g}"
    # the paper's row count is that of the test part
    published = entry.published_rows if part == "test" else None
    return SetPart(
        name,
        part,
        rows=len(split),
        dropped=split.dropped,
        expected=entry.rows.get(part),
        labels=labels,
        source=split.source,
        published=published,
    )


def load_part(
    task: RunTask,
    part: str,
    num_rows: int | None,
    entries: Mapping[str, TaskEntry] | None = None,
    warn: Callable[[str], None] | None = None,
) -> TextSplit:
    """Load the ``train``, ``dev`` or ``test`` part of a task, sample it, and check its row count.

    If the task has no test split, its dev split is the test part.

    Args:
        task: The task whose rows are loaded.
        part: The name of the part.
        num_rows: The number of sampled rows; None keeps all.
        entries: The tasks of ``tasks.yaml``, with the row counts that are expected.
        warn: A function that prints a warning. It is called if the row count is unexpected.
            Without ``warn`` or ``entries``, row counts are not checked.
    """
    # "dev" instead of "test", if the task has no test split
    loaded_part = resolve_part(task.splits, part)
    split = load_whole_part(task, loaded_part)
    # warn if the row count is unexpected, because a copy of the set may be incomplete
    if warn and entries and task.name in entries:
        description = describe_rows(task.name, loaded_part, split, entries[task.name])
        note = description.note
        if note:
            warn(note)
    return split.sample(num_rows, f"{task.name}/{loaded_part}")


class TaskSplits(NamedTuple):
    """The splits of a training task: for training, for selection, and for the report."""

    train: TextSplit
    dev: TextSplit  # for the selection of epoch and hyper-parameters
    test: TextSplit  # reported


def load_splits(
    task: RunTask,
    load: Callable[..., TextSplit],
    *,
    held_out_share: float | None,
    dev_rows: int | None,
    test_rows: int | None,
) -> TaskSplits:
    """Load all training rows of a task, and the rows for selection and for the report.

    If the task has a test split, its dev split is for selection, and its test split is reported.
    Otherwise the dev split is reported. Then selection uses held-out training rows, or the reported
    rows themselves if ``held_out_share`` is None. The rows are the same in every run.

    Args:
        task: The training task.
        load: :func:`load_part`, which gets the task, the name of a part and a number of rows.
        held_out_share: The share of the training rows to hold out; None to hold out none.
        dev_rows: The number of rows for selection; None for all.
        test_rows: The number of reported rows; None for all.
    """
    train = load(task, "train", None)
    # without a test split, `load` returns the dev split
    test = load(task, "test", test_rows)
    if task.splits.test:
        dev = load(task, "dev", dev_rows)
    elif held_out_share is None:
        dev = test
    else:
        train, held_out = train.hold_out(held_out_share, f"{task.name}/held out")
        dev = held_out.sample(dev_rows, f"{task.name}/held out rows")
    return TaskSplits(train, dev, test)


def load_whole_part(task: RunTask, part: str) -> TextSplit:
    """Load all rows of the ``train``, ``dev`` or ``test`` part of a task.

    The dev split never replaces a missing test split here. Rows without a text or a gold label are
    left out. :attr:`TextSplit.dropped` counts them.

    If the task names a package or a csv, the rows come from there. Otherwise they come from the
    set's folder below the data root (``EMOE_DATA_ROOT``). Without that folder, they come from the
    hub.

    Raises:
        DataError: The set, a column or a split is missing, a label is not one of the task's, or no
            row has a text and a label.
    """
    split_name: str | None = getattr(task.splits, part)
    if split_name is None:
        raise DataError(f"task '{task.name}' has no {part} split")
    # the name `a+b` stands for the split `a` followed by `b`
    splits = split_name.split("+")
    if task.source.vader_sentiment:
        return _load_vader(task.source.vader_sentiment, task.source.vader_label, splits)
    # a split may consist of several files
    tables = _read_tables(task, splits)
    texts: list[tuple[str, ...]] = []
    labels: list[Any] = []
    for table in tables:
        for row_texts, label in _complete_rows(table, task):
            texts.append(row_texts)
            labels.append(label)
    source = ", ".join(table.source for table in tables)
    stored_rows = sum(len(table.cells) for table in tables)
    if not texts:
        raise DataError(f"{source} has no row with text and label ({stored_rows} without)")
    return TextSplit(texts, labels, dropped=stored_rows - len(texts), source=source)


def _load_vader(domain: str, label: str | None, splits: Sequence[str]) -> TextSplit:
    """Load splits of a domain, such as tweets, of the data set inside the package vaderSentiment.

    The label of a text is the sign of its rating. If ``label`` is "strength", the label is weak or
    strong.
    """
    is_strength = label == "strength"
    texts: list[tuple[str, ...]] = []  # the tuple of a row has a single text
    labels: list[int] = []
    dropped = 0
    for split in splits:
        rated = load_vader(domain, split, strength=is_strength)
        texts += [(text,) for text in rated.texts]
        labels += rated.labels
        dropped += rated.dropped
    name = domain
    if label:
        name = f"{domain}, {label}"
    version = find_package(PACKAGE).version
    split_names = "+".join(splits)
    source = f"{PACKAGE} {version}, {name}, {split_names}"
    return TextSplit(texts, labels, dropped=dropped, source=source)


@dataclass(frozen=True)
class _Table:
    """The rows of one file, or of one split on the hub, as they are stored.

    Attributes:
        source: The file, or the hub id and split.
        cells: The rows, with the file's column names.
        class_names: The class names that the source stores, in the order of the class numbers; None
            if it stores none.
    """

    source: str
    cells: pd.DataFrame
    class_names: Sequence[str] | None = None

    def column(self, name: str, task: RunTask) -> str:
        """Return the name of a task's column in this table: ``name``, or an alias of it.

        Raises:
            DataError: The table has no such column.
        """
        # another copy of a set may have another name for a column
        aliases = [alias for alias, column in task.column_aliases.items() if column == name]
        for column in (name, *aliases):
            if column in self.cells:
                return column
        raise DataError(f"{self.source} has no column '{name}'{did_you_mean(name, self.cells)}")


def _read_tables(task: RunTask, splits: Sequence[str]) -> list[_Table]:
    """Read splits from the task's csv, else from the user's folder, else from the hub.

    A split may be several files.
    """
    if task.source.csv:
        return [_csv_rows(ROOT / task.source.csv, task, splits)]
    # the user's folder; None if there is none
    folder = local_path(task.name, task.source.model_dump())
    if folder is None:
        return [_read_hub(task, name) for name in splits]
    # `save_to_disk` writes one of these files
    if (folder / "state.json").exists() or (folder / "dataset_dict.json").exists():
        return _read_saved(folder, task, splits)
    tables = []
    for name in splits:
        tables += _read_folder(folder, task, name)
    return tables


def _read_hub(task: RunTask, split: str) -> _Table:
    """Read a split from the hub.

    Raises:
        DataError: The task names no set on the hub, or the set cannot be loaded.
    """
    source = task.source
    folder = expected_path(source.model_dump())
    if source.hub is None:
        raise DataError(
            f"{folder} is missing; `python -m benchmarks data --check` says how to get "
            f"'{task.name}'"
        )
    configuration = f" ({source.config})" if source.config else ""
    try:
        dataset = datasets.load_dataset(
            source.hub, source.config, split=split, revision=source.revision
        )
    except Exception as error:  # the hub raises many types
        raise DataError(
            f"could not load '{source.hub}'{configuration} from the hub: "
            f"{type(error).__name__}: {error}\n"
            f"Without the hub, put its files into {folder} (config/README.md)"
        ) from error
    name = hub_name(source.hub, source.revision, commit_of(dataset))
    return _to_table(dataset, f"{name}{configuration}, split {split}", task)


def _read_saved(folder: Path, task: RunTask, splits: Sequence[str]) -> list[_Table]:
    """Read splits from a folder that ``datasets`` wrote with ``save_to_disk``.

    The folder may hold a single set without splits, if the task has no training split.

    Raises:
        DataError: The folder cannot be read, lacks a split, or has a set without splits although
            the task has a training split.
    """
    with _name_file_in_errors(folder):
        saved: Any = datasets.load_from_disk(str(folder))
        # a dictionary has several splits, anything else is one set
        if isinstance(saved, datasets.DatasetDict):
            for split in splits:
                if split not in saved:
                    near = did_you_mean(split, saved)
                    raise DataError(f"{folder} has no split '{split}'{near}")
            return [_to_table(saved[split], f"{folder} [{split}]", task) for split in splits]
        if task.splits.train is not None:
            raise DataError(
                f"{folder} has no splits, but '{task.name}' needs several: save a DatasetDict"
            )
        return [_to_table(saved, str(folder), task)]


def _read_folder(folder: Path, task: RunTask, split: str) -> list[_Table]:
    """Read a split from files that are named as on the hub, in the first available format.

    Raises:
        DataError: The folder has no file of the split, or a file cannot be read.
    """
    folders = [folder]
    # on the hub, the files of a configuration are in a folder with its name, or in `data`
    if task.source.config:
        folders += [folder / task.source.config, folder / "data"]
    # read the files in the first folder that has any, and in the first format there
    for subfolder in folders:
        for suffix in _BUILDERS:
            files = _find_files(subfolder, split, suffix)
            if files:
                return [_read_file(file, folders, task) for file in files]
    # no file was found
    wanted = ", ".join(f"{split}.{suffix}" for suffix in _BUILDERS)
    advice = ""
    if task.raw_formats:
        advice = "; `python tools/convert_glue_x.py` converts its makers' files"
    raise DataError(f"{folder} has no file for the split '{split}': wanted one of {wanted}{advice}")


def _find_files(folder: Path, split: str, suffix: str) -> list[Path]:
    """Find the files of a split with the ending ``suffix``, in the order of their rows.

    A split is stored in one of three layouts. The first one that exists is used:

    - one file, such as ``train.parquet``
    - numbered pieces, such as ``train-00000-of-00002.parquet``
    - a folder of pieces, such as ``train/0000.parquet``, from the hub's conversion to Parquet

    The list is empty if there are no files.

    Raises:
        DataError: A piece is missing.
    """
    whole_file = folder / f"{split}.{suffix}"
    if whole_file.exists():
        return [whole_file]

    pieces = sorted(folder.glob(f"{split}-*-of-*.{suffix}"))
    if pieces:
        # the name of each piece ends with the number of pieces
        if not pieces[0].stem.endswith(f"-of-{len(pieces):05}"):
            raise DataError(f"{folder} lacks a piece of the split '{split}'")
        return pieces

    converted = sorted(folder.glob(f"{split}/[0-9]*.{suffix}"))
    # if a number is skipped, a piece is missing
    for number, file in enumerate(converted):
        wanted = f"{number:04}.{suffix}"
        if file.name != wanted:
            raise DataError(f"{folder / split} lacks the piece {wanted} before {file.name}")
    return converted


def _read_file(file: Path, folders: Sequence[Path], task: RunTask) -> _Table:
    """Read a file as a table. Its format is one of :data:`_BUILDERS`.

    If the file stores no class names, they come from the metadata files in ``folders``.
    """
    with _name_file_in_errors(file):
        if file.suffix == ".csv":
            table = _Table(str(file), read_csv(file))
        else:
            builder = _BUILDERS[file.suffix.removeprefix(".")]
            # Streaming writes no copy of the file into the cache. The library calls all rows of a
            # single file "train".
            dataset = datasets.load_dataset(
                builder, data_files=glob.escape(str(file)), split="train", streaming=True
            )
            table = _to_table(dataset, str(file), task)
        if table.class_names is None:
            return replace(table, class_names=_documented_class_names(table, folders, task))
        return table


def _documented_class_names(
    table: _Table, folders: Sequence[Path], task: RunTask
) -> Sequence[str] | None:
    """Find the class names in README.md or ``dataset_infos.json`` of the folders.

    Return None if no folder has them.
    """
    for folder in folders:
        # the metadata by configuration; a set without configurations has only "default"
        infos = DatasetInfosDict.from_directory(str(folder))
        info = infos.get(task.source.config) or infos.get("default")
        # this folder has no metadata, or none on the columns
        if not info or not info.features:
            continue
        label_column = table.column(task.label, task)
        feature = info.features.get(label_column)
        if isinstance(feature, datasets.ClassLabel):
            return feature.names
    return None


def read_csv(file: Path) -> pd.DataFrame:
    """Read a csv with every cell as text. Rows may lack their last cells.

    Raises:
        DataError: The file cannot be read, or its first row has more cells than the header.
    """
    # cells stay as they are written, because the task decides what a label means
    with _name_file_in_errors(file), warnings.catch_warnings():
        # pandas only warns if the first row has more cells than the header
        warnings.simplefilter("error", pd.errors.ParserWarning)
        return pd.read_csv(
            file, dtype=str, na_filter=False, index_col=False, engine="python", encoding="utf-8-sig"
        )


def _csv_rows(file: Path, task: RunTask, splits: Sequence[str]) -> _Table:
    """Read the rows of splits from one csv, split after split.

    The column ``split`` names the split of each row. Without this column, a hash of the first text
    chooses the split.

    Raises:
        DataError: The csv cannot be read, lacks the column of the text, has no row of a split, or
            names an unknown split.
    """
    table = _Table(str(file), read_csv(file))
    cells = table.cells
    if "split" in cells:
        # a row may end before this cell
        split_of_row = cells["split"].fillna("")
        _check_csv_splits(file, split_of_row)
    else:
        first_text = table.column(task.fields[0], task)
        # a row that ends before its text has no text to hash; it is dropped and counted later
        texts = cells[first_text].fillna("")
        split_of_row = texts.map(_split_by_hash)
    parts = []
    for split in splits:
        is_in_split = split_of_row == split
        if not is_in_split.any():
            near = did_you_mean(split, split_of_row.unique())
            raise DataError(f"{file} has no row of the split '{split}'{near}")
        parts.append(cells[is_in_split])
    return replace(table, cells=pd.concat(parts))


def _check_csv_splits(file: Path, split_of_row: pd.Series) -> None:
    """Check that a csv assigns each row to a known split, so that no row is left out silently.

    Raises:
        DataError: A row names an unknown split.
    """
    is_known = split_of_row.isin(_CSV_SPLITS)
    if is_known.all():
        return
    first_unknown = split_of_row[~is_known].iloc[0]
    number = int((~is_known).sum())
    near = did_you_mean(first_unknown, _CSV_SPLITS)
    raise DataError(f"{file}: rows with an unknown split: {number}, first '{first_unknown}'{near}")


def _split_by_hash(text: str) -> str:
    """Choose ``train``, ``dev`` or ``test`` by a hash of the text.

    The choice does not depend on other rows, so a row keeps its split if rows are added.
    """
    digest = hashlib.sha256(text.encode()).digest()
    # the first 48 bits, as a number from 0 to 1
    fraction = int.from_bytes(digest[:6], "big") / 2**48
    if fraction < _DEV_SHARE:
        return "dev"
    if fraction < _DEV_SHARE + _TEST_SHARE:
        return "test"
    return "train"


def _to_table(dataset: Any, source: str, task: RunTask) -> _Table:
    """Convert a data set of the library ``datasets`` to a table, with the class names it stores."""
    # read arrow tables of 10,000 rows each, because a streamed set has no length
    batches = list(dataset.with_format("arrow").iter(batch_size=10_000))
    # with the default promotion, a column without values in one batch fits the other batches
    cells = pa.concat_tables(batches, promote_options="default").to_pydict()
    table = _Table(source, pd.DataFrame(cells, dtype=object))
    # the types of the columns; a streamed set may have none
    features = dataset.features or {}
    feature = features.get(table.column(task.label, task))
    if isinstance(feature, datasets.ClassLabel):
        return replace(table, class_names=feature.names)
    return table


@contextmanager
def _name_file_in_errors(path: Path) -> Iterator[None]:
    """Turn an error of a library inside the block into a :class:`DataError` that names the file."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # libraries raise many types
        raise DataError(f"{path} cannot be read: {first_line(error)}") from error


@dataclass(frozen=True)
class _LabelReader:
    """Reads the labels of a table: turns each into a class number, or a score in a regression.

    Attributes:
        class_names: The class names that the table stores, by class number as text; empty if it
            stores none.
        unlabelled: The label texts that mean that a row has no gold label.
        classes: The class number of each spelling of a label; empty for a regression.
        low: The lowest score of a regression.
        high: The highest score of a regression.
    """

    class_names: Mapping[str, str]
    unlabelled: set[str]
    classes: Mapping[str, int]
    low: float
    high: float

    @classmethod
    def for_table(cls, table: _Table, task: RunTask) -> _LabelReader:
        """Return a reader of the labels in ``table``, which has rows of ``task``."""
        low, high = task.range or (-math.inf, math.inf)
        stored_names = table.class_names or ()
        return cls(
            class_names={str(number): name for number, name in enumerate(stored_names)},
            unlabelled={label_text(value) for value in task.unlabelled},
            classes=_class_numbers(table, task),
            low=low,
            high=high,
        )

    def text(self, value: object) -> str:
        """Convert the value of a label cell to text; a class number becomes its stored name."""
        written = label_text(value)
        return label_text(self.class_names.get(written, written))

    def number(self, label: str) -> int | float | None:
        """Return the class number or the score of a label; None if the task has no such label."""
        if self.classes:
            return self.classes.get(label)
        # a text that is not a number becomes nan, which is outside of every range
        score = float(pd.to_numeric(label, errors="coerce"))
        if self.low <= score <= self.high:
            return score
        return None

    def hint(self, label: str) -> str:
        """Return the end of the message on an unknown label: a similar one, or the range."""
        if self.classes:
            return did_you_mean(label, self.classes)
        return f"; it must be a number from {self.low:g} to {self.high:g}"


def _complete_rows(table: _Table, task: RunTask) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield the texts and the label of each row. Skip rows without a gold label or a text.

    A label is a class number or a score.

    Raises:
        DataError: The table lacks a column, or a label is not one of the task's.
    """
    reader = _LabelReader.for_table(table, task)
    columns = [table.column(name, task) for name in (*task.fields, task.label)]
    # the columns of a row are its index, its one or two texts, and its label
    for index, *text_cells, label_cell in table.cells[columns].itertuples(name=None):
        texts = _row_texts(text_cells)
        label = reader.text(label_cell)
        # the row lacks a text, or its label means that it has no gold label
        if texts is None or label in reader.unlabelled:
            continue
        number = reader.number(label)
        if number is not None:
            yield texts, number
        # a label such as "null" means in every set that there is none; others are errors
        elif label.casefold() not in _NO_LABEL:
            raise DataError(
                f"{table.source}, row {index + 1}: '{label}' is no label of task '{task.name}'"
                f"{reader.hint(label)}"
            )


def _row_texts(cells: Sequence[object]) -> tuple[str, ...] | None:
    """Return the texts of a row; None if one is missing, or all are blank."""
    for cell in cells:
        # some formats read an empty cell as nan, which is not equal to itself
        if cell is None or cell != cell:
            return None
    texts = tuple(str(cell) for cell in cells)
    if not "".join(texts).strip():
        return None
    return texts


def label_text(value: object) -> str:
    """Convert a label to text, without surrounding blanks; ``1.0`` becomes ``1``."""
    if value is None:
        return ""
    return _WHOLE.sub(r"\1", str(value).strip())


def _class_numbers(table: _Table, task: RunTask) -> dict[str, int]:
    """Map each spelling of a label to its class number; empty for a regression."""
    class_names = _class_names_by_spelling(table, task)
    return {label_text(text): task.labels.index(name) for text, name in class_names.items()}


def _class_names_by_spelling(table: _Table, task: RunTask) -> dict[str, str]:
    """Map each accepted spelling of a label to the name of its class.

    A label may be spelled as the name of a class, as one of the task's ``label_names``, as a class
    number, or as the makers of the set spell it. Which of these spellings are accepted depends on
    the class names that the table stores:

    - If the table stores none, its labels are names or class numbers.
    - If it stores only the numbers from 0 as names, its labels are class numbers.
    - If it stores other names, its labels are names or the makers' spellings.

    If the task has a class whose name is a number, every number is a name, not a class number.
    """
    names = dict(task.label_names)
    for name in task.labels:
        names[name] = name
    class_numbers = {str(number): name for number, name in enumerate(task.labels)}
    numbers_are_names = any(_is_number(name) for name in (*task.labels, *task.label_names))

    if table.class_names is None:
        if numbers_are_names:
            return names
        return {**class_numbers, **names}
    # a regression has no class numbers
    may_have_class_numbers = bool(task.labels) and not numbers_are_names
    if may_have_class_numbers and _are_numbers_from_0(table.class_names):
        return class_numbers
    return {**_makers_spellings(task), **names}


def _is_number(name: str) -> bool:
    """Return True if a class name is a whole number, such as ``-1`` or ``2.0``."""
    return label_text(name).lstrip("-").isdecimal()


def _are_numbers_from_0(names: Sequence[str]) -> bool:
    """Return True if the class names are only numbers from 0, such as ``0``, ``1`` and ``2``."""
    return set(names) == {str(number) for number in range(len(names))}


def _makers_spellings(task: RunTask) -> dict[str, str]:
    """Map the labels in the files of the set's makers to class names, for all file layouts."""
    spellings = {}
    # an earlier layout has precedence, so it comes last and overwrites later ones
    for layout in reversed(task.raw_formats or []):
        spellings.update(layout.label_names)
    return spellings
