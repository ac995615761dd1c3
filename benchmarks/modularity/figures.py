"""Draw pre-trained models as they are: active neurons, their concentration, and the experts of each task."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib import pyplot as plt

from benchmarks.harness.report import plots
from benchmarks.harness.report.style import EMOE
from benchmarks.modularity.definition import EXPERTS
from benchmarks.modularity.outcomes import ModularityOutcomes
from benchmarks.text.figures import UsagePanel, draw_usage

_PAPERS_N = 64  # of Fig. 4
_BESIDE = 0.14  # the distance of the paper's cross from our mark


def draw_activations(outcomes: ModularityOutcomes, path: Path) -> None:
    """Draw a dot per active neuron: a line per model (its first layer), a column per construction."""
    panels = outcomes.first_panels()
    names = [name for name in outcomes.methods if name in set(outcomes.rows["method"])]
    size, shared = (plots.WIDTH, 2.3 * len(panels) + 0.4), {"sharex": "row", "sharey": "row"}
    with plots.panel_figure(path, len(panels), len(names), size, plots.HEATMAP, **shared) as (_, axes):
        for axis_row, (title, rows) in zip(axes, panels, strict=True):
            for axis, (name, row) in zip(axis_row, _first_runs(rows, names), strict=True):
                if row is None:
                    continue
                matrix = outcomes.metrics_of(row)["matrix"]
                _draw_matrix(axis, matrix, int(row.num_experts))
                axis.set_title(f"{outcomes.title('method', name)}, N = {row.num_experts}", fontsize=7.5)
                if axis is axis_row[0]:
                    middles = pd.Series(range(len(matrix["tasks"]))).groupby(matrix["tasks"], sort=False).mean()
                    axis.set_yticks(middles, [outcomes.title("task", str(name)) for name in middles.index])
                    axis.tick_params(axis="y", length=0)
            axis_row[0].set_ylabel(f"{title}\ntokens of")
            for axis in axis_row:
                axis.set_xlabel("neurons, expert by expert")


def _draw_matrix(axis: Any, matrix: dict[str, Any], experts: int) -> None:
    size = matrix["neurons"] // experts
    for edge in range(size, matrix["neurons"], size):
        axis.axvline(edge - 0.5, color="#e3e3e3", lw=0.3, zorder=0)
    axis.plot(matrix["places"], matrix["tokens"], "s", ms=0.9, mew=0, color=EMOE.colour, alpha=0.8, rasterized=True)
    axis.set_xlim(-0.5, matrix["neurons"] - 0.5)
    axis.set_ylim(len(matrix["tasks"]) - 0.5, -0.5)
    axis.set_xticks([0, matrix["neurons"]])


def draw_activations_3d(outcomes: ModularityOutcomes, path: Path) -> None:
    """Draw magnitudes of the first model and layer in 3D, before and after clustering, as the paper does."""
    title, rows = outcomes.first_panels()[0]
    shown = [(name, row) for name, row in _first_runs(rows, ["contiguous", outcomes.baseline]) if row is not None]
    if not shown:
        plots.placeholder_figure(path, "this suite runs neither clusters nor contiguous neurons")
        return
    with mpl.rc_context({**plots.STYLE, "font.size": 7}):
        figure = plt.figure(figsize=(plots.WIDTH, 3.0), layout="constrained")
        for number, (name, row) in enumerate(shown, 1):
            matrix = outcomes.metrics_of(row)["matrix"]
            axis: Any = figure.add_subplot(1, len(shown), number, projection="3d")
            axis.scatter(
                matrix["places"], matrix["tokens"], matrix["values"],
                c=matrix["values"], cmap="viridis", s=1.2, linewidths=0, rasterized=True,
            )  # fmt: skip
            axis.set_xlabel("neurons", labelpad=-1)
            axis.set_ylabel("tokens", labelpad=-4)
            axis.set_zlabel("|activation|", labelpad=-8)
            axis.tick_params(pad=-2, labelsize=7)
            axis.view_init(elev=35, azim=-70)
            axis.set_box_aspect((1.3, 1, 0.6), zoom=1.1)
            for side in (axis.xaxis, axis.yaxis, axis.zaxis):
                side.set_major_locator(mpl.ticker.MaxNLocator(4))
            axis.set_title(f"{outcomes.title('method', name)}, N = {row.num_experts}", fontsize=7.5)
        figure.suptitle(title, fontsize=8)
        plots.save(figure, path)


def draw_concentration(outcomes: ModularityOutcomes, path: Path) -> None:
    """Draw the share of active neurons in the best quarter of blocks over N, a panel per model and layer."""
    panels = list(outcomes.panels())
    columns = min(len(panels), 2)
    lines = -(-len(panels) // columns)
    size, style = (2.6 * columns + 1.4, 2.4 * lines + 0.3), {**plots.STYLE, "axes.grid.axis": "y"}
    with plots.panel_figure(path, lines, columns, size, style, sharey=True) as (figure, axes):
        for axis, (title, rows) in zip(axes.flat, panels, strict=False):
            sizes = sorted(rows["num_experts"].unique())
            axis.axhline(25, color="#888888", lw=0.8, ls=":", zorder=0, label="every expert alike (25 %)")
            for number, name in enumerate(outcomes.methods):
                if name in set(rows["method"]):
                    _draw_series(axis, outcomes, rows[rows["method"] == name], sizes, number)
            axis.set_xticks(range(len(sizes)), [str(size) for size in sizes])
            axis.set_xlim(-0.5, len(sizes) - 0.5)
            axis.set_ylim(0, 102)
            axis.set_xlabel("number of experts, N")
            axis.set_title(title, fontsize=8)
        for axis in axes[:, 0]:
            axis.set_ylabel("active neurons in the\nbest quarter of experts (%)")
        handles, labels = axes[0, 0].get_legend_handles_labels()
        handles.append(mpl.lines.Line2D([], [], color=plots.REFERENCE, marker="x", ls="", ms=5))
        figure.legend(handles, [*labels, "the paper's matrices"], loc="outside right center", frameon=False, fontsize=7)


def _draw_series(axis: Any, outcomes: ModularityOutcomes, rows: pd.DataFrame, sizes: list[int], number: int) -> None:
    name = str(rows["method"].iloc[0])
    style = outcomes.style(name)
    by_number_of_runs = rows.groupby("num_experts")["best_quarter"]
    shift = 0.12 * (number - 1)
    means, low, high = by_number_of_runs.mean() * 100, by_number_of_runs.min() * 100, by_number_of_runs.max() * 100
    x = np.array([sizes.index(size) for size in by_number_of_runs.groups]) + shift
    axis.vlines(x, low, high, color=style.colour, lw=1.4)
    axis.plot(x, means, ls="", ms=4.5, **style.mark, label=outcomes.title("method", name))
    published = outcomes.paper[(outcomes.paper["method"] == name) & (outcomes.paper["metric"] == "best_quarter")]
    published = published[published["num_experts"].isin(sizes)]
    beside = [sizes.index(size) + shift + _BESIDE for size in published["num_experts"]]
    axis.plot(beside, published["value"] * 100, "x", ms=5, color=style.colour)


def draw_experts(outcomes: ModularityOutcomes, path: Path) -> None:
    """Draw the use of experts by task and class, a panel per model (first layer, smallest N)."""
    panels: list[UsagePanel] = []
    for title, rows in outcomes.first_panels():
        clusters = rows[rows["method"] == outcomes.baseline].sort_values("num_experts", kind="stable")
        for row in clusters.head(1).itertuples():
            metrics = outcomes.metrics_of(row)
            panels.append((f"{title}, N = {row.num_experts}", metrics["measured"][EXPERTS], metrics["usage"]))
    draw_usage(panels, outcomes, path)


def _first_runs(rows: pd.DataFrame, names: list[str]) -> Iterator[tuple[str, Any]]:
    """Yield each construction with its first run at the paper's N (else the largest N), or None without a run."""
    sizes = set(rows["num_experts"])
    size = _PAPERS_N if _PAPERS_N in sizes else max(sizes)
    for name in names:
        runs = rows[(rows["method"] == name) & (rows["num_experts"] == size)]
        yield name, next(runs.itertuples(), None)
