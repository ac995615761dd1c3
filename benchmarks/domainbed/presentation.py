"""Tables, figures and verdicts of domain generalisation."""

from __future__ import annotations

from pathlib import Path

from benchmarks.domainbed.definition import ImageDefinition, SetEntry
from benchmarks.domainbed.figures import draw_accuracy, draw_confusion, draw_routing, draw_samples
from benchmarks.domainbed.outcomes import Outcomes
from benchmarks.domainbed.tables import domain_tables, set_tables, verdicts
from benchmarks.harness.planning.kinds import Benchmark
from benchmarks.harness.planning.runs import Run
from benchmarks.harness.planning.schema import check_names
from benchmarks.harness.reporting.presentation import Part, Presentation

_NOTE = (
    "In points, mean over paired trials of the mean over held-out environments, with its 95 % confidence interval; verdicts by paired t-tests at 5 %, corrected by Holm's procedure over a method's "
    "sets, not over methods. With two trials a test rests on two differences: read it as a hint."
)
_DRAWERS = {
    "accuracy": draw_accuracy,
    "samples": draw_samples,
    "confusion": draw_confusion,
    "routing": draw_routing,
}


def present(benchmark: Benchmark[ImageDefinition, SetEntry], runs: list[Run]) -> Presentation:
    """Present finished runs."""
    outcomes = Outcomes(benchmark, runs)
    definition = benchmark.definition
    check_names(f"{benchmark.file}: '", "set_figures", definition.set_figures, _DRAWERS)
    return Presentation(
        domain_tables(outcomes, definition.tables),
        list(verdicts(outcomes)),
        _NOTE,
        parts={name: _part(outcomes, name) for name in outcomes.sets},
    )


def _part(outcomes: Outcomes, name: str) -> Part:
    def draw(folder: Path) -> None:
        for figure in outcomes.benchmark.definition.set_figures:
            _DRAWERS[figure](outcomes, name, folder / f"{outcomes.benchmark.name}_{name}_{figure}")

    return Part(set_tables(outcomes, name, outcomes.benchmark.definition.set_tables), draw)
