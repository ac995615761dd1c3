"""Present text benchmarks: full fine-tuning, tuning by adapters, and benchmarks made of a csv."""

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
    "Use of experts by set after training, over an expert's mean use, of the first seed; the set that the model was "
    "trained on stands first. Triangles mark what is more (▲) or less (▼) than shuffled rows explain at 5 % over the "
    "whole panel; dots below mark experts that every set uses above the average and alike.",
)
FIGURES = {
    "ood": Figure(
        partial(draw_scores, domains=[ID, OOD], by_task=True),
        "Scores by method and evaluation set. Each panel is a model trained on one domain and evaluated on one; the "
        "dashed line is the baseline's mean. All panels share one axis, which does not start at zero.",
    ),
    "scores": Figure(
        partial(draw_scores, domains=[ID]),
        "Scores by method and training task. The dashed line is the baseline's mean. All panels share one axis, which "
        "does not start at zero.",
    ),
    "traces": Figure(
        draw_traces,
        "Shares of experts over training, in windows of steps, of the first seed: a row a window, a column an expert, "
        "its load over the mean load. The paper's panels are of QNLI, 16 experts, 330 windows of 100 steps (Fig. 6 of "
        "the first version); which model they show, and that adapters tune it, is our reading.",
    ),
    "usage": USAGE,
}


def present(benchmark: AnyBenchmark, runs: list[Run]) -> Presentation:
    """Present finished runs."""
    check_same_trained([run for run in runs if run.spec["training"]["lora"]])
    optimizer = "AdamW, linear decay, no clipping"
    return shown(benchmark, Ablations(benchmark, runs), TABLES, FIGURES, optimizer)


def check_same_trained(runs: list[Run]) -> None:
    """Check that all rows of a model train the same adapters and the same head."""
    first: dict[tuple[str, str], tuple[Run, object]] = {}
    for run in runs:
        trained = read_metrics(run)["model"]["trained"]
        groups = [trained["adapters"], trained["head"]]  # the rest is what the row is about
        key = (run.spec["model"]["name"], str(len(run.spec["task"]["labels"])))
        other, expected = first.setdefault(key, (run, groups))
        if groups != expected:
            raise DefinitionError(
                f"{run.folder} and {other.folder} train other adapters or another head: they cannot be compared"
            )


def shown(
    benchmark: AnyBenchmark,
    ablations: Ablations,
    tables: Mapping[str, Callable[..., Table]],
    figures: Mapping[str, Figure],
    optimizer: str,
) -> Presentation:
    """Present a text benchmark: its tables and figures, those of its ablations, and a verdict on every method."""
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
