"""Show how models route: the use of experts by data set, and the loads of experts over training.

:mod:`.traces` defines and summarises a trace, the loads of one layer over training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import matplotlib as mpl
import numpy as np
import pandas as pd

from benchmarks.harness.base import DefinitionError, first_line
from benchmarks.harness.config.methods import CONTROL
from benchmarks.harness.report import plots
from benchmarks.harness.report.common import Outcomes, average_over_seeds
from benchmarks.harness.report.presentation import Figure
from benchmarks.harness.report.table import MISSING, Column, Table
from benchmarks.harness.results.content import Usage
from benchmarks.harness.results.statistics import PERMUTATIONS, information_metrics
from benchmarks.text.definition import TaskEntry
from benchmarks.text.outcomes import CELL, HEADINGS, TextOutcomes
from benchmarks.text.traces import NUMBERS, layer_traces, trace_numbers

_MOST_LINES = 40  # of the figure of expert use; with more lines, classes are left out
_MOST_PANELS = 3  # of the figure of expert use
_PANEL_WIDTH = 5.0  # inches, in the figure of expert use
# the meanings of the marks in the figure of expert use
_ABOVE = "used more than by chance"
_BELOW = "used less than by chance"
_SHARED = "shared: used by all sets"
_KEYS_OF_RUN = [*CELL, "seed"]
_MOST_PANEL_ROWS = 4  # rows of panels with our traces, in the figure of traces
_PUBLISHED_WINDOW = 100  # steps of a window in the paper's traces


class UsagePanel(NamedTuple):
    """One panel of a figure of expert use."""

    title: str
    usage: Usage


def draw_usage_by_set(outcomes: TextOutcomes, path: Path) -> None:
    """Draw which experts each data set uses, for at most three routed methods (no controls).

    Only the first model and task with routing are shown, and the first seed of each method.
    """
    panels = _usage_panels(outcomes)
    draw_usage(panels[:_MOST_PANELS], outcomes, path)


def _usage_panels(outcomes: TextOutcomes) -> list[UsagePanel]:
    """Return a panel for each routed method of one model and task, without controls.

    The model and the task are those of the first run with expert use. A panel shows the first seed
    of its method.
    """
    panels: dict[str, UsagePanel] = {}
    shown_model_and_task = None
    for run, metrics in outcomes.chosen_runs():
        if outcomes.role(run.method) == CONTROL:
            continue
        # dense models and runs on a single set have no expert use to show
        if not metrics.usage or not metrics.usage.tasks:
            continue
        model_and_task = (run.model, run.task)
        if shown_model_and_task is None:
            shown_model_and_task = model_and_task
        if model_and_task != shown_model_and_task:
            continue
        # the method already has the panel of an earlier seed
        if run.method in panels:
            continue
        title = f"{run.method_title}, {run.model_title}, trained on {run.task_title}"
        panels[run.method] = UsagePanel(title, _with_first_set(metrics.usage, run.task))
    return list(panels.values())


def _with_first_set(usage: Usage, name: str) -> Usage:
    """Return the same expert use, with the data set ``name`` first."""
    others = {other: use for other, use in usage.tasks.items() if other != name}
    in_order = {name: usage.tasks[name], **others}
    return usage.model_copy(update={"tasks": in_order})


def draw_usage(panels: Sequence[UsagePanel], outcomes: Outcomes, path: Path) -> None:
    """Draw expert use as heatmaps, one panel below the other.

    Lines are data sets, columns are experts. Each set is followed by a line for each of its
    classes. If the figure would have more than :data:`_MOST_LINES` lines, the classes are left out.
    """
    if not panels:
        plots.placeholder_figure(path)
        return
    # the heights of the panels, in lines
    heights = [_count_lines(panel.usage, with_classes=True) for panel in panels]
    shows_classes = sum(heights) <= _MOST_LINES
    if not shows_classes:
        heights = [_count_lines(panel.usage, with_classes=False) for panel in panels]

    # in inches
    lines_height = 0.16 * sum(heights)
    titles_height = 0.7 * len(panels)  # with the numbers of the experts
    legend_height = 0.5  # with the label of the last panel
    size = (plots.WIDTH, lines_height + titles_height + legend_height)
    figure_of_panels = plots.panel_figure(
        path,
        rows=len(panels),
        columns=1,
        size=size,
        style=plots.HEATMAP,
        height_ratios=heights,
    )
    with figure_of_panels as (figure, axes):
        for axis, panel in zip(axes[:, 0], panels, strict=True):
            lines = _use_lines(outcomes, panel.usage, with_classes=shows_classes)
            _draw_use(axis, panel.usage, lines)
            axis.set_title(panel.title, fontsize=7.5)
        figure.colorbar(
            plots.USE, ax=axes, shrink=0.6, label="use ÷ mean use over sets", extend="max"
        )
        plots.legend_below(figure, axes[:, 0], columns=3)


class _Line(NamedTuple):
    """One line of a heatmap of expert use: a data set, or one of its classes.

    Attributes:
        label: The title of the data set, or the name of the class.
        shares: The share of each expert.
        marks: The mark of each expert: 1 for use above chance, -1 for use below chance, else 0.
            None for a class.
    """

    label: str
    shares: list[float]
    marks: list[int] | None


def _count_lines(usage: Usage, *, with_classes: bool) -> int:
    """Count the lines of a panel: its sets, and their classes if these are shown."""
    if not with_classes:
        return len(usage.tasks)
    return sum(1 + len(use.classes) for use in usage.tasks.values())


def _use_lines(outcomes: Outcomes, usage: Usage, *, with_classes: bool) -> list[_Line]:
    """Return the lines of a panel: each set, followed by its classes if they are shown."""
    lines = []
    for name, use in usage.tasks.items():
        lines.append(_Line(outcomes.title("task", name), use.shares, use.marks))
        if not with_classes:
            continue
        task = cast(TaskEntry, outcomes.benchmark.tasks[name])
        for number, shares in use.classes.items():
            # a blank after the name distinguishes classes from sets
            lines.append(_Line(f"{task.labels[int(number)]} ", shares, None))
    return lines


def _draw_use(axis: Any, usage: Usage, lines: Sequence[_Line]) -> None:
    """Draw one panel: the expert shares of each line, divided by their mean over all sets.

    Triangles mark the experts that a set uses more or less than by chance. Dots below the last line
    mark the experts that all sets share.
    """
    # `lines` may also have classes, but the mean is only over whole sets
    shares_of_sets = [use.shares for use in usage.tasks.values()]
    mean_shares = np.mean(shares_of_sets, axis=0)  # [experts]
    shares = np.array([line.shares for line in lines])  # [lines, experts]
    plots.show_use(axis, plots.divide_by_mean(shares, mean_shares))

    axis.set_yticks(range(len(lines)), [line.label for line in lines])
    for tick, line in zip(axis.get_yticklabels(), lines, strict=True):
        # names of sets are bold, names of classes are not
        weight = "normal" if line.marks is None else "bold"
        tick.set_fontweight(weight)
    num_experts = len(mean_shares)
    plots.number_experts(axis, num_experts, _PANEL_WIDTH)
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0)
    if usage.shared:
        axis.tick_params(axis="x", pad=7)  # room for the dots

    for row, line in enumerate(lines):
        # classes have no marks
        if line.marks is not None:
            _draw_marks(axis, row, line.marks)
    # without shared experts, an empty plot would be drawn in the figure's corner
    if usage.shared:
        below_last_line = [len(lines) - 0.15] * len(usage.shared)
        dots: Any = {"ms": 3, "color": "black", "clip_on": False}
        axis.plot(usage.shared, below_last_line, "o", label=_SHARED, **dots)


def _draw_marks(axis: Any, row: int, marks: Sequence[int]) -> None:
    """Draw a triangle on each marked expert of a row: up for 1, down for -1, none for 0."""
    for expert, mark in enumerate(marks):
        if mark == 0:
            continue
        triangle = "^" if mark > 0 else "v"
        meaning = _ABOVE if mark > 0 else _BELOW
        axis.plot(
            expert, row, triangle, label=meaning, ms=5, ls="", color="black", mec="white", mew=0.4
        )


_USAGE_CAPTION = (
    "Mutual information, in bits, of a token's expert (last converted layer) with the set of its "
    "row, and with the row's class (within a set, mean over the sets), on 200 rows per set. "
    f"Chance: mean and 95 % quantile of {PERMUTATIONS} shuffles of rows over the sets, or within "
    "their set. Specialised experts: a set uses them more than by chance (5 %, over all experts "
    "and sets). Shared experts: each gets more than 1/N of the choices of every set, and no set "
    "differs from chance. Means over n seeds ± standard deviation. The benchmark modularity "
    "measures the same before training."
)


def usage_table(outcomes: TextOutcomes) -> Table:
    """Make a table of how a token's expert depends on the token's data set and class.

    It shows their mutual information, and the counts of specialised and shared experts. It has a
    row per model, training task and method, with means over seeds.
    """
    # for the data set and for the class: the information, and its mean and quantile by chance
    information_names = information_metrics("task", "class")
    numbers = [*information_names, "specialised_experts", "shared_experts"]
    rows_of_runs = _usage_rows(outcomes, information_names)
    by_run = pd.DataFrame(rows_of_runs, columns=[*CELL, *numbers])
    means = average_over_seeds(by_run, cell_columns=CELL, numbers=numbers)
    # the count of seeds is one of the table's text columns
    rows = means.astype({"n": str})
    # the deviations of the counts of experts are left out
    deviations = [f"{name}_std" for name in information_names]
    shown = rows[[*CELL, *numbers, *deviations, "n"]]
    return Table(
        title="Information in the choice of an expert after training",
        caption=_USAGE_CAPTION,
        keys={**HEADINGS, "n": "n"},
        columns=[_usage_column(name) for name in numbers],
        frame=outcomes.order(shown, CELL),
    )


def _usage_column(name: str) -> Column:
    """Return the column of :func:`usage_table` for one number. Only information has a deviation."""
    if name in ("task_information", "class_information"):
        return Column(name, name, std=f"{name}_std")
    return Column(name, name)


def _usage_rows(outcomes: TextOutcomes, information_names: Sequence[str]) -> list[dict[str, Any]]:
    """Return a dictionary for each chosen run that recorded the use of experts.

    It has the columns :data:`CELL`, the recorded metrics ``information_names``, and the counts of
    specialised and shared experts.
    """
    rows = []
    for run, metrics in outcomes.chosen_runs():
        if not metrics.usage or not metrics.usage.tasks or not metrics.routing:
            continue
        cell = {key: getattr(run, key) for key in CELL}
        information = {name: getattr(metrics.routing, name) for name in information_names}
        counts = {
            "specialised_experts": len(metrics.usage.specialised),
            "shared_experts": len(metrics.usage.shared),
        }
        rows.append({**cell, **information, **counts})
    return rows


USAGE = Figure(
    draw_usage_by_set,
    "Use of experts by set after training, divided by the expert's mean use, for the first seed. "
    "The training set is first. Triangles mark use above (▲) or below (▼) chance, by shuffled rows "
    "at 5 % over the whole panel. Dots mark shared experts: every set uses them above the average "
    "and equally.",
)


def traces(outcomes: TextOutcomes) -> pd.DataFrame:
    """Return the traces of the chosen runs with routing, under the first protocol with runs.

    A trace is a frame with the expert loads of one layer in each window of training steps.

    Returns:
        A frame with a row per run and layer, and with the columns ``model``, ``task``, ``method``,
        ``seed``, ``layer``, ``trace`` and titles. Each cell of ``trace`` has a whole trace.
    """
    rows = []
    for run, metrics in outcomes.chosen_runs():
        if metrics.routing is None or metrics.routing.windows is None:
            continue
        keys_of_run = {key: getattr(run, key) for key in _KEYS_OF_RUN}
        for layer, trace in layer_traces(metrics.routing.windows).items():
            rows.append({**keys_of_run, "layer": layer, "trace": trace})
    # the columns are named, because there may be no rows
    all_traces = pd.DataFrame(rows, columns=[*_KEYS_OF_RUN, "layer", "trace"])
    return outcomes.with_titles(all_traces)


def published_traces(outcomes: TextOutcomes) -> dict[str, pd.DataFrame]:
    """Read the paper's traces from csv files without a header, a row for each window.

    Returns:
        The trace of each method, by name; empty if the definition has no ``published_traces``.

    Raises:
        DefinitionError: A file is not a table of numbers.
    """
    definition = outcomes.benchmark.definition.published_traces
    if definition is None:
        return {}
    published = {}
    for name, file in definition.rows.items():
        path = outcomes.benchmark.folder / file
        try:
            # with ndmin, a file with a single line is a matrix, too
            shares = np.loadtxt(path, delimiter=",", ndmin=2)  # [windows, experts]
        except ValueError as error:
            raise DefinitionError(f"{path} has no numbers: {first_line(error)}") from error
        # the file has rounded shares, which do not quite sum to 1
        normalised = shares / shares.sum(axis=1, keepdims=True)
        # the last step of each window: 100, 200, and so on
        last_steps = _PUBLISHED_WINDOW * np.arange(1, 1 + len(shares))
        published[name] = pd.DataFrame(normalised, index=last_steps)
    return published


_TRACES_CAPTION = (
    "Loads of training batches without padding, in windows of 100 steps as in the authors' code "
    "(fewer for runs below 2,000 steps, more for runs above 10,000; an epoch also ends a window). "
    "Means over layers and n seeds ± standard deviation. Entropy and busiest expert over the mean "
    "are 1 for balanced loads. Change is the L1 distance between the shares of consecutive "
    "windows; it grows if windows have fewer tokens. Drift is the distance between the first and "
    "the last quarter of training. Drift by chance is the distance between the even and the odd "
    "windows of each half, a mean over both halves. Routing changes if the drift exceeds it."
)


def trace_table(outcomes: TextOutcomes) -> Table:
    """Make a table of how balanced the expert loads are over training, and how they change.

    It has a row per model, task and routed method, and a row for each of the paper's traces.
    """
    numbers = ["windows", *NUMBERS]
    rows = _our_trace_numbers(outcomes, numbers)
    published = published_traces(outcomes)
    if published:
        paper_rows = _paper_trace_numbers(outcomes, published)
        rows = pd.concat([rows, paper_rows], ignore_index=True)
    # the counts of seeds and windows are text columns of the table, so format them here
    seed_counts = rows["n"].astype(int).astype(str)
    window_counts = rows["windows"].map("{:.0f}".format)  # a mean over seeds
    shown = rows.assign(n=seed_counts, windows=window_counts)
    deviations = [f"{name}_std" for name in NUMBERS]
    return Table(
        title="Shares of experts over training",
        caption=_TRACES_CAPTION,
        keys={**HEADINGS, "n": "n", "windows": "Windows"},
        columns=[Column(name, name, std=f"{name}_std") for name in NUMBERS],
        frame=shown[[*HEADINGS, "method", "n", *numbers, *deviations]],
    )


def _our_trace_numbers(outcomes: TextOutcomes, numbers: Sequence[str]) -> pd.DataFrame:
    """Average the numbers of our traces over layers, then over the seeds of each cell."""
    by_layer = traces(outcomes)
    measured = pd.DataFrame([trace_numbers(trace) for trace in by_layer["trace"]], columns=numbers)
    # both frames number their rows from 0, so `join` puts the numbers beside their trace
    with_measured = by_layer[_KEYS_OF_RUN].join(measured)
    by_run = with_measured.groupby(_KEYS_OF_RUN, sort=False).mean().reset_index()
    return outcomes.order(average_over_seeds(by_run, cell_columns=CELL, numbers=numbers), CELL)


def _paper_trace_numbers(
    outcomes: TextOutcomes, published: Mapping[str, pd.DataFrame]
) -> pd.DataFrame:
    """Return the table rows of the paper's traces. The paper does not name their model."""
    rows = []
    for name, trace in published.items():
        rows.append({"method": name, **trace_numbers(trace)})
    task = outcomes.title("task", outcomes.benchmark.definition.published_traces.task)
    titled = outcomes.with_titles(pd.DataFrame(rows))
    return titled.assign(model_title=MISSING, task_title=f"{task} (the paper)", n=1)


class _TracePanel(NamedTuple):
    """One panel of the figure of traces."""

    title: str
    trace: pd.DataFrame


class _TraceGroup(NamedTuple):
    """The panels of one model and task, or of the paper. Each shows a method."""

    title: str
    panels: list[_TracePanel]


def draw_traces(outcomes: TextOutcomes, path: Path) -> None:
    """Draw the expert loads over training, for the first routed layer and the first seed.

    The panels of a model and task are a group with a heading, and each panel shows a method. Small
    groups share a row of panels. At most four rows show our runs, and those with the paper's task
    come first. The last row shows the paper's traces.
    """
    our_groups = _our_trace_groups(outcomes)
    paper_groups = _paper_trace_groups(outcomes)
    groups = our_groups + paper_groups
    if not groups:
        plots.placeholder_figure(path)
        return

    # the largest group fills a row
    columns = max(len(group.panels) for group in groups)
    our_rows = _fill_rows(our_groups, columns)[:_MOST_PANEL_ROWS]
    rows = our_rows + _fill_rows(paper_groups, columns)
    size = (plots.WIDTH, 1.85 * len(rows) + 0.3)  # inches
    # inches: the labels and the colour bar take 1.7 of the width
    panel_width = (plots.WIDTH - 1.7) / columns
    figure_of_panels = plots.panel_figure(
        path, rows=len(rows), columns=columns, size=size, style=plots.HEATMAP
    )
    with figure_of_panels as (figure, axes):
        for axis_row, row in zip(axes, rows, strict=True):
            _draw_trace_row(axis_row, row, panel_width)
        figure.colorbar(plots.USE, ax=axes, shrink=0.6, label="load ÷ mean load", extend="max")


def _fill_rows(groups: Sequence[_TraceGroup], columns: int) -> list[list[_TraceGroup]]:
    """Distribute groups over rows of ``columns`` panels, in their order.

    A group that does not fit into the last row begins a new one.
    """
    rows: list[list[_TraceGroup]] = []
    num_free = 0  # panels that the last row has room for
    for group in groups:
        num_panels = len(group.panels)
        if num_panels > num_free:
            rows.append([])
            num_free = columns
        rows[-1].append(group)
        num_free -= num_panels
    return rows


def _draw_trace_row(axes: Sequence[Any], row: Sequence[_TraceGroup], panel_width: float) -> None:
    """Draw the groups of a row from left to right, and the title of each group above it.

    ``panel_width`` is in inches.
    """
    first_axes = []  # the first axis of each group
    first_column = 0  # the column of this axis
    for group in row:
        end_column = first_column + len(group.panels)
        group_axes = axes[first_column:end_column]
        for axis, panel in zip(group_axes, group.panels, strict=True):
            _draw_trace(axis, panel, panel_width)
        _label_steps(group_axes, group)
        first_axes.append(group_axes[0])
        first_column = end_column
    # only the first axis of a row has the label "step", because there is no room between the panels
    axes[0].set_ylabel("step")

    # all groups have their titles at the same height: above the panel title with the most lines
    panel_titles = [axis.title for axis in axes]
    highest_title = max(panel_titles, key=lambda title: title.get_text().count("\n"))
    for axis, group in zip(first_axes, row, strict=True):
        group_width = panel_width * len(group.panels)
        heading = plots.wrap_text(group.title, inches=group_width)
        plots.draw_heading(axis, highest_title, heading, "left")


def _label_steps(axes: Sequence[Any], group: _TraceGroup) -> None:
    """Give the axes of a group the same steps from top to bottom. Only the first has numbers."""
    last_step = max(panel.trace.index[-1] for panel in group.panels)
    for axis in axes:
        axis.set_ylim(last_step, 0)  # the first step is at the top
        axis.tick_params(labelleft=axis is axes[0])


def _paper_trace_groups(outcomes: TextOutcomes) -> list[_TraceGroup]:
    """Return one group with the paper's traces; an empty list if there are none."""
    published = published_traces(outcomes)
    if not published:
        return []
    panels = []
    for name, trace in published.items():
        panels.append(_TracePanel(outcomes.title("method", name), trace))
    return [_TraceGroup("the paper", panels)]


def _our_trace_groups(outcomes: TextOutcomes) -> list[_TraceGroup]:
    """Return a group of panels for each model and task, those of the paper's task first.

    Each panel shows one method: the trace of its first seed and first routed layer. Controls are
    left out.
    """
    all_traces = traces(outcomes)
    without_controls = all_traces[all_traces["is_method"]]
    # a model, task and method has a row for each seed and layer; this keeps the first one
    shown = without_controls.drop_duplicates(CELL)
    definition = outcomes.benchmark.definition.published_traces
    if definition is not None:
        is_of_paper = shown["task"] == definition.task
        shown = pd.concat([shown[is_of_paper], shown[~is_of_paper]])
    groups = []
    for (model, task), rows in shown.groupby(["model_title", "task_title"], sort=False):
        groups.append(_trace_group(f"{model}, {task}", rows))
    return groups


def _trace_group(title: str, rows: pd.DataFrame) -> _TraceGroup:
    """Make the group of panels of one model and task.

    If all panels show the same layer, the title of the group names it. Otherwise the title of each
    panel names the layer of the panel.

    Args:
        title: The model and the task.
        rows: The rows of :func:`traces`, one for each panel.
    """
    layers = rows["layer"].unique()
    has_one_layer = len(layers) == 1
    panels = []
    for row in rows.itertuples():
        panel_title = row.method_title
        if not has_one_layer:
            panel_title = f"{row.method_title}, layer {row.layer}"
        panels.append(_TracePanel(panel_title, cast(pd.DataFrame, row.trace)))
    if has_one_layer:
        title = f"{title}, layer {layers[0]}"
    return _TraceGroup(title, panels)


def _draw_trace(axis: Any, panel: _TracePanel, width: float) -> None:
    """Draw a trace as a heatmap: windows from top to bottom, experts from left to right.

    ``width`` is the width of the panel in inches.
    """
    shares = panel.trace.to_numpy()  # [windows, experts]
    num_experts = shares.shape[1]
    last_step = panel.trace.index[-1]
    # left, right, bottom, top: expert 0 has its centre at 0, and the y axis shows steps
    extent = (-0.5, num_experts - 0.5, last_step, 0)
    # the mean share is 1 / N, so this is the load of each expert over the mean load
    relative_loads = shares * num_experts
    plots.show_use(axis, relative_loads, interpolation="nearest", extent=extent)
    plots.number_experts(axis, num_experts, width)
    # at most five ticks, at whole steps
    axis.yaxis.set_major_locator(mpl.ticker.MaxNLocator(4, integer=True))
    axis.set_title(plots.wrap_text(panel.title, inches=width, size=7), fontsize=7)


TRACES = Figure(
    draw_traces,
    "Loads of experts over training, divided by the mean load, for the first seed: rows are "
    "windows of steps, columns are experts. The paper's panels show QNLI, 16 experts, 330 windows "
    "of 100 steps (Fig. 6 of the first version); their model, and its tuning with adapters, are "
    "our interpretation.",
)
