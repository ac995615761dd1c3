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

if "MPLBACKEND" not in os.environ:  # a notebook sets it
    mpl.use("Agg")
from matplotlib import pyplot as plt

REFERENCE, _BAND = "#444444", "#dceaf5"  # the colours of reference lines and margins
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
FEW = 3  # minimum number of pairs for drawing an interval
_FOREST, _LINE, _TEXT = (
    6.0,
    0.26,
    3.5,
)  # inches of a forest plot: its width, the height of a line, the width of a title
_APART = 0.8  # share of a line with marks


def count_text(counts: Iterable[float], unit: str = "seeds") -> str:
    """Format counts as ``n = 5 to 8 seeds``; empty if all are zero or nan."""
    present = sorted({int(count) for count in counts if count and not math.isnan(count)})
    if not present:
        return ""
    unit = unit.removesuffix("s") if present == [1] else unit
    return f"n = {present[0]}{f' to {present[-1]}' if len(present) > 1 else ''} {unit}"


def draw_forest(rows: pd.DataFrame, path: Path, label: str, *, zero: bool = True) -> None:
    """Draw a forest plot: marks with 95 % intervals, one panel below the other.

    Args:
        rows: One row per mark: the titles ``panel``, ``line`` (vertical position) and ``series`` (legend), the
            ``style``, the value ``delta``, and its interval (``low``, ``high``), drawn if ``n`` is at least
            :data:`FEW`. A ``margin`` shades its panel around zero, and a ``text`` is printed beside its mark.
        path: The path without ending.
        label: The label of the axis.
        zero: True to draw a line at zero.
    """
    panels = list(rows.groupby("panel", sort=False))
    series = rows.groupby("series", sort=False)["style"]
    heights = [group["line"].nunique() + 0.6 for _, group in panels]
    size = (_FOREST, _LINE * sum(heights) + 0.3 * len(panels) + 0.07 * len(series) + 0.5)
    with panel_figure(path, len(panels), 1, size, height_ratios=heights, sharex=True) as (
        figure,
        axes,
    ):
        for axis, (title, group) in zip(axes[:, 0], panels, strict=True):
            by_line = group.groupby("line", sort=False)
            shift = (by_line.cumcount() + 0.5) / by_line["line"].transform("size") - 0.5
            for row, height in zip(
                group.itertuples(), by_line.ngroup() + _APART * shift, strict=True
            ):
                if row.n >= FEW and not math.isnan(row.low):
                    axis.plot(
                        [row.low * 100, row.high * 100],
                        [height, height],
                        color=row.style.colour,
                        lw=1.4,
                    )
                axis.plot(row.delta * 100, height, ls="", ms=4.5, **row.style.mark)
                if getattr(row, "text", ""):
                    beside = {"xycoords": ("axes fraction", "data"), "va": "center", "fontsize": 7}
                    axis.annotate(row.text, (1.01, height), **beside)
            if "margin" in group:
                axis.axvspan(
                    -100 * group["margin"].max(), 100 * group["margin"].max(), color=_BAND, zorder=0
                )
            if zero:
                axis.axvline(0, color=REFERENCE, lw=0.8, zorder=1)
            axis.set_title(wrap_text(title, _TEXT), fontsize=8)
            axis.set_yticks(range(len(by_line)), group["line"].unique(), fontsize=7)
            axis.set_ylim(len(by_line) - 0.4, -0.6)
        for name, styles in series:
            colours = {style.colour for style in styles}
            style = replace(
                styles.iloc[0], colour=colours.pop() if len(colours) == 1 else REFERENCE
            )
            axes[0, 0].plot([], [], ls="", ms=4.5, label=name, **style.mark)
        legend_below(figure, axes[:1, 0], 3 if rows["series"].str.len().max() < 30 else 1)
        axes[-1, 0].set_xlabel(wrap_text(label, _TEXT))


def legend_below(figure: Any, axes: Iterable[Any], columns: int) -> None:
    """Draw one legend for all axes below the figure."""
    named = {
        label: handle
        for axis in axes
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    options: Any = {"loc": "outside lower center", "fontsize": 7, "frameon": False}
    figure.legend(named.values(), named.keys(), ncols=min(len(named), columns), **options)


def wrap_text(text: str, inches: float, size: float = 8) -> str:
    """Break a text into lines of at most ``inches``, estimated for letters of ``size`` points."""
    letters = max(8, int(inches * 72 / (0.58 * size)))
    text = re.sub(r"(?<=\d) (?=[MB]\))", "\u00a0", text)  # keep a parameter count with its unit
    return "\n".join(
        textwrap.fill(line, letters, break_on_hyphens=False) for line in text.split("\n")
    )


def show_use(axis: Any, use: NDArray[np.float64], **options: Any) -> None:
    """Show expert use relative to the mean use as an image, in the colours of :data:`USE`."""
    axis.imshow(use, norm=USE.norm, cmap=USE.cmap, aspect="auto", **options)


def divide_by_mean(shares: NDArray[np.float64], mean: NDArray[np.float64]) -> NDArray[np.float64]:
    """Divide each row of expert shares by the mean shares, for :data:`USE`; 1 if a mean is zero."""
    return np.divide(shares, mean, out=np.ones_like(shares), where=mean > 0)


@contextmanager
def panel_figure(
    path: Path,
    lines: int,
    columns: int,
    size: tuple[float, float],
    style: Any = STYLE,
    **options: Any,
) -> Iterator[tuple[Any, Any]]:
    """Yield a figure and its axes ``[lines, columns]``; on exit hide the axes without data and save the figure.

    ``size`` is in inches, and ``options`` go to ``plt.subplots``. If the axes of a column share their x axis, the last
    visible one labels its ticks.
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


def placeholder_figure(path: Path) -> None:
    """Write an empty figure with a notice, because the workflow expects its files. Pages omit it."""
    with mpl.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(4, 0.6))
        axis.text(0.5, 0.5, _PLACEHOLDER, ha="center", va="center")
        axis.axis("off")
        save(figure, path, _PLACEHOLDER)


def is_drawn(path: Path) -> bool:
    """Return False if a figure is only a placeholder."""
    with Image.open(path.with_suffix(".png")) as image:
        return image.info.get("Description") != _PLACEHOLDER
