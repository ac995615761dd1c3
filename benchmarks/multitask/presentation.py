"""Tables, figure and verdicts of models that learn several tasks at once."""

from __future__ import annotations

from benchmarks.harness.config.benchmark import Benchmark
from benchmarks.harness.config.runs import Run
from benchmarks.harness.report.presentation import NOTE, Presentation, make
from benchmarks.multitask.figures import draw_differences
from benchmarks.multitask.grid import MultitaskDefinition
from benchmarks.multitask.tables import TABLES, MultitaskOutcomes, verdicts
from benchmarks.text.definition import TaskEntry

FIGURES = {"differences": draw_differences}


def present(benchmark: Benchmark[MultitaskDefinition, TaskEntry], runs: list[Run]) -> Presentation:
    """Present finished runs."""
    outcomes = MultitaskOutcomes(benchmark, runs)
    return make(
        benchmark,
        TABLES,
        FIGURES,
        outcomes,
        verdicts=list(verdicts(outcomes)),
        note=NOTE,
        compared=outcomes.compared,
    )
