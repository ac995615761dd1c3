"""Shares of experts over training, as the paper draws them: steps down, experts across."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl

from benchmarks.harness.report.plots import STYLE, USE, WIDTH, panel_grid, placeholder_figure, save, wrapped
from benchmarks.text.outcomes import TextOutcomes
from benchmarks.text.traces import Trace, published_traces, shown_traces

_MOST = 4  # rows of panels


def draw_traces(outcomes: TextOutcomes, path: Path) -> None:
    """A row of panels a model and task (four at most, the paper's task first), a panel a method; the paper's own below."""
    rows = [
        (f"{outcomes.title('model', model)}\n{outcomes.title('task', task)}", found)
        for (model, task), found in list(shown_traces(outcomes).items())[:_MOST]
    ]
    if published := published_traces(outcomes):
        rows.append(
            ("the paper's", {name: (outcomes.title("method", name), trace) for name, trace in published.items()})
        )
    if not rows:
        placeholder_figure(path, "this suite trains no routed method")
        return
    names = [name for name in outcomes.methods if any(name in found for _, found in rows)]
    with mpl.rc_context({**STYLE, "axes.grid": False, "font.size": 7}):
        figure, axes = panel_grid(len(rows), len(names), (WIDTH, 1.75 * len(rows) + 0.3))
        for axis_row, (title, found) in zip(axes, rows, strict=True):
            for axis, name in zip(axis_row, names, strict=True):
                if name not in found:
                    axis.set_visible(False)
                    continue
                named, trace = found[name]
                _draw(axis, trace)
                axis.set_title(wrapped(named, (WIDTH - 1.1) / len(names), 7), fontsize=7)
            next(axis for axis in axis_row if axis.get_visible()).set_ylabel(f"{title}\nstep")
        for axis in axes[-1]:
            axis.set_xlabel("experts")
        figure.colorbar(USE, ax=axes, shrink=0.6, label="load ÷ mean load", extend="max")
        save(figure, path)


def _draw(axis: Any, trace: Trace) -> None:
    windows, count = trace.shares.shape
    last = trace.ends[-1] if trace.ends else windows * 100
    axis.imshow(
        trace.shares * count,
        norm=USE.norm,
        cmap=USE.cmap,
        aspect="auto",
        interpolation="nearest",
        extent=(-0.5, count - 0.5, last, 0),
    )
    axis.set_xticks([0, count - 1], ["1", str(count)])
    axis.yaxis.set_major_locator(mpl.ticker.MaxNLocator(4, integer=True))
