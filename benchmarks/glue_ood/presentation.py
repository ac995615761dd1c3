"""Present evaluations out of distribution."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from benchmarks.glue_ood.definition import EvaluationDefinition
from benchmarks.harness.base.errors import DefinitionError
from benchmarks.harness.config.kinds import Benchmark
from benchmarks.harness.config.runs import Run
from benchmarks.harness.report.presentation import Presentation
from benchmarks.harness.report.rendering import Table
from benchmarks.text.ablations import Ablations
from benchmarks.text.definition import TaskEntry
from benchmarks.text.figures import draw_usage_by_set, ood_scores, rank_diagram
from benchmarks.text.grid import OOD
from benchmarks.text.outcomes import ranked
from benchmarks.text.presentation import shown
from benchmarks.text.tables import paper, ranks, tasks, tests, usage_table


def present(benchmark: Benchmark[EvaluationDefinition, TaskEntry], runs: list[Run]) -> Presentation:
    """Present finished runs.

    Raises:
        DefinitionError: The suite runs no method that is ranked.
    """
    ablations = Ablations(benchmark, runs)
    rankings = ranked(ablations.usual, benchmark.definition.ranked, ["protocol", "model"])
    if not rankings:
        raise DefinitionError(f"{benchmark.file}: 'ranked' names no method that the suite runs")
    tables: dict[str, Callable[..., Table]] = {
        "ranks": partial(ranks, rankings=rankings),
        "scores": partial(tasks, domain=OOD),
        "tests": tests,
        "usage": usage_table,
        "paper": partial(paper, domain=OOD),
    }
    figures: dict[str, Callable[..., None]] = {
        "ranks": partial(rank_diagram, rankings=rankings),
        "scores": ood_scores,
        "usage": draw_usage_by_set,
    }
    return shown(benchmark, ablations, tables, figures)
