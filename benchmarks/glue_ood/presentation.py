"""Present evaluations out of distribution."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import cast

from benchmarks.glue_ood.definition import EvaluationDefinition
from benchmarks.harness.config.benchmark import AnyBenchmark
from benchmarks.harness.config.runs import Run
from benchmarks.harness.report.presentation import Figure, Presentation
from benchmarks.harness.report.table import Table
from benchmarks.text.ablations import Ablations
from benchmarks.text.definition import OOD
from benchmarks.text.figures import draw_scores, rank_diagram
from benchmarks.text.outcomes import Ranking, TextOutcomes, rank_methods
from benchmarks.text.presentation import USAGE, present_text
from benchmarks.text.tables import paper, ranks, tasks, tests, usage_table


def _rankings(outcomes: TextOutcomes) -> list[Ranking]:
    definition = cast(EvaluationDefinition, outcomes.benchmark.definition)
    rankings = rank_methods(outcomes, definition.ranked, ["protocol", "model"])
    return [ranking for ranking in rankings if not ranking.scores.empty]


def _ranks(outcomes: TextOutcomes) -> Table:
    return ranks(outcomes, _rankings(outcomes))


def _draw_ranks(outcomes: TextOutcomes, path: Path) -> None:
    rank_diagram(outcomes, path, _rankings(outcomes))


TABLES: dict[str, Callable[[TextOutcomes], Table]] = {
    "ranks": _ranks,
    "scores": partial(tasks, domain=OOD),
    "tests": tests,
    "usage": usage_table,
    "paper": partial(paper, domain=OOD),
}
FIGURES = {
    "ranks": Figure(
        _draw_ranks,
        "Mean rank over the OOD sets (left is better). Methods joined by a bar do not differ by Nemenyi's test at 5 %.",
    ),
    "scores": Figure(
        partial(draw_scores, domains=[OOD]),
        "Scores by method and OOD set. The dashed line is the baseline's mean. All panels share one axis, which does "
        "not start at zero.",
    ),
    "usage": USAGE,
}


def present(benchmark: AnyBenchmark, runs: list[Run]) -> Presentation:
    """Present finished runs."""
    return present_text(benchmark, Ablations(benchmark, runs), TABLES, FIGURES, optimizer="")
