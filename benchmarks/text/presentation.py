"""Tables, figure and verdicts of full fine-tuning, and of text benchmarks without a presentation of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from benchmarks.harness.config.benchmark import AnyBenchmark
from benchmarks.harness.config.runs import Run
from benchmarks.harness.report.presentation import NOTE, Presentation, make
from benchmarks.harness.report.table import Table
from benchmarks.text.ablations import Ablations
from benchmarks.text.figures import scores_by_training_task
from benchmarks.text.tables import TABLES, verdicts
from benchmarks.text.trace_figures import draw_traces
from benchmarks.text.usage_figures import draw_usage_by_set

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
    """What a text benchmark shows of its runs: tables and figures of its own, those of its ablations, and a verdict on every method.

    Args:
        benchmark: its definition.
        ablations: of its runs.
        tables: by name, what makes it of the usual outcomes.
        figures: by name, what draws it of the usual outcomes.
    """
    return make(
        benchmark,
        {**tables, **ablations.tables},
        {**figures, **ablations.figures},
        ablations.usual,
        verdicts=list(verdicts(ablations.usual)),
        note=NOTE,
        compared=ablations.compared,
    )
