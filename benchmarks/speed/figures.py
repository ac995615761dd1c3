"""The figures of the measurements."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from matplotlib import pyplot as plt

from benchmarks.harness.report.looks import Look
from benchmarks.harness.report.plots import STYLE, WIDTH, legend_below, panel_grid, save
from benchmarks.speed.measurements import Measurements
from benchmarks.speed.tables import threads_text
from emoe.sparse.cost_model import predicted_time_ratio

_LOOKS = {
    "sparse": Look("#0072b2", "D"),
    "masked": Look("#999999", "s"),
    "block_mask": Look("#d55e00", "^"),
    "transformers_eager": Look("#009e73", "v"),
    "transformers_grouped": Look("#cc79a7", ">"),
}
_LEVEL = "_"  # a mark of lines, which shows where there is one value alone


def draw_layer(measured: Measurements, path: Path) -> None:
    """One panel a number of threads: the FFNs that met all candidates."""
    rows = measured.ratios(dtype="float32")
    rows = rows[rows["candidates"].map(len) == rows["candidates"].map(len).max()]
    panels = sorted(rows["threads"].unique())
    names = [name for name in _LOOKS if name in set(rows["eval_task"])]
    cells = list(dict.fromkeys(zip(rows["model_title"], rows["top_k_fraction"], strict=True)))
    with mpl.rc_context(STYLE):
        figure, axes = panel_grid(
            1, len(panels), (min(3.4 * len(panels) + 1.2, WIDTH), 0.42 * len(cells) + 1.3), sharey=True
        )
        for axis, threads in zip(axes[0], panels, strict=True):
            for place, (title, share) in enumerate(cells):
                cell = rows[
                    (rows["model_title"] == title) & (rows["top_k_fraction"] == share) & (rows["threads"] == threads)
                ]
                for offset, name in enumerate(names):
                    for row in cell[cell["eval_task"] == name].itertuples():
                        height = place + (offset - (len(names) - 1) / 2) * 0.11
                        axis.plot([row.ratio_low, row.ratio_high], [height] * 2, color=_LOOKS[name].colour, lw=1)
                        axis.plot(row.ratio, height, ls="", ms=3.6, label=measured.titles[name], **_LOOKS[name].mark)
                axis.plot([share] * 2, [place - 0.4, place + 0.4], ":", color="black", lw=1)
            axis.axvline(1, color="#444444", ls="--", lw=0.8, zorder=0)
            axis.set_xscale("log")
            _plain_ticks(axis.xaxis, [0.25, 0.5, 1, 2, 4])
            axis.set_title(threads_text(threads))
            axis.set_xlabel("Time ÷ dense")
        axes[0][0].set_yticks(range(len(cells)), [f"{title}, k/N {share:g}" for title, share in cells])
        axes[0][0].set_ylim(len(cells) - 0.5, -0.5)
        legend_below(figure, axes[0][:1], 3)
        save(figure, path)


def draw_scaling(measured: Measurements, path: Path) -> None:
    """Each axis varied alone, the rest at the measure's usual setting with 1024 tokens."""
    usual = measured.benchmark.definition.measures["layer"].settings
    rows = measured.ratios(dtype="float32", threads=1)
    rows = rows.assign(size=rows["neurons"] / rows["num_experts"])
    base = rows["model"] == "bert-base"
    usual_n, usual_k, at = (
        rows["num_experts"] == usual["num_experts"],
        rows["top_k_fraction"] == usual["top_k_fraction"],
        rows["tokens"] == 1024,
    )
    panels = {
        "tokens": ("Tokens", rows[base & usual_n & usual_k]),
        "size": ("Neurons an expert", rows[base & usual_k & at]),
        "top_k_fraction": ("Share of experts in use, k/N", rows[base & usual_n & at]),
        "hidden": ("Width", rows[usual_n & usual_k & at]),
    }
    names = [name for name in ("sparse", "masked", "block_mask") if name in set(rows["eval_task"])]
    with mpl.rc_context(STYLE):
        figure, axes = plt.subplots(2, 2, figsize=(WIDTH, 4.9), sharey=True, layout="constrained")
        for axis, (column, (label, panel)) in zip(axes.flat, panels.items(), strict=True):
            for name in names:
                line = panel[panel["eval_task"] == name].sort_values(column)
                axis.errorbar(
                    line[column],
                    line["ratio"],
                    yerr=[line["ratio"] - line["ratio_low"], line["ratio_high"] - line["ratio"]],
                    ms=3.4,
                    lw=1,
                    label=measured.titles[name],
                    **_LOOKS[name].mark,
                )
            own = panel[panel["eval_task"] == "sparse"].sort_values(column)
            expected = [
                predicted_time_ratio(row.tokens, int(row.hidden), int(row.size), row.top_k_fraction, torch.float32, 1)
                for row in own.itertuples()
            ]
            axis.plot(
                own[column], expected, color="#bbbbbb", lw=2.5, marker=_LEVEL, ms=14, zorder=0, label="sparse, expected"
            )
            axis.plot(
                own[column], own["top_k_fraction"], ":", color="black", lw=1, marker=_LEVEL, ms=9, label="limit k/N"
            )
            axis.axhline(1, color="#444444", ls="--", lw=0.8, zorder=0)
            if column != "top_k_fraction":
                axis.set_xscale("log", base=2)
            _plain_ticks(axis.xaxis, _apart(sorted(own[column].unique())))
            axis.set_xlabel(label)
            axis.grid(axis="y", color="#e3e3e3")
            axis.set_ylim(0, 2)
        for axis in axes[:, 0]:
            axis.set_ylabel("Time ÷ dense")
        legend_below(figure, axes[0, :1], 3)
        save(figure, path)


def _apart(places: list[float]) -> list[float]:
    """Those of sorted places that are at least a seventh of a logarithmic axis apart, so that their labels do not touch."""
    least = (places[-1] / places[0]) ** (1 / 7)
    kept = places[:1]
    for place in places[1:]:
        if place >= least * kept[-1]:
            kept.append(place)
    return kept


def _plain_ticks(axis: Any, places: list[float]) -> None:
    axis.set_major_locator(mpl.ticker.FixedLocator(places))
    axis.set_major_formatter(mpl.ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(mpl.ticker.NullLocator())
