"""Present text benchmarks: full fine-tuning, adapters, and benchmarks from a csv."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from benchmarks.harness.base import DefinitionError
from benchmarks.harness.config.benchmark import AnyBenchmark
from benchmarks.harness.config.runs import Run
from benchmarks.harness.report.presentation import NOTE, Figure, Presentation, make
from benchmarks.harness.report.table import Table
from benchmarks.harness.results.records import read_metrics
from benchmarks.text.ablations import Ablations
from benchmarks.text.definition import ID, OOD
from benchmarks.text.figures import draw_scores, draw_traces, draw_usage_by_set
from benchmarks.text.tables import TABLES, verdicts

USAGE = Figure(
    draw_usage_by_set,
    "Use of experts by set after training, divided by the expert's mean use, for the first seed. The training set is "
    "first. Triangles mark use above (▲) or below (▼) chance, by shuffled rows at 5 % over the whole panel. Dots mark "
    "shared experts: every set uses them above the average and equally.",
)
FIGURES = {
    "ood": Figure(
        partial(draw_scores, domains=[ID, OOD], by_task=True),
        "Scores by method and evaluation set. Each panel has one training domain and one evaluation domain. The dashed "
        "line is the baseline's mean. All panels share one axis, which does not start at zero.",
    ),
    "scores": Figure(
        partial(draw_scores, domains=[ID]),
        "Scores by method and training task. The dashed line is the baseline's mean. All panels share one axis, which "
        "does not start at zero.",
    ),
    "traces": Figure(
        draw_traces,
        "Loads of experts over training, divided by the mean load, for the first seed: rows are windows of steps, "
        "columns are experts. The paper's panels show QNLI, 16 experts, 330 windows of 100 steps (Fig. 6 of the first "
        "version); their model, and its tuning with adapters, are our interpretation.",
    ),
    "usage": USAGE,
}


def present(benchmark: AnyBenchmark, runs: list[Run]) -> Presentation:
    """Present finished runs."""
    check_same_parameters([run for run in runs if run.spec["training"]["lora"]])
    optimizer = "AdamW, linear decay, no clipping"
    return present_text(benchmark, Ablations(benchmark, runs), TABLES, FIGURES, optimizer)


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
    ablations: Ablations,
    tables: Mapping[str, Callable[..., Table]],
    figures: Mapping[str, Figure],
    optimizer: str,
) -> Presentation:
    """Present a text benchmark: tables, figures, ablations, and a verdict on every method."""
    return make(
        benchmark,
        {**tables, **ablations.tables},
        {**figures, **ablations.figures},
        ablations.usual,
        verdicts=list(verdicts(ablations.usual)),
        note=NOTE,
        optimizer=optimizer,
        shows_labels=True,
        claim_numbers=ablations.claim_numbers,
    )
