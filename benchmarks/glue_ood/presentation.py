"""Present evaluations out of distribution."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import cast

from benchmarks.glue_ood.definition import EvaluationDefinition
from benchmarks.harness.config.benchmark import Benchmark
from benchmarks.harness.config.runs import Run
from benchmarks.harness.report.presentation import Presentation
from benchmarks.harness.report.table import Table
from benchmarks.text.ablations import Ablations
from benchmarks.text.definition import TaskEntry
from benchmarks.text.figures import draw_usage_by_set, ood_scores, rank_diagram
from benchmarks.text.grid import OOD
from benchmarks.text.outcomes import Ranked, TextOutcomes, ranked
from benchmarks.text.presentation import shown
from benchmarks.text.tables import paper, ranks, tasks, tests, usage_table


def _rankings(outcomes: TextOutcomes) -> list[Ranked]:
    definition = cast(EvaluationDefinition, outcomes.benchmark.definition)
    rankings = ranked(outcomes, definition.ranked, ["protocol", "model"])
    return [ranking for ranking in rankings if not ranking.scores.empty]


def _ranks(outcomes: TextOutcomes) -> Table:
    return ranks(outcomes, _rankings(outcomes))


def _scores(outcomes: TextOutcomes) -> Table:
    return tasks(outcomes, OOD)


def _paper(outcomes: TextOutcomes) -> Table:
    return paper(outcomes, OOD)


def _draw_ranks(outcomes: TextOutcomes, path: Path) -> None:
    rank_diagram(outcomes, path, _rankings(outcomes))


TABLES: dict[str, Callable[[TextOutcomes], Table]] = {
    "ranks": _ranks,
    "scores": _scores,
    "tests": tests,
    "usage": usage_table,
    "paper": _paper,
}
FIGURES: dict[str, Callable[[TextOutcomes, Path], None]] = {
    "ranks": _draw_ranks,
    "scores": ood_scores,
    "usage": draw_usage_by_set,
}


def present(benchmark: Benchmark[EvaluationDefinition, TaskEntry], runs: list[Run]) -> Presentation:
    """Present finished runs."""
    return shown(benchmark, Ablations(benchmark, runs), TABLES, FIGURES)
