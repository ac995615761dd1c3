"""Tables, figures and verdicts of instruction tuning."""

from __future__ import annotations

from benchmarks.harness.config.benchmark import Benchmark
from benchmarks.harness.config.runs import Run
from benchmarks.harness.report.presentation import Presentation, make
from benchmarks.llama.definition import InstructionDefinition, InstructionSet
from benchmarks.llama.figures import draw_categories, draw_curves, draw_routing
from benchmarks.llama.outcomes import InstructionOutcomes
from benchmarks.llama.tables import TABLES, verdicts

_NOTE = (
    "Losses are paired by seed, with a 95 % confidence interval over seeds where there are several; accuracies are "
    "paired by question, with an interval over questions, corrected by Holm's procedure over the tasks "
    "of a row, not over rows."
)
FIGURES = {"curves": draw_curves, "categories": draw_categories, "routing": draw_routing}


def present(benchmark: Benchmark[InstructionDefinition, InstructionSet], runs: list[Run]) -> Presentation:
    """Present finished runs."""
    outcomes = InstructionOutcomes(benchmark, runs)
    return make(
        benchmark,
        TABLES,
        FIGURES,
        outcomes,
        verdicts=list(verdicts(outcomes)),
        note=_NOTE,
        compared=outcomes.compared,
    )
