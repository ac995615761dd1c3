"""Draw the figures of instruction tuning: loss curves, accuracy by category, routing."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from scipy import stats

from benchmarks.harness.config.runs import Run
from benchmarks.harness.report import plots
from benchmarks.harness.report.style import DENSE, MethodStyle, curve_styles
from benchmarks.harness.results.statistics import CONFIDENCE
from benchmarks.llama.definition import is_trained
from benchmarks.llama.outcomes import CELL, GROUP, InstructionOutcomes, cell_of, format_part, format_task

_Point = tuple[int, float | None]  # step and loss
_FOUR_CHOICES, _CHANCE = "mmlu", 0.25
_NAMES = 1.8  # inches beside the panels


def draw_curves(outcomes: InstructionOutcomes, path: Path) -> None:
    """Draw the loss by step, averaged over seeds: a column of panels per model and tuning, a line per method."""
    groups: dict[tuple[str, ...], dict[str, list[Run]]] = {}
    for run in (run for run in outcomes.runs if is_trained(run.spec)):
        cell = cell_of(run)
        lines = groups.setdefault(tuple(cell[key] for key in GROUP), {})
        lines.setdefault(outcomes.method_title(cell), []).append(run)
    if not groups:
        plots.placeholder_figure(path, "none of these runs trains a model")
        return
    panels: dict[str, Callable[[Run], list[_Point]]] = {
        "training loss": lambda run: list(enumerate(outcomes.metrics[run.id]["curve"], start=1))
    }
    if any(_held_out(outcomes, run) for lines in groups.values() for runs in lines.values() for run in runs):
        panels["held-out loss"] = lambda run: _held_out(outcomes, run)
    styles = curve_styles(
        (title, outcomes.style(runs[0].spec["method"]["name"]))
        for lines in groups.values()
        for title, runs in lines.items()
    )
    size = (min(3.0 * len(groups) + 0.6, plots.WIDTH), 2.3 * len(panels) + 0.3)
    shared = {"sharex": "col", "sharey": "row"}
    with plots.panel_figure(path, len(panels), len(groups), size, plots.CURVES, **shared) as (figure, axes):
        for column, ((model, name, tuning), lines) in enumerate(groups.items()):
            for axis, (label, points) in zip(axes[:, column], panels.items(), strict=True):
                for title, runs in lines.items():
                    _draw_curve(axis, title, styles[title], [points(run) for run in runs])
                axis.set_ylabel(label if column == 0 else "")
            tuned = outcomes.title("tuning", tuning)
            below = f"{outcomes.title('set', name)}, {tuned}" if outcomes.several_sets else tuned
            title = f"{outcomes.title('model', model)}\n{below}"
            axes[0, column].set_title(plots.wrap_text(title, (size[0] - 0.6) / len(groups)), fontsize=8)
            axes[-1, column].set_xlabel(f"step; means of {plots.count_text(len(runs) for runs in lines.values())}")
            axes[-1, column].xaxis.set_major_locator(mpl.ticker.MaxNLocator(integer=True))
        plots.legend_below(figure, axes.flat, len(groups) + 1)


def _held_out(outcomes: InstructionOutcomes, run: Run) -> list[_Point]:
    return [(point["step"], point["loss"]) for point in outcomes.metrics[run.id].get("held_out_curve", ())]


def _draw_curve(axis: Any, title: str, style: Mapping[str, Any], curves: list[list[_Point]]) -> None:
    """Draw the mean over seeds. Dashes and marks keep overlapping lines visible."""
    steps = [step for step, _ in curves[0]]
    if not steps:
        return
    losses = [[math.nan if loss is None else loss for _, loss in curve] for curve in curves]
    is_dense = style["color"] == DENSE.colour  # wide, to stay visible below the others
    width = {"lw": 2.6, "alpha": 0.55} if is_dense else {"lw": 1.2}
    axis.plot(steps, np.mean(losses, axis=0), label=title, ms=4, **width, **style, markevery=max(1, len(steps) // 8))


def draw_categories(outcomes: InstructionOutcomes, path: Path) -> None:
    """Draw accuracy by category: a line of panels per task, a panel per category, a row per cell."""
    cells = outcomes.order(outcomes.cells(), CELL)
    panels: dict[str, dict[str, dict[tuple[str, ...], list[tuple[float, int]]]]] = {}
    for run in outcomes.runs:
        for task, tested in outcomes.metrics[run.id]["tasks"].items():
            if tested["metric"] != "acc":
                continue
            whole = {"all": {"acc": tested["scores"]["accuracy"], "questions": tested["questions"]}}
            for name, values in (whole | tested["categories"]).items():
                rows = panels.setdefault(task, {}).setdefault(name, {})
                rows.setdefault(tuple(cell_of(run).values()), []).append((values["acc"], values["questions"]))
    if not panels:
        plots.placeholder_figure(path, "none of these tasks has an accuracy")
        return
    names = [outcomes.row_title(cell) for cell in cells[CELL].to_dict("records")]
    columns = max(map(len, panels.values()))
    size = (min(1.5 * columns + _NAMES, plots.WIDTH), (0.17 * len(names) + 0.95) * len(panels) + 0.4)
    with plots.panel_figure(path, len(panels), columns, size, sharex=True, sharey=True) as (figure, axes):
        for axis_row, (task, categories) in zip(axes, panels.items(), strict=True):
            for axis, (name, rows) in zip(axis_row, categories.items(), strict=False):
                for height, key in enumerate(cells[CELL].itertuples(index=False, name=None)):
                    if key in rows:
                        _draw_shares(axis, height, rows[key], outcomes.style(key[CELL.index("method")]))
                if task.startswith(_FOUR_CHOICES):
                    axis.axvline(_CHANCE * 100, color=plots.REFERENCE, lw=0.8, ls="--", zorder=0)
                title = f"{format_task(task)}\n{format_part(name)} ({next(iter(rows.values()))[0][1]:,})"
                axis.set_title(plots.wrap_text(title, (size[0] - _NAMES) / columns, 7), fontsize=7)
            axis_row[0].set_yticks(range(len(names)), names)
            axis_row[0].set_ylim(len(names) - 0.4, -0.6)
        figure.supxlabel("Accuracy (%); in brackets: questions; dashed: chance among four answers", fontsize=7.5)


def _draw_shares(axis: Any, height: int, shares: list[tuple[float, int]], style: MethodStyle) -> None:
    """Draw the accuracies of seeds, their mean, and the first seed's interval over questions."""
    share, count = shares[0]
    interval = stats.binomtest(round(share * count), count).proportion_ci(CONFIDENCE, "wilson")
    values = [value * 100 for value, _ in shares]
    axis.plot([interval.low * 100, interval.high * 100], [height, height], color=style.colour, alpha=0.4, lw=1.2)
    axis.plot(values, [height] * len(values), "o", ms=2.6, color=style.colour, alpha=0.6, mew=0)
    axis.plot(np.mean(values), height, ls="", ms=4, **{"mec": "white", "mew": 0.6, **style.mark})


def draw_routing(outcomes: InstructionOutcomes, path: Path) -> None:
    """Draw expert loads by layer as heatmaps: a panel per routed cell, for its first seed."""
    shown: dict[str, dict[str, Any]] = {}
    for run in outcomes.runs:
        if routing := outcomes.metrics[run.id]["routing"]:
            shown.setdefault(outcomes.row_title(cell_of(run)), routing)
    if not shown:
        plots.placeholder_figure(path, "no method of these runs has experts")
        return
    heights = [len(routing["shares"]) + 1.5 for routing in shown.values()]
    size = (6.4, 0.105 * sum(heights) + 0.3 * len(shown) + 0.5)
    with plots.panel_figure(path, len(shown), 1, size, plots.HEATMAP, height_ratios=heights) as (figure, axes):
        for axis, (title, routing) in zip(axes[:, 0], shown.items(), strict=True):
            layers = sorted(routing["shares"], key=int)
            shares = np.array([routing["shares"][layer] for layer in layers])
            plots.show_use(axis, shares * shares.shape[1])
            axis.set_yticks(range(len(layers)), layers)
            axis.set_ylabel("layer")
            axis.set_title(f"{title}: load entropy {routing['load_entropy']:.3f}", fontsize=8)
        axes[-1, 0].set_xlabel("expert")
        figure.colorbar(plots.USE, ax=axes, shrink=0.8, label="load ÷ mean load", extend="max")
