"""Read the written table of the claims without pandas, so that ``status`` starts at once."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from benchmarks.harness import base as paths
from benchmarks.harness.base import DataError, read_text
from benchmarks.harness.report.artifacts import CLAIMS, remake_advice


def read_claim_rows(suite_name: str, columns: Sequence[str]) -> list[dict[str, str]]:
    """Read the CSV table of a suite's claims: one dictionary per test, with its texts by column.

    Args:
        suite_name: The name of the suite.
        columns: The columns in which each test must have a text. The others are not checked.

    Raises:
        DataError: The file cannot be read, or a test lacks a cell.
    """
    path = paths.RESULTS / suite_name / "tables" / f"{CLAIMS.name}.csv"
    advice = remake_advice(path, suite_name)
    text = read_text(path, advice)
    try:
        rows = list(csv.DictReader(io.StringIO(text, newline="")))
    except csv.Error as error:
        raise DataError(f"{path} is damaged: {error}; {advice}") from None
    if not rows:
        raise DataError(f"{path} is damaged: it has no tests; {advice}")
    for number, row in enumerate(rows, start=1):
        for column in columns:
            if not row.get(column):
                raise DataError(f"{path} is damaged: test {number} has no '{column}'; {advice}")
    return rows
