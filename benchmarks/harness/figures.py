"""Figures, from the same records as the tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas as pd

from benchmarks.harness.definition import Benchmark
from benchmarks.harness.records import scores_of
from benchmarks.harness.statistics import confidence_interval

mpl.use("Agg")
from matplotlib import pyplot as plt

_COLOURS = {"baseline": "#444444", "method": "#0072b2", "control": "#999999"}
STYLE: Any = {
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "x",
    "grid.color": "#e3e3e3",
    "axes.axisbelow": True,
    "pdf.fonttype": 42,
    # the same numbers give the same bytes
    "svg.hashsalt": "emoe",
}


def ood_by_method_and_domain(benchmark: Benchmark, selected: pd.DataFrame, folder: Path) -> None:
    """Score by method, one panel a training and an evaluation set.

    Small dots are seeds, the diamond their mean, the bar its 95 % confidence interval, cut at the panel's edge.
    All panels share one axis, and the dashed line is the baseline's mean.

    Args:
        benchmark: for titles, roles and order.
        selected: records of the chosen runs.
        folder: gets ``<benchmark>_ood.pdf`` and ``.png``.
    """
    rows = pd.concat([scores_of(selected, "test"), scores_of(selected, "ood")])
    rows = rows.assign(value=rows["value"] * 100)
    methods = benchmark.definition["methods"]
    groups = list(dict.fromkeys(zip(rows["model"], rows["task"], strict=True)))
    low, high = rows["value"].min(), rows["value"].max()
    margin = max(high - low, 1.0) * 0.08
    panels = {cell: list(dict.fromkeys(_of(rows, cell)["eval_task"])) for cell in groups}
    present = {cell: [name for name in methods if name in set(_of(rows, cell)["method"])] for cell in groups}
    columns = max(map(len, panels.values()))
    heights = [len(names) + 1.5 for names in present.values()]
    with mpl.rc_context(STYLE):
        figure, axes = plt.subplots(
            len(groups),
            columns,
            figsize=(2.1 * columns + 1.4, 0.25 * sum(heights) + 0.35 * len(groups) + 0.3),
            height_ratios=heights,
            squeeze=False,
            sharex=True,
            sharey="row",
            layout="constrained",
        )
        for axis_row, cell in zip(axes, groups, strict=True):
            task = cell[1]
            for axis in axis_row[len(panels[cell]) :]:
                axis.set_visible(False)
            for axis, name in zip(axis_row, panels[cell], strict=False):
                panel = _of(rows, cell)
                panel = panel[panel["eval_task"] == name]
                for place, method in enumerate(present[cell]):
                    values = panel.loc[panel["method"] == method, "value"].to_numpy(dtype=float)
                    if len(values) == 0:
                        continue
                    colour = _COLOURS[methods[method]["role"]]
                    ends = confidence_interval(values)
                    axis.plot(
                        [max(ends[0], low - margin), min(ends[1], high + margin)],
                        [place, place],
                        color=colour,
                        lw=1.2,
                        alpha=0.6,
                    )
                    axis.plot(values, [place] * len(values), "o", ms=2.6, color=colour, alpha=0.55, mew=0)
                    axis.plot(values.mean(), place, "D", ms=4.2, color=colour, mec="white", mew=0.6)
                    if method == benchmark.definition["baseline"]:
                        axis.axvline(values.mean(), color=colour, lw=0.8, ls="--", zorder=0)
                role = "ID" if name == task else "OOD"
                axis.set_title(
                    f"{benchmark.tasks[task]['title']} → {benchmark.tasks[name]['title']} ({role})", fontsize=8
                )
                axis.set_xlim(low - margin, high + margin)
            axis_row[0].set_yticks(range(len(present[cell])), [methods[name]["title"] for name in present[cell]])
            axis_row[0].set_ylim(len(present[cell]) - 0.4, -0.6)
        figure.supxlabel(
            "Score (%); diamonds: mean over seeds, dots: seeds, bars: 95 % confidence interval, cut at the panel's edge",
            fontsize=7.5,
        )
        save(figure, folder / f"{benchmark.name}_ood")


def save(figure: Any, path: Path) -> None:
    """Write ``<path>.pdf`` and ``.png``, the same bytes for the same numbers, and close the figure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path.with_suffix(".pdf"), metadata={"CreationDate": None})
    figure.savefig(path.with_suffix(".png"), dpi=160, metadata={"Software": None})
    plt.close(figure)


def _of(rows: pd.DataFrame, cell: tuple[str, str]) -> pd.DataFrame:
    """The rows of one model and training task."""
    return rows[(rows["model"] == cell[0]) & (rows["task"] == cell[1])]
