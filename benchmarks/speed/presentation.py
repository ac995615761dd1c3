"""Tables, figures and verdicts of the measurements."""

from __future__ import annotations

from benchmarks.harness.config.kinds import Benchmark
from benchmarks.harness.config.runs import Run
from benchmarks.harness.report.presentation import Presentation, make
from benchmarks.speed.definition import Measure, MeasurementDefinition
from benchmarks.speed.figures import draw_layer, draw_scaling
from benchmarks.speed.measurements import Measurements
from benchmarks.speed.tables import TABLES, verdicts

_NOTE = "Each ratio is the median over rounds in which all candidates ran in turn in one process. The middle here is the median over settings."
_FIGURES = {"layer": draw_layer, "scaling": draw_scaling}


def present(benchmark: Benchmark[MeasurementDefinition, Measure], runs: list[Run]) -> Presentation:
    """Present finished runs."""
    measured = Measurements(benchmark, runs)
    return make(
        benchmark,
        TABLES,
        _FIGURES,
        measured,
        verdicts=list(verdicts(measured)),
        note=_NOTE,
        compared=measured.compared,
    )
