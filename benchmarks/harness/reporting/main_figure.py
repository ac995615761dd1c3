"""The main averages (Fig. 2 of the paper): a radar, and, because radars mislead, differences with their intervals; the paper's beside ours."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd

from benchmarks.harness.planning.catalogue import load_models
from benchmarks.harness.planning.paper_items import MainAverage, load_main_averages, main_files
from benchmarks.harness.reporting.plots import COLOURS, SERIES, STYLE, draw_difference, placeholder_figure, save
from benchmarks.harness.results.evidence import paired
from benchmarks.harness.results.statistics import mean_difference

from matplotlib import pyplot as plt  # isort: skip  (plots chooses the backend)

_METHODS = {"dense": "dense", "gmoe": "GMoE", "emoe": "EMoE"}
_LOOKS: dict[str, dict[str, Any]] = {
    "dense": {"color": COLOURS["baseline"], "marker": "o"},
    "gmoe": {"color": SERIES[1], "marker": "s"},
    "emoe": {"color": SERIES[0], "marker": "D"},
}
_NOTHING = "this suite runs none of the main averages"
_PADDING = 0.25  # of the range of an axis of the radar, inside its least and outside its greatest value


def main_rows(numbers: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """The main averages of a suite, and the paper's.

    Args:
        numbers: what :func:`~benchmarks.harness.reporting.claims.claimed_numbers` gave.

    Returns:
        A row an average, model and method (``dense``, ``gmoe``, ``emoe``): ``axis`` (title and model), ``whose`` (``ours``, ``paper``), ``is_rank``, ``mean`` (points;
        of a rank as it is), and the paired difference to the dense row: ``delta``, ``low``, ``high`` (points) and ``n``.
    """
    found = []
    for average in load_main_averages().values():
        if average.of.benchmark in numbers:
            found += _ours(average, numbers[average.of.benchmark])
        for models, is_rank in ((average.paper, False), (average.paper_ranks, True)):
            for model, values in models.items():
                for method in _METHODS:
                    value, dense = getattr(values, method), values.dense
                    row = {"axis": f"{average.title}, {model}", "whose": "paper", "is_rank": is_rank, "method": method}
                    found.append({**row, "mean": value, "delta": value - dense, "n": 0})
    columns = ["axis", "whose", "is_rank", "method", "mean", "delta", "low", "high", "n"]
    return pd.DataFrame(found, columns=columns)


def _ours(average: MainAverage, numbers: pd.DataFrame) -> list[dict[str, Any]]:
    """Means over the tasks and sets, and the pairs (seeds, trials), that all methods have; differences over those that a method shares with the dense one."""
    of = average.of
    kept = numbers["selection"].eq(of.selection) & numbers["domain"].eq(of.domain) & numbers["metric"].eq(of.metric)
    rows = numbers[kept & numbers["setting"].eq("")]
    found = []
    for model, own in rows.groupby("model", sort=False):
        title = load_models()[model].title if model in load_models() else str(model)
        wide = own.pivot_table(index=["task", "eval_task", "pair"], columns="method", values="value", aggfunc="mean")
        if of.dense not in wide or not {of.gmoe, of.emoe} & set(wide):
            continue
        shared = wide[[name for name in (of.dense, of.gmoe, of.emoe) if name in wide]].dropna()
        by_pair = shared.groupby("pair")
        means = by_pair.mean()[by_pair.size() == shared.groupby(["task", "eval_task"]).ngroups]
        for method in _METHODS:
            name = getattr(of, method)
            if name not in wide or means.empty:
                continue
            evidence = None if name == of.dense else paired(own, of.comparison(name))
            difference = evidence.difference if evidence else mean_difference(np.zeros(len(means)))
            found.append(
                {
                    "axis": f"{average.title}, {title}",
                    "whose": "ours",
                    "is_rank": False,
                    "method": method,
                    "mean": float(means[name].mean()) * 100,
                    "delta": difference.mean * 100,
                    "low": difference.low * 100,
                    "high": difference.high * 100,
                    "n": difference.n,
                }
            )
    return found


def draw_main(rows: pd.DataFrame, folder: Path) -> None:
    """Draw the radar and the differences into a folder, under the names of :func:`~benchmarks.harness.planning.paper_items.main_files`."""
    radar, differences = dict.fromkeys(folder / Path(file).stem for file in main_files(""))
    if not (rows["whose"] == "ours").any():
        placeholder_figure(radar, _NOTHING)
        placeholder_figure(differences, _NOTHING)
        return
    draw_radar(rows, radar)
    draw_differences(rows, differences)


def draw_radar(rows: pd.DataFrame, path: Path) -> None:
    """Two radars, ours and the paper's: every axis has its own range, and the best is outside; the numbers stand under its name."""
    with mpl.rc_context({**STYLE, "axes.grid": True, "axes.grid.axis": "both"}):
        figure, panels = plt.subplots(
            1, 2, figsize=(6.9, 4.3), subplot_kw={"projection": "polar"}, layout="constrained"
        )
        for panel, whose in zip(panels, ("ours", "paper"), strict=True):
            found = rows[rows["whose"] == whose]
            axes = list(found["axis"].drop_duplicates())
            angles = np.linspace(0, 2 * np.pi, len(axes), endpoint=False)
            wide = found.pivot_table(index="axis", columns="method", values="mean", sort=False).loc[axes]
            ranks = found.drop_duplicates("axis").set_index("axis").loc[axes, "is_rank"]
            better = wide.mul(np.where(ranks, -1.0, 1.0), axis=0)
            low, high = better.min(axis=1), better.max(axis=1)
            span = (high - low).where(high > low, 1.0)
            places = better.sub(low, axis=0).div(span, axis=0) * (1 - 2 * _PADDING) + _PADDING
            for method, label in _METHODS.items():
                if method not in places:
                    continue
                values = places[method].to_numpy(dtype=float)
                look = _LOOKS[method]
                panel.plot([*angles, angles[0]], [*values, values[0]], ms=3.5, lw=1.2, label=label, **look)
            labels = [
                "\n".join(
                    [*textwrap.wrap(axis, 18), " / ".join(f"{wide.loc[axis, m]:.1f}" for m in _METHODS if m in wide)]
                )
                for axis in axes
            ]
            panel.set_xticks(angles, labels, fontsize=6)
            panel.tick_params(axis="x", pad=12)
            panel.set_ylim(0, 1)
            panel.set_yticks([_PADDING, 0.5, 1 - _PADDING], ["", "", ""])
            panel.set_title("these runs" if whose == "ours" else "the paper (OOD: ranks, lower is better)", fontsize=8)
        handles = panels[1].get_legend_handles_labels()
        figure.legend(*handles, loc="outside lower center", ncols=3, fontsize=7, frameon=False)
        figure.suptitle(
            "Under each name: dense / GMoE / EMoE. Every axis from the least to the greatest of them, the best outside",
            fontsize=7,
        )
        save(figure, path)


def draw_differences(rows: pd.DataFrame, path: Path) -> None:
    """Differences to the dense model in points: ours with their 95 % intervals, the paper's as crosses; ranks are left out."""
    drawn = rows[(rows["method"] != "dense") & ~rows["is_rank"]]
    axes = list(drawn["axis"].drop_duplicates())
    with mpl.rc_context(STYLE):
        figure, panel = plt.subplots(figsize=(6.9, 0.34 * len(axes) + 0.9), layout="constrained")
        for row in drawn.itertuples():
            look = _LOOKS[row.method]
            place = axes.index(row.axis) + (0.14 if row.method == "gmoe" else -0.14)
            if row.whose == "paper":
                panel.plot(row.delta, place, "x", ms=5, color=look["color"])
                continue
            draw_difference(panel, row, place, look["color"], look["marker"])
        panel.axvline(0, color=COLOURS["baseline"], lw=0.8, ls="--", zorder=0)
        panel.set_yticks(range(len(axes)), axes)
        panel.set_ylim(len(axes) - 0.4, -0.6)
        panel.set_xlabel(
            "Difference to the dense model (points)\nbars: 95 % intervals of these runs, crosses: the paper"
        )
        handles = [
            mpl.lines.Line2D([], [], ls="", ms=5, label=_METHODS[name], **_LOOKS[name]) for name in ("gmoe", "emoe")
        ]
        panel.legend(handles=handles, loc="best", fontsize=7, frameon=False)
        save(figure, path)
