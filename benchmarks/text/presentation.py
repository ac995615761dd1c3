"""Tables, figure and verdicts of full fine-tuning, and of text benchmarks without a presentation of their own."""

from __future__ import annotations

from benchmarks.harness.planning.kinds import Benchmark
from benchmarks.harness.planning.runs import Run
from benchmarks.harness.reporting.presentation import NOTE, Presentation, make
from benchmarks.text.ablations import Ablations
from benchmarks.text.definition import TaskEntry, TextDefinition
from benchmarks.text.figures import scores_by_training_task
from benchmarks.text.outcomes import TextOutcomes
from benchmarks.text.tables import TABLES, verdicts


def present(benchmark: Benchmark[TextDefinition, TaskEntry], runs: list[Run]) -> Presentation:
    """Present finished runs."""
    outcomes = TextOutcomes(benchmark, runs)
    ablations = Ablations(benchmark, runs, outcomes)
    return make(
        benchmark,
        {**TABLES, **ablations.tables},
        {"ood": scores_by_training_task, **ablations.figures},
        outcomes,
        verdicts=list(verdicts(outcomes)),
        note=NOTE,
        compared=ablations.compared,
    )
