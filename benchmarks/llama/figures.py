"""Draw the loss curves of instruction tuning."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from benchmarks.harness.report import plots
from benchmarks.harness.report.presentation import Figure
from benchmarks.harness.results.content import Metrics
from benchmarks.llama.outcomes import GROUP, InstructionOutcomes

_PANEL_HEIGHT = 2.3  # inches


def draw_curves(outcomes: InstructionOutcomes, path: Path) -> None:
    """Draw the loss by step, averaged over seeds.

    There is a column of panels for each model, set and fine-tuning. A column has a panel with the
    training loss. A second panel shows the held-out loss if runs computed it. A line is a method.
    """
    # a row for each run and point, with the fields of _LossPoint as columns
    points = outcomes.collect_rows(_LossPoint._fields, _loss_points)
    titled = outcomes.with_titles(points.astype({"value": float}))
    if titled.empty:
        plots.placeholder_figure(path)
        return
    labels = list(titled["panel"].unique())  # "training loss" and, if there is one, "held-out loss"
    # each model, set and fine-tuning is a column of panels
    points_by_column = titled.groupby(GROUP, sort=False)
    titles = []
    for (model, task, tuning), _points in points_by_column:
        titles.append(_column_title(outcomes, model, task, tuning))
    styles = outcomes.styles_by_title(titled)
    with plots.curve_figure(path, titles, labels, _PANEL_HEIGHT) as axes:
        for column, (_names, points_of_column) in enumerate(points_by_column):
            axes_of_column = axes[:, column]
            for axis, label in zip(axes_of_column, labels, strict=True):
                points_of_panel = points_of_column[points_of_column["panel"] == label]
                plots.draw_means(axis, points_of_panel, styles)
            # each run of a method has another seed
            num_seeds = points_of_column.groupby("method_title")["run_id"].nunique()
            lowest_axis = axes_of_column[-1]
            plots.label_steps(lowest_axis, f"step; means of {plots.count_text(num_seeds)}")


def _column_title(outcomes: InstructionOutcomes, model: str, task: str, tuning: str) -> str:
    """Return the title of a column: the model, and on a second line the fine-tuning.

    If runs train on several sets, the set comes before the fine-tuning.
    """
    below = outcomes.title("tuning", tuning)
    if outcomes.several_sets:
        below = f"{outcomes.title('task', task)}, {below}"
    return f"{outcomes.title('model', model)}\n{below}"


class _LossPoint(NamedTuple):
    """A point of a loss curve."""

    panel: str
    """The label of the panel."""
    step: int
    value: float | None
    """The loss; None if the model diverged."""


def _loss_points(metrics: Metrics) -> Iterator[_LossPoint]:
    """Yield a point for each recorded loss: of the training, then of the held-out rows."""
    for step, loss in enumerate(metrics.curve, start=1):
        yield _LossPoint("training loss", step, loss)
    for point in metrics.held_out_curve:
        yield _LossPoint("held-out loss", point.step, point.loss)


FIGURES = {
    "curves": Figure(
        draw_curves,
        "Loss of the training steps by tuning and method: the mean over the response tokens of a "
        "step, averaged over seeds. Every step has different rows. The held-out loss, shown below "
        "if runs computed it while training (`training.eval_every`), is always over the same rows. "
        "The axes do not start at zero.",
    ),
}
