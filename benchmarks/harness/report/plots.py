"""Draw figures from the same records as the tables."""

from __future__ import annotations

import math
import os
import re
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from benchmarks.harness.base import atomic_write
from benchmarks.harness.report.placeholders import PLACEHOLDER
from benchmarks.harness.report.style import DENSE, MethodStyle

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
    "savefig.dpi": 160,
}
CURVES = {**STYLE, "axes.grid.axis": "both"}
_NARROW_STYLE = {**STYLE, "savefig.dpi": 320}  # telephones have small pixels
HEATMAP = {**STYLE, "axes.grid": False, "font.size": 7}

WIDTH = 6.9  # inches of a page's text, the largest width of a figure
FEW = 3  # minimum number of pairs for drawing an interval
# sizes in a forest plot, in inches
_FOREST_WIDTH = 6.0
_NARROW_WIDTH = 3.0
_HEADING_HEIGHT = 0.3  # the heading of a group of panels
_LEGEND_LINE_HEIGHT = 0.07  # added for each series in the legend
_AXIS_HEIGHT = 0.5  # the axis at the bottom and its label
_LABEL_HEIGHT = 0.115  # a line of text above marks
_ABOVE_MARKS_HEIGHT = 0.22  # the marks under such a text
_BAND_HEIGHT = 0.11  # the shaded margin around zero
_LINE_TO_BORDER = 0.6  # lines, from the middle of the first and of the last line to the border
_NUMBER_WIDTH = 0.25  # inches for the number of an expert, below a matrix of expert use
# letters; with a name of this length the legend has one column, else three (two in narrow figures)
_LONG_SERIES = 30
# inches of a column of curves, and of the labels of the vertical axes
_CURVES_WIDTH = 3.0
_LABELS_WIDTH = 0.6
_LEGEND_HEIGHT = 0.3


def count_text(counts: Iterable[float], unit: str = "seeds") -> str:
    """Format counts as ``n = 5 to 8 seeds`` or ``n = 5 seeds``; empty if all are zero or nan."""
    present = [int(count) for count in counts if count > 0]  # nan is not larger than 0
    if not present:
        return ""
    fewest = min(present)
    most = max(present)
    if fewest < most:
        return f"n = {fewest} to {most} {unit}"
    if most == 1:
        return f"n = 1 {unit.removesuffix('s')}"
    return f"n = {most} {unit}"


def sample_text(rows: pd.DataFrame, unit: str = "seeds") -> str:
    """Format the counts of a forest plot's marks, and say which marks have an interval.

    Args:
        rows: The marks, with the columns ``n`` and ``low`` of :func:`draw_forest`.
        unit: The plural of what ``n`` counts.
    """
    counts = count_text(rows["n"], unit)
    has_enough = rows["n"] >= FEW
    if not has_enough.any():
        return f"{counts}, no intervals: they need {FEW} {unit}"
    text = f"{counts}, 95 % intervals"
    if not has_enough.all():
        text = f"{text} where n ≥ {FEW}"
    # equal differences have no deviation, so they have no interval
    if rows.loc[has_enough, "low"].isna().any():
        text = f"{text}, none for equal differences"
    return text


@dataclass(frozen=True)
class _ForestShape:
    """The sizes of a forest plot.

    Attributes:
        width: The width of the figure in inches.
        title_width: The largest width of a title in inches.
        title_height: The space for a title in inches.
        line_height: The height of a line in inches.
        panel_border: The space above and below the lines of a panel, together, in lines.
        marks_shift: How far the marks of a line are below its middle, as a share of its height.
        marks_spread: The share of a line's height over which its marks are spread.
        labels_above: True to print the titles of lines, and texts, above the marks. False to print
            them beside the marks.
        legend_columns: The largest number of columns of the legend.
        style: The settings of matplotlib.
    """

    width: float
    title_width: float
    title_height: float
    line_height: float
    panel_border: float
    marks_shift: float
    marks_spread: float
    labels_above: bool
    legend_columns: int
    style: Any


_WIDE = _ForestShape(
    width=_FOREST_WIDTH,
    title_width=3.5,
    title_height=0.3,
    line_height=0.26,
    panel_border=0.6,
    marks_shift=0.0,
    marks_spread=0.8,
    labels_above=False,
    legend_columns=3,
    style=STYLE,
)


def _narrow_shape(rows: pd.DataFrame) -> _ForestShape:
    """Return the sizes of a forest plot for a telephone, 360 pixels wide.

    A letter of 7 points is then 11.7 pixels high.
    """
    most_lines = max(label.count("\n") + 1 for label in _labels_above(rows))
    label_height = most_lines * _LABEL_HEIGHT
    line_height = label_height + _ABOVE_MARKS_HEIGHT
    # the label takes the upper part of a line, so the middle of the marks is half of the label's
    # height below the middle of the line
    marks_shift = 0.5 * label_height / line_height
    # not the whole space under the label, so that marks keep a distance from the next label
    marks_spread = 0.9 * _ABOVE_MARKS_HEIGHT / line_height
    return _ForestShape(
        width=_NARROW_WIDTH,
        title_width=_NARROW_WIDTH,
        title_height=0.38,  # titles often have two lines
        line_height=line_height,
        panel_border=0.2,
        marks_shift=marks_shift,
        marks_spread=marks_spread,
        labels_above=True,
        legend_columns=2,
        style=_NARROW_STYLE,
    )


def draw_forest(
    rows: pd.DataFrame, path: Path, label: str, *, zero: bool = True, narrow: bool = False
) -> None:
    """Draw a forest plot: marks with 95 % intervals, one panel below the other.

    Args:
        rows: One row per mark. Numbers are shares, and are drawn in points. The columns:

            - ``panel``, ``line`` and ``series``: the titles of the mark's panel, of its line in the
              panel, and of its entry in the legend.
            - ``style``: the style of the mark.
            - ``delta``: the value of the mark.
            - ``low``, ``high``, ``n``: its interval, drawn if ``n`` is at least :data:`FEW`.
            - ``margin`` (optional): shades the space from ``-margin`` to ``margin`` behind the
              mark; nan for none.
            - ``text`` (optional): a text beside the line.
            - ``group`` (optional): a heading above the first panel with this heading; empty for
              none.
        path: The path without ending.
        label: The label of the axis.
        zero: True to draw a line at zero.
        narrow: True to draw for a telephone. The titles of lines and ``text`` are then above the
            marks.
    """
    shape = _narrow_shape(rows) if narrow else _WIDE
    grouped = rows if "group" in rows else rows.assign(group="")
    # each panel is a pair: its heading and title, and its rows
    panels = list(grouped.groupby(["group", "panel"], sort=False))
    panel_heights = []  # in lines
    for _names, panel in panels:
        panel_heights.append(panel["line"].nunique() + shape.panel_border)
    num_headings = grouped.loc[grouped["group"] != "", "group"].nunique()
    figure_height = (  # in inches
        shape.line_height * sum(panel_heights)
        + shape.title_height * len(panels)
        + _HEADING_HEIGHT * num_headings
        + _LEGEND_LINE_HEIGHT * rows["series"].nunique()
        + _AXIS_HEIGHT
    )
    drawing = panel_figure(
        path,
        rows=len(panels),
        columns=1,
        size=(shape.width, figure_height),
        style=shape.style,
        height_ratios=panel_heights,
        sharex=True,
    )
    with drawing as (figure, axes):
        column = axes[:, 0]
        last_group = ""
        for axis, (group_and_title, panel) in zip(column, panels, strict=True):
            group, title = group_and_title
            # only the first panel of a group has the heading
            heading = "" if group == last_group else group
            last_group = group
            _draw_panel(axis, panel, title, heading, shape)
            if zero:
                axis.axvline(0, color=REFERENCE, lw=0.8, zorder=1)
        _draw_series_legend(figure, column[0], rows, shape)
        column[-1].set_xlabel(wrap_text(label, inches=shape.title_width))


def _draw_panel(
    axis: Any, rows: pd.DataFrame, title: str, heading: str, shape: _ForestShape
) -> None:
    """Draw one panel of a forest plot: its heading and title, and its lines with their marks."""
    positions = _mark_positions(list(rows["line"]), shape)
    for row, y in zip(rows.itertuples(), positions, strict=True):
        _draw_mark(axis, row, y, shape)

    side = "left" if shape.labels_above else "center"
    wrapped = wrap_text(title, inches=shape.title_width)
    title_text = axis.set_title(wrapped, loc=side, fontsize=8)
    if heading:
        wrapped_heading = wrap_text(heading, inches=shape.title_width)
        draw_heading(axis, title_text, wrapped_heading, side)
    if shape.labels_above:
        _draw_labels_above(axis, rows)
    else:
        _draw_labels_beside(axis, rows)
    # y grows downwards from 0, so the first line is at the top
    last_line = rows["line"].nunique() - 1
    top = -_LINE_TO_BORDER
    bottom = last_line + _LINE_TO_BORDER
    axis.set_ylim(bottom, top)


def draw_heading(axis: Any, title: Any, heading: str, side: str) -> None:
    """Print the heading of a group of panels above their titles.

    Args:
        axis: The first panel.
        title: The drawn title of this panel, or of one beside it if that has more lines.
        heading: The heading.
        side: Where the heading is along the first panel: ``left`` or ``center``.
    """
    # x is a share of the panel's width: its left end or its middle
    x = 0 if side == "left" else 0.5
    options: Any = {
        # y is a share of the height of the drawn title, so 1 is the top of the title
        "xy": (x, 1),
        "xycoords": ("axes fraction", title),
        "xytext": (0, 7),  # 7 points above
        "textcoords": "offset points",
        "ha": side,
        "fontsize": 8,
        "fontweight": "bold",
    }
    # A heading may be wider than its panel. If the layout knew its width, it would make all panels
    # narrower. So only a blank text with as many lines is part of the layout.
    shown_heading = axis.annotate(heading, **options)
    shown_heading.set_in_layout(False)
    num_lines = heading.count("\n") + 1
    blank_lines = [" "] * num_lines
    axis.annotate("\n".join(blank_lines), **options)


def _texts_by_line(rows: pd.DataFrame) -> dict[str, str]:
    """Map the title of each line to the text of its marks, which may be empty."""
    texts = {}
    for line, of_line in rows.groupby("line", sort=False):
        of_marks = of_line.get("text", [])
        texts[str(line)] = "\n".join(text for text in of_marks if text)
    return texts


def _draw_labels_beside(axis: Any, rows: pd.DataFrame) -> None:
    """Print the titles of a panel's lines on the left, and their texts on the right."""
    texts = _texts_by_line(rows)
    axis.set_yticks(range(len(texts)), list(texts), fontsize=7)
    beside: Any = {"xycoords": ("axes fraction", "data"), "va": "center", "fontsize": 7}
    for y, text in enumerate(texts.values()):
        # just outside the right end of the axis
        axis.annotate(text, (1.01, y), **beside)


def _draw_labels_above(axis: Any, rows: pd.DataFrame) -> None:
    """Print the title and the text of each line above its marks, from the left border."""
    axis.set_yticks([])
    axis.spines["left"].set_visible(False)
    # x is a share of the axis' width, and y has the unit of the data: lines
    above: Any = {"xycoords": ("axes fraction", "data"), "va": "top", "fontsize": 7}
    # the white box hides the grid
    box = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
    for y, label in enumerate(_labels_above(rows)):
        top_of_line = y - _LINE_TO_BORDER  # of the first line: the upper border of the panel
        axis.annotate(label, (0, top_of_line), bbox=box, linespacing=1.1, **above)


def _labels_above(rows: pd.DataFrame) -> list[str]:
    """Return the title of each line, with its text in a line below it."""
    labels = []
    for line, text in _texts_by_line(rows).items():
        title = wrap_text(line, inches=_NARROW_WIDTH, size=7)
        text_in_a_line = text.replace("\n", ", ")
        labels.append(f"{title}\n{text_in_a_line}".rstrip())
    return labels


def _mark_positions(lines: Sequence[str], shape: _ForestShape) -> list[float]:
    """Return the vertical position ``y`` of each mark of a panel, counted in lines from the top.

    The middle of the first line is at 0, that of the second at 1, and so on. The marks of a line
    are spread evenly around this position, or below it if labels are above the marks.

    Args:
        lines: For each mark, the title of its line.
        shape: The sizes of the plot.
    """
    num_marks_of_line = Counter(lines)
    # lines have the order in which their titles occur
    y_of_line = {line: y for y, line in enumerate(num_marks_of_line)}

    positions = []
    num_placed: Counter[str] = Counter()
    for line in lines:
        middle_of_marks = y_of_line[line] + shape.marks_shift
        # between 0 and 1: a single mark is at 0.5, two are at 0.25 and 0.75
        place_in_line = (num_placed[line] + 0.5) / num_marks_of_line[line]
        distance = shape.marks_spread * (place_in_line - 0.5)
        positions.append(middle_of_marks + distance)
        num_placed[line] += 1
    return positions


def _draw_mark(axis: Any, row: Any, y: float, shape: _ForestShape) -> None:
    """Draw the mark of a row of a forest plot at ``y``, with its interval and its margin."""
    has_interval = row.n >= FEW and not math.isnan(row.low)
    if has_interval:
        ends = [row.low * 100, row.high * 100]
        axis.plot(ends, [y, y], color=row.style.colour, lw=1.4)
    axis.plot(row.delta * 100, y, ls="", **_mark_options(row.style))

    margin = 100 * getattr(row, "margin", math.nan)  # in points
    if not math.isnan(margin):
        axis.barh(
            y,
            width=2 * margin,
            height=_BAND_HEIGHT / shape.line_height,
            left=-margin,
            color=_BAND,
            zorder=0.6,  # above the grid (0.5), below the line at zero (1)
        )


def _mark_options(style: MethodStyle) -> dict[str, Any]:
    """Return the arguments of ``plot`` for a mark. Crosses are larger, because they are thin."""
    if style.marker == "x":
        return {"ms": 5.5, "mew": 1.5, **style.mark}
    return {"ms": 4.5, **style.mark}


def _draw_series_legend(figure: Any, axis: Any, rows: pd.DataFrame, shape: _ForestShape) -> None:
    """Draw the legend of a forest plot below the figure, with one entry per series.

    ``axis`` gets an invisible mark for each series, which the legend shows.
    """
    for name, styles in rows.groupby("series", sort=False)["style"]:
        style = _legend_style(styles)
        axis.plot([], [], ls="", label=name, **_mark_options(style))
    longest_name = rows["series"].str.len().max()
    num_columns = shape.legend_columns if longest_name < _LONG_SERIES else 1
    legend_below(figure, [axis], num_columns)


def _legend_style(styles: pd.Series) -> MethodStyle:
    """Return the style of a series in the legend: grey if its marks have several colours.

    ``styles`` are those of its marks. Crosses are the paper's numbers, so the legend shows another
    marker of the series if there is one.
    """
    shown: MethodStyle = styles.iloc[0]
    for style in styles:
        if style.marker != "x":
            shown = style
            break
    colours = {style.colour for style in styles}
    if len(colours) > 1:
        return replace(shown, colour=REFERENCE)
    return shown


def legend_below(figure: Any, axes: Iterable[Any], columns: int) -> float:
    """Draw one legend for all axes below the figure, and return its height in inches.

    It has at most ``columns`` columns, and fewer if they are wider than the figure. A label that
    several axes have appears once, as the first axis draws it. Without labels, there is no legend.
    """
    handles_by_label: dict[str, Any] = {}
    for axis in axes:
        handles, labels = axis.get_legend_handles_labels()
        for handle, label in zip(handles, labels, strict=True):
            handles_by_label.setdefault(label, handle)
    if not handles_by_label:
        return 0.0

    # not the whole width, because letters of a saved figure may be a little wider
    widest = 0.97 * figure.bbox.width
    num_columns = min(len(handles_by_label), columns)
    # the width is known only after drawing, so it is drawn with fewer columns until it fits
    while True:
        legend = figure.legend(
            handles_by_label.values(),
            handles_by_label.keys(),
            ncols=num_columns,
            loc="outside lower center",
            fontsize=7,
            frameon=False,
        )
        extent = legend.get_window_extent()
        if extent.width <= widest or num_columns == 1:
            return float(extent.height / figure.dpi)
        legend.remove()
        num_columns -= 1


@contextmanager
def curve_figure(
    path: Path, titles: Sequence[str], labels: Sequence[str], panel_height: float
) -> Iterator[Any]:
    """Yield the axes ``[labels, titles]`` of a figure with curves; save the figure on exit.

    The caller draws the curves, and calls :func:`label_steps` on the axes of the last row. On exit,
    titles, labels, and one legend for all panels are added. Panels without data are hidden.

    Args:
        path: The path without ending.
        titles: The titles of the columns. The panels of a column share the horizontal axis, which
            has steps.
        labels: The labels of the rows. The panels of a row share the vertical axis.
        panel_height: The height of a panel in inches.
    """
    width = min(_CURVES_WIDTH * len(titles) + _LABELS_WIDTH, WIDTH)
    height = panel_height * len(labels) + _LEGEND_HEIGHT
    title_width = (width - _LABELS_WIDTH) / len(titles)
    panels = panel_figure(
        path,
        rows=len(labels),
        columns=len(titles),
        size=(width, height),
        style=CURVES,
        sharex="col",
        sharey="row",
    )
    with panels as (figure, axes):
        yield axes

        # Panels without data are hidden, with their labels. So the labels are on the first or last
        # panel with data of each column and row.
        for column, title in zip(axes.T, titles, strict=True):
            shown = [axis for axis in column if axis.has_data()]
            if shown:
                shown[0].set_title(wrap_text(title, inches=title_width), fontsize=8)
                # the caller labelled the steps of the last row, where the panel may be hidden
                label_of_steps = column[-1].get_xlabel()
                shown[-1].set_xlabel(label_of_steps)
        for row, label in zip(axes, labels, strict=True):
            shown = [axis for axis in row if axis.has_data()]
            if shown:
                # shorter than the panel, so that labels of neighbours do not touch
                shown[0].set_ylabel(wrap_text(label, inches=0.9 * panel_height))
                # matplotlib labels the ticks of the first column only, which may be hidden
                shown[0].tick_params(labelleft=True)
        legend_columns = len(titles) + 1  # the labels at the left have room for one more
        legend_below(figure, axes.flat, legend_columns)


def draw_means(axis: Any, points: pd.DataFrame, styles: Mapping[str, MethodStyle]) -> None:
    """Draw a line for each method: the mean of its runs by step.

    Args:
        axis: The axis of the panel.
        points: A row for each run and step, with ``method_title``, ``step`` and ``value``.
        styles: The style of each method, by title.
    """
    for title, of_method in points.groupby("method_title", sort=False):
        # the line ends where a model diverges, so a missing value makes the mean missing
        means = of_method.groupby("step")["value"].mean(skipna=False)
        _draw_curve(axis, means, str(title), styles[str(title)])


def _draw_curve(axis: Any, values: pd.Series[float], title: str, style: MethodStyle) -> None:
    """Draw the line of one method: its values by step.

    Dashes and markers, and a wide line for the dense model, keep overlapping lines visible.
    """
    is_dense = style.colour == DENSE.colour
    # the line of the dense model is wide, to be visible below other lines
    line = {"lw": 2.6, "alpha": 0.55} if is_dense else {"lw": 1.2}
    # about eight markers a line
    markers = {"ms": 4, "markevery": max(1, len(values) // 8)}
    axis.plot(values.index, values, label=title, **line, **style.line, **markers)


def label_steps(axis: Any, label: str, most_ticks: int = 10) -> None:
    """Label the horizontal axis of curves. It has at most so many ticks, at whole numbers."""
    axis.set_xlabel(label)
    axis.xaxis.set_major_locator(mpl.ticker.MaxNLocator(most_ticks, integer=True))


def wrap_text(text: str, *, inches: float, size: float = 8) -> str:
    """Break a text into lines of at most ``inches``, estimated for letters of ``size`` points.

    A line has room for at least 8 letters.
    """
    # An inch has 72 points. In matplotlib's font, a letter is on average 0.50 to 0.56 times as wide
    # as the font size, so 0.58 is on the safe side.
    letters = max(8, int(inches * 72 / (0.58 * size)))
    # A number stays with its unit, such as "22 M" in "ViT-S/14 (22 M)", and with its name, such as
    # "N 8", "layer 1" and "n ≥ 3". The blanks between them become no-break spaces.
    before_unit = r"(?<=\d) (?=[MB]\))"
    after_name = r"(?<=\bN) (?=\d)|(?<=\blayer) (?=\d)"
    beside_sign = r"(?<=\bn) (?=[=≥])|(?<=[=≥]) (?=\d)"
    unbroken = re.sub(f"{before_unit}|{after_name}|{beside_sign}", "\u00a0", text)
    lines = []
    for line in unbroken.split("\n"):
        lines.append(textwrap.fill(line, letters, break_on_hyphens=False))
    return "\n".join(lines)


def show_use(axis: Any, use: NDArray[np.float64], **options: Any) -> None:
    """Draw a matrix of expert use, relative to the mean use, in the colours of :data:`USE`.

    ``options`` go to ``imshow``.
    """
    axis.imshow(use, norm=USE.norm, cmap=USE.cmap, aspect="auto", **options)


def number_experts(axis: Any, num_experts: int, inches: float) -> None:
    """Number the experts below a matrix of expert use, from 1.

    The first and the last expert are numbered, and all others if there is room.

    Args:
        axis: The axis with the matrix. The first expert is at 0.
        num_experts: The number of experts.
        inches: The width of the axis.
    """
    has_room = num_experts * _NUMBER_WIDTH <= inches
    places = list(range(num_experts)) if has_room else [0, num_experts - 1]
    axis.set_xticks(places, [str(place + 1) for place in places])
    axis.set_xlabel("expert")


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
    rows: int,
    columns: int,
    size: tuple[float, float],
    style: Any = STYLE,
    **options: Any,
) -> Iterator[tuple[Any, Any]]:
    """Yield a figure and its axes ``[rows, columns]``; save the figure on exit.

    On exit, axes without data are hidden. With ``sharex``, the lowest visible axes of each column
    get tick labels. ``path`` has no ending, ``size`` is in inches, ``style`` has matplotlib's
    settings, and ``options`` go to ``plt.subplots``.
    """
    with mpl.rc_context(style):
        figure, axes = plt.subplots(
            rows, columns, figsize=size, squeeze=False, layout="constrained", **options
        )
        yield figure, axes

        for column in axes.T:
            shown = [axis for axis in column if axis.has_data()]
            for axis in column:
                axis.set_visible(axis.has_data())
            # matplotlib labels the ticks of the lowest axis only, which may be hidden
            if shown and "sharex" in options:
                shown[-1].tick_params(labelbottom=True)
        save(figure, path)


def save(figure: Any, path: Path, description: str | None = None) -> None:
    """Write ``<path>.pdf`` and ``.png``, and close the figure. The files have no date.

    ``description`` is stored in the PNG.
    """
    with atomic_write(path.with_suffix(".png")) as temporary:
        metadata = {"Software": None, "Description": description}
        figure.savefig(temporary, format="png", metadata=metadata)
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
        axis.text(0.5, 0.5, PLACEHOLDER, ha="center", va="center")
        axis.axis("off")
        save(figure, path, PLACEHOLDER)
