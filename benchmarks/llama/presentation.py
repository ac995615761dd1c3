"""Tables, figures and verdicts of instruction tuning."""

from __future__ import annotations

from pathlib import Path

from benchmarks.harness.planning.kinds import Benchmark
from benchmarks.harness.planning.runs import Run
from benchmarks.harness.planning.schema import check_names
from benchmarks.harness.reporting.presentation import Presentation
from benchmarks.llama.definition import InstructionDefinition, InstructionSet
from benchmarks.llama.figures import draw_categories, draw_curves, draw_routing
from benchmarks.llama.outcomes import Outcomes
from benchmarks.llama.tables import instruction_tables, verdicts

_NOTE = (
    "Losses are paired by seed, with a 95 % confidence interval over seeds where there are several; accuracies are paired by question, with an interval over questions, corrected by Holm's procedure over the tasks "
    "of a row, not over rows."
)
_DRAWERS = {"curves": draw_curves, "categories": draw_categories, "routing": draw_routing}


def present(benchmark: Benchmark[InstructionDefinition, InstructionSet], runs: list[Run]) -> Presentation:
    """Present finished runs."""
    outcomes = Outcomes(benchmark, runs)
    definition = benchmark.definition
    check_names(f"{benchmark.file}: '", "figures", definition.figures, _DRAWERS)

    def draw(folder: Path) -> None:
        for figure in definition.figures:
            _DRAWERS[figure](outcomes, folder / f"{benchmark.name}_{figure}")

    return Presentation(instruction_tables(outcomes, definition.tables), list(verdicts(outcomes)), _NOTE, draw)
