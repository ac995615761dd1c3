"""Tables, figures and verdicts of domain generalisation."""

from __future__ import annotations

from benchmarks.domainbed.definition import ImageDefinition, SetEntry
from benchmarks.domainbed.figures import draw_accuracy, draw_confusion, draw_routing, draw_samples
from benchmarks.domainbed.outcomes import DomainOutcomes
from benchmarks.domainbed.tables import SET_TABLES, TABLES, verdicts
from benchmarks.harness.config.kinds import Benchmark
from benchmarks.harness.config.runs import Run
from benchmarks.harness.report.presentation import Presentation, make

_NOTE = (
    "In points, mean over paired trials of the mean over held-out environments, with its 95 % confidence interval; verdicts by paired t-tests at 5 %, corrected by Holm's procedure over a method's "
    "sets, not over methods. With two trials a test rests on two differences: read it as a hint."
)
_FIGURES = {
    "accuracy": draw_accuracy,
    "samples": draw_samples,
    "confusion": draw_confusion,
    "routing": draw_routing,
}


def present(benchmark: Benchmark[ImageDefinition, SetEntry], runs: list[Run]) -> Presentation:
    """Present finished runs."""
    outcomes = DomainOutcomes(benchmark, runs)
    parts = {name: make(benchmark, SET_TABLES, _FIGURES, outcomes, name, part=name) for name in outcomes.sets}
    return make(
        benchmark,
        TABLES,
        {},
        outcomes,
        verdicts=list(verdicts(outcomes)),
        note=_NOTE,
        compared=outcomes.compared,
        parts=parts,
    )
