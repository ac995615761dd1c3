"""Tables, figure and verdicts of full fine-tuning, and of text benchmarks without a presentation of their own."""

from __future__ import annotations

from pathlib import Path

from benchmarks.harness.planning.kinds import Benchmark
from benchmarks.harness.planning.runs import Run
from benchmarks.harness.reporting.plots import score_panels
from benchmarks.harness.reporting.presentation import NOTE, Presentation
from benchmarks.text.comparison import Comparison
from benchmarks.text.definition import TaskEntry, TextDefinition
from benchmarks.text.figures import panels_by_training_task
from benchmarks.text.tables import TextTables


def present(benchmark: Benchmark[TextDefinition, TaskEntry], runs: list[Run]) -> Presentation:
    """Present finished runs."""
    comparison = Comparison(benchmark, runs)
    tables = TextTables(comparison)

    def draw(folder: Path) -> None:
        for figure in benchmark.definition.figures:
            score_panels(comparison, panels_by_training_task(comparison), folder / f"{benchmark.name}_{figure}")

    names = benchmark.definition.tables
    return Presentation(tables.named(names), list(tables.verdicts()), NOTE, draw)
