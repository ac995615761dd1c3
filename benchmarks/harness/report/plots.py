"""Draw figures from the same records as the tables."""

from __future__ import annotations

import math
import os
import re
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image

from benchmarks.harness.base import atomic_write
from benchmarks.harness.report.style import MethodStyle

# draw without a display; a notebook sets its own backend, before pyplot is imported
if "MPLBACKEND" not in os.environ:
    mpl.use("Agg")
from matplotlib import pyplot as plt

REFERENCE = "#444444"  # the colour of reference lines
_BAND = "#dceaf5"  # the colour of margins
# The colours of the use of an expert, divided by its mean use. White means 1. The colour-blind can
# distinguish purple and orange.
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
CURVES = {**STYLE, "axes.grid.axis": "both"}
HEATMAP = {**STYLE, "axes.grid": False, "font.size": 7}

WIDTH = 6.9  # inches of a page's text, the largest width of a figure
FEW = 3  # minimum number of pairs for drawing an interval
# sizes in a forest plot, in inches
_FOREST_WIDTH = 6.0
_LINE_HEIGHT = 0.26
_TITLE_WIDTH = 3.5
_TITLE_HEIGHT = 0.3  # the title of a panel
_LEGEND_LINE_HEIGHT = 0.07  # added for each series in the legend
_AXIS_HEIGHT = 0.5  # the axis at the bottom and its label
# sizes in a panel of a forest plot, in lines
_MARKED_SHARE = 0.8  # the part of a line's height where its marks are spread
_PANEL_BORDER = 0.6  # the space above and below the lines of a panel, together
_LONG_SERIES = 30  # letters; with a name of this length the legend has one column, else three


def count_text(counts: Iterable[float], unit: str = "seeds") -> str:
    """Format counts as ``n = 5 to 8 seeds`` or ``n = 5 seeds``; empty if all are zero or nan."""
    present = {int(count) for count in counts if count and not math.isnan(count)}
    if not present:
        return ""
    fewest = min(present)
    most = max(present)
    if fewest < most:
        return f"n = {fewest} to {most} {unit}"
    if most == 1:
        return f"n = 1 {unit.removesuffix('s')}"
    return f"n = {most} {unit}"


def draw_forest(rows: pd.DataFrame, path: Path, label: str, *, zero: bool = True) -> None:
    """Draw a forest plot: marks with 95 % intervals, one panel below the other.

    Args:
        rows: One row per mark. ``panel``, ``line`` (the vertical position) and ``series`` (the
            entry of the legend) are titles. ``style`` is the style of the mark, and ``delta`` its
            value. The interval from ``low`` to ``high`` is drawn if ``n`` is at least :data:`FEW`.
            Two columns are optional: ``margin`` shades the panel around zero, and ``text`` is
            printed beside the mark. Numbers are shares and are drawn in points.
        path: The path without ending.
        label: The label of the axis.
        zero: True to draw a line at zero.
    """
    panels = list(rows.groupby("panel", sort=False))
    panel_heights = [panel["line"].nunique() + _PANEL_BORDER for _, panel in panels]  # in lines
    figure_height = (  # in inches
        _LINE_HEIGHT * sum(panel_heights)
        + _TITLE_HEIGHT * len(panels)
        + _LEGEND_LINE_HEIGHT * rows["series"].nunique()
        + _AXIS_HEIGHT
    )
    size = (_FOREST_WIDTH, figure_height)
    options: Any = {"height_ratios": panel_heights, "sharex": True}
    with panel_figure(path, len(panels), 1, size, **options) as (figure, axes):
        column = axes[:, 0]
        for axis, (title, panel) in zip(column, panels, strict=True):
            _draw_panel(axis, panel, str(title))
            if zero:
                axis.axvline(0, color=REFERENCE, lw=0.8, zorder=1)
        _draw_series_legend(figure, column[0], rows)
        column[-1].set_xlabel(wrap_text(label, _TITLE_WIDTH))


def _draw_panel(axis: Any, rows: pd.DataFrame, title: str) -> None:
    """Draw one panel of a forest plot: its lines with their marks, its title and its margin."""
    heights = _mark_heights(list(rows["line"]))
    for row, height in zip(rows.itertuples(), heights, strict=True):
        _draw_mark(axis, row, height)

    if "margin" in rows:
        margin = 100 * rows["margin"].max()
        axis.axvspan(-margin, margin, color=_BAND, zorder=0)

    axis.set_title(wrap_text(title, _TITLE_WIDTH), fontsize=8)
    lines = rows["line"].unique()
    axis.set_yticks(range(len(lines)), lines, fontsize=7)
    # Heights grow downwards, so the first line is at the top. There are 0.6 lines of space from the
    # middle of the first and of the last line to the border.
    top = -0.6
    bottom = len(lines) - 0.4
    axis.set_ylim(bottom, top)


def _mark_heights(lines: Sequence[str]) -> list[float]:
    """Return the height of each mark of a panel, given the title of each mark's line.

    The first line is at height 0, the second at height 1, and so on. The marks of a line are spread
    evenly around its height.
    """
    num_marks = Counter(lines)
    height_of_line = {line: height for height, line in enumerate(num_marks)}

    heights = []
    num_placed: Counter[str] = Counter()
    for line in lines:
        place_in_line = (num_placed[line] + 0.5) / num_marks[line]  # from 0 to 1
        heights.append(height_of_line[line] + _MARKED_SHARE * (place_in_line - 0.5))
        num_placed[line] += 1
    return heights


def _draw_mark(axis: Any, row: Any, height: float) -> None:
    """Draw the mark of a row of a forest plot, with its interval and the text beside it."""
    has_interval = row.n >= FEW and not math.isnan(row.low)
    if has_interval:
        ends = [row.low * 100, row.high * 100]
        axis.plot(ends, [height, height], color=row.style.colour, lw=1.4)
    axis.plot(row.delta * 100, height, ls="", ms=4.5, **row.style.mark)
    if getattr(row, "text", ""):
        # just outside the right end of the axis, at the height of the mark
        beside: Any = {"xycoords": ("axes fraction", "data"), "va": "center", "fontsize": 7}
        axis.annotate(row.text, (1.01, height), **beside)


def _draw_series_legend(figure: Any, axis: Any, rows: pd.DataFrame) -> None:
    """Draw the legend of a forest plot below the figure, with one entry per series.

    ``axis`` gets an invisible mark for each series, which the legend shows.
    """
    for name, styles in rows.groupby("series", sort=False)["style"]:
        style = _legend_style(styles)
        axis.plot([], [], ls="", ms=4.5, label=name, **style.mark)
    longest_name = rows["series"].str.len().max()
    num_columns = 3 if longest_name < _LONG_SERIES else 1
    legend_below(figure, [axis], num_columns)


def _legend_style(styles: pd.Series) -> MethodStyle:
    """Return the style of a series in the legend: grey if its marks have several colours."""
    first: MethodStyle = styles.iloc[0]
    colours = {style.colour for style in styles}
    if len(colours) > 1:
        return replace(first, colour=REFERENCE)
    return first


def legend_below(figure: Any, axes: Iterable[Any], columns: int) -> None:
    """Draw one legend for all axes below the figure, in at most ``columns`` columns.

    A label that several axes have appears once.
    """
    handles_by_label = {}
    for axis in axes:
        handles, labels = axis.get_legend_handles_labels()
        for handle, label in zip(handles, labels, strict=True):
            handles_by_label[label] = handle
    num_columns = min(len(handles_by_label), columns)
    options: Any = {"loc": "outside lower center", "fontsize": 7, "frameon": False}
    figure.legend(handles_by_label.values(), handles_by_label.keys(), ncols=num_columns, **options)


def wrap_text(text: str, inches: float, size: float = 8) -> str:
    """Break a text into lines of at most ``inches``, estimated for letters of ``size`` points.

    A line has room for at least 8 letters.
    """
    # An inch has 72 points. In matplotlib's font, a letter is on average 0.50 to 0.56 times as wide
    # as the font size, so 0.58 is on the safe side.
    letters = max(8, int(inches * 72 / (0.58 * size)))
    # A parameter count stays with its unit, such as "22 M" in "ViT-S/14 (22 M)". The blank between
    # a digit and "M)" or "B)" becomes a no-break space.
    unbroken = re.sub(r"(?<=\d) (?=[MB]\))", "\u00a0", text)
    lines = []
    for line in unbroken.split("\n"):
        lines.append(textwrap.fill(line, letters, break_on_hyphens=False))
    return "\n".join(lines)


def show_use(axis: Any, use: NDArray[np.float64], **options: Any) -> None:
    """Draw a matrix of expert use, relative to the mean use, in the colours of :data:`USE`.

    ``options`` go to ``imshow``.
    """
    axis.imshow(use, norm=USE.norm, cmap=USE.cmap, aspect="auto", **options)


def divide_by_mean(shares: NDArray[np.float64], mean: NDArray[np.float64]) -> NDArray[np.float64]:
    """Divide each row of expert shares by the mean shares, to draw them in the colours ``USE``.

    The quotient is 1 where the mean is zero.
    """
    quotients = np.ones_like(shares)
    # where a mean is zero, the quotient keeps the 1
    return np.divide(shares, mean, out=quotients, where=mean > 0)


@contextmanager
def panel_figure(
    path: Path,
    lines: int,
    columns: int,
    size: tuple[float, float],
    style: Any = STYLE,
    **options: Any,
) -> Iterator[tuple[Any, Any]]:
    """Yield a figure and its axes ``[lines, columns]``; save the figure on exit.

    On exit, axes without data are hidden. With ``sharex``, the lowest visible axes of each column
    get tick labels. ``path`` has no ending, ``size`` is in inches, ``style`` has matplotlib's
    settings, and ``options`` go to ``plt.subplots``.
    """
    with mpl.rc_context(style):
        figure, axes = plt.subplots(
            lines, columns, figsize=size, squeeze=False, layout="constrained", **options
        )
        yield figure, axes

        for column in axes.T:
            shown = [axis for axis in column if axis.has_data()]
            for axis in column:
                axis.set_visible(axis in shown)
            # matplotlib labels the ticks of the lowest axis only, which may be hidden
            if shown and "sharex" in options:
                shown[-1].tick_params(labelbottom=True)
        save(figure, path)


_PLACEHOLDER = "no data for this figure in this suite"


def save(figure: Any, path: Path, description: str | None = None) -> None:
    """Write ``<path>.pdf`` and ``.png``, and close the figure. The files have no date.

    ``description`` is stored in the PNG.
    """
    with atomic_write(path.with_suffix(".png")) as temporary:
        metadata = {"Software": None, "Description": description}
        figure.savefig(temporary, format="png", dpi=160, metadata=metadata)
    # keep the present layout, because a second layout would take as long as drawing
    figure.set_layout_engine("none")
    with atomic_write(path.with_suffix(".pdf")) as temporary:
        figure.savefig(temporary, format="pdf", metadata={"CreationDate": None})
    plt.close(figure)


def placeholder_figure(path: Path) -> None:
    """Write a figure with only the text that there is no data for it.

    The workflow expects the files of every figure. Pages omit placeholders.
    """
    with mpl.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(4, 0.6))
        axis.text(0.5, 0.5, _PLACEHOLDER, ha="center", va="center")
        axis.axis("off")
        save(figure, path, _PLACEHOLDER)


def is_drawn(path: Path) -> bool:
    """Return True if a written figure has data, False if it is a placeholder."""
    with Image.open(path.with_suffix(".png")) as image:
        return image.info.get("Description") != _PLACEHOLDER
