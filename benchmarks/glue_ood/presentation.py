"""Tables, figures and verdicts out of distribution."""

from __future__ import annotations

from pathlib import Path

from benchmarks.glue_ood.definition import EvaluationDefinition
from benchmarks.harness.base.errors import DefinitionError
from benchmarks.harness.planning.kinds import Benchmark
from benchmarks.harness.planning.runs import Run
from benchmarks.harness.reporting.plots import score_panels
from benchmarks.harness.reporting.presentation import NOTE, Presentation
from benchmarks.text.comparison import OOD, Comparison, ranked
from benchmarks.text.definition import TaskEntry
from benchmarks.text.figures import panels_by_model, rank_diagram
from benchmarks.text.paper_tables import paper_table, rank_table
from benchmarks.text.tables import TextTables


def present(benchmark: Benchmark[EvaluationDefinition, TaskEntry], runs: list[Run]) -> Presentation:
    """Present finished runs."""
    comparison = Comparison(benchmark, runs)
    tables = TextTables(comparison)
    rankings = ranked(comparison, benchmark.definition.ranked, ["protocol", "model"])
    if not rankings:
        raise DefinitionError(f"{benchmark.file}: 'ranked' names no method that the suite runs")

    def draw(folder: Path) -> None:
        rank_diagram(comparison, rankings, folder / f"{benchmark.name}_ranks")
        score_panels(comparison, panels_by_model(comparison, OOD), folder / f"{benchmark.name}_scores")

    return Presentation(
        [rank_table(comparison, rankings), tables.tasks("scores", OOD), tables.tests(), paper_table(comparison, OOD)],
        list(tables.verdicts()),
        NOTE,
        draw,
    )
