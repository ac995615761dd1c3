"""Draw the loss curves of instruction tuning."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas as pd

from benchmarks.harness.report import plots
from benchmarks.harness.report.presentation import Figure
from benchmarks.harness.report.style import DENSE, MethodStyle, distinct_styles
from benchmarks.harness.results.content import Metrics
from benchmarks.llama.outcomes import GROUP, InstructionOutcomes, Row


def draw_curves(outcomes: InstructionOutcomes, path: Path) -> None:
    """Draw the loss by step, averaged over seeds: a column of panels per model and tuning, a line per method."""
    points = outcomes.with_titles(
        outcomes.collect_rows(["panel", "step", "loss"], _loss_points).astype({"loss": float})
    )
    if points.empty:
        plots.placeholder_figure(path)
        return
    panels, groups = points["panel"].unique(), points.groupby(GROUP, sort=False)
    lines = points[["method_title", "method"]].drop_duplicates().itertuples()
    styles = distinct_styles((line.method_title, outcomes.style(line.method)) for line in lines)
    size = (min(3.0 * len(groups) + 0.6, plots.WIDTH), 2.3 * len(panels) + 0.3)
    shared = {"sharex": "col", "sharey": "row"}
    with plots.panel_figure(path, len(panels), len(groups), size, plots.CURVES, **shared) as (
        figure,
        axes,
    ):
        for column, ((model, name, tuning), group) in enumerate(groups):
            for axis, label in zip(axes[:, column], panels, strict=True):
                for title, line in group[group["panel"] == label].groupby(
                    "method_title", sort=False
                ):
                    _draw_curve(
                        axis,
                        line.groupby("step")["loss"].mean(skipna=False),
                        str(title),
                        styles[str(title)],
                    )
                axis.set_ylabel(label if column == 0 else "")
            tuned = outcomes.title("tuning", tuning)
            below = f"{outcomes.title('task', name)}, {tuned}" if outcomes.several_sets else tuned
            title = f"{outcomes.title('model', model)}\n{below}"
            axes[0, column].set_title(
                plots.wrap_text(title, (size[0] - 0.6) / len(groups)), fontsize=8
            )
            seeds = group.groupby("method_title")["run_id"].nunique()
            axes[-1, column].set_xlabel(f"step; means of {plots.count_text(seeds)}")
            axes[-1, column].xaxis.set_major_locator(mpl.ticker.MaxNLocator(integer=True))
        plots.legend_below(figure, axes.flat, len(groups) + 1)


def _loss_points(metrics: Metrics) -> Iterator[Row]:
    """Yield panel, step and loss; a loss is None if the model diverged."""
    for step, loss in enumerate(metrics.curve, start=1):
        yield "training loss", step, loss
    for point in metrics.held_out_curve:
        yield "held-out loss", point.step, point.loss


def _draw_curve(axis: Any, losses: pd.Series[float], title: str, style: MethodStyle) -> None:
    """Draw losses by step. Dashes and marks keep overlapping lines visible."""
    is_dense = style.colour == DENSE.colour  # wide, to be visible below other lines
    width = {"lw": 2.6, "alpha": 0.55} if is_dense else {"lw": 1.2}
    marks = {"ms": 4, "markevery": max(1, len(losses) // 8)}
    axis.plot(losses.index, losses, label=title, **width, **style.line, **marks)


FIGURES = {
    "curves": Figure(
        draw_curves,
        "Loss of the training steps by tuning and method: the mean over the response tokens of a step, averaged over "
        "seeds. Every step has different rows. The held-out loss, shown below if runs computed it while training "
        "(`training.eval_every`), is always over the same rows. The axes do not start at zero.",
    ),
}
