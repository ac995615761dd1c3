"""The figure of the claims: a line a test, with its interval, the margin and the paper's number."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from benchmarks.harness.base import paths
from benchmarks.harness.config.artifacts import CLAIMS
from benchmarks.harness.config.suite import Suite
from benchmarks.harness.report.claims import claimed_numbers, claims_table, judged, runs_text
from benchmarks.harness.report.main_figure import draw_main, main_rows
from benchmarks.harness.report.plots import STYLE, WIDTH, draw_interval, placeholder_figure, save
from benchmarks.harness.results.evidence import Verdict

from matplotlib import pyplot as plt  # isort: skip  (plots chooses the backend)

# inches: the width of a column of text, a claim's title, a test, and what a panel has below
_TITLE, _TEST, _BELOW = 0.22, 0.18, 0.47
_LEFT, _RIGHT = 0.36, 0.715  # of the width: where axes begin and end
_REACH = 6.0  # intervals are cut at so many margins, or beyond the means
_MARKS: dict[Verdict, dict[str, Any]] = {
    Verdict.SUPPORTED: {"marker": "o", "color": "#0072b2"},
    Verdict.CONTRADICTED: {"marker": "X", "color": "#d55e00"},
    Verdict.UNDECIDED: {"marker": "D", "color": "#777777"},
    Verdict.NO_TEST: {"marker": "D", "color": "#777777", "mfc": "white"},
}
_PAPER, _BAND = "#222222", "#dcebf5"
_PATCH = {"facecolor": "white", "edgecolor": "none", "pad": 1.2}


def write_claims(suite: Suite) -> None:
    """Write the table and the figure of the claims of a suite whose runs are finished, and the figure of the main averages."""
    numbers = claimed_numbers(suite)
    rows = judged(suite, numbers)
    folder = paths.RESULTS / suite.name
    claims_table(suite, rows).write(folder / "tables")
    draw_claims(rows, folder / "figures" / CLAIMS.name)
    draw_main(main_rows(numbers), folder / "paper")


def draw_claims(rows: pd.DataFrame, path: Path) -> None:
    """Draw what :func:`~benchmarks.harness.report.claims.judged` found as ``<path>.pdf`` and ``.png``.

    Tests of different units have panels of their own. What is compared with what, counts, and what was not tested, are in the table alone.
    """
    drawn = rows[[row.evidence is not None and row.compare.direction != "equal" for row in rows.itertuples()]]
    drawn = drawn[drawn["delta"].notna()]
    if drawn.empty:
        placeholder_figure(path, "no claim was tested")
        return
    panels = [panel for _, panel in drawn.groupby("unit", sort=False)]
    heights = [_TITLE * panel["claim"].nunique() + _TEST * len(panel) for panel in panels]
    total = sum(heights) + _BELOW * len(panels) + 0.3
    with mpl.rc_context({**STYLE, "font.size": 7.5, "axes.spines.left": False}):
        figure = plt.figure(figsize=(WIDTH, total))
        top = total
        for panel, height in zip(panels, heights, strict=True):
            top -= height
            axis = figure.add_axes((_LEFT, top / total, _RIGHT - _LEFT, height / total))
            _draw_panel(axis, panel, height)
            top -= _BELOW
        handles: list[Artist] = [
            Line2D([], [], ls="", ms=5, label=str(word), **mark)
            for word, mark in _MARKS.items()
            if word in set(drawn["verdict"])
        ]
        handles.append(Line2D([], [], ls="", marker="|", ms=9, mew=1.6, color=_PAPER, label="the paper"))
        handles.append(Rectangle((0, 0), 1, 1, color=_BAND, label="practically equal"))
        figure.legend(handles=handles, loc="lower center", ncols=len(handles), frameon=False, fontsize=7.5)
        save(figure, path)


def _draw_panel(axis: Any, panel: pd.DataFrame, height: float) -> None:
    """Rows from above to below, in inches."""
    low, high = _limits(panel)
    axis.set_xlim(low, high)
    axis.set_ylim(height, 0)
    axis.set_yticks([])
    top = 0.0
    for _, claim in panel.groupby("claim", sort=False):
        title = claim["claim_title"].iloc[0]
        _write(axis, 0, -_LEFT * WIDTH * 72 + 6, top + 0.62 * _TITLE, title, fontweight="bold", bbox=_PATCH)
        top += _TITLE
        for row in claim.itertuples():
            _draw_row(axis, row, top, low, high)
            top += _TEST
    axis.axvline(0, color="#555555", lw=0.8, zorder=1)
    axis.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    unit = panel["unit"].iloc[0]
    near = panel["compare"].iloc[0].direction == "near"
    axis.set_xlabel("Time ÷ dense − 1" if near else f"Difference in {unit}", fontsize=7.5)


def _write(axis: Any, side: int, shift: float, place: float, text: str, **said: Any) -> None:
    """Text beside the axes: at its left (0) or right (1) edge, moved by points."""
    axis.annotate(
        text,
        (side, place),
        xytext=(shift, 0),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        va="center",
        annotation_clip=False,
        zorder=5,
        **said,
    )


def _draw_row(axis: Any, row: Any, top: float, low: float, high: float) -> None:
    mark, place = _MARKS[Verdict(row.verdict)], top + _TEST / 2
    if not math.isnan(row.margin):
        start = low if row.compare.direction == "near" else -row.margin
        axis.fill_betweenx([top, top + _TEST], start, row.margin, color=_BAND, lw=0, zorder=0)
    if not math.isnan(row.low):
        line = {"lw": 1.4, "zorder": 2, "solid_capstyle": "butt"}
        draw_interval(axis, (row.low, row.high), place, (low, high), mark["color"], **line)
    if not math.isnan(row.effect):
        axis.plot(row.effect, place, "|", ms=11, mew=1.6, color=_PAPER, zorder=3)
    axis.plot(row.delta, place, ms=5, zorder=4, **{"mec": mark["color"], **mark})
    left = -_LEFT * WIDTH * 72 + 6
    _write(axis, 0, left, place, row.test, fontsize=7)
    _write(axis, 1, 8, place, f"{runs_text(row).replace(' points', '')}, n {int(row.n)}", fontsize=7)


def _limits(panel: pd.DataFrame) -> tuple[float, float]:
    """The axis: all means, margins and the paper's numbers, and intervals as far as they do not squeeze these."""
    inner = pd.concat([panel["delta"], panel["effect"], panel["margin"], -panel["margin"]]).dropna()
    reach = max(_REACH * panel["margin"].max(), 1.2 * inner.abs().max())
    ends = pd.concat([panel["low"].clip(lower=-reach), panel["high"].clip(upper=reach), inner])
    margin = 0.06 * (ends.max() - ends.min())
    return ends.min() - margin, ends.max() + margin
