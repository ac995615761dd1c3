"""Figure of models that learn several tasks at once: the difference of each method, set by set."""

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
from benchmarks.multitask.definition import ID_MEAN
from benchmarks.multitask.outcomes import MultitaskOutcomes
from benchmarks.text.definition import ID, OOD

_DOMAINS = {ID: "", ID_MEAN: "mean of the tasks", OOD: " (OOD)", OOD_MEAN: "mean out of domain"}
_LINE, _APART = 0.27, 0.8  # inches of a set, and the share of it that its methods take


def draw_differences(outcomes: MultitaskOutcomes, path: Path) -> None:
    """Draw the differences to the baseline: a panel per model and mixture, a line per set; 95 % intervals."""
    rows = outcomes.of_mixtures(outcomes.rows)
    rows = rows[rows["delta"].notna()].assign(n=rows["pairs"])
    methods = [name for name in outcomes.methods if name in set(rows["method"])]
    panels = [(str(model), str(task), group) for (model, task), group in rows.groupby(["model", "task"], sort=False)]
    if not panels:
        placeholder_figure(path, "this suite compares nothing on several tasks")
        return
    lines = [_lines(outcomes, group) for _, _, group in panels]
    heights = [len(names) + 0.6 for names in lines]
    with mpl.rc_context(STYLE):
        figure, axes = panel_grid(
            len(panels), 1, (WIDTH, _LINE * sum(heights) + 0.3 * len(panels) + 0.6), height_ratios=heights, sharex=True
        )
        for axis, (model, task, group), names in zip(axes[:, 0], panels, lines, strict=True):
            for line, (_, index) in enumerate(names):
                for row in group.loc[index].itertuples():
                    number = methods.index(row.method)
                    shift = _APART * ((number + 0.5) / len(methods) - 0.5)
                    draw_difference(axis, row, line + shift, outcomes.style(row.method), 100)
            axis.axvline(0, color=REFERENCE, lw=0.8, ls="--", zorder=0)
            title = f"{outcomes.title('model', model)}, {outcomes.title('task', task)}"
            axis.set_title(wrapped(title, WIDTH), fontsize=8)
            axis.set_yticks(range(len(names)), [name for name, _ in names])
            axis.set_ylim(len(names) - 0.4, -0.6)
        handles = [mpl.lines.Line2D([], [], ls="", ms=4.5, **outcomes.style(name).mark) for name in methods]
        titles = [outcomes.title("method", name) for name in methods]
        figure.legend(handles, titles, loc="outside lower center", ncols=3, fontsize=7, frameon=False)
        axes[-1, 0].set_xlabel(difference_label(outcomes.baseline_title, rows["n"]))
        save(figure, path)


def _lines(outcomes: MultitaskOutcomes, rows: pd.DataFrame) -> list[tuple[str, Any]]:
    """List the lines of a panel, a label and the index of its rows: tasks, their mean, other sets, their mean.

    A mean over one set is left out.
    """
    lines = []
    for domain, words in _DOMAINS.items():
        of_domain = rows[rows["domain"] == domain]
        if domain == OOD_MEAN and rows.loc[rows["domain"] == OOD, "eval_task"].nunique() < 2:
            continue
        for name, group in of_domain.groupby("eval_task", sort=False):
            label = f"{outcomes.title('task', str(name))}{words}" if name else words
            lines.append((label, group.index))
    return lines
