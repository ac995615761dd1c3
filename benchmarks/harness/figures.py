"""Figures, from the same records as the tables."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import matplotlib as mpl
import pandas as pd
import scikit_posthocs

from benchmarks.harness.comparison import ID, OOD, Comparison, Ranked
from benchmarks.harness.selection import PROTOCOLS
from benchmarks.harness.statistics import SIGNIFICANCE, confidence_interval, critical_difference, nemenyi

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


@dataclass(frozen=True)
class Panel:
    """One panel of :func:`score_panels`: its title, and a row a method and seed with ``value``."""

    title: str
    rows: pd.DataFrame


def panels_by_training_task(comparison: Comparison) -> list[list[Panel]]:
    """A row a selection, model and training task, a panel an evaluation set, the training task's own first."""
    return [
        [
            Panel(
                _selected(
                    comparison,
                    protocol,
                    f"{comparison.task_title(task)} → {comparison.task_title(name)} ({'ID' if name == task else 'OOD'})",
                ),
                part,
            )
            for name, part in rows.groupby("eval_task", sort=False)
        ]
        for (protocol, _, task), rows in _shown(comparison, [ID, OOD]).groupby(
            ["protocol", "model", "task"], sort=False
        )
    ]


def panels_by_model(comparison: Comparison, domain: str, columns: int = 4) -> list[list[Panel]]:
    """A few rows a selection and model, a panel a training task, or a pair of training task and OOD set."""
    found: list[list[Panel]] = []
    for (protocol, model), rows in _shown(comparison, [domain]).groupby(["protocol", "model"], sort=False):
        above = _selected(comparison, protocol, comparison.model_title(model))
        panels = [
            Panel(f"{above}\n{comparison.pair_title(task, name)}", part)
            for (task, name), part in rows.groupby(["task", "eval_task"], sort=False)
        ]
        found += [panels[start : start + columns] for start in range(0, len(panels), columns)]
    return found


def _shown(comparison: Comparison, domains: list[str]) -> pd.DataFrame:
    """The scores of the protocols that have runs of their own."""
    seeds = comparison.seeds
    return seeds[seeds["domain"].isin(domains) & seeds["protocol"].isin(comparison.run_protocols)]


def _selected(comparison: Comparison, protocol: str, title: str) -> str:
    """A title that says which selection, where there are two."""
    return title if len(comparison.run_protocols) == 1 else f"{title}, {PROTOCOLS[protocol]} selection"


class Compared(Protocol):
    """What a figure knows of methods: titles, roles and order, and which one is the baseline."""

    methods: dict[str, dict[str, str]]
    baseline: str


def score_panels(
    comparison: Compared,
    panels: list[list[Panel]],
    path: Path,
    measure: str = "Score (%); diamonds: mean over seeds, dots: seeds",
) -> None:
    """Score by method, one panel a set.

    Small dots are seeds, the diamond their mean, the bar its 95 % confidence interval, cut at the panel's edge.
    All panels share one axis, and the dashed line is the baseline's mean.

    Args:
        comparison: for titles, roles and order.
        panels: by row and column.
        path: of the files, without ending.
        measure: what the axis shows, and what diamonds and dots are.
    """
    values = pd.concat([panel.rows["value"] for row in panels for panel in row]) * 100
    low, high = values.min(), values.max()
    margin = max(high - low, 1.0) * 0.08
    methods = comparison.methods
    present = [[name for name in methods if any(name in set(panel.rows["method"]) for panel in row)] for row in panels]
    columns = max(map(len, panels))
    heights = [len(names) + 1.5 for names in present]
    with mpl.rc_context(STYLE):
        figure, axes = plt.subplots(
            len(panels),
            columns,
            figsize=(2.1 * columns + 1.6, 0.25 * sum(heights) + 0.45 * len(panels) + 0.3),
            height_ratios=heights,
            squeeze=False,
            sharex=True,
            sharey="row",
            layout="constrained",
        )
        for axis_row, row, names in zip(axes, panels, present, strict=True):
            for axis in axis_row[len(row) :]:
                axis.set_visible(False)
            for axis, panel in zip(axis_row, row, strict=False):
                for place, method in enumerate(names):
                    scores = panel.rows.loc[panel.rows["method"] == method, "value"].to_numpy(dtype=float) * 100
                    if len(scores):
                        _draw_method(
                            axis, place, scores, _COLOURS[methods[method]["role"]], (low - margin, high + margin)
                        )
                    if len(scores) and method == comparison.baseline:
                        axis.axvline(scores.mean(), color=_COLOURS["baseline"], lw=0.8, ls="--", zorder=0)
                axis.set_title(panel.title, fontsize=8)
                axis.set_xlim(low - margin, high + margin)
            axis_row[0].set_yticks(range(len(names)), [methods[name]["title"] for name in names])
            axis_row[0].set_ylim(len(names) - 0.4, -0.6)
        label = f"{measure}, bars: 95 % confidence interval, cut at the panel's edge"
        figure.supxlabel("\n".join(textwrap.wrap(label, 38 * columns)), fontsize=7.5)
        save(figure, path)


def _draw_method(axis: Any, place: int, scores: Any, colour: str, limits: tuple[float, float]) -> None:
    ends = confidence_interval(scores)
    axis.plot([max(ends[0], limits[0]), min(ends[1], limits[1])], [place, place], color=colour, lw=1.2, alpha=0.6)
    axis.plot(scores, [place] * len(scores), "o", ms=2.6, color=colour, alpha=0.55, mew=0)
    axis.plot(scores.mean(), place, "D", ms=4.2, color=colour, mec="white", mew=0.6)


def rank_diagram(comparison: Comparison, rankings: list[Ranked], path: Path) -> None:
    """Critical difference diagrams (Demšar 2006), one a model and selection.

    Args:
        comparison: for titles.
        rankings: what was ranked.
        path: of the files, without ending.
    """
    with mpl.rc_context({**STYLE, "axes.grid": False}):
        rows = max(len(one.scores) for one in rankings)
        figure, axes = plt.subplots(
            len(rankings), 1, figsize=(7.2, (0.9 + 0.2 * rows) * len(rankings)), squeeze=False, layout="constrained"
        )
        for axis, one in zip(axes[:, 0], rankings, strict=True):
            names = {method: comparison.method_title(method) for method in one.scores.index}
            ranks, p = one.ranking.ranks.rename(names), nemenyi(one.scores).rename(index=names, columns=names)
            scikit_posthocs.critical_difference_diagram(
                ranks,
                p,
                alpha=SIGNIFICANCE,
                ax=axis,
                label_fmt_left="{label} ({rank:.2f}) ",
                label_fmt_right=" ({rank:.2f}) {label}",
                color_palette=dict.fromkeys(ranks.index, _COLOURS["method"]),
                crossbar_props={"color": _COLOURS["baseline"]},
            )
            axis.set_xlim(1, len(ranks))  # all ranks that there are
            axis.xaxis.set_major_locator(mpl.ticker.MaxNLocator(integer=True))
            axis.set_title(
                f"{comparison.model_title(one.key['model'])}, {PROTOCOLS[one.key['protocol']]} selection: mean rank over {one.scores.shape[1]} sets, "
                f"critical difference {critical_difference(*one.scores.shape):.2f}",
                fontsize=8,
            )
        save(figure, path)


def save(figure: Any, path: Path) -> None:
    """Write ``<path>.pdf`` and ``.png``, the same bytes for the same numbers, and close the figure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path.with_suffix(".pdf"), metadata={"CreationDate": None})
    figure.savefig(path.with_suffix(".png"), dpi=160, metadata={"Software": None})
    plt.close(figure)


def say_nothing(path: Path, text: str) -> None:
    """A picture that says why there is none."""
    with mpl.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(3, 0.6))
        axis.text(0.5, 0.5, text, ha="center", va="center")
        axis.axis("off")
        save(figure, path)
