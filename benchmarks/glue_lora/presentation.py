"""Present tuning by adapters."""

from __future__ import annotations

from benchmarks.harness.base import DefinitionError
from benchmarks.harness.config.benchmark import Benchmark
from benchmarks.harness.config.runs import Run
from benchmarks.harness.report.presentation import Presentation
from benchmarks.harness.results.records import read_metrics
from benchmarks.text.ablations import Ablations
from benchmarks.text.definition import TaskEntry, TextDefinition
from benchmarks.text.figures import draw_traces, id_scores
from benchmarks.text.presentation import shown
from benchmarks.text.tables import TABLES

FIGURES = {"scores": id_scores, "traces": draw_traces}
# what every row trains; the rest is what the row is about
_SHARED = ("adapters", "head")


def present(benchmark: Benchmark[TextDefinition, TaskEntry], runs: list[Run]) -> Presentation:
    """Present finished runs.

    Raises:
        DefinitionError: Two rows of a model do not train the same adapters and head.
    """
    check_same_trained(runs)
    return shown(benchmark, Ablations(benchmark, runs), TABLES, FIGURES)


def check_same_trained(runs: list[Run]) -> None:
    """Check that all rows of a model train the same adapters and the same head.

    Raises:
        DefinitionError: Two runs do not.
    """
    first: dict[tuple[str, str], tuple[Run, object]] = {}
    for run in runs:
        trained = read_metrics(run)["model"]["trained"]
        groups = [trained[group] for group in _SHARED]
        key = (run.spec["model"]["name"], str(len(run.spec["task"]["labels"])))
        other, expected = first.setdefault(key, (run, groups))
        if groups != expected:
            raise DefinitionError(
                f"{run.folder} and {other.folder} train other adapters or another head: they cannot be compared"
            )
