"""How many rows a set has, beside what is known of it."""

from __future__ import annotations

from benchmarks.harness.planning.schema import Count, Strict


class PublishedRows(Strict):
    """Another number of rows that the paper's authors score."""

    rows: Count
    """How many."""
    of: str
    """Who says so."""
    why: str
    """Why they differ."""


def count_note(
    name: str,
    part: str,
    rows: int,
    dropped: int,
    expected: int | None,
    published: PublishedRows | None = None,
) -> str | None:
    """How the number of a part's rows differs from those that are known; None where it does not.

    Args:
        name: the set's.
        part: the part's.
        rows: how many are used.
        dropped: how many were left out.
        expected: how many there are by the set's makers.
        published: how many the paper's authors score, who says so, and why.
    """
    if published and published.rows == rows:
        return None
    if expected not in (None, rows, rows + dropped):
        return f"{name} ({part}): {rows + dropped:,} rows, its makers count {expected:,}: another version, or not all of it"
    if published:
        return (
            f"{name} ({part}): {rows:,} rows are scored, not {published.rows:,} as by {published.of}: {published.why}"
        )
    return None
