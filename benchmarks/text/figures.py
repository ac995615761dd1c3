"""Figures of text benchmarks."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import pandas as pd
from matplotlib import pyplot as plt

from benchmarks.harness.reporting.plots import COLOURS, STYLE, Panel, save
from benchmarks.harness.results.statistics import SIGNIFICANCE, critical_difference, nemenyi
from benchmarks.text.comparison import ID, OOD, Comparison, Ranked
from benchmarks.text.selection import PROTOCOLS


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


def rank_diagram(comparison: Comparison, rankings: list[Ranked], path: Path) -> None:
    """Critical difference diagrams (Demšar 2006), one a model and selection.

    Args:
        comparison: for titles.
        rankings: what was ranked.
        path: of the files, without ending.
    """
    import scikit_posthocs  # it takes a plotting library of its own along

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
                color_palette=dict.fromkeys(ranks.index, COLOURS["method"]),
                crossbar_props={"color": COLOURS["baseline"]},
            )
            axis.set_xlim(1, len(ranks))  # all ranks that there are
            axis.xaxis.set_major_locator(mpl.ticker.MaxNLocator(integer=True))
            axis.set_title(
                f"{comparison.model_title(one.key['model'])}, {PROTOCOLS[one.key['protocol']]} selection: mean rank over {one.scores.shape[1]} sets, "
                f"critical difference {critical_difference(*one.scores.shape):.2f}",
                fontsize=8,
            )
        save(figure, path)
