"""Tables, figures and sentences of pre-trained models as they are."""

from __future__ import annotations

from benchmarks.harness.config.benchmark import Benchmark
from benchmarks.harness.config.runs import Run
from benchmarks.harness.report.presentation import Presentation, make
from benchmarks.modularity.figures import draw_activations, draw_activations_3d, draw_concentration, draw_experts
from benchmarks.modularity.grid import ModularityDefinition
from benchmarks.modularity.tables import TABLES, ModularityOutcomes, verdicts
from benchmarks.text.definition import TaskEntry

FIGURES = {
    "activations": draw_activations,
    "activations_3d": draw_activations_3d,
    "concentration": draw_concentration,
    "experts": draw_experts,
}
_NOTE = "Nothing is trained, so that nothing varies but random partitions. A mark or a bit above chance says that experts are used differently, not that this helps."


def present(benchmark: Benchmark[ModularityDefinition, TaskEntry], runs: list[Run]) -> Presentation:
    """Present finished runs."""
    outcomes = ModularityOutcomes(benchmark, runs)
    return make(benchmark, TABLES, FIGURES, outcomes, verdicts=list(verdicts(outcomes)), note=_NOTE)
