"""Figures of text benchmarks."""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd

from benchmarks.harness.report.plots import (
    REFERENCE,
    STYLE,
    WIDTH,
    Panel,
    hide_empty,
    panel_grid,
    placeholder_figure,
    save,
    score_panels,
    wrapped,
)
from benchmarks.harness.results.statistics import SIGNIFICANCE, critical_difference, nemenyi
from benchmarks.text.grid import ID, OOD
from benchmarks.text.outcomes import Ranked, TextOutcomes
from benchmarks.text.selection import PROTOCOLS

_DIFFERENCE = mpl.colormaps["PuOr_r"]
_MOST = 12  # panels of scores; of more sets a map of differences is drawn
_CELL, _READABLE = 4.6, 0.27  # inches of all cells beside each other, and of one that a number fits in


def scores_by_training_task(outcomes: TextOutcomes, path: Path) -> None:
    """A row of panels a selection, model and training task, a panel an evaluation set, the training task's own first."""
    if _many(outcomes, [ID, OOD]):
        difference_map(outcomes, path, [ID, OOD])
        return
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
    """A panel a training task, or of many a map."""
    _scores(outcomes, path, ID)


def ood_scores(outcomes: TextOutcomes, path: Path) -> None:
    """A panel a pair of training task and OOD set, or of many a map."""
    _scores(outcomes, path, OOD)


def _scores(outcomes: TextOutcomes, path: Path, domain: str) -> None:
    if _many(outcomes, [domain]):
        difference_map(outcomes, path, [domain])
    else:
        score_panels(outcomes, _by_model(outcomes, domain), path)


def _many(outcomes: TextOutcomes, domains: list[str]) -> bool:
    sets = _shown(outcomes, domains)[["protocol", "model", "task", "eval_task"]]
    return len(sets.drop_duplicates()) > _MOST


def difference_map(outcomes: TextOutcomes, path: Path, domains: list[str]) -> None:
    """Differences to the baseline, paired by seed: a panel a model and selection, a row a method, a column a set. Bold where the interval leaves out 0.

    Numbers stand in the cells where there is room; they are in the table of scores.
    """
    rows = outcomes.rows[outcomes.rows["domain"].isin(domains) & outcomes.rows["protocol"].isin(outcomes.run_protocols)]
    rows = rows[rows["method"] != outcomes.baseline]
    pairs = list(dict.fromkeys(zip(rows["task"], rows["eval_task"], strict=True)))
    methods = [name for name in outcomes.methods if name in set(rows["method"])]
    shown = [
        (protocol, model, found)
        for model, of_model in rows.groupby("model", sort=False)
        for protocol, found in of_model.groupby("protocol", sort=False)
    ]
    columns = min(len(outcomes.run_protocols), len(shown))  # a line a model, where all ran under all selections
    cell = _CELL / (columns * len(pairs))
    most = max(1.0, float(rows["delta"].abs().quantile(0.95)) * 100)
    norm = mpl.colors.Normalize(-most, most)
    with mpl.rc_context({**STYLE, "axes.grid": False, "font.size": 7}):
        lines = -(-len(shown) // columns)
        figure, axes = panel_grid(
            lines, columns, (WIDTH, (0.16 * len(methods) + 0.5) * lines + 1.3), sharex=True, sharey=True
        )
        for axis, (protocol, model, found) in zip(axes.flat, shown, strict=False):
            by = found.set_index(["method", "task", "eval_task"])[["delta", "low", "high"]]
            table = np.full((len(methods), len(pairs)), np.nan)
            for line, method in enumerate(methods):
                for column, pair in enumerate(pairs):
                    if (method, *pair) not in by.index:
                        continue
                    delta, low, high = by.loc[(method, *pair)]
                    table[line, column] = delta * 100
                    if cell >= _READABLE and not math.isnan(delta):
                        weight = "bold" if low > 0 or high < 0 else "normal"
                        dark = abs(norm(delta * 100) - 0.5) > 0.35
                        text = f"{delta * 100:+.1f}"
                        axis.text(
                            column, line, text, ha="center", va="center", weight=weight, color="w" if dark else "k"
                        )
            axis.imshow(table, norm=norm, cmap=_DIFFERENCE, aspect="auto")
            axis.set_yticks(range(len(methods)), [outcomes.title("method", name) for name in methods])
            axis.set_xticks(range(len(pairs)), [outcomes.pair_title(*pair) for pair in pairs], rotation=90)
            axis.set_title(_selected(outcomes, str(protocol), outcomes.title("model", str(model))), fontsize=8)
        hide_empty(axes)
        bar = mpl.cm.ScalarMappable(norm, _DIFFERENCE)
        label = f"difference to {outcomes.baseline_title} (points)"
        figure.colorbar(bar, ax=axes, orientation="horizontal", shrink=0.5, aspect=40, label=label, extend="both")
        save(figure, path)


def _by_model(outcomes: TextOutcomes, domain: str) -> list[list[Panel]]:
    """A row of panels a selection and model."""
    found: list[list[Panel]] = []
    for (protocol, model), rows in _shown(outcomes, [domain]).groupby(["protocol", "model"], sort=False):
        above = _selected(outcomes, protocol, outcomes.title("model", model))
        panels = [
            Panel(f"{above}\n{outcomes.pair_title(task, name)}", part)
            for (task, name), part in rows.groupby(["task", "eval_task"], sort=False)
        ]
        found.append(panels)
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

    if not rankings:
        placeholder_figure(path, "the ranked rows have no common set and seed")
        return
    with mpl.rc_context({**STYLE, "axes.grid": False}):
        rows = max(len(one.scores) for one in rankings)
        figure, axes = panel_grid(len(rankings), 1, (WIDTH, (1.1 + 0.2 * rows) * len(rankings)))
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
                color_palette={names[method]: outcomes.style(method).colour for method in names},
                crossbar_props={"color": REFERENCE},
            )
            axis.set_xlim(1, len(ranks))  # all ranks that there are
            for drawn in (*axis.lines, *axis.collections):
                drawn.set_clip_on(False)  # the first and the last rank stand on the edge
            axis.xaxis.set_major_locator(mpl.ticker.MaxNLocator(integer=True))
            axis.spines["top"].set(visible=True, color="black")  # the diagram hides its own axis
            title = (
                f"{outcomes.title('model', one.key['model'])}, {PROTOCOLS[one.key['protocol']]} selection: mean rank over {one.scores.shape[1]} sets, "
                f"critical difference {critical_difference(*one.scores.shape):.2f}"
            )
            axis.set_title(wrapped(title, WIDTH), fontsize=8)
        save(figure, path)
