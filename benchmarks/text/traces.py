"""Show how routing changes during training: the loads of experts, window by window."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.special import entr

from benchmarks.harness.config.methods import CONTROL
from benchmarks.harness.report import plots
from benchmarks.harness.report.common import average_over_seeds
from benchmarks.harness.report.presentation import Figure
from benchmarks.harness.report.table import MISSING, Column, Table
from benchmarks.text.outcomes import CELL, KEYS, TextOutcomes

Shares = NDArray[np.float64]
_PERIODS = 4  # quarters of the training
_MOST_TASKS = 4  # rows of panels
NUMBERS = ("load_entropy", "load_max_over_mean", "load_change", "load_drift", "load_drift_chance")


@dataclass(frozen=True)
class Trace:
    """Hold the shares of experts ``[windows, N]`` over the steps of one layer's training; each row sums to 1."""

    shares: Shares
    steps: int

    def numbers(self) -> dict[str, float]:
        """Return the number of ``windows``, and the numbers in :data:`NUMBERS`.

        Means over windows: entropy (divided by ln N), load of the busiest expert over the mean load, and change, the L1
        distance between the shares of consecutive windows. Change grows if windows have fewer tokens, so compare it
        only within a run. Drift is the L1 distance between the first and the last quarter of training. Its chance is
        the same distance between the even and odd windows within a quarter.
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
        values = (windows, entropy.mean(), shares.max(1).mean() * experts, *changes)
        return dict(zip(("windows", *NUMBERS), map(float, values), strict=True))


def _distance(first: Shares, second: Shares) -> float:
    return float(np.abs(first.mean(0) - second.mean(0)).sum())


def traces(outcomes: TextOutcomes) -> Iterator[tuple[Any, int, Trace]]:
    """Yield record, layer and trace of every chosen run with routing, under the first selection."""
    for record, metrics in outcomes.training():
        windows = metrics["routing"].get("windows") or {"loads": {}}
        for layer, loads in windows["loads"].items():
            counts = np.asarray(loads, dtype=np.float64)
            yield record, int(layer), Trace(counts / np.maximum(counts.sum(1, keepdims=True), 1), windows["ends"][-1])


def published_traces(outcomes: TextOutcomes) -> dict[str, Trace]:
    """Read the paper's traces, by method (``published_traces`` of the definition); empty if there are none."""
    published = {}
    if definition := outcomes.benchmark.definition.published_traces:
        for name, file in definition.rows.items():
            shares = np.loadtxt(outcomes.benchmark.folder / file, delimiter=",", ndmin=2)
            published[name] = Trace(shares / shares.sum(1, keepdims=True), 100 * len(shares))
    return published


def trace_table(outcomes: TextOutcomes) -> Table:
    """Make a table with a row per model, task and routed method, and the paper's rows."""
    numbers, keys = ["windows", *NUMBERS], [*CELL, "seed"]
    rows = [{**{key: getattr(record, key) for key in keys}, **trace.numbers()} for record, _, trace in traces(outcomes)]
    layer_means = pd.DataFrame(rows, columns=[*keys, *numbers]).groupby(keys, sort=False).mean().reset_index()
    frame = outcomes.order(average_over_seeds(layer_means, CELL, numbers), CELL)
    if published := published_traces(outcomes):
        paper = pd.DataFrame([{"method": name, **trace.numbers()} for name, trace in published.items()])
        task_title = f"{outcomes.title('task', outcomes.benchmark.definition.published_traces.task)} (the paper)"
        paper = outcomes.with_titles(paper).assign(model_title=MISSING, task_title=task_title, n=1)
        frame = pd.concat([frame, paper], ignore_index=True)
    frame = frame.assign(n=frame["n"].astype(int).astype(str), windows=frame["windows"].map("{:.0f}".format))
    return Table(
        "Shares of experts over training",
        "Loads of training batches without padding, in windows of 100 steps as in the authors' code (shorter if a run "
        "would have less than 20 windows). Means over layers and n seeds ± standard deviation. Entropy and busiest "
        "expert over the mean are 1 for balanced loads. Change is the L1 distance between the shares of consecutive "
        "windows; it grows if windows have fewer tokens. Drift is the distance between the first and the last quarter "
        "of training. Routing changes if this drift exceeds the drift within quarters.",
        {**KEYS, "n": "n", "windows": "Windows"},
        [Column(name, name, std=f"{name}_std") for name in NUMBERS],
        frame[[*KEYS, "method", "n", *numbers, *(f"{name}_std" for name in NUMBERS)]],
    )


def draw_traces(outcomes: TextOutcomes, path: Path) -> None:
    """Draw the expert loads of the first layer and seed: a row per model and task, a panel per method.

    The paper's task comes first; at most four rows are ours. The last row is the paper's.
    """
    by_cell: dict[tuple[str, str], dict[str, tuple[str, Trace]]] = {}
    for record, layer, trace in traces(outcomes):
        if outcomes.role(record.method) != CONTROL:
            title = f"{outcomes.title('method', record.method)}, layer {layer}"
            by_cell.setdefault((record.model, record.task), {}).setdefault(record.method, (title, trace))
    published = {name: (outcomes.title("method", name), trace) for name, trace in published_traces(outcomes).items()}
    cells = list(by_cell)
    if published:
        cells.sort(key=lambda cell: cell[1] != outcomes.benchmark.definition.published_traces.task)
    rows = [
        (f"{outcomes.title('model', model)}\n{outcomes.title('task', task)}", by_cell[model, task])
        for model, task in cells[:_MOST_TASKS]
    ]
    rows += [("the paper's", published)] if published else []
    if not rows:
        plots.placeholder_figure(path)
        return
    columns = max(len(by_method) for _, by_method in rows)
    size = (plots.WIDTH, 1.75 * len(rows) + 0.3)
    with plots.panel_figure(path, len(rows), columns, size, plots.HEATMAP, sharey="row") as (figure, axes):
        for axis_row, (title, by_method) in zip(axes, rows, strict=True):
            shown = [by_method[name] for name in outcomes.methods if name in by_method]
            for axis, (label, trace) in zip(axis_row, shown, strict=False):
                _draw_trace(axis, trace)
                axis.set_title(plots.wrap_text(label, (plots.WIDTH - 1.7) / columns, 7), fontsize=7)
            axis_row[0].set_ylim(max(trace.steps for _, trace in shown), 0)
            axis_row[0].set_ylabel(f"{plots.wrap_text(title, 1.6, 7)}\nstep")
        figure.colorbar(plots.USE, ax=axes, shrink=0.6, label="load ÷ mean load", extend="max")


def _draw_trace(axis: Any, trace: Trace) -> None:
    count = trace.shares.shape[1]
    plots.show_use(axis, trace.shares * count, interpolation="nearest", extent=(-0.5, count - 0.5, trace.steps, 0))
    axis.set_xticks([0, count - 1], ["1", str(count)])
    axis.set_xlabel("experts")
    axis.yaxis.set_major_locator(mpl.ticker.MaxNLocator(4, integer=True))


TRACES = Figure(
    draw_traces,
    "Loads of experts over training, divided by the mean load, for the first seed: rows are windows of steps, columns "
    "are experts. The paper's panels show QNLI, 16 experts, 330 windows of 100 steps (Fig. 6 of the first version); "
    "their model, and its tuning with adapters, are our interpretation.",
)
