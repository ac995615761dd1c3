"""Present evaluations out of distribution."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from benchmarks.glue_ood.outcomes import EvaluationOutcomes
from benchmarks.glue_ood.ranks import ranks
from benchmarks.harness.config.benchmark import AnyBenchmark
from benchmarks.harness.report.presentation import Presentation
from benchmarks.harness.report.table import Table
from benchmarks.harness.results.records import Record
from benchmarks.text.definition import OOD
from benchmarks.text.outcomes import TextOutcomes
from benchmarks.text.presentation import present_text
from benchmarks.text.routing import USAGE, usage_table
from benchmarks.text.tables import paper_table, tasks_table, tests_table

TABLES: dict[str, Callable[[TextOutcomes], Table]] = {
    "ranks": ranks,
    "scores": partial(tasks_table, domain=OOD),
    "tests": tests_table,
    "usage": usage_table,
    "paper": partial(paper_table, domain=OOD),
}
FIGURES = {"usage": USAGE}


def present(benchmark: AnyBenchmark, records: Sequence[Record]) -> Presentation:
    """Make the tables, figures and verdicts of a benchmark's finished runs."""
    outcomes = EvaluationOutcomes(benchmark, records)
    return present_text(outcomes, TABLES, FIGURES, optimizer="")
