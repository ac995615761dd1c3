"""Figures, from the same records as the tables."""

from __future__ import annotations

import math
import os
import re
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from benchmarks.harness.report.looks import Look
from benchmarks.harness.report.outcomes import Outcomes
from benchmarks.harness.results.statistics import confidence_interval

if "MPLBACKEND" not in os.environ:  # a notebook sets it
    mpl.use("Agg")
from matplotlib import pyplot as plt

REFERENCE = "#444444"  # lines that others are compared with
# of use of an expert over its mean use: 1 is like the others
USE = mpl.cm.ScalarMappable(mpl.colors.Normalize(0, 2), "PuOr_r")
STYLE: Any = {
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "x",
    "grid.color": "#e3e3e3",
    "axes.axisbelow": True,
    "pdf.fonttype": 42,
}


WIDTH = 6.9  # inches of a page's text: no figure is wider
_NAMES, _COLUMNS = 1.7, 4  # inches beside the panels of scores, and how many stand beside each other
_BARS, _BELOW = 5, 0.26  # below so many scores no interval is drawn; where they stand, in lines below their mean
FEW = 3  # below so many pairs an interval says nothing that the numbers do not


def draw_difference(axis: Any, row: Any, place: float, look: Look, scale: float = 1) -> None:
    """Draw a difference and, where there are enough pairs, its interval.

    Args:
        axis: where.
        row: with ``delta``, ``low``, ``high`` and ``n``.
        place: on the vertical axis.
        look: of the method.
        scale: what the numbers are drawn times.
    """
    if row.n >= FEW and not math.isnan(row.low):
        axis.plot([row.low * scale, row.high * scale], [place, place], color=look.colour, lw=1.4)
    axis.plot(row.delta * scale, place, ls="", ms=4.5, **look.mark)


def count_text(counts: Iterable[float], of: str = "seeds") -> str:
    """How many there are of what is drawn, ``n = 5 to 8 seeds``; nothing where no count is known."""
    known = sorted({int(count) for count in counts if count and not math.isnan(count)})
    if not known:
        return ""
    named = of.removesuffix("s") if known == [1] else of
    return f"n = {known[0]}{f' to {known[-1]}' if len(known) > 1 else ''} {named}"


def difference_label(reference: str, counts: Iterable[float]) -> str:
    """What an axis of differences shows, and over how many seeds."""
    return ", ".join(filter(None, (f"Difference to {reference} (points)", count_text(counts))))


def draw_interval(
    axis: Any, ends: tuple[float, float], place: float, limits: tuple[float, float], colour: str, **line: Any
) -> None:
    """Draw an interval as far as the panel goes, with an arrow at an end that lies beyond it."""
    shown = max(ends[0], limits[0]), min(ends[1], limits[1])
    axis.plot(shown, [place, place], color=colour, **line)
    for end, cut, arrow in zip(ends, shown, "<>", strict=True):
        if end != cut:
            axis.plot(cut, place, arrow, ms=4.5, color=colour, mew=0, clip_on=False, zorder=3)


def legend_below(figure: Any, axes: Iterable[Any], columns: int) -> None:
    """Name what is drawn in any of the axes once, below the figure."""
    named = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(
        named.values(),
        named.keys(),
        loc="outside lower center",
        ncols=min(len(named), columns),
        fontsize=7,
        frameon=False,
    )


def wrapped(text: str, inches: float, size: float = 8) -> str:
    """Break a text into lines of that width, by the mean width of letters of ``size`` points."""
    letters = max(8, int(inches * 72 / (0.58 * size)))
    text = re.sub(r"(?<=\d) (?=[MB]\))", "\u00a0", text)  # a number of parameters and its unit
    return "\n".join(textwrap.fill(line, letters, break_on_hyphens=False) for line in text.split("\n"))


def over_mean(shares: NDArray[np.float64], mean: NDArray[np.float64]) -> NDArray[np.float64]:
    """Each row's shares of experts over their mean use, for :data:`USE`; 1 where that is nothing."""
    return np.divide(shares, mean, out=np.ones_like(shares), where=mean > 0)


@dataclass(frozen=True)
class Panel:
    """One panel of :func:`score_panels`: its title, and a row a method and seed with ``value``."""

    title: str
    rows: pd.DataFrame


def score_panels(
    outcomes: Outcomes,
    panels: list[list[Panel]],
    path: Path,
    measure: str = "Score (%); large marks: mean over seeds, dots below: seeds",
) -> None:
    """Score by method, one panel a set.

    Small dots are seeds, the large mark above them their mean, the bar its 95 % confidence interval: of fewer than five seeds it would say less than
    the dots do. An arrow is an end beyond the panel.
    All panels share one axis, and the dashed line is the baseline's mean.

    Args:
        outcomes: for titles, roles and order.
        panels: by row and column.
        path: of the files, without ending.
        measure: what the axis shows, and what marks and dots are.
    """
    lines = [row[start : start + _COLUMNS] for row in panels for start in range(0, len(row), _COLUMNS)]
    values = pd.concat([panel.rows["value"] for row in lines for panel in row]) * 100
    low, high = values.min(), values.max()
    margin = max(high - low, 1.0) * 0.08
    methods = outcomes.methods
    present = [[name for name in methods if any(name in set(panel.rows["method"]) for panel in row)] for row in lines]
    columns = max(map(len, lines))
    heights = [len(names) + 1.5 for names in present]
    width = min(2.1 * columns + _NAMES, WIDTH)
    inches = (width - _NAMES) / columns
    with mpl.rc_context(STYLE):
        figure, axes = panel_grid(
            len(lines),
            columns,
            (width, 0.27 * sum(heights) + 0.6 * len(lines) + 0.3),
            height_ratios=heights,
            sharex=True,
            sharey="row",
        )
        for axis_row, row, names in zip(axes, lines, present, strict=True):
            for axis, panel in zip(axis_row, row, strict=False):
                for place, method in enumerate(names):
                    scores = panel.rows.loc[panel.rows["method"] == method, "value"].to_numpy(dtype=float) * 100
                    if len(scores):
                        _draw_method(axis, place, scores, outcomes.look(method), (low - margin, high + margin))
                    if len(scores) and method == outcomes.baseline:
                        axis.axvline(scores.mean(), color=REFERENCE, lw=0.8, ls="--", zorder=0)
                axis.set_title(wrapped(panel.title, inches), fontsize=8)
                axis.set_xlim(low - margin, high + margin)
            axis_row[0].set_yticks(range(len(names)), [methods[name].title for name in names])
            axis_row[0].set_ylim(len(names) - 0.4, -0.6)
        label = f"{measure}, bars: 95 % confidence interval (from five on; arrows: beyond the panel)"
        hide_empty(axes)
        figure.supxlabel(wrapped(label, width), fontsize=7.5)
        save(figure, path)


def _draw_method(axis: Any, place: int, scores: Any, look: Look, limits: tuple[float, float]) -> None:
    if len(scores) >= _BARS:
        draw_interval(axis, confidence_interval(scores), place, limits, look.colour, lw=1.2, alpha=0.6)
    axis.plot(scores.mean(), place, ls="", ms=4.2, **{"mec": "white", "mew": 0.6, **look.mark})
    axis.plot(scores, [place + _BELOW] * len(scores), "o", ms=2.6, color=look.colour, alpha=0.55, mew=0)


def panel_grid(lines: int, columns: int, size: tuple[float, float], **options: Any) -> tuple[Any, Any]:
    """A figure with that many panels, and its axes ``[lines, columns]``.

    Args:
        lines: of panels, below each other.
        columns: of panels.
        size: in inches.
        **options: of ``plt.subplots``.
    """
    return plt.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained", **options)


def hide_empty(axes: NDArray[np.object_]) -> None:
    """Hide the axes ``[rows, columns]`` that nothing was drawn in; where ticks' labels are shared, they stand below the last panel of each column."""
    for column in axes.T:
        for axis in column:
            axis.set_visible(axis.has_data())
        if seen := [axis for axis in column if axis.get_visible()]:
            seen[-1].tick_params(labelbottom=True)


def save(figure: Any, path: Path) -> None:
    """Write ``<path>.pdf`` and ``.png``, the same bytes for the same numbers, and close the figure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path.with_suffix(".png"), dpi=160, metadata={"Software": None})
    figure.set_layout_engine("none")  # it stays as it was laid out, which takes as long as drawing
    figure.savefig(path.with_suffix(".pdf"), metadata={"CreationDate": None})
    plt.close(figure)


def placeholder_figure(path: Path, text: str) -> None:
    """A picture that says why there is none."""
    with mpl.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(3, 0.6))
        axis.text(0.5, 0.5, text, ha="center", va="center")
        axis.axis("off")
        save(figure, path)
