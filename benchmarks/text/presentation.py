"""Present full fine-tuning, and text benchmarks without a presentation of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from benchmarks.harness.config.benchmark import AnyBenchmark
from benchmarks.harness.config.runs import Run
from benchmarks.harness.report.presentation import NOTE, Presentation, make
from benchmarks.harness.report.table import Table
from benchmarks.text.ablations import Ablations
from benchmarks.text.figures import draw_traces, draw_usage_by_set, scores_by_training_task
from benchmarks.text.tables import TABLES, verdicts

FIGURES = {"ood": scores_by_training_task, "traces": draw_traces, "usage": draw_usage_by_set}


def present(benchmark: AnyBenchmark, runs: list[Run]) -> Presentation:
    """Present finished runs."""
    return shown(benchmark, Ablations(benchmark, runs), TABLES, FIGURES)


def shown(
    benchmark: AnyBenchmark,
    ablations: Ablations,
    tables: Mapping[str, Callable[..., Table]],
    figures: Mapping[str, Callable[..., None]],
) -> Presentation:
    """Present a text benchmark: its tables and figures, those of its ablations, and a verdict on every method."""
    return make(
        benchmark,
        {**tables, **ablations.tables},
        {**figures, **ablations.figures},
        ablations.usual,
        verdicts=list(verdicts(ablations.usual)),
        note=NOTE,
        compared=ablations.compared,
    )
