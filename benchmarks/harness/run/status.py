"""Determine which runs of a suite are finished, running, failed or missing.

This module reads files and changes nothing.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from benchmarks.harness import base as paths
from benchmarks.harness.base import is_held, read_json
from benchmarks.harness.config.runs import Run
from benchmarks.harness.config.suite import Suite
from benchmarks.harness.report.closing import closing_lines
from benchmarks.harness.report.listing import format_rows
from benchmarks.harness.results.content import Metrics, rerun_advice

State = Literal["finished", "running", "failed", "missing"]


@dataclass(frozen=True)
class RunStatus:
    """The status of one run.

    Attributes:
        run: The run.
        state: ``finished`` if its numbers exist; else ``running`` if a process holds its lock;
            else ``failed`` if its log exists; else ``missing``.
        last_line: The last line in the log of a running or failed run; empty if there is none.
        seconds_silent: The number of seconds since the log was last written; None without a log.
    """

    run: Run
    state: State
    last_line: str = ""
    seconds_silent: float | None = None

    def __str__(self) -> str:
        run = f"{self.state:<8} {self.run.name}"
        if self.seconds_silent is None:
            return f"{run}: it has no log yet"
        last_line = self.last_line or "its log is empty"
        return f"{run}: {last_line} ({self.seconds_silent:.0f} s ago)"


def describe_runs(suite: Suite) -> str:
    """Describe a suite's runs: a table of counts, and a line for each running or failed run.

    If all runs are finished, the description ends with what to open next, and with the verdicts. If
    none has started, it ends with the command that runs the suite.
    """
    statuses = [run_status(run) for run in suite.runs]
    counts = [state_counts(name, statuses) for name in suite.settings.benchmarks]
    running = [str(status) for status in statuses if status.state == "running"]
    failed = [str(status) for status in statuses if status.state == "failed"]
    lines = [format_rows(counts), *running, *failed]

    if all(status.state == "missing" for status in statuses):
        lines.append(f"No run has started. Run the suite: make run SUITE={suite.name}")
    elif all(status.state == "finished" for status in statuses):
        lines.extend(closing_lines(suite))
    return "\n".join(lines)


def run_status(run: Run) -> RunStatus:
    """Determine the state of a run, and the last line of its log if it is running or failed."""
    folder = paths.RUNS / run.folder
    # checked before metrics.json: a run that writes it and ends between the two checks would
    # otherwise have neither numbers nor a lock, and would look failed
    is_running = is_held(folder / paths.LOCK)
    if run.metrics_file.exists():
        return RunStatus(run, "finished")
    log = folder / paths.LOG
    has_log = log.is_file()
    state: State
    if is_running:
        state = "running"
    elif has_log:
        state = "failed"
    else:
        state = "missing"
    if not has_log:
        return RunStatus(run, state)
    seconds_silent = time.time() - log.stat().st_mtime
    return RunStatus(run, state, last_line=_last_line(log), seconds_silent=seconds_silent)


def _last_line(log: Path) -> str:
    """Return the last line of a log that is not blank; empty if all lines are blank."""
    # a progress bar overwrites its line with "\r", which read_text() turns into a line end
    lines = log.read_text(errors="replace").split("\n")
    for line in reversed(lines):
        text = line.strip()
        if text:
            return text
    return ""


def state_counts(
    benchmark: str, statuses: Sequence[RunStatus]
) -> dict[str, str | int | float | None]:
    """Count the runs of a benchmark in each state, and compute the finished runs' median time.

    Args:
        benchmark: The name of the benchmark.
        statuses: The statuses of the runs of all benchmarks.

    Returns:
        A row of the table: ``benchmark``, a count for each state, and ``median_seconds``, which is
        None without finished runs.
    """
    num_runs: Counter[State] = Counter()  # by state
    job_seconds = []  # of the finished runs
    for status in statuses:
        if status.run.benchmark != benchmark:
            continue
        num_runs[status.state] += 1
        if status.state == "finished":
            file = status.run.metrics_file
            metrics = read_json(file, Metrics, rerun_advice(file))
            job_seconds.append(metrics.cost.job_seconds)
    median_seconds = None
    if job_seconds:
        median_seconds = round(statistics.median(job_seconds), 1)
    return {
        "benchmark": benchmark,
        "finished": num_runs["finished"],
        "running": num_runs["running"],
        "failed": num_runs["failed"],
        "missing": num_runs["missing"],
        "median_seconds": median_seconds,
    }
