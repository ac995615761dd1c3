"""The benchmark's tables, figure and verdicts: those of every text benchmark."""

from __future__ import annotations

import functools

from benchmarks.harness.definition import Benchmark
from benchmarks.harness.figures import ood_by_method_and_domain
from benchmarks.harness.presentation import Presentation
from benchmarks.harness.runs import Run
from benchmarks.harness.tables import BenchmarkTables


def present(benchmark: Benchmark, runs: list[Run]) -> Presentation:
    """Present finished runs."""
    tables = BenchmarkTables(benchmark, runs)
    return Presentation(
        tables.all(),
        list(tables.verdicts()),
        "In points, mean over paired seeds with its 95 % confidence interval, not corrected for the number of comparisons. With two seeds an "
        "interval rests on two differences: read it as a hint.",
        functools.partial(ood_by_method_and_domain, benchmark, tables.clean),
    )
