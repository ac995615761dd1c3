"""Draw figures from the same records as the tables."""

from __future__ import annotations

import math
import os
import re
import textwrap
from collections.abc import Iterable, Iterator
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
from benchmarks.harness.report.common import Outcomes
from benchmarks.harness.report.style import MethodStyle
from benchmarks.harness.results.statistics import confidence_interval

if "MPLBACKEND" not in os.environ:  # a notebook sets it
    mpl.use("Agg")
from matplotlib import pyplot as plt

REFERENCE = "#444444"  # the colour of reference lines
# the use of an expert divided by its mean use: 1 is white; the colour-blind can distinguish purple and orange
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
FEW = 3  # with fewer pairs no interval of a difference is drawn
_NAMES, _COLUMNS = 1.7, 4  # inches beside the panels of scores; panels in a line
_FEW_SCORES, _BELOW = 5, 0.26  # with fewer scores no interval is drawn; distance of the scores below their mean
_FOREST, _LINE, _APART = 6.0, 0.085, 0.8  # inches of a forest plot's width and of a series; share of a line with marks


def count_text(counts: Iterable[float], unit: str = "seeds") -> str:
    """Format counts as ``n = 5 to 8 seeds``; empty if all are zero or nan."""
    present = sorted({int(count) for count in counts if count and not math.isnan(count)})
    if not present:
        return ""
    unit = unit.removesuffix("s") if present == [1] else unit
    return f"n = {present[0]}{f' to {present[-1]}' if len(present) > 1 else ''} {unit}"


def difference_label(reference: str, counts: Iterable[float]) -> str:
    """Label an axis of differences, with the number of seeds."""
    return ", ".join(filter(None, (f"Difference to {reference} (points)", count_text(counts))))


def draw_forest(rows: pd.DataFrame, path: Path, label: str) -> None:
    """Draw a forest plot: differences with 95 % intervals, one panel below the other.

    ``rows`` has the titles ``panel``, ``line`` (vertical position) and ``series`` (mark), the ``style``, the
    difference ``delta``, and its interval (``low``, ``high``), which is drawn from :data:`FEW` pairs ``n`` on.
    """
    panels = list(rows.groupby("panel", sort=False))
    series = rows.groupby("series", sort=False)["style"].agg(list)
    heights = [group["line"].nunique() + 0.6 for _, group in panels]
    line = min(max(_LINE * len(series), 0.24), 0.28)
    size = (_FOREST, line * sum(heights) + 0.3 * len(panels) + 0.07 * len(series) + 0.5)
    with panel_figure(path, len(panels), 1, size, height_ratios=heights, sharex=True) as (figure, axes):
        for axis, (title, group) in zip(axes[:, 0], panels, strict=True):
            lines = list(group["line"].unique())
            for row in group.itertuples():
                shift = _APART * ((series.index.get_loc(row.series) + 0.5) / len(series) - 0.5)
                height = lines.index(row.line) + shift
                if row.n >= FEW and not math.isnan(row.low):
                    axis.plot([row.low * 100, row.high * 100], [height, height], color=row.style.colour, lw=1.4)
                axis.plot(row.delta * 100, height, ls="", ms=4.5, **row.style.mark)
            axis.axvline(0, color=REFERENCE, lw=0.8, zorder=0)
            axis.set_title(wrap_text(title, _FOREST), fontsize=8)
            axis.set_yticks(range(len(lines)), lines, fontsize=7)
            axis.set_ylim(len(lines) - 0.4, -0.6)
        for name, (style, *others) in series.items():
            has_one_colour = all(other.colour == style.colour for other in others)
            mark = style.mark if has_one_colour else replace(style, colour=REFERENCE).mark
            axes[0, 0].plot([], [], ls="", ms=4.5, label=name, **mark)
        legend_below(figure, axes[:1, 0], 3 if series.index.str.len().max() < 30 else 1)
        axes[-1, 0].set_xlabel(wrap_text(label, 3.5))


def legend_below(figure: Any, axes: Iterable[Any], columns: int) -> None:
    """Draw one legend for all axes below the figure."""
    named = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    options: Any = {"loc": "outside lower center", "fontsize": 7, "frameon": False}
    figure.legend(named.values(), named.keys(), ncols=min(len(named), columns), **options)


def wrap_text(text: str, inches: float, size: float = 8) -> str:
    """Break a text into lines of at most ``inches``, estimated for letters of ``size`` points."""
    letters = max(8, int(inches * 72 / (0.58 * size)))
    text = re.sub(r"(?<=\d) (?=[MB]\))", "\u00a0", text)  # keep a parameter count with its unit
    return "\n".join(textwrap.fill(line, letters, break_on_hyphens=False) for line in text.split("\n"))


def show_use(axis: Any, use: NDArray[np.float64], **options: Any) -> None:
    """Show expert use relative to the mean use as an image, in the colours of :data:`USE`."""
    axis.imshow(use, norm=USE.norm, cmap=USE.cmap, aspect="auto", **options)


def divide_by_mean(shares: NDArray[np.float64], mean: NDArray[np.float64]) -> NDArray[np.float64]:
    """Divide each row of expert shares by the mean shares, for :data:`USE`; 1 if a mean is zero."""
    return np.divide(shares, mean, out=np.ones_like(shares), where=mean > 0)


def score_panels(
    outcomes: Outcomes,
    panels: list[list[tuple[str, pd.DataFrame]]],
    path: Path,
    measure: str = "Score (%); large marks: mean over seeds, dots below: seeds",
) -> None:
    """Draw the scores of all methods, one panel per set; all panels share one axis.

    Each inner list of ``panels`` starts a new line. A panel has a title and a frame with ``method`` and ``value``, one
    row per method and seed. Small dots are seeds, and the large mark above them is their mean. The bar is the 95 %
    confidence interval of the mean, drawn from five seeds on. The dashed line is the baseline's mean. ``measure``
    labels the axis.
    """
    lines = [row[start : start + _COLUMNS] for row in panels for start in range(0, len(row), _COLUMNS)]
    values = pd.concat([rows["value"] for line in lines for _, rows in line]) * 100
    margin = max(values.max() - values.min(), 1.0) * 0.08
    limits = (values.min() - margin, values.max() + margin)
    shown = [{name for _, rows in line for name in rows["method"]} for line in lines]
    names_of = [[name for name in outcomes.methods if name in present] for present in shown]
    columns = max(map(len, lines))
    heights = [len(names) + 1.5 for names in names_of]
    width = min(2.1 * columns + _NAMES, WIDTH)
    size = (width, 0.27 * sum(heights) + 0.6 * len(lines) + 0.3)
    options: Any = {"height_ratios": heights, "sharex": True, "sharey": "row"}
    with panel_figure(path, len(lines), columns, size, **options) as (figure, axes):
        for axis_row, line, names in zip(axes, lines, names_of, strict=True):
            for axis, (title, rows) in zip(axis_row, line, strict=False):
                for method, of_method in rows.groupby("method"):
                    scores = of_method["value"].to_numpy(dtype=float) * 100
                    _draw_scores(axis, names.index(method), scores, outcomes.style(str(method)), limits)
                    if method == outcomes.baseline:
                        axis.axvline(scores.mean(), color=REFERENCE, lw=0.8, ls="--", zorder=0)
                axis.set_title(wrap_text(title, (width - _NAMES) / columns), fontsize=8)
                axis.set_xlim(*limits)
            axis_row[0].set_yticks(range(len(names)), [outcomes.methods[name].title for name in names])
            axis_row[0].set_ylim(len(names) - 0.4, -0.6)
        bars = "bars: 95 % confidence interval (from five on; arrows: beyond the panel)"
        label = f"{measure}, {bars}, dashed: mean of {outcomes.baseline_title}"
        figure.supxlabel(wrap_text(label, width), fontsize=7.5)


def _draw_scores(axis: Any, height: int, scores: Any, style: MethodStyle, limits: tuple[float, float]) -> None:
    """Draw scores, their mean and, with enough scores, its interval; arrows mark ends outside the panel."""
    if len(scores) >= _FEW_SCORES:
        ends = confidence_interval(scores)
        cut = max(ends[0], limits[0]), min(ends[1], limits[1])
        axis.plot(cut, [height, height], color=style.colour, lw=1.2, alpha=0.6)
        for end, position, arrow in zip(ends, cut, "<>", strict=True):
            if end != position:
                axis.plot(position, height, arrow, ms=4.5, color=style.colour, mew=0, clip_on=False, zorder=3)
    axis.plot(scores.mean(), height, ls="", ms=4.2, **{"mec": "white", "mew": 0.6, **style.mark})
    axis.plot(scores, [height + _BELOW] * len(scores), "o", ms=2.6, color=style.colour, alpha=0.55, mew=0)


@contextmanager
def panel_figure(
    path: Path, lines: int, columns: int, size: tuple[float, float], style: Any = STYLE, **options: Any
) -> Iterator[tuple[Any, Any]]:
    """Yield a figure and its axes ``[lines, columns]``; on exit hide the axes without data and save the figure.

    ``size`` is in inches, and ``options`` go to ``plt.subplots``. If the axes of a column share their x axis, the last
    visible one labels its ticks.
    """
    with mpl.rc_context(style):
        figure, axes = plt.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained", **options)
        yield figure, axes
        for column in axes.T:
            shown = [axis for axis in column if axis.has_data()]
            for axis in column:
                axis.set_visible(axis in shown)
            if shown and "sharex" in options:
                shown[-1].tick_params(labelbottom=True)
        save(figure, path)


_PLACEHOLDER = "no run of this suite has a number of this figure"


def save(figure: Any, path: Path, description: str | None = None) -> None:
    """Write ``<path>.pdf`` and ``.png`` reproducibly, and close the figure."""
    with atomic_write(path.with_suffix(".png")) as temporary:
        metadata = {"Software": None, "Description": description}
        figure.savefig(temporary, format="png", dpi=160, metadata=metadata)
    figure.set_layout_engine("none")  # a second layout would take as long as drawing
    with atomic_write(path.with_suffix(".pdf")) as temporary:
        figure.savefig(temporary, format="pdf", metadata={"CreationDate": None})
    plt.close(figure)


def placeholder_figure(path: Path, text: str) -> None:
    """Write a figure with only a text, because the workflow expects its files. Pages omit it."""
    with mpl.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(3, 0.6))
        axis.text(0.5, 0.5, text, ha="center", va="center")
        axis.axis("off")
        save(figure, path, _PLACEHOLDER)


def is_drawn(path: Path) -> bool:
    """Return False if a figure is only a placeholder."""
    with Image.open(path.with_suffix(".png")) as image:
        return image.info.get("Description") != _PLACEHOLDER
