"""Determine if a suite's runs are finished, running, failed or missing. Reads files and changes nothing."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from benchmarks.harness.base import LOCK, LOG, RUNS, is_held, read_json
from benchmarks.harness.config.runs import Run
from benchmarks.harness.config.suite import Suite
from benchmarks.harness.report.listing import format_rows
from benchmarks.harness.results.content import Metrics, rerun_advice

State = Literal["finished", "running", "failed", "missing"]


@dataclass(frozen=True)
class RunStatus:
    """The status of one run.

    Attributes:
        run: The run.
        state: ``finished`` if its numbers exist, ``running`` if a process holds its lock, ``failed`` if it was begun
            and has neither, else ``missing``.
        last: The last line of the log of a running or failed run.
        silent: The number of seconds since that line was written.
    """

    run: Run
    state: State
    last: str = ""
    silent: float | None = None

    def __str__(self) -> str:
        ago = "" if self.silent is None else f" ({self.silent:.0f} s ago)"
        return f"{self.state:<8} {self.run.name}: {self.last or 'its log is empty'}{ago}"


def describe(suite: Suite) -> str:
    """Describe the runs of a suite: a table of counts, and the last line of running and failed runs."""
    statuses = [run_status(run) for run in suite.runs]
    rows = [count(name, statuses) for name in suite.settings.benchmarks]
    running = [str(status) for status in statuses if status.state == "running"]
    failed = [str(status) for status in statuses if status.state == "failed"]
    return "\n".join([format_rows(rows), *running, *failed])


def run_status(run: Run) -> RunStatus:
    """Return the status of a run."""
    folder = RUNS / run.folder
    is_running = is_held(
        folder / LOCK
    )  # checked first: a run writes its numbers before it releases its lock
    if (folder / "metrics.json").exists():
        return RunStatus(run, "finished")
    log = folder / LOG
    if not log.is_file():
        return RunStatus(run, "running" if is_running else "missing")
    lines = log.read_text(errors="replace").split("\n")  # a progress bar's states are lines, too
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return RunStatus(
        run, "running" if is_running else "failed", last, time.time() - log.stat().st_mtime
    )


def count(benchmark: str, statuses: Sequence[RunStatus]) -> dict[str, str | int | float | None]:
    """Count the runs of a benchmark by state, with the median seconds of the finished ones."""
    members = [status for status in statuses if status.run.benchmark == benchmark]
    states = Counter(status.state for status in members)
    files = [
        RUNS / status.run.folder / "metrics.json"
        for status in members
        if status.state == "finished"
    ]
    seconds = [read_json(file, Metrics, rerun_advice(file)).cost.job_seconds for file in files]
    row = {state: states[state] for state in get_args(State)}
    return {
        "benchmark": benchmark,
        **row,
        "median_seconds": round(statistics.median(seconds), 1) if seconds else None,
    }
