"""Draw the loss curves of instruction tuning."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas as pd

from benchmarks.harness.report import plots
from benchmarks.harness.report.presentation import Figure
from benchmarks.harness.report.style import DENSE, MethodStyle, distinct_styles
from benchmarks.harness.results.content import Metrics
from benchmarks.llama.outcomes import GROUP, InstructionOutcomes, Row

# inches of a column of panels, and of the labels of the vertical axes
_PANEL_WIDTH = 3.0
_LABELS_WIDTH = 0.6


def draw_curves(outcomes: InstructionOutcomes, path: Path) -> None:
    """Draw the loss by step, averaged over seeds.

    There is a column of panels for each model, set and fine-tuning. A column has a panel with the
    training loss. A second panel shows the held-out loss if runs computed it. A line is a method.
    """
    points = outcomes.collect_rows(["panel", "step", "loss"], _loss_points)
    titled = outcomes.with_titles(points.astype({"loss": float}))
    if titled.empty:
        plots.placeholder_figure(path)
        return
    labels = list(titled["panel"].unique())  # "training loss" and, if there is one, "held-out loss"
    groups = titled.groupby(GROUP, sort=False)
    # a method with several settings has several titles
    methods = titled[["method_title", "method"]].drop_duplicates()
    styles = distinct_styles(
        (row.method_title, outcomes.style(row.method)) for row in methods.itertuples()
    )
    # in inches: each row of panels has a height of 2.3
    width = min(_PANEL_WIDTH * len(groups) + _LABELS_WIDTH, plots.WIDTH)
    height = 2.3 * len(labels) + 0.3
    title_width = (width - _LABELS_WIDTH) / len(groups)
    panels = plots.panel_figure(
        path,
        len(labels),
        len(groups),
        (width, height),
        plots.CURVES,
        sharex="col",
        sharey="row",
    )
    with panels as (figure, axes):
        for column, (names, group) in enumerate(groups):
            _draw_column(axes[:, column], labels, group, styles)
            title = _column_title(outcomes, *names)
            axes[0, column].set_title(plots.wrap_text(title, title_width), fontsize=8)
        for axis, label in zip(axes[:, 0], labels, strict=True):
            axis.set_ylabel(label)
        plots.legend_below(figure, axes.flat, len(groups) + 1)


def _draw_column(
    axes: Sequence[Any],
    labels: Sequence[str],
    group: pd.DataFrame,
    styles: Mapping[str, MethodStyle],
) -> None:
    """Draw one column of panels: a panel for each loss, with a line for each method.

    Args:
        axes: The axes of the panels.
        labels: The labels of the panels, such as ``training loss``.
        group: The losses of a model, set and fine-tuning, one row for each run and step.
        styles: The style of each method, by title.
    """
    for axis, label in zip(axes, labels, strict=True):
        panel = group[group["panel"] == label]
        for title, points in panel.groupby("method_title", sort=False):
            # the line ends where a model diverges, so a missing loss makes the mean missing
            means = points.groupby("step")["loss"].mean(skipna=False)
            _draw_curve(axis, means, str(title), styles[str(title)])
    seeds = group.groupby("method_title")["run_id"].nunique()
    axes[-1].set_xlabel(f"step; means of {plots.count_text(seeds)}")
    axes[-1].xaxis.set_major_locator(mpl.ticker.MaxNLocator(integer=True))


def _column_title(outcomes: InstructionOutcomes, model: str, task: str, tuning: str) -> str:
    """Return the title of a column: the model, and on a second line the fine-tuning.

    If runs train on several sets, the set comes before the fine-tuning.
    """
    below = outcomes.title("tuning", tuning)
    if outcomes.several_sets:
        below = f"{outcomes.title('task', task)}, {below}"
    return f"{outcomes.title('model', model)}\n{below}"


def _loss_points(metrics: Metrics) -> Iterator[Row]:
    """Yield the label of the panel, the step and the loss of each recorded loss.

    A loss is None if the model diverged.
    """
    for step, loss in enumerate(metrics.curve, start=1):
        yield "training loss", step, loss
    for point in metrics.held_out_curve:
        yield "held-out loss", point.step, point.loss


def _draw_curve(axis: Any, losses: pd.Series[float], title: str, style: MethodStyle) -> None:
    """Draw the line of one method: its losses by step.

    Dashes and markers, and a wide line for the dense model, keep overlapping lines visible.
    """
    is_dense = style.colour == DENSE.colour
    # the line of the dense model is wide, to be visible below other lines
    line = {"lw": 2.6, "alpha": 0.55} if is_dense else {"lw": 1.2}
    # about eight markers a line
    markers = {"ms": 4, "markevery": max(1, len(losses) // 8)}
    axis.plot(losses.index, losses, label=title, **line, **style.line, **markers)


FIGURES = {
    "curves": Figure(
        draw_curves,
        "Loss of the training steps by tuning and method: the mean over the response tokens of a "
        "step, averaged over seeds. Every step has different rows. The held-out loss, shown below "
        "if runs computed it while training (`training.eval_every`), is always over the same rows. "
        "The axes do not start at zero.",
    ),
}
