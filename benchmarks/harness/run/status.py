"""Determine if a suite's runs are finished, running, failed or missing. Reads files and changes nothing."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from benchmarks.harness.base import LOCK, LOG, RUNS, is_held, read_json
from benchmarks.harness.config.benchmark import load_benchmark
from benchmarks.harness.config.catalogue import load_models
from benchmarks.harness.config.listing import format_rows
from benchmarks.harness.config.runs import Run
from benchmarks.harness.config.suite import Suite

State = Literal["finished", "running", "failed", "missing"]
# dense TFLOP/s of the makers' data sheets: float32, and half precision
_DEVICES = {
    "one CPU core": (0.25, 0.25),
    "an RTX 4090": (83, 165),
    "an A100": (19.5, 312),
    "an H100": (67, 989),
}
_UTILIZATION = 0.15


@dataclass(frozen=True)
class RunStatus:
    """Hold the status of one run.

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
        return f"{self.state:<8} {self.run.folder}: {self.last or 'its log is empty'}{ago}"


def describe(suite: Suite) -> str:
    """Describe the runs of a suite: a table of counts, estimates, and the last line of running and failed runs."""
    statuses = [run_status(run) for run in suite.runs]
    rows = [count(name, statuses) for name in suite.settings.benchmarks]
    estimates = [estimate_text(suite.runs_of(str(row["benchmark"]))) for row in rows if not row["finished"]]
    listed = [status for state in ("running", "failed") for status in statuses if status.state == state]
    return "\n".join([format_rows(rows), *estimates, *map(str, listed)])


def run_status(run: Run) -> RunStatus:
    """Return the status of a run."""
    folder = RUNS / run.folder
    is_running = is_held(folder / LOCK)  # checked first: a run writes its numbers before it releases its lock
    if (folder / "metrics.json").exists():
        return RunStatus(run, "finished")
    log = folder / LOG
    if not log.is_file():
        return RunStatus(run, "running" if is_running else "missing")
    lines = log.read_text(errors="replace").split("\n")  # a progress bar's states are lines, too
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return RunStatus(run, "running" if is_running else "failed", last, time.time() - log.stat().st_mtime)


def estimate_text(runs: Sequence[Run]) -> str:
    """Estimate a benchmark's hours on each device (6 × parameters × tokens ÷ rate) as a line of text."""
    hours, name = dict.fromkeys(_DEVICES, 0.0), runs[0].benchmark
    for run in runs:
        model, training = load_models().get(run.spec["model"]["name"]), run.spec.get("training", {})
        shape = model.shape if model else None  # a measurement has its own models
        tokens = load_benchmark(name).tokens(run.spec) if shape else None
        if shape is None or tokens is None:
            return f"{name}: no run is finished; how long they take is unknown"
        trained = 1 - (training.get("frozen_layers") or 0) / shape.layers
        is_half = training.get("precision", "fp32") != "fp32"
        for device, rates in _DEVICES.items():
            operations = 6 * shape.parameters * trained * tokens
            hours[device] += operations / (rates[is_half] * 1e12 * _UTILIZATION) / 3600
    times = ", ".join(f"{value:,.2f} h on {device}" for device, value in hours.items())
    return (
        f"{name}: no run is finished; one after the other they take about {times} "
        "(6 × parameters × tokens ÷ rate, within a factor of three; the start of each run comes on top)"
    )


def count(benchmark: str, statuses: Sequence[RunStatus]) -> dict[str, str | int | float | None]:
    """Count the runs of a benchmark by state, with the median seconds of the finished ones."""
    members = [status for status in statuses if status.run.benchmark == benchmark]
    states = Counter(status.state for status in members)
    files = [RUNS / status.run.folder / "metrics.json" for status in members if status.state == "finished"]
    seconds = [read_json(file, dict[str, Any])["cost"]["job_seconds"] for file in files]
    row = {state: states[state] for state in get_args(State)}
    return {"benchmark": benchmark, **row, "median_seconds": round(statistics.median(seconds), 1) if seconds else None}
