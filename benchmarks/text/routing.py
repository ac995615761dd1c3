"""Show how models route: the use of experts by set, and their loads over training, window by window.

A trace is the frame of one layer: a row of the experts' shares for each window, indexed by the window's last step.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import matplotlib as mpl
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.special import entr

from benchmarks.harness.config.methods import CONTROL
from benchmarks.harness.report import plots
from benchmarks.harness.report.common import Outcomes, average_over_seeds
from benchmarks.harness.report.presentation import Figure
from benchmarks.harness.report.table import MISSING, Column, Table
from benchmarks.harness.results.content import Usage
from benchmarks.harness.results.statistics import PERMUTATIONS, information_numbers
from benchmarks.text.definition import TaskEntry
from benchmarks.text.outcomes import CELL, KEYS, TextOutcomes

_MOST_LINES = 40  # lines of sets and classes
_MOST_PANELS = 3
_RUN = [*CELL, "seed"]
_PERIODS = 4  # quarters of the training
_MOST_TASKS = 4  # rows of panels
NUMBERS = ("load_entropy", "load_max_over_mean", "load_change", "load_drift", "load_drift_chance")

UsagePanel = tuple[str, Usage]  # a title, and the use of experts


def draw_usage_by_set(outcomes: TextOutcomes, path: Path) -> None:
    """Draw expert use per routed method (at most three, no controls), for the first model, task and seed."""
    panels: dict[str, UsagePanel] = {}
    cell = None
    for record, metrics in outcomes.training():
        if not metrics.usage or not metrics.usage.tasks or outcomes.role(record.method) == CONTROL:
            continue
        cell = cell or (record.model, record.task)
        if cell == (record.model, record.task) and record.method not in panels:
            sets = metrics.usage.tasks
            usage = metrics.usage.model_copy(
                update={"tasks": {record.task: sets[record.task], **sets}}
            )
            title = f"{record.method_title}, {record.model_title}, trained on {record.task_title}"
            panels[record.method] = (title, usage)
    draw_usage(list(panels.values())[:_MOST_PANELS], outcomes, path)


def draw_usage(panels: Sequence[UsagePanel], outcomes: Outcomes, path: Path) -> None:
    """Draw expert use as stacked heatmaps: rows are sets (with classes if they fit), columns experts."""
    if not panels:
        plots.placeholder_figure(path)
        return
    heights = [sum(1 + len(use.classes) for use in usage.tasks.values()) for _, usage in panels]
    shows_classes = sum(heights) <= _MOST_LINES
    if not shows_classes:
        heights = [len(usage.tasks) for _, usage in panels]
    size = (plots.WIDTH, 0.16 * sum(heights) + 0.4 * len(panels) + 0.3)
    with plots.panel_figure(path, len(panels), 1, size, plots.HEATMAP, height_ratios=heights) as (
        figure,
        axes,
    ):
        for axis, (title, usage) in zip(axes[:, 0], panels, strict=True):
            _draw_use(axis, outcomes, usage, shows_classes=shows_classes)
            axis.set_title(title, fontsize=7.5)
        axes[-1, 0].set_xlabel("experts")
        figure.colorbar(
            plots.USE, ax=axes, shrink=0.6, label="use ÷ mean use over sets", extend="max"
        )


def _draw_use(axis: Any, outcomes: Outcomes, usage: Usage, *, shows_classes: bool) -> None:
    sets = usage.tasks
    mean = np.mean([use.shares for use in sets.values()], axis=0)
    lines: list[
        tuple[str, list[float], list[int] | None]
    ] = []  # label, shares, and the marks of a set
    for name, use in sets.items():
        lines.append((outcomes.title("task", name), use.shares, use.marks))
        labels = cast(TaskEntry, outcomes.benchmark.tasks[name]).labels
        if shows_classes:
            lines += [
                (f"{labels[int(number)]} ", shares, None) for number, shares in use.classes.items()
            ]
    shares = np.array([shares for _, shares, _ in lines])
    plots.show_use(axis, plots.divide_by_mean(shares, mean))
    axis.set_yticks(range(len(lines)), [label for label, _, _ in lines])
    for tick, (_, _, marks) in zip(axis.get_yticklabels(), lines, strict=True):
        tick.set_fontweight("normal" if marks is None else "bold")
    axis.set_xticks([])
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0)
    for line, (_, _, marks) in enumerate(lines):
        for expert, mark in enumerate(marks or ()):
            if mark:
                axis.plot(
                    expert,
                    line,
                    "^" if mark > 0 else "v",
                    ms=4,
                    color="black",
                    mec="white",
                    mew=0.4,
                )
    if shared := usage.shared:  # an empty plot would be drawn in the figure's corner
        axis.plot(
            shared, [len(lines) - 0.15] * len(shared), "o", ms=2.5, color="black", clip_on=False
        )


def usage_table(outcomes: TextOutcomes) -> Table:
    """Make a table of the mutual information of experts with set and class, by model, training task and method."""
    information = information_numbers("task", "class")
    rows = []
    for record, metrics in outcomes.training():
        if metrics.usage and metrics.usage.tasks and metrics.routing:
            cell = [getattr(record, key) for key in CELL]
            measured = [getattr(metrics.routing, name) for name in information]
            rows.append(
                [*cell, *measured, len(metrics.usage.specialised), len(metrics.usage.shared)]
            )
    numbers = [*information, "specialised_experts", "shared_experts"]
    means = average_over_seeds(pd.DataFrame(rows, columns=[*CELL, *numbers]), CELL, numbers).astype(
        {"n": str}
    )
    return Table(
        "Information in the choice of an expert after training",
        "Mutual information, in bits, of a token's expert (last converted layer) with the set of its row, and with the "
        "row's class (within a set, mean over the sets), on 200 rows per set. Chance: mean and 95 % quantile of "
        f"{PERMUTATIONS} shuffles of rows over the sets, or within their set. Specialised experts: a set uses them "
        "more than by chance (5 %, over all experts and sets). Shared experts: every set uses them above 1/N, and no "
        "set differs from chance. Means over n seeds ± standard deviation. The benchmark modularity measures the same "
        "before training.",
        {**KEYS, "n": "n"},
        [
            Column(name, name, std=f"{name}_std" if name.endswith("_information") else None)
            for name in numbers
        ],
        outcomes.order(
            means[[*CELL, *numbers, *(f"{name}_std" for name in information), "n"]], CELL
        ),
    )


USAGE = Figure(
    draw_usage_by_set,
    "Use of experts by set after training, divided by the expert's mean use, for the first seed. The training set is "
    "first. Triangles mark use above (▲) or below (▼) chance, by shuffled rows at 5 % over the whole panel. Dots mark "
    "shared experts: every set uses them above the average and equally.",
)


def trace_numbers(trace: pd.DataFrame) -> dict[str, float]:
    """Return the number of ``windows`` of a trace, and the numbers in :data:`NUMBERS`.

    Means over windows: entropy (divided by ln N), load of the busiest expert over the mean load, and change, the L1
    distance between the shares of consecutive windows. Change grows if windows have fewer tokens, so compare it only
    within a run. Drift is the L1 distance between the first and the last quarter of training. Its chance is the same
    distance between the even and odd windows within a quarter.
    """
    shares = np.ascontiguousarray(trace)  # sums depend on the memory layout in the last digit
    windows, experts = shares.shape
    entropy = entr(shares).sum(1) / np.log(experts) if experts > 1 else np.ones(windows)
    changes: list[Any] = [np.nan] * 3
    if windows > 1:
        quarter = max(windows // _PERIODS, 1)
        changes = [
            np.abs(np.diff(shares, axis=0)).sum(1).mean(),
            _distance(shares[:quarter], shares[-quarter:]),
            np.mean(
                [
                    _distance(half[::2], half[1::2])
                    for half in (shares[: 2 * quarter], shares[-2 * quarter :])
                ]
            ),
        ]
    values = (windows, entropy.mean(), shares.max(1).mean() * experts, *changes)
    return dict(zip(("windows", *NUMBERS), map(float, values), strict=True))


def _distance(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    return float(np.abs(first.mean(0) - second.mean(0)).sum())


def traces(outcomes: TextOutcomes) -> pd.DataFrame:
    """Return the traces of the chosen runs with routing, under the first selection: a row per run and layer."""
    rows = []
    for record, metrics in outcomes.training():
        windows = metrics.routing.windows if metrics.routing else None
        if windows is None:
            continue
        for layer, loads in windows.loads.items():
            counts = np.asarray(loads, dtype=np.float64)
            shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
            run = [getattr(record, key) for key in _RUN]
            rows.append([*run, layer, pd.DataFrame(shares, windows.ends)])
    return outcomes.with_titles(pd.DataFrame(rows, columns=[*_RUN, "layer", "trace"]))


def published_traces(outcomes: TextOutcomes) -> dict[str, pd.DataFrame]:
    """Read the paper's traces, by method (``published_traces`` of the definition); empty if there are none."""
    published = {}
    if definition := outcomes.benchmark.definition.published_traces:
        for name, file in definition.rows.items():
            shares = np.loadtxt(outcomes.benchmark.folder / file, delimiter=",", ndmin=2)
            ends = 100 * np.arange(1, 1 + len(shares))
            published[name] = pd.DataFrame(shares / shares.sum(1, keepdims=True), ends)
    return published


def trace_table(outcomes: TextOutcomes) -> Table:
    """Make a table with a row per model, task and routed method, and the paper's rows."""
    numbers, rows = ["windows", *NUMBERS], traces(outcomes)
    measured = rows[_RUN].join(pd.DataFrame(map(trace_numbers, rows["trace"]), columns=numbers))
    layer_means = measured.groupby(_RUN, sort=False).mean().reset_index()
    frame = outcomes.order(average_over_seeds(layer_means, CELL, numbers), CELL)
    if published := published_traces(outcomes):
        paper = pd.DataFrame(
            [{"method": name, **trace_numbers(trace)} for name, trace in published.items()]
        )
        task_title = f"{outcomes.title('task', outcomes.benchmark.definition.published_traces.task)} (the paper)"
        paper = outcomes.with_titles(paper).assign(model_title=MISSING, task_title=task_title, n=1)
        frame = pd.concat([frame, paper], ignore_index=True)
    frame = frame.assign(
        n=frame["n"].astype(int).astype(str), windows=frame["windows"].map("{:.0f}".format)
    )
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
    ours = traces(outcomes)
    ours = ours[ours["is_method"]].drop_duplicates(CELL)
    ours["line"] = ours["model_title"] + "\n" + ours["task_title"]
    ours["label"] = ours["method_title"] + ", layer " + ours["layer"]
    published = published_traces(outcomes)
    if published:
        task = outcomes.benchmark.definition.published_traces.task
        ours = ours.sort_values("task", key=lambda tasks: tasks != task, kind="stable")
    rows = [
        (line, list(zip(group["label"], group["trace"], strict=True)))
        for line, group in ours.groupby("line", sort=False)
    ]
    rows = rows[:_MOST_TASKS]
    if published:
        rows.append(
            (
                "the paper's",
                [(outcomes.title("method", name), trace) for name, trace in published.items()],
            )
        )
    if not rows:
        plots.placeholder_figure(path)
        return
    columns = max(len(panels) for _, panels in rows)
    size = (plots.WIDTH, 1.75 * len(rows) + 0.3)
    with plots.panel_figure(path, len(rows), columns, size, plots.HEATMAP, sharey="row") as (
        figure,
        axes,
    ):
        for axis_row, (title, panels) in zip(axes, rows, strict=True):
            for axis, (label, trace) in zip(axis_row, panels, strict=False):
                _draw_trace(axis, trace)
                axis.set_title(plots.wrap_text(label, (plots.WIDTH - 1.7) / columns, 7), fontsize=7)
            axis_row[0].set_ylim(max(trace.index[-1] for _, trace in panels), 0)
            axis_row[0].set_ylabel(f"{plots.wrap_text(title, 1.6, 7)}\nstep")
        figure.colorbar(plots.USE, ax=axes, shrink=0.6, label="load ÷ mean load", extend="max")


def _draw_trace(axis: Any, trace: pd.DataFrame) -> None:
    count = trace.shape[1]
    extent = (-0.5, count - 0.5, trace.index[-1], 0)
    plots.show_use(axis, trace.to_numpy() * count, interpolation="nearest", extent=extent)
    axis.set_xticks([0, count - 1], ["1", str(count)])
    axis.set_xlabel("experts")
    axis.yaxis.set_major_locator(mpl.ticker.MaxNLocator(4, integer=True))


TRACES = Figure(
    draw_traces,
    "Loads of experts over training, divided by the mean load, for the first seed: rows are windows of steps, columns "
    "are experts. The paper's panels show QNLI, 16 experts, 330 windows of 100 steps (Fig. 6 of the first version); "
    "their model, and its tuning with adapters, are our interpretation.",
)
