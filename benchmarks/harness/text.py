"""Text classification sets: rows, labels and their splits, whatever they were read from."""

from __future__ import annotations

import functools
import hashlib
import math
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.harness.packages import DataError
from benchmarks.harness.rated import PACKAGE, VERSION, load_rated
from benchmarks.harness.seeds import derive_seed
from benchmarks.harness.text_files import Rows, read_rows
from emoe.errors import did_you_mean


@dataclass(frozen=True)
class TextSplit:
    """Rows of one split.

    Attributes:
        texts: one tuple a row, of one text or of a pair.
        labels: class numbers, or numbers for a regression.
        dropped: rows without a gold label or without text, left out.
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

    def _rows(self, chosen: Sequence[int]) -> TextSplit:
        return replace(self, texts=[self.texts[i] for i in chosen], labels=[self.labels[i] for i in chosen])

    @functools.cached_property
    def texts_digest(self) -> str:
        """sha256 of the texts."""
        return _digest(self.texts)

    def summary(self) -> dict[str, Any]:
        """Source, a digest of the rows, their number, dropped rows, and rows by class (or a regression's range)."""
        digest = _digest(zip(self.texts, self.labels, strict=True))[:16]
        found: dict[str, Any] = {"source": self.source, "digest": digest, "rows": len(self), "dropped": self.dropped}
        if all(isinstance(label, int) for label in self.labels):
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


def part_read(task: Mapping[str, Any], part: str) -> str:
    """The part that is read for a part: without a test split the dev split is reported."""
    return "dev" if part == "test" and task["splits"]["test"] is None else part


def load_part(task: Mapping[str, Any], part: str, rows: int | None) -> TextSplit:
    """The ``train``, ``dev`` or ``test`` part of a task, cut to ``rows``."""
    part = part_read(task, part)
    return load_split(task, part).head(rows, f"{task['name']}/{part}")


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
    return _to_split(read_rows(task, split), task)


def _to_split(rows: Rows, task: Mapping[str, Any]) -> TextSplit:
    texts: list[tuple[str, ...]] = []
    labels: list[Any] = []
    unlabelled, total = set(task["unlabelled"]), 0
    for file in rows:
        frame = file.frame.rename(columns=task["also_named"])
        for column in (*task["fields"], task["label"]):
            if column not in frame.columns:
                raise DataError(f"{file.where} has no column '{column}'{did_you_mean(column, frame.columns)}")
        raw = frame[task["label"]].tolist()
        written = list(zip(*(map(_text, frame[field]) for field in task["fields"]), strict=True))
        total += len(raw)
        keep = [i for i, value in enumerate(raw) if value not in unlabelled and any(written[i])]
        convert = _class_number if task["labels"] else _number
        labels += [convert(raw[i], task, file.label_names, file.where, i) for i in keep]
        texts += [written[i] for i in keep]
    where = ", ".join(file.where for file in rows)
    if not texts:
        raise DataError(f"{where} has no row with text and label ({total} without)")
    return TextSplit(texts, labels, total - len(texts), where)


def _text(value: object) -> str:
    """A cell as text; a missing one is empty."""
    return "" if value is None or value != value else str(value)


def _class_number(value: object, task: Mapping[str, Any], spelled: Mapping[str, str], where: str, row: int) -> int:
    """The number of a class from its name, its number, or what files call it; ``spelled`` leaves no other names."""
    names: Sequence[str] = task["labels"]
    text = str(value).strip()
    if spelled:
        if text not in spelled:
            raise _wrong_label(value, spelled, task, where, row)
        return names.index(spelled[text])
    text = task["label_names"].get(text, text)
    if text in names:
        return names.index(text)
    if text.isdigit() and int(text) < len(names):
        return int(text)
    raise _wrong_label(value, [*names, *map(str, range(len(names)))], task, where, row)


def _number(value: Any, task: Mapping[str, Any], _spelled: Mapping[str, str], where: str, row: int) -> float:
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
