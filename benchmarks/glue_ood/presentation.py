"""Tables, figures and verdicts out of distribution."""

from __future__ import annotations

from pathlib import Path

from benchmarks.harness.comparison import OOD, Comparison, ranked
from benchmarks.harness.definition import Benchmark, DefinitionError
from benchmarks.harness.figures import panels_by_model, rank_diagram, score_panels
from benchmarks.harness.paper_tables import paper_table, rank_table
from benchmarks.harness.presentation import NOTE, Presentation
from benchmarks.harness.runs import Run
from benchmarks.harness.tables import TextTables


def present(benchmark: Benchmark, runs: list[Run]) -> Presentation:
    """Present finished runs."""
    comparison = Comparison(benchmark, runs)
    tables = TextTables(comparison)
    rankings = ranked(comparison, benchmark.definition["ranked"], ["protocol", "model"])
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
