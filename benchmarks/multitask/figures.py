"""Figure of models that learn several tasks at once: the difference of each method, set by set."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl

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
    rows = rows[rows["delta"].notna()].sort_values(
        "domain", key=lambda names: names.map(list(_DOMAINS).index), kind="stable"
    )
    methods = [name for name in outcomes.methods if name in set(rows["method"])]
    if not methods:
        placeholder_figure(path, "this suite compares nothing on several tasks")
        return
    labels = [outcomes.title("task", row.eval_task) + _DOMAINS[row.domain] for row in rows.itertuples()]
    rows = rows.assign(n=rows["pairs"], line=labels)
    panels = []
    for (model, task), group in rows.groupby(["model", "task"], sort=False):
        if group.loc[group["domain"] == OOD, "eval_task"].nunique() < 2:
            group = group[group["domain"] != OOD_MEAN]  # a mean over one set
        panels.append((f"{outcomes.title('model', model)}, {outcomes.title('task', task)}", group))
    heights = [group["line"].nunique() + 0.6 for _, group in panels]
    with mpl.rc_context(STYLE):
        figure, axes = panel_grid(
            len(panels), 1, (WIDTH, _LINE * sum(heights) + 0.3 * len(panels) + 0.6), height_ratios=heights, sharex=True
        )
        for axis, (title, group) in zip(axes[:, 0], panels, strict=True):
            lines = list(group["line"].unique())
            for row in group.itertuples():
                shift = _APART * ((methods.index(row.method) + 0.5) / len(methods) - 0.5)
                draw_difference(axis, row, lines.index(row.line) + shift, outcomes.style(row.method), 100)
            axis.axvline(0, color=REFERENCE, lw=0.8, ls="--", zorder=0)
            axis.set_title(wrapped(title, WIDTH), fontsize=8)
            axis.set_yticks(range(len(lines)), lines)
            axis.set_ylim(len(lines) - 0.4, -0.6)
        handles = [mpl.lines.Line2D([], [], ls="", ms=4.5, **outcomes.style(name).mark) for name in methods]
        titles = [outcomes.title("method", name) for name in methods]
        figure.legend(handles, titles, loc="outside lower center", ncols=3, fontsize=7, frameon=False)
        axes[-1, 0].set_xlabel(difference_label(outcomes.baseline_title, rows["n"]))
        save(figure, path)
