"""Present text benchmarks: full fine-tuning, adapters, and benchmarks from a csv."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from benchmarks.harness.base import DefinitionError
from benchmarks.harness.config.benchmark import AnyBenchmark
from benchmarks.harness.config.runs import Run
from benchmarks.harness.report.presentation import NOTE, Figure, Presentation
from benchmarks.harness.report.table import Table
from benchmarks.harness.results.records import read_metrics
from benchmarks.text.ablations import ablation_figure, ablation_table
from benchmarks.text.figures import USAGE
from benchmarks.text.outcomes import TextOutcomes
from benchmarks.text.tables import TABLES, verdicts
from benchmarks.text.traces import TRACES, trace_table

TABLES["traces"] = trace_table
FIGURES = {"usage": USAGE, "traces": TRACES}


def present(benchmark: AnyBenchmark, runs: list[Run]) -> Presentation:
    """Present finished runs."""
    check_same_parameters([run for run in runs if run.spec["training"]["lora"]])
    return present_text(benchmark, runs, TABLES, FIGURES, optimizer="AdamW, linear decay, no clipping")


def check_same_parameters(runs: list[Run]) -> None:
    """Raise :class:`DefinitionError` if rows of one model train different adapters or heads."""
    first: dict[tuple[str, str], tuple[Run, object]] = {}
    for run in runs:
        trained = read_metrics(run)["model"]["trained"]
        groups = [trained["adapters"], trained["head"]]  # other groups may differ between rows
        key = (run.spec["model"]["name"], str(len(run.spec["task"]["labels"])))
        other, expected = first.setdefault(key, (run, groups))
        if groups != expected:
            raise DefinitionError(
                f"{run.folder} and {other.folder} train other adapters or another head: they cannot be compared"
            )


def present_text(
    benchmark: AnyBenchmark,
    runs: list[Run],
    tables: Mapping[str, Callable[..., Table]],
    figures: Mapping[str, Figure],
    optimizer: str,
) -> Presentation:
    """Present a text benchmark: tables, figures, ablations, and a verdict on every method."""
    outcomes, ablations = TextOutcomes(benchmark, runs), benchmark.definition.ablations
    return Presentation(
        benchmark,
        {**tables, **{name: partial(ablation_table, name=name) for name in ablations}},
        {**figures, **{name: ablation_figure(outcomes, name) for name in ablations}},
        outcomes,
        verdicts=list(verdicts(outcomes)),
        note=NOTE,
        optimizer=optimizer,
    )
