"""Figures of text benchmarks."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import pandas as pd
from matplotlib import pyplot as plt

from benchmarks.harness.reporting.plots import COLOURS, STYLE, Panel, save, score_panels
from benchmarks.harness.results.statistics import SIGNIFICANCE, critical_difference, nemenyi
from benchmarks.text.grid import ID, OOD
from benchmarks.text.outcomes import Ranked, TextOutcomes
from benchmarks.text.selection import PROTOCOLS

_COLUMNS = 4


def scores_by_training_task(outcomes: TextOutcomes, path: Path) -> None:
    """A row of panels a selection, model and training task, a panel an evaluation set, the training task's own first."""
    panels = []
    for (protocol, _, task), rows in _shown(outcomes, [ID, OOD]).groupby(["protocol", "model", "task"], sort=False):
        titles = {
            name: f"{outcomes.title('task', task)} → {outcomes.title('task', name)} ({'ID' if name == task else 'OOD'})"
            for name in rows["eval_task"].unique()
        }
        panels.append(
            [
                Panel(_selected(outcomes, protocol, titles[name]), part)
                for name, part in rows.groupby("eval_task", sort=False)
            ]
        )
    score_panels(outcomes, panels, path)


def id_scores(outcomes: TextOutcomes, path: Path) -> None:
    """A panel a training task."""
    score_panels(outcomes, _by_model(outcomes, ID), path)


def ood_scores(outcomes: TextOutcomes, path: Path) -> None:
    """A panel a pair of training task and OOD set."""
    score_panels(outcomes, _by_model(outcomes, OOD), path)


def _by_model(outcomes: TextOutcomes, domain: str) -> list[list[Panel]]:
    """A few rows of panels a selection and model."""
    found: list[list[Panel]] = []
    for (protocol, model), rows in _shown(outcomes, [domain]).groupby(["protocol", "model"], sort=False):
        above = _selected(outcomes, protocol, outcomes.title("model", model))
        panels = [
            Panel(f"{above}\n{outcomes.pair_title(task, name)}", part)
            for (task, name), part in rows.groupby(["task", "eval_task"], sort=False)
        ]
        found += [panels[start : start + _COLUMNS] for start in range(0, len(panels), _COLUMNS)]
    return found


def _shown(outcomes: TextOutcomes, domains: list[str]) -> pd.DataFrame:
    """The scores of the protocols that have runs of their own."""
    seeds = outcomes.seeds
    return seeds[seeds["domain"].isin(domains) & seeds["protocol"].isin(outcomes.run_protocols)]


def _selected(outcomes: TextOutcomes, protocol: str, title: str) -> str:
    """A title that says which selection, where there are two."""
    return title if len(outcomes.run_protocols) == 1 else f"{title}, {PROTOCOLS[protocol]} selection"


def rank_diagram(outcomes: TextOutcomes, path: Path, rankings: list[Ranked]) -> None:
    """Critical difference diagrams (Demšar 2006), one a model and selection.

    Args:
        outcomes: for titles.
        path: of the files, without ending.
        rankings: what was ranked.
    """
    import scikit_posthocs  # it takes a plotting library of its own along

    with mpl.rc_context({**STYLE, "axes.grid": False}):
        rows = max(len(one.scores) for one in rankings)
        figure, axes = plt.subplots(
            len(rankings), 1, figsize=(7.2, (0.9 + 0.2 * rows) * len(rankings)), squeeze=False, layout="constrained"
        )
        for axis, one in zip(axes[:, 0], rankings, strict=True):
            names = {method: outcomes.title("method", method) for method in one.scores.index}
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
                f"{outcomes.title('model', one.key['model'])}, {PROTOCOLS[one.key['protocol']]} selection: mean rank over {one.scores.shape[1]} sets, "
                f"critical difference {critical_difference(*one.scores.shape):.2f}",
                fontsize=8,
            )
        save(figure, path)
