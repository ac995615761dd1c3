"""Draw dev scores and dev losses over the epochs of the training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.harness.config.catalogue import load_metrics
from benchmarks.harness.config.methods import CONTROL
from benchmarks.harness.report import plots
from benchmarks.harness.report.presentation import Figure
from benchmarks.harness.report.style import MethodStyle
from benchmarks.harness.report.table import Column
from benchmarks.harness.results.statistics import shared_pairs
from benchmarks.text.outcomes import CELL, TextOutcomes

_LOSS = "loss"
# a group is a model and a training task; it has a panel with the score, and below it one with the
# loss
_MOST_GROUPS = 8
_MOST_NARROW_GROUPS = 6  # more groups in two columns would be higher than a page
_MOST_TICKS = 5  # most numbers below a panel
# inches
_COLUMN_WIDTH = 1.7
_LEAST_WIDTH = 3.4  # a telephone shows this width with letters of 11 pixels
_PANEL_HEIGHT = 1.4
_MOST_HEIGHT = 8.0  # of all panels, without the legend


def epoch_numbers(outcomes: TextOutcomes) -> pd.DataFrame:
    """Collect the dev score and the dev loss of the chosen runs after each epoch.

    The runs are those of :meth:`.TextOutcomes.chosen_runs`, without controls. Only the seeds that
    all methods of a model and task have are used. If one seed of a method stopped early, the later
    epochs of its other seeds are left out, too.

    Returns:
        Two rows for each run and epoch, one with the score and one with the loss. The columns are:

        - ``model``, ``task``, ``method`` and their titles, and ``seed``
        - ``metric``: the metric of the task, or ``loss``
        - ``step``: the epoch
        - ``value``: the number as it is printed, such as in %; nan if the model diverged
    """
    rows = []
    for run, metrics in outcomes.chosen_runs():
        if outcomes.role(run.method) == CONTROL:
            continue
        keys_of_run = {key: getattr(run, key) for key in (*CELL, "seed")}
        metric_of_task = outcomes.benchmark.tasks[run.task].metric
        for metric in (metric_of_task, _LOSS):
            for epoch in metrics.epochs:
                recorded = epoch.numbers()[metric]
                value = _printed_number(metric, recorded)
                rows.append({**keys_of_run, "metric": metric, "step": epoch.epoch, "value": value})
    columns = [*CELL, "seed", "metric", "step", "value"]
    numbers = pd.DataFrame(rows, columns=columns).astype({"step": float, "value": float})
    shared = shared_pairs(numbers, within=["model", "task"], compared=["method"], pair="seed")
    # `transform` returns a value for each row: the number of seeds of its method
    num_seeds = shared.groupby(CELL)["seed"].transform("nunique")
    # and the number of these seeds that reached the epoch of the row
    num_seeds_of_epoch = shared.groupby([*CELL, "step"])["seed"].transform("nunique")
    is_complete = num_seeds_of_epoch == num_seeds
    return outcomes.with_titles(shared[is_complete])


def _printed_number(metric: str, number: float | None) -> float:
    """Scale a number of a metric as it is printed, such as a share to %; nan for None."""
    if number is None:
        return math.nan
    return number * load_metrics()[metric].scale


def draw_curves(outcomes: TextOutcomes, path: Path) -> None:
    """Draw the dev score and the dev loss by epoch for each model and training task.

    A line is a method. Models and tasks with a single epoch are left out, and at most eight are
    drawn. The figure is a placeholder if none is left.
    """
    numbers = epoch_numbers(outcomes)
    # for each row: the number of epochs of its model and task
    num_epochs = numbers.groupby(["model", "task"])["step"].transform("nunique")
    with_curves = numbers[num_epochs > 1]
    all_groups = list(with_curves.groupby(["model_title", "task_title"], sort=False))
    groups = all_groups[:_MOST_GROUPS]
    if not groups:
        plots.placeholder_figure(path)
        return
    styles = outcomes.styles_by_title(with_curves)
    columns = _count_columns(len(groups))
    group_rows = math.ceil(len(groups) / columns)
    panel_rows = 2 * group_rows  # each group has two panels, one below the other
    height = min(_PANEL_HEIGHT * panel_rows, _MOST_HEIGHT)
    width = max(_COLUMN_WIDTH * columns, _LEAST_WIDTH)
    figure_of_panels = plots.panel_figure(
        path, rows=panel_rows, columns=columns, size=(width, height), style=plots.CURVES
    )
    with figure_of_panels as (figure, axes):
        for number, (titles, group) in enumerate(groups):
            group_row, column = divmod(number, columns)
            panel_row = 2 * group_row
            _draw_group(
                score_axis=axes[panel_row, column],
                loss_axis=axes[panel_row + 1, column],
                titles=titles,
                numbers=group,
                styles=styles,
                panel_size=(width / columns, height / panel_rows),
            )
        legend_height = plots.legend_below(figure, axes.flat, columns + 1)
        figure.set_figheight(figure.get_figheight() + legend_height)


def _draw_group(
    score_axis: Any,
    loss_axis: Any,
    titles: Sequence[str],
    numbers: pd.DataFrame,
    styles: Mapping[str, MethodStyle],
    panel_size: tuple[float, float],
) -> None:
    """Draw the two panels of a model and training task: the score, and below it the loss.

    Args:
        score_axis: The axis of the score.
        loss_axis: The axis of the loss.
        titles: The titles of the model and of the training task.
        numbers: Their rows of :func:`epoch_numbers`.
        styles: The style of each method, by title.
        panel_size: The width and the height of a panel with its labels, in inches.
    """
    panel_width, panel_height = panel_size
    # The label of the vertical axis runs along the height of the panel. It is shorter than the
    # panel, so that it does not touch the labels of the panels above and below.
    label_length = 0.75 * panel_height
    title_width = 0.5 * panel_width  # the labels take the rest
    is_loss = numbers["metric"] == _LOSS
    _draw_panel(score_axis, numbers[~is_loss], styles, label_length)
    _draw_panel(loss_axis, numbers[is_loss], styles, label_length)
    wrapped_titles = [plots.wrap_text(title, inches=title_width) for title in titles]
    score_axis.set_title("\n".join(wrapped_titles), fontsize=8)
    seed_counts = numbers.groupby("method")["seed"].nunique()
    loss_axis.set_xlabel(f"epoch\n{plots.count_text(seed_counts)}")


def _count_columns(num_groups: int) -> int:
    """Choose the number of columns: at most two, so that a telephone shows readable letters.

    With more than six groups, four columns are needed, so that the figure fits a page.
    """
    if num_groups > _MOST_NARROW_GROUPS:
        return 4
    return min(num_groups, 2)


def _draw_panel(
    axis: Any, points: pd.DataFrame, styles: Mapping[str, MethodStyle], label_length: float
) -> None:
    """Draw one metric of a model and task by epoch, and label the vertical axis.

    Args:
        axis: The axis of the panel.
        points: The rows of :func:`epoch_numbers` with this model, task and metric.
        styles: The style of each method, by title.
        label_length: The length of the label in inches; a longer label is broken into lines.
    """
    plots.draw_means(axis, points, styles)
    plots.label_steps(axis, "", _MOST_TICKS)
    (metric,) = points["metric"].unique()
    label = f"{load_metrics()[metric].label} on dev"
    # the heading of a table column is its label with the unit of the metric, as needed here
    column = Column(metric, value="value", label=label)
    axis.set_ylabel(plots.wrap_text(column.heading, inches=label_length))


CURVES = Figure(
    draw_curves,
    "Score and loss on the dev split after each epoch, by model and training task: means over the "
    "n seeds that all drawn methods have. Hyper-parameters are chosen by the dev split. Each "
    "method has its chosen learning rate and setting, under the clean selection if it has runs, "
    "else under the authors'. The loss of a regression is the mean squared error. Some seeds stop "
    "early; a line ends with the first of its seeds that stops. Controls and rows of ablations "
    "are left out, and so are models and tasks with a single epoch. At most eight models and "
    "tasks are drawn. The axes do not start at zero.",
)
