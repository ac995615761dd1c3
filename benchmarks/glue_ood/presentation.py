"""Tables, figures and verdicts out of distribution."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from benchmarks.glue_ood.definition import EvaluationDefinition
from benchmarks.harness.config.kinds import Benchmark
from benchmarks.harness.config.runs import Run
from benchmarks.harness.report.presentation import Presentation
from benchmarks.harness.report.rendering import Table
from benchmarks.text.ablations import Ablations
from benchmarks.text.definition import TaskEntry
from benchmarks.text.figures import ood_scores, rank_diagram
from benchmarks.text.grid import OOD
from benchmarks.text.outcomes import ranked
from benchmarks.text.paper_tables import paper, ranks
from benchmarks.text.presentation import shown
from benchmarks.text.tables import tasks, tests
from benchmarks.text.usage_figures import draw_usage_by_set
from benchmarks.text.usage_tables import usage_table


def present(benchmark: Benchmark[EvaluationDefinition, TaskEntry], runs: list[Run]) -> Presentation:
    """Present finished runs."""
    ablations = Ablations(benchmark, runs)
    rankings = ranked(ablations.usual, benchmark.definition.ranked, ["protocol", "model"])
    rankings = [ranking for ranking in rankings if not ranking.scores.empty]
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
