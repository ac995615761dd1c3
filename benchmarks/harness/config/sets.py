"""Describe the data sets that runs read, for `python -m benchmarks data`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from benchmarks.harness.config.yaml import Count, Strict

ALL = "all"  # the name of the only part, if a data set is not split


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
    """One part of a data set, such as a split, as found by reading it.

    Attributes:
        name: The name of the data set.
        part: ``train``, ``dev`` or ``test``; an environment of an image set; ``all`` for a set of
            instructions.
        rows: The number of rows in use; None if the part is missing.
        dropped: The number of rows that are left out: broken, or without a gold label or text.
        expected: The number of rows according to the makers of the data; None if unknown.
        labels: The number of rows by label, as text.
        source: The source of the rows.
        advice: How to get a missing part, or what is wrong with it.
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
        """Return True unless the makers of the data give another number of rows.

        Their number may include the dropped rows or not.
        """
        if self.expected is None:
            return True
        with_dropped = (self.rows or 0) + self.dropped
        return self.expected in (self.rows, with_dropped)

    @property
    def note(self) -> str | None:
        """Describe why the number of rows in use is not the published one.

        The published number is that of the data's makers, or that of the paper's authors. None if
        the part is missing, or if there is no difference that matters.
        """
        if self.rows is None:
            return None
        published = self.published
        # if the authors score as many rows as we do, the number of the makers does not matter
        if published is not None and published.rows == self.rows:
            return None
        rows = f"{self.name} ({self.part}): {self.rows:,} rows"
        if not self.as_expected:
            dropped = f" and {self.dropped:,} dropped" if self.dropped else ""
            return (
                f"{rows}{dropped}, its makers count {self.expected:,}: "
                "another version, or not all of it"
            )
        if published:
            by_authors = f"{published.rows:,} by {published.of}: {published.why}"
            return f"{rows} are scored, but {by_authors}"
        return None


class SetReader(NamedTuple):
    """A part of a data set that a run reads, such as a split, and the function that describes it.

    Attributes:
        name: The name of the data set.
        part: The part, as in :class:`SetPart`; :data:`ALL` if the set is read as a whole.
        read: The function that reads the part and yields its descriptions. If its argument is True,
            it opens every file, which may take minutes.
    """

    name: str
    part: str
    read: Callable[[bool], Iterator[SetPart]]


def missing_set(name: str, problem: object, instructions: str, expected: int | None) -> SetPart:
    """Describe a data set that cannot be read, as one missing part called ``all``.

    Args:
        name: The name of the data set.
        problem: The reason why it cannot be read.
        instructions: How to get the data.
        expected: The number of rows according to the makers of the data; None if unknown.
    """
    advice = f"{name}: {problem}\n    {instructions}. Without it: `exclude: [{name}]`"
    return SetPart(name, ALL, None, expected=expected, advice=advice)
