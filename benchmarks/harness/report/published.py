"""The paper's numbers, as the CSV beside a benchmark has them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd

from benchmarks.harness.base.errors import DefinitionError
from benchmarks.harness.config.benchmark import Benchmark, Definition, Entry
from benchmarks.harness.config.yaml import NUMBER_COLUMNS
from emoe.errors import did_you_mean

_STATUS = ("published", "inferred", "unknown")


def read_published(
    benchmark: Benchmark[Definition, Entry], file: str | None = None, of: Sequence[str] | None = None
) -> pd.DataFrame:
    """A benchmark's ``paper.csv``: published numbers, values in points (of a rank, as it is), each with status and source.

    Args:
        benchmark: whose numbers.
        file: another file in its folder.
        of: columns that say what a number is of, where they are not the kind's own.

    Raises:
        DefinitionError: a wrong column, status, or a value that does not go with its status.
    """
    file = file or benchmark.definition.paper
    columns = [*(of or benchmark.kind.paper_columns), *NUMBER_COLUMNS]
    if not file:
        return pd.DataFrame(columns=columns)
    path = benchmark.folder / file
    found = pd.read_csv(path, keep_default_na=False, na_values={"value": [""]})
    if list(found.columns) != columns:
        raise DefinitionError(f"{path}: the columns are {list(found.columns)}, but must be {columns}")
    for number, row in enumerate(found.itertuples(), 2):
        if row.status not in _STATUS:
            raise DefinitionError(f"{path}, line {number}: status is '{row.status}'{did_you_mean(row.status, _STATUS)}")
        if math.isnan(row.value) != (row.status == "unknown"):
            raise DefinitionError(f"{path}, line {number}: a value is given where it is known, and only there")
    return found


def published_delta(published: pd.DataFrame, baseline: str) -> list[float]:
    """The difference of every published ``value`` to the baseline's of the same ``model`` and ``scope``; nan for the baseline itself, and where that is not known."""
    base = published[published["method"] == baseline].set_index(["model", "scope"])["value"]
    return [
        math.nan if row.method == baseline else row.value - base.get((row.model, row.scope), math.nan)
        for row in published.itertuples()
    ]
