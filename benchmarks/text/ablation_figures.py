"""Figures of ablations: differences row by row, or curves over a setting; the paper's numbers in panels of their own."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas as pd

from benchmarks.harness.report.plots import (
    FEW,
    REFERENCE,
    STYLE,
    WIDTH,
    difference_label,
    draw_difference,
    hide_empty,
    legend_below,
    panel_grid,
    placeholder_figure,
    save,
    wrapped,
)
from benchmarks.harness.report.style import curve_styles
from benchmarks.text.grid import ID
from benchmarks.text.outcomes import TextOutcomes
from benchmarks.text.selection import PROTOCOLS

_COLUMNS, _MOST, _NAMES = 3, 12, 2.3  # panels beside each other and in all, inches of names beside them
_TITLE, _TICKS = 1.4, 6  # inches of a panel's title, and labels below it
_NOTHING = "this suite runs no row of this ablation"
_AXIS_LABELS = {"D": "Share of the training rows", "k": "Experts in use, k/N"}


def draw_differences(outcomes: TextOutcomes, rows: pd.DataFrame, path: Path, reference: str = "the baseline") -> None:
    """A panel a model, selection and scope (of many the averages alone): the difference of every row to its reference, with its 95 % interval from three seeds on; crosses are the paper's.

    All panels share one axis.

    Args:
        outcomes: for looks.
        rows: what :func:`~benchmarks.text.ablations.ablation_rows` gave.
        path: of the files, without ending.
        reference: what the differences are to.
    """
    panels = [(title, found[found["delta"].notna()]) for title, found in panels_of(rows)]
    panels = [(title, found) for title, found in panels if len(found)]
    if len(panels) > _MOST:  # every set is in the table
        panels = [(title, found) for title, found in panels if not found["is_ours"].any() or found["is_average"].any()]
    if not panels:
        placeholder_figure(path, _NOTHING)
        return
    names = list(dict.fromkeys(name for _, found in panels for name in found["method_title"]))
    with mpl.rc_context(STYLE):
        figure, axes = _axes(len(panels), 0.24 * len(names) + 0.9, shared=True)
        for axis, (title, found) in zip(axes.flat, panels, strict=False):
            for row in found.itertuples():
                place = names.index(row.method_title)
                look = outcomes.style(row.method)
                draw_difference(axis, row, place, look if row.is_ours else replace(look, marker="x", hollow=False), 100)
            axis.axvline(0, color=REFERENCE, lw=0.8, ls="--", zorder=0)
            axis.set_title(title, fontsize=8)
            axis.set_yticks(range(len(names)), [textwrap.fill(name, 34) for name in names])
            axis.set_ylim(len(names) - 0.4, -0.6)
        hide_empty(axes)
        counts = (n for _, found in panels for n in found.loc[found["is_ours"], "n"])
        figure.supxlabel(difference_label(reference, counts), fontsize=8)
        save(figure, path)


def draw_curves(outcomes: TextOutcomes, rows: pd.DataFrame, path: Path, axis: str) -> None:
    """A panel a model, selection and scope: the score of every method over a setting, with its 95 % interval from three seeds on. The dashed line is the baseline.

    Args:
        outcomes: for looks.
        rows: what :func:`~benchmarks.text.ablations.ablation_rows` gave.
        path: of the files, without ending.
        axis: the letter of the setting.
    """
    panels = [(title, found) for title, found in panels_of(rows) if found.loc[found[axis].ne(""), axis].nunique() > 1]
    if not panels:
        placeholder_figure(
            path,
            f"no row of this suite has two values of:\n{_AXIS_LABELS[axis]}" if rows["is_ours"].any() else _NOTHING,
        )
        return
    series = [(label, part) for _, found in panels for label, part in _series(found, axis)]
    styles = curve_styles((label, outcomes.style(part["method"].iloc[0])) for label, part in series)
    labels = list(styles)
    with mpl.rc_context({**STYLE, "axes.grid.axis": "both"}):
        figure, axes = _axes(len(panels), 2.2, shared=False)
        for panel, (title, found) in zip(axes.flat, panels, strict=False):
            places = sorted({float(value) for value in found[axis] if value})
            apart = 0.012 * (places[-1] - places[0])
            for label, part in _series(found, axis):
                shift = apart * (labels.index(label) - (len(labels) - 1) / 2)  # so that no interval hides another
                panel.errorbar(
                    part[axis].astype(float) + shift,
                    part["score"] * 100,
                    yerr=None if part["half"].isna().all() else part["half"] * 100,
                    label=label,
                    ms=3.5,
                    lw=1.2,
                    capsize=2,
                    **styles[label],
                )
            base = found[found["is_baseline"]]["score"]
            if len(base):
                panel.axhline(float(base.iloc[0]) * 100, color=REFERENCE, lw=0.8, ls="--", zorder=0)
            low, high = panel.get_ylim()
            panel.set_ylim(max(low, 0.0), min(high, 101.0))  # intervals of few seeds know no bounds
            panel.set_xticks(places)
            every = math.ceil(len(places) / _TICKS)
            panel.set_xticklabels(
                ["" if (len(places) - 1 - number) % every else f"{place:g}" for number, place in enumerate(places)],
                size=7,
            )
            panel.set_title(title, fontsize=8)
            panel.set_xlabel(_AXIS_LABELS[axis], fontsize=7)
        hide_empty(axes)
        legend_below(figure, axes.flat, 2)
        figure.supylabel("Score (%)", fontsize=8)
        save(figure, path)


def _axes(panels: int, height: float, *, shared: bool) -> tuple[Any, Any]:
    """A figure with so many panels, at most four beside each other, all of one width, perhaps with the same axes."""
    columns = min(panels, _COLUMNS)
    lines = math.ceil(panels / columns)
    return panel_grid(
        lines, columns, (min(2.1 * columns + _NAMES, WIDTH), height * lines + 0.5), sharex=shared, sharey=shared
    )


def panels_of(rows: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """The rows of each model, selection and scope with a title: ours, and then the paper's in panels of their own; ``score`` and ``delta`` are of whose they are."""
    several = rows.loc[rows["is_ours"], "protocol"].nunique() > 1
    ours = rows[rows["is_ours"]]
    half = ((ours["high_mean"] - ours["low_mean"]) / 2).where(ours["n"] >= FEW)
    ours = ours.assign(score=ours["mean"], half=half)
    paper = rows[rows["paper"].notna()]
    paper = paper.assign(score=paper["paper"], delta=paper["paper_delta"], is_ours=False, n=math.nan, half=math.nan)
    keys = ["is_ours", "model_title", "protocol", "domain", "scope"]
    for (is_ours, model, protocol, domain, scope), found in pd.concat([ours, paper]).groupby(keys, sort=False):
        who = model if is_ours else ", ".join(filter(None, ("the paper", model)))
        selection = f", {PROTOCOLS[protocol]}" if several and is_ours else ""
        where = scope if domain == ID else f"{scope} (OOD)"
        yield wrapped(f"{who}{selection}\n{where}", _TITLE), found


def _series(rows: pd.DataFrame, axis: str) -> Iterator[tuple[str, pd.DataFrame]]:
    """The rows that differ in one setting alone, of methods that have it, with the label of their curve."""
    rows = rows[rows[axis].ne("")]
    others = [key for key in ("N", "L", "k", "D") if key != axis and rows.groupby("kind")[key].nunique().max() > 1]
    for key, found in rows.groupby(["kind", *others], sort=False):
        values = dict(zip(others, key[1:], strict=True))
        named = ", ".join(f"{'layers' if name == 'L' else name} {value}" for name, value in values.items() if value)
        title = found["row_title"].iloc[0]
        # a main row, and the same setting among those of an ablation: the main row stands first
        points = found.drop_duplicates(axis).sort_values(axis, key=lambda column: column.astype(float))
        yield ", ".join(filter(None, (title, named))), points
