"""Describe the sets that runs read, for `python -m benchmarks data`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from benchmarks.harness.config.yaml import Count, Strict

ALL = "all"  # the only part of a set without a split


class PublishedRows(Strict):
    """The number of rows that the paper's authors score, if we score another number."""

    rows: Count
    """Number of rows."""
    of: str
    """Source of that number."""
    why: str
    """Reason for the difference."""


@dataclass(frozen=True)
class SetPart:
    """Describe one part of a set after reading it.

    Attributes:
        name: The name of the set.
        part: ``train``, ``dev`` or ``test``; the environment of an image set; ``all`` of instructions.
        rows: The number of rows in use; None if the part is missing.
        dropped: The number of rows that are left out: broken, or without a gold label or text.
        expected: The number of rows according to the set's makers; None if unknown.
        labels: The number of rows by label, as text.
        source: The source of the rows.
        advice: Instructions to get a missing part.
        published: The number of rows that the paper's authors score, if we score another number.
    """

    name: str
    part: str
    rows: int | None
    dropped: int = 0
    expected: int | None = None
    labels: str = ""
    source: str = ""
    advice: str = ""
    published: PublishedRows | None = None

    @property
    def as_expected(self) -> bool:
        """Return True if the makers' count equals the rows in use, with or without the dropped ones, or is unknown."""
        return self.expected in (None, self.rows, (self.rows or 0) + self.dropped)

    @property
    def note(self) -> str | None:
        """Describe a difference from the makers' or the paper's number of rows; None if there is none."""
        if self.rows is None or (self.published and self.published.rows == self.rows):
            return None
        if not self.as_expected:
            rows = (
                f"{self.rows:,} rows and {self.dropped:,} dropped"
                if self.dropped
                else f"{self.rows:,} rows"
            )
            counts = f"{rows}, its makers count {self.expected:,}"
            return f"{self.name} ({self.part}): {counts}: another version, or not all of it"
        if self.published:
            other = f"not {self.published.rows:,} as by {self.published.of}: {self.published.why}"
            return f"{self.name} ({self.part}): {self.rows:,} rows are scored, {other}"
        return None


class SetReader(NamedTuple):
    """Name a part of a set that a run reads, with the function that reads and describes it.

    The function's argument is True to open every file, which may take minutes.
    """

    name: str
    part: str  # :data:`ALL` of a set that is read as a whole
    read: Callable[[bool], Iterator[SetPart]]


def missing_set(name: str, problem: object, instructions: str, expected: int | None) -> SetPart:
    """Describe a set that cannot be read, as a single part, with the instructions to get it."""
    advice = f"{name}: {problem}\n    {instructions}. Without it: `exclude: [{name}]`"
    return SetPart(name, ALL, None, expected=expected, advice=advice)
