"""Text classification sets: rows, labels and their splits, whatever they were read from."""

from __future__ import annotations

import functools
import hashlib
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.harness.base.errors import DataError
from benchmarks.harness.base.seeds import derive_seed
from benchmarks.harness.config.counts import PublishedRows, count_note
from benchmarks.harness.sources.vader import PACKAGE, VERSION, load_vader
from benchmarks.text.definition import RunTask, Splits, TaskEntry
from benchmarks.text.readers import FileRows, Rows, has_numbers, label_text, read_rows
from emoe.errors import did_you_mean

_NO_LABEL = {"", "-1", "nan", "none", "null"}  # where none of these is a label of the task
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)  # Python's has 1_0 too


@dataclass(frozen=True)
class TextSplit:
    """Rows of one split.

    Attributes:
        texts: one tuple a row, of one text or of a pair.
        labels: class numbers, or numbers for a regression.
        dropped: rows without a gold label, without text, or without one of two texts, left out.
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
        return self._rows(sorted(random.Random(derive_seed("rows", seed_name)).sample(range(len(self)), rows)))

    def divided(self, share: float, seed_name: str) -> tuple[TextSplit, TextSplit]:
        """The rows without a share of them, and that share, drawn once and for all (not by the run's seed)."""
        count = round(len(self) * share)
        if not 0 < count < len(self):
            raise DataError(f"{self.source}: a share of {share:g} of {len(self)} rows cannot be held out")
        chosen = set(random.Random(derive_seed("held out", seed_name)).sample(range(len(self)), count))
        return self._rows([i for i in range(len(self)) if i not in chosen]), self._rows(sorted(chosen))

    def part(self, share: float, seed_name: str) -> TextSplit:
        """A share of the rows of every class (of a regression's whole scores), at least one of each, drawn once and for all (not by the run's seed).

        A smaller share is a part of a larger one.
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
        """sha256 of the texts."""
        return _digest(self.texts)

    @property
    def has_classes(self) -> bool:
        """Whether labels are class numbers, and not a regression's."""
        return all(isinstance(label, int) for label in self.labels)

    @property
    def class_numbers(self) -> NDArray[np.int64]:
        """The rows' classes; -1 for each row of a regression."""
        return np.asarray(self.labels if self.has_classes else [-1] * len(self), dtype=np.int64)

    def summary(self) -> dict[str, Any]:
        """Source, a digest of the rows, their number, dropped rows, and rows by class (or a regression's range)."""
        digest = _digest(zip(self.texts, self.labels, strict=True))[:16]
        found: dict[str, Any] = {"source": self.source, "digest": digest, "rows": len(self), "dropped": self.dropped}
        if self.has_classes:
            found["labels"] = {str(label): count for label, count in sorted(Counter(self.labels).items())}
        else:
            found["range"] = [min(self.labels), max(self.labels)]
        return found


def _digest(rows: Iterable[object]) -> str:
    """sha256 of rows, one at a time."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(repr(row).encode())
    return digest.hexdigest()


def part_read(splits: Splits, part: str) -> str:
    """The part that is read for a part: without a test split the dev split is reported."""
    return "dev" if part == "test" and splits.test is None else part


def load_part(
    task: RunTask,
    part: str,
    rows: int | None,
    known: Mapping[str, TaskEntry] | None = None,
    say: Callable[[str], None] | None = None,
) -> TextSplit:
    """The ``train``, ``dev`` or ``test`` part of a task, cut to ``rows``.

    Args:
        task: its spec.
        part: which one.
        rows: how many; None for all.
        known: the tasks as ``tasks.yaml`` has them.
        say: where to say that a part has other rows than these know of.
    """
    part = part_read(task.splits, part)
    found = load_split(task, part)
    if say and known and task.name in known:
        expected, published = known_rows(known[task.name], part)
        counted = counts_unlabelled(known[task.name])
        note = count_note(task.name, part, len(found), found.dropped, expected, published, counts_dropped=counted)
        if note:
            say(f"warning: {note}")
    return found.head(rows, f"{task.name}/{part}")


def known_rows(known: TaskEntry, part: str) -> tuple[int | None, PublishedRows | None]:
    """How many rows a set's entry in ``tasks.yaml`` says that a part has, and how many the paper's authors score."""
    return getattr(known.rows, part), known.published_rows if part == "test" else None


def counts_unlabelled(known: TaskEntry) -> bool:
    """Whether a set's makers count rows that are left out: those that they mark as rows without a gold label."""
    return any(label != "" for label in known.unlabelled)


def load_split(task: RunTask, part: str) -> TextSplit:
    """Load the ``train``, ``dev`` or ``test`` part of a task.

    A folder of the set's name below the data root (environment variable ``EMOE_DATA_ROOT``) is used
    when there is one, else the hub.

    Raises:
        DataError: the set, a column or a split is missing, or a label is not one of the task's.
    """
    split: str | None = getattr(task.splits, part)
    if split is None:
        raise DataError(f"task '{task.name}' has no {part} split")
    source = task.source
    if source.vader_sentiment:
        strength = source.vader_label == "strength"
        texts, labels, dropped = load_vader(source.vader_sentiment, split, strength=strength)
        where = ", ".join(filter(None, (source.vader_sentiment, source.vader_label, split)))
        return TextSplit([(text,) for text in texts], labels, dropped, f"{PACKAGE} {VERSION}, {where}")
    return _to_split(read_rows(task, split), task)


def _to_split(files: Rows, task: RunTask) -> TextSplit:
    texts: list[tuple[str, ...]] = []
    labels: list[Any] = []
    total = 0
    for file in files:
        label_of = _reader(file, task)
        found = file.columns[task.label]
        total += len(found)
        for row, cells in enumerate(zip(*(file.columns[field] for field in task.fields), strict=True)):
            written = tuple(text for cell in cells if (text := _text(cell, file, row)) is not None)
            label = label_of(row, found[row]) if "".join(written).strip() and len(written) == len(cells) else None
            if label is not None:
                texts.append(written)
                labels.append(label)
    where = ", ".join(file.where for file in files)
    if not texts:
        raise DataError(f"{where} has no row with text and label ({total} without)")
    return TextSplit(texts, labels, total - len(texts), where)


def _text(cell: Any, file: FileRows, row: int) -> str | None:
    """A cell as text; None where it is missing, as in a row that ends early."""
    if cell is None or cell != cell:
        return None
    if not isinstance(cell, str | int | float):
        raise DataError(f"{file.place(row)}: a cell is {type(cell).__name__}, not text")
    text = str(cell)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{file.place(row)}: {text[error.start : error.end]!r} is no letter") from error
    return text


def _reader(file: FileRows, task: RunTask) -> Callable[[int, object], int | float | None]:
    """What makes a number of a row's label, or None where there is none, and refuses what is no label of the task."""
    unlabelled = {label_text(value) for value in task.unlabelled}
    classes = _classes(file, task)

    def read(row: int, value: object) -> int | float | None:
        text = label_text(value)
        if text in unlabelled:
            return None
        number = classes.get(text) if task.labels else _score(text, task)
        if number is None and text.casefold() not in _NO_LABEL:
            wanted = did_you_mean(value, classes or task.labels) if task.labels else _scale(task)
            raise DataError(f"{file.place(row)}: '{value}' is no label of task '{task.name}'{wanted}")
        return number

    return read


def _classes(file: FileRows, task: RunTask) -> dict[str, int]:
    """The numbers of a task's classes by all that a file may call them: names of its own, else the task's names and numbers."""
    names: list[str] = task.labels
    spelled = file.label_names
    if spelled is None:
        numbers = {str(number): name for number, name in enumerate(names)} if has_numbers(task) else {}
        spelled = numbers | task.label_names | {name: name for name in names}
    return {label_text(called): names.index(name) for called, name in spelled.items()}


def _score(text: str, task: RunTask) -> float | None:
    """A regression's label, if it is one."""
    if not _NUMBER.fullmatch(text):
        return None
    low, high = task.range or (-math.inf, math.inf)
    number = float(text)
    return number if math.isfinite(number) and low <= number <= high else None


def _scale(task: RunTask) -> str:
    return "; it must be a number" + (" from {:g} to {:g}".format(*task.range) if task.range else "")


def label_counts(split: TextSplit, names: list[str]) -> str:
    """Rows by label as text; of a regression the range."""
    summary = split.summary()
    if "range" in summary:
        return f"{summary['range'][0]:g} to {summary['range'][1]:g}"
    return ", ".join(f"{name} {summary['labels'].get(str(number), 0):,}" for number, name in enumerate(names))
