"""Draw dev scores and dev losses over the epochs of the training."""

from __future__ import annotations

import math
from collections.abc import Mapping
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
    all methods of a model and task have are used. If a seed of a method stopped early, the method
    has no later epochs.

    Returns:
        A row for each run, epoch and ``metric`` (that of the task, or ``loss``), with titles. The
        other columns are those of :data:`.outcomes.CELL`, ``seed``, ``step`` (the epoch) and
        ``value`` (the number as it is printed; nan if the model diverged).
    """
    rows = []
    for run, metrics in outcomes.chosen_runs():
        if outcomes.role(run.method) == CONTROL:
            continue
        names = {key: getattr(run, key) for key in (*CELL, "seed")}
        for metric in (outcomes.benchmark.tasks[run.task].metric, _LOSS):
            scale = load_metrics()[metric].scale
            for epoch in metrics.epochs:
                number = epoch.numbers()[metric]
                value = math.nan
                if number is not None:
                    value = number * scale
                rows.append({**names, "metric": metric, "step": epoch.epoch, "value": value})
    columns = [*CELL, "seed", "metric", "step", "value"]
    numbers = pd.DataFrame(rows, columns=columns).astype({"step": float, "value": float})
    shared = shared_pairs(numbers, within=["model", "task"], compared=["method"], pair="seed")
    # beside each number: how many seeds its method has, and how many of them have its epoch
    seeds = shared.groupby(CELL)["seed"].transform("nunique")
    seeds_of_epoch = shared.groupby([*CELL, "step"])["seed"].transform("nunique")
    # keep the epochs that all seeds of the method have
    is_complete = seeds_of_epoch == seeds
    return outcomes.with_titles(shared[is_complete])


def draw_curves(outcomes: TextOutcomes, path: Path) -> None:
    """Draw the dev score and the dev loss by epoch for each model and training task.

    A line is a method. Models and tasks with a single epoch are left out, and at most eight are
    drawn. The figure is a placeholder if none is left.
    """
    numbers = epoch_numbers(outcomes)
    num_epochs = numbers.groupby(["model", "task"])["step"].transform("nunique")
    with_curves = numbers[num_epochs > 1]
    groups = list(with_curves.groupby(["model_title", "task_title"], sort=False))[:_MOST_GROUPS]
    if not groups:
        plots.placeholder_figure(path)
        return
    styles = outcomes.styles_by_title(with_curves)
    columns = _count_columns(len(groups))
    # a row of groups has two rows of panels: the scores, and below them the losses
    rows = math.ceil(len(groups) / columns)
    lines = 2 * rows
    height = min(_PANEL_HEIGHT * lines, _MOST_HEIGHT)
    # shorter than a panel with its numbers, so that labels of neighbours do not touch
    label_height = 0.75 * height / lines
    width = max(_COLUMN_WIDTH * columns, _LEAST_WIDTH)
    title_width = 0.5 * width / columns  # the labels take the rest
    figure_of_panels = plots.panel_figure(
        path, lines=lines, columns=columns, size=(width, height), style=plots.CURVES
    )
    with figure_of_panels as (figure, axes):
        for number, (titles, group) in enumerate(groups):
            row, column = divmod(number, columns)
            score_axis = axes[2 * row, column]
            loss_axis = axes[2 * row + 1, column]
            is_loss = group["metric"] == _LOSS
            _draw_panel(score_axis, group[~is_loss], styles, label_height)
            _draw_panel(loss_axis, group[is_loss], styles, label_height)
            wrapped = [plots.wrap_text(title, title_width) for title in titles]
            score_axis.set_title("\n".join(wrapped), fontsize=8)
            seeds = group.groupby("method")["seed"].nunique()
            loss_axis.set_xlabel(f"epoch\n{plots.count_text(seeds)}")
        legend_height = plots.legend_below(figure, axes.flat, columns + 1)
        figure.set_figheight(figure.get_figheight() + legend_height)


def _count_columns(num_groups: int) -> int:
    """Choose the number of columns: at most two, so that a telephone shows readable letters.

    With more than six groups, four columns are needed, so that the figure fits a page.
    """
    if num_groups > _MOST_NARROW_GROUPS:
        return 4
    return min(num_groups, 2)


def _draw_panel(
    axis: Any, points: pd.DataFrame, styles: Mapping[str, MethodStyle], label_height: float
) -> None:
    """Draw one metric of a model and task by epoch, and label the vertical axis.

    ``label_height`` is the largest length of a line of the label, in inches.
    """
    plots.draw_means(axis, points, styles)
    plots.label_steps(axis, "", _MOST_TICKS)
    (metric,) = points["metric"].unique()
    label = f"{load_metrics()[metric].label} on dev"
    axis.set_ylabel(plots.wrap_text(Column(metric, "value", label).heading, label_height))


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
