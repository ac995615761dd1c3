"""Do finished runs give their numbers once more? Executes them again in a temporary folder; what they wrote stays as it is."""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness.base.errors import DefinitionError
from benchmarks.harness.base.paths import RUNS
from benchmarks.harness.config.runs import Run
from benchmarks.harness.results.records import read_metrics
from benchmarks.harness.results.reference import Reference, read_tolerances
from benchmarks.harness.results.regression import Comparison, as_reference, judge
from benchmarks.harness.run.repetition import Repetition, borrow, prepare_folder, repeat
from benchmarks.harness.training.progress import clock


@dataclass(frozen=True)
class Repeated:
    """What came of running runs again.

    Attributes:
        before: the numbers of those that did not fail.
        after: the same, once more.
        failed: the last line of the log of each that failed, by its id.
    """

    before: Reference
    after: Reference
    failed: dict[str, str]


@dataclass(frozen=True)
class Verification:
    """What :func:`verify` found.

    Attributes:
        runs: ids of those that were run again.
        comparison: of their numbers; None where all failed.
        failed: the last line of the log of each that failed, by its id.
    """

    runs: tuple[str, ...]
    comparison: Comparison | None
    failed: dict[str, str]

    @property
    def passed(self) -> bool:
        return not self.failed and self.comparison is not None and self.comparison.passed

    def to_json(self) -> str:
        """All of it, for programs."""
        comparison = json.loads(self.comparison.to_json()) if self.comparison else None
        content = {"passed": self.passed, "runs": self.runs, "failed": self.failed, "comparison": comparison}
        return json.dumps(content, indent=1, allow_nan=False)

    def __str__(self) -> str:
        lines = [f"again    {name}" for name in self.runs if name not in self.failed]
        lines += [f"failed   {name}: {last}" for name, last in self.failed.items()]
        return "\n".join([*lines, *([str(self.comparison)] if self.comparison else [])])


def verify(runs: Sequence[Run], suite: str, count: int, seed: int, say: Callable[[str], None] = print) -> Verification:
    """Execute some finished runs again, drawn at random, and compare every number.

    Numbers of the same machine have to be equal to the last digit, those of another within the measured spread.

    Args:
        runs: of the suite.
        suite: its name, for its spreads.
        count: how many are drawn; all, where fewer are finished.
        seed: of the drawing.
        say: where to say what is going on.

    Raises:
        DefinitionError: no run is finished, a file is damaged, or the machine is another one and no spread was measured.
    """
    finished = [run for run in runs if (RUNS / run.folder / "metrics.json").exists()]
    if not finished:
        raise DefinitionError(
            f"no run of the suite '{suite}' is finished below {RUNS}: `snakemake --cores all --config suite={suite}`"
        )
    chosen = random.Random(seed).sample(finished, min(count, len(finished)))
    repeated = run_again(chosen, say)
    comparison = None
    if len(repeated.failed) < len(chosen):
        comparison = judge(repeated.before, repeated.after, lambda: read_tolerances(suite))
    return Verification(tuple(run.id for run in chosen), comparison, repeated.failed)


def run_again(runs: Sequence[Run], say: Callable[[str], None] = print) -> Repeated:
    """Execute finished runs once more in a temporary folder, under as many threads as they had.

    Raises:
        DefinitionError: a run's file is damaged, or does not say on what it ran.
    """
    found = {run.id: read_metrics(run) for run in runs}
    try:
        threads = {name: int(content["environment"]["threads"]) for name, content in found.items()}
        seconds = sum(float(content["cost"]["job_seconds"]) for content in found.values())
    except (KeyError, TypeError, ValueError) as error:
        raise DefinitionError(
            f"runs below {RUNS} do not say on what they ran ({error!r}): they were made by older code; delete them and run them again"
        ) from error
    say(f"running {len(runs)} runs again, about {clock(seconds)}")
    with tempfile.TemporaryDirectory(prefix="again-") as temporary:
        folder = Path(temporary).resolve()
        prepare_folder(folder)
        for run in runs:
            borrow(run.spec.get("candidates", ()), folder)
        failed = {one.run.id: one.last for one in repeat([Repetition(run, folder, threads[run.id]) for run in runs])}
        kept = [run for run in runs if run.id not in failed]
        return Repeated(
            as_reference([(run, found[run.id]) for run in kept]),
            as_reference([(run, read_metrics(run, folder / RUNS)) for run in kept]),
            failed,
        )
