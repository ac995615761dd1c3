"""Show how routing changes during training: the loads of experts, window by window."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.special import entr

from benchmarks.harness.config.methods import CONTROL
from benchmarks.harness.report.common import average_over_seeds
from benchmarks.harness.report.table import MISSING, Column, Table
from benchmarks.text.definition import PublishedTraces
from benchmarks.text.outcomes import CELL, KEYS, TextOutcomes

Shares = NDArray[np.float64]
_PERIODS = 4  # quarters of the training
NUMBERS = ("load_entropy", "load_max_over_mean", "load_change", "load_drift", "load_drift_chance")


@dataclass(frozen=True)
class Trace:
    """Hold the shares of experts ``[windows, N]`` over the steps of one layer's training; each row sums to 1."""

    shares: Shares
    steps: int

    def numbers(self) -> dict[str, float]:
        """Return the numbers of a trace, by the names in :data:`NUMBERS`.

        Means over windows: entropy (divided by ln N), load of the busiest expert over the mean load, and change, the L1
        distance between the shares of consecutive windows. Change grows if windows have fewer tokens, so compare it only
        within a run. Drift is the L1 distance between the first and the last quarter of training. Its chance is the same
        distance between the even and odd windows within a quarter.
        """
        shares = self.shares
        windows, experts = shares.shape
        entropy = entr(shares).sum(1) / np.log(experts) if experts > 1 else np.ones(windows)
        changes: list[Any] = [np.nan] * 3
        if windows > 1:
            quarter = max(windows // _PERIODS, 1)
            changes = [
                np.abs(np.diff(shares, axis=0)).sum(1).mean(),
                _distance(shares[:quarter], shares[-quarter:]),
                np.mean([_distance(half[::2], half[1::2]) for half in (shares[: 2 * quarter], shares[-2 * quarter :])]),
            ]
        return dict(zip(NUMBERS, map(float, (entropy.mean(), shares.max(1).mean() * experts, *changes)), strict=True))


def _distance(one: Shares, other: Shares) -> float:
    return float(np.abs(one.mean(0) - other.mean(0)).sum())


def traces(outcomes: TextOutcomes) -> Iterator[tuple[Any, int, Trace]]:
    """Yield record, layer and trace of every chosen run with routing, under the first selection."""
    for record, content in outcomes.training:
        windows = content["routing"].get("windows") or {"loads": {}}
        for layer, loads in windows["loads"].items():
            counts = np.asarray(loads, dtype=np.float64)
            yield record, int(layer), Trace(counts / np.maximum(counts.sum(1, keepdims=True), 1), windows["ends"][-1])


def published_traces(outcomes: TextOutcomes) -> dict[str, Trace]:
    """Read the paper's traces, by method (``published_traces`` of the definition)."""
    published = {}
    for name, file in _published(outcomes).rows.items():
        shares = np.loadtxt(outcomes.benchmark.folder / file, delimiter=",", ndmin=2)
        published[name] = Trace(shares / shares.sum(1, keepdims=True), 100 * len(shares))
    return published


def _published(outcomes: TextOutcomes) -> PublishedTraces:
    definition: Any = outcomes.benchmark.definition
    return getattr(definition, "published_traces", None) or PublishedTraces(task="", rows={})


def trace_table(outcomes: TextOutcomes) -> Table:
    """Make a table with a row per model, task and routed method, and the paper's rows."""
    numbers, keys = ["windows", *NUMBERS], [*CELL, "seed"]
    rows = [
        {**{key: getattr(record, key) for key in keys}, "windows": len(trace.shares), **trace.numbers()}
        for record, _, trace in traces(outcomes)
    ]
    layer_means = pd.DataFrame(rows, columns=[*keys, *numbers]).groupby(keys, sort=False).mean().reset_index()
    frame = outcomes.order(average_over_seeds(layer_means, CELL, numbers), CELL)
    task_title = f"{outcomes.title('task', _published(outcomes).task)} (the paper)"
    if published := published_traces(outcomes):
        paper = [{"method": name, "windows": len(trace.shares), **trace.numbers()} for name, trace in published.items()]
        of_paper = outcomes.titled(pd.DataFrame(paper)).assign(model_title=MISSING, task_title=task_title, n=1)
        frame = pd.concat([frame, of_paper], ignore_index=True)
    frame = frame.assign(n=frame["n"].astype(int).astype(str), windows=frame["windows"].map("{:.0f}".format))
    return Table(
        "Shares of experts over training",
        "Loads of training batches without padding, in windows of 100 steps as in the authors' code (shorter if a run "
        "would have less than 20 windows). Means over layers and n seeds ± standard deviation. Entropy and busiest expert "
        "over the mean are 1 for balanced loads. Change is the L1 distance between the shares of consecutive windows; it "
        "grows if windows have fewer tokens. Drift is the distance between the first and the last quarter of training. "
        "Routing changes if this drift exceeds the drift within quarters.",
        {**KEYS, "n": "n", "windows": "Windows"},
        [Column(name, name, std=f"{name}_std") for name in NUMBERS],
        frame[[*KEYS, "method", "n", *numbers, *(f"{name}_std" for name in NUMBERS)]],
    )


def select_traces(outcomes: TextOutcomes) -> dict[tuple[str, str], dict[str, tuple[str, Trace]]]:
    """Select the traces of the first layer and seed, by model and task (the paper's first), then by method."""
    shown: dict[tuple[str, str], dict[str, tuple[str, Trace]]] = {}
    for record, layer, trace in traces(outcomes):
        if outcomes.role(record.method) != CONTROL:
            title = f"{outcomes.title('method', record.method)}, layer {layer}"
            shown.setdefault((record.model, record.task), {}).setdefault(record.method, (title, trace))
    first = _published(outcomes).task
    return dict(sorted(shown.items(), key=lambda item: item[0][1] != first))
