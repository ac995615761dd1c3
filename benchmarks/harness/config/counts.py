"""How many rows a set has, beside what is known of it."""

from __future__ import annotations

from benchmarks.harness.config.yaml import Count, Strict


class PublishedRows(Strict):
    """Another number of rows that the paper's authors score."""

    rows: Count
    """How many."""
    of: str
    """Who says so."""
    why: str
    """Why they differ."""


def counted(rows: int, dropped: int, *, counts_dropped: bool) -> int:
    """The rows that a set's makers count: those that are used, and those that are left out where they count these too."""
    return rows + dropped if counts_dropped else rows


def count_note(
    name: str,
    part: str,
    rows: int,
    dropped: int,
    expected: int | None,
    published: PublishedRows | None = None,
    *,
    counts_dropped: bool = True,
) -> str | None:
    """How the number of a part's rows differs from those that are known; None where it does not.

    Args:
        name: the set's.
        part: the part's.
        rows: how many are used.
        dropped: how many were left out.
        expected: how many there are by the set's makers.
        published: how many the paper's authors score, who says so, and why.
        counts_dropped: whether the makers count those that are left out too.
    """
    whole = counted(rows, dropped, counts_dropped=counts_dropped)
    if published and published.rows == rows:
        return None
    if expected not in (None, rows, whole):
        beside = f" beside {dropped:,} dropped" if whole < rows + dropped else ""
        return (
            f"{name} ({part}): {whole:,} rows{beside}, its makers count {expected:,}: another version, or not all of it"
        )
    if published:
        return (
            f"{name} ({part}): {rows:,} rows are scored, not {published.rows:,} as by {published.of}: {published.why}"
        )
    return None
