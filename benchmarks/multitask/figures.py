"""The picture of models that learn several tasks at once: what each method changes, set by set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas as pd

from benchmarks.harness.config.benchmark import OOD_MEAN
from benchmarks.harness.report.plots import (
    REFERENCE,
    STYLE,
    WIDTH,
    difference_label,
    draw_difference,
    panel_grid,
    placeholder_figure,
    save,
    wrapped,
)
from benchmarks.multitask.grid import ID_MEAN
from benchmarks.multitask.tables import MultitaskOutcomes
from benchmarks.text.grid import ID, OOD

_DOMAINS = {ID: "", ID_MEAN: "mean of the tasks", OOD: " (OOD)", OOD_MEAN: "mean out of domain"}
_LINE, _APART = 0.27, 0.8  # inches of a set, and the part of it that its methods are spread over


def draw_differences(outcomes: MultitaskOutcomes, path: Path) -> None:
    """A panel a model and mixture, a line a set and the means: the difference of every method to the baseline with its 95 % interval from three seeds on.

    All panels share one axis.
    """
    rows = outcomes.of_mixtures(outcomes.rows)
    rows = rows[rows["delta"].notna()].assign(n=rows["pairs"])
    methods = [name for name in outcomes.methods if name in set(rows["method"])]
    panels = [(str(model), str(task), found) for (model, task), found in rows.groupby(["model", "task"], sort=False)]
    if not panels:
        placeholder_figure(path, "this suite compares nothing on several tasks")
        return
    lines = [_lines(outcomes, found) for _, _, found in panels]
    heights = [len(found) + 0.6 for found in lines]
    with mpl.rc_context(STYLE):
        figure, axes = panel_grid(
            len(panels), 1, (WIDTH, _LINE * sum(heights) + 0.3 * len(panels) + 0.6), height_ratios=heights, sharex=True
        )
        for axis, (model, task, found), names in zip(axes[:, 0], panels, lines, strict=True):
            for line, (_, own) in enumerate(names):
                for row in found.loc[own].itertuples():
                    number = methods.index(row.method)
                    shift = _APART * ((number + 0.5) / len(methods) - 0.5)
                    draw_difference(axis, row, line + shift, outcomes.style(row.method), 100)
            axis.axvline(0, color=REFERENCE, lw=0.8, ls="--", zorder=0)
            title = f"{outcomes.title('model', model)}, {outcomes.title('task', task)}"
            axis.set_title(wrapped(title, WIDTH), fontsize=8)
            axis.set_yticks(range(len(names)), [name for name, _ in names])
            axis.set_ylim(len(names) - 0.4, -0.6)
        handles = [mpl.lines.Line2D([], [], ls="", ms=4.5, **outcomes.style(name).mark) for name in methods]
        figure.legend(
            handles,
            [outcomes.title("method", name) for name in methods],
            loc="outside lower center",
            ncols=3,
            fontsize=7,
            frameon=False,
        )
        axes[-1, 0].set_xlabel(difference_label(outcomes.baseline_title, rows["n"]))
        save(figure, path)


def _lines(outcomes: MultitaskOutcomes, rows: pd.DataFrame) -> list[tuple[str, Any]]:
    """The lines of a panel: tasks, their mean, other sets, their mean; a label, and which rows stand in it. A mean over one set is left out."""
    found = []
    for domain, words in _DOMAINS.items():
        own = rows[rows["domain"] == domain]
        if domain == OOD_MEAN and rows.loc[rows["domain"] == OOD, "eval_task"].nunique() < 2:
            continue
        for name, part in own.groupby("eval_task", sort=False):
            label = f"{outcomes.title('task', str(name))}{words}" if name else words
            found.append((label, part.index))
    return found
