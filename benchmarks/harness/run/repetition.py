"""Run finished runs once more, elsewhere: to see whether their numbers repeat, and what another processor makes of them."""

from __future__ import annotations

import gc
import importlib
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness.base.paths import LOG, RUNS
from benchmarks.harness.config.runs import Run
from benchmarks.harness.results.records import read_metrics
from benchmarks.harness.run.status import last_line


@dataclass(frozen=True)
class Repetition:
    """One run that is executed again.

    Attributes:
        run: which.
        folder: the working directory, with its own ``results``.
        threads: CPU threads.
        before: what is done in the process before the run.
    """

    run: Run
    folder: Path
    threads: int = 1
    before: Callable[[], None] | None = None

    @property
    def log(self) -> Path:
        """Where its output is."""
        return self.folder / RUNS / self.run.folder / LOG

    @property
    def last(self) -> str:
        """The last line of its output."""
        return last_line(self.log) if self.log.exists() else "it said nothing"


def prepare_folder(folder: Path) -> None:
    """Make a working directory in which runs find what all runs share: data, models and partitions."""
    folder.mkdir(parents=True, exist_ok=True)
    resources = folder / "resources"
    if not resources.is_symlink():
        resources.symlink_to(Path("resources").resolve())


def repeat(repetitions: Sequence[Repetition], *, jobs: int = 1) -> list[Repetition]:
    """Execute runs, each in a fork of this process, which has imported what they need and must not have computed yet.

    Args:
        repetitions: in the order in which they are begun.
        jobs: how many at a time.

    Returns:
        Those that failed; their logs say why.
    """
    for name in dict.fromkeys(repetition.run.spec["pipeline"] for repetition in repetitions):
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    waiting, running, failed = list(reversed(repetitions)), dict[int, Repetition](), list[Repetition]()
    while waiting or running:
        while waiting and len(running) < jobs:
            repetition = waiting.pop()
            running[_fork(repetition)] = repetition
        time.sleep(0.02)
        for child in list(running):
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                repetition = running.pop(child)
                failed += [repetition] if status else []
    return failed


def _fork(repetition: Repetition) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        _execute(repetition)
        status = 0
    except BaseException:
        repetition.log.parent.mkdir(parents=True, exist_ok=True)
        with repetition.log.open("a") as log:
            traceback.print_exc(file=log)
    finally:
        os._exit(status)


def _execute(repetition: Repetition) -> None:
    from benchmarks.harness.run.execution import execute

    began = time.time()
    os.chdir(repetition.folder)
    path = RUNS / repetition.run.folder / "run.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(repetition.run.to_json())
    if repetition.before is not None:
        repetition.before()
    with open(os.devnull, "w") as nowhere:  # noqa: PTH123 -- what a run says while it runs
        os.dup2(nowhere.fileno(), 2)
    execute(path, threads=repetition.threads, log=path.with_name(LOG), started=began)


def borrow(runs: Iterable[str], folder: Path) -> None:
    """Give a working directory finished runs of this one, by their folders, for runs that evaluate them."""
    for name in runs:
        target = folder / RUNS / name
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to((RUNS / name).resolve())


def cheapest(runs: Iterable[Run]) -> list[Run]:
    """Of every benchmark the finished run that took least time."""
    found: dict[str, tuple[float, Run]] = {}
    for run in runs:
        seconds = float(read_metrics(run)["cost"]["job_seconds"])
        if run.benchmark not in found or seconds < found[run.benchmark][0]:
            found[run.benchmark] = seconds, run
    return [run for _, run in found.values()]
