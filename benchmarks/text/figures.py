"""Draw the figures of text benchmarks: scores, and the use of experts by sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import matplotlib as mpl
import numpy as np

from benchmarks.harness.config.methods import CONTROL
from benchmarks.harness.report import plots
from benchmarks.harness.report.common import Outcomes, has_random_weights
from benchmarks.harness.report.presentation import Figure
from benchmarks.text.definition import ID, OOD, TaskEntry
from benchmarks.text.outcomes import PROTOCOLS, TextOutcomes

_DIFFERENCE = mpl.colormaps["PuOr_r"]
_MOST_SETS = 12  # panels of scores; a map of differences replaces more panels


def draw_scores(outcomes: TextOutcomes, path: Path, *, domains: list[str], by_task: bool = False) -> None:
    """Draw the scores under each protocol with runs: a panel per set, or a map of differences for many sets.

    Each selection and model has a line of panels, and with ``by_task`` each training task too.
    """
    seeds = outcomes.seeds
    seeds = seeds[seeds["domain"].isin(domains) & seeds["protocol"].isin(outcomes.run_protocols)]
    sets = ["protocol", "model", "task", "scope"]
    if len(seeds[sets].drop_duplicates()) > _MOST_SETS:
        difference_map(outcomes, path, domains)
        return
    panels = [
        [
            (f"{_model_title(outcomes, protocol, model)}\n{scope}", rows)
            for (protocol, model, _, scope), rows in of_line.groupby(sets, sort=False)
        ]
        for _, of_line in seeds.groupby(sets[: 3 if by_task else 2], sort=False)
    ]
    plots.score_panels(outcomes, panels, path)


def difference_map(outcomes: TextOutcomes, path: Path, domains: list[str]) -> None:
    """Draw paired differences to the baseline as a heatmap ``[methods, sets]``, a panel per model and selection."""
    rows = outcomes.rows[outcomes.rows["domain"].isin(domains) & outcomes.rows["protocol"].isin(outcomes.run_protocols)]
    rows = rows[rows["method"] != outcomes.baseline]
    methods = [name for name in outcomes.methods if name in set(rows["method"])]
    panels = list(rows.groupby(["model", "protocol"], sort=False))
    columns = min(len(outcomes.run_protocols), len(panels))  # a line per model, if all ran under all selections
    lines = -(-len(panels) // columns)
    most = max(1.0, float(rows["delta"].abs().quantile(0.95)) * 100)
    norm = mpl.colors.Normalize(-most, most)
    size = (plots.WIDTH, (0.16 * len(methods) + 0.5) * lines + 1.3)
    with plots.panel_figure(path, lines, columns, size, plots.HEATMAP, sharex=True, sharey=True) as (figure, axes):
        for axis, ((model, protocol), group) in zip(axes.flat, panels, strict=False):
            deltas = group.pivot(index="method", columns="scope", values="delta") * 100
            scopes = rows["scope"].unique()
            axis.imshow(deltas.reindex(index=methods, columns=scopes), norm=norm, cmap=_DIFFERENCE, aspect="auto")
            axis.set_yticks(range(len(methods)), [outcomes.title("method", name) for name in methods])
            axis.set_xticks(range(len(scopes)), scopes, rotation=90)
            axis.set_title(_model_title(outcomes, protocol, model), fontsize=8)
        bar, label = mpl.cm.ScalarMappable(norm, _DIFFERENCE), f"difference to {outcomes.baseline_title} (points)"
        figure.colorbar(bar, ax=axes, orientation="horizontal", shrink=0.5, aspect=40, label=label, extend="both")


def _model_title(outcomes: TextOutcomes, protocol: Any, model: Any) -> str:
    """Return a model's title, with the selection if there are several."""
    selection = "" if len(outcomes.run_protocols) == 1 else f", {PROTOCOLS[protocol]} selection"
    return outcomes.title("model", model) + selection


_MOST_MARKED = 32  # experts in a panel with marks
_MOST_LINES = 40  # lines of sets and classes
_MOST_PANELS = 3
_MARKS = {
    "^": "used more than by chance (shuffled rows, 5 % over the panel)",
    "v": "used less than by chance (shuffled rows, 5 % over the panel)",
    "o": "below a panel: every set uses the expert above the average and equally",
}


# a title, and the numbers and shares of :func:`~benchmarks.text.usage.describe_usage`
UsagePanel = tuple[str, Mapping[str, float], Mapping[str, Any]]


def draw_usage_by_set(outcomes: TextOutcomes, path: Path) -> None:
    """Draw expert use per routed method (without controls, at most three), for the first model, task and seed."""
    panels: dict[str, UsagePanel] = {}
    cell = None
    for record, metrics in outcomes.training():
        if not metrics["usage"] or outcomes.role(record.method) == CONTROL:
            continue
        cell = cell or (record.model, record.task)
        if cell == (record.model, record.task) and record.method not in panels:
            sets = metrics["usage"]["tasks"]
            usage = {**metrics["usage"], "tasks": {record.task: sets[record.task], **sets}}
            title = f"{record.method_title}, {record.model_title}, trained on {record.task_title}"
            panels[record.method] = (title, metrics["routing"], usage)
    draw_usage(list(panels.values())[:_MOST_PANELS], outcomes, path)


def draw_usage(panels: Sequence[UsagePanel], outcomes: Outcomes, path: Path) -> None:
    """Draw expert use as heatmaps below each other: rows are sets (with classes if they fit), columns experts."""
    if not panels:
        plots.placeholder_figure(path, "this suite has no experts to show")
        return
    sets = [usage["tasks"].values() for _, _, usage in panels]
    heights = [sum(1 + len(use["classes"]) for use in uses) for uses in sets]
    classes = sum(heights) <= _MOST_LINES
    marked = not has_random_weights(outcomes.runs)
    if not classes:
        heights = [len(uses) for uses in sets]
    size = (plots.WIDTH, 0.16 * sum(heights) + 0.5 * len(panels) + 0.8)
    with plots.panel_figure(path, len(panels), 1, size, plots.HEATMAP, height_ratios=heights) as (figure, axes):
        for axis, (title, information, usage) in zip(axes[:, 0], panels, strict=True):
            _draw_use(axis, outcomes, usage, classes=classes, marked=marked)
            axis.set_title("\n".join(filter(None, (title, _information_text(information)))), fontsize=7.5)
        axes[-1, 0].set_xlabel("experts")
        if marked:
            for marker, meaning in _MARKS.items():
                axes[0, 0].plot([], [], marker, ms=4, color="black", label=meaning)
            plots.legend_below(figure, axes[:1, 0], 1)
        figure.colorbar(plots.USE, ax=axes, shrink=0.6, label="use ÷ mean use over sets", extend="max")


def _information_text(numbers: Mapping[str, float]) -> str:
    """Format the mutual information of experts with set and class; empty if it was not measured."""
    return "; ".join(
        f"{label} {numbers[name]:.3f} bit (chance {numbers[f'{name}_chance']:.3f}, 95 % "
        f"{numbers[f'{name}_chance_95']:.3f})"
        for name, label in (("task_information", "set"), ("class_information", "class"))
        if name in numbers
    )


def _draw_use(axis: Any, outcomes: Outcomes, usage: Mapping[str, Any], *, classes: bool, marked: bool) -> None:
    sets = usage["tasks"]
    mean = np.mean([use["shares"] for use in sets.values()], axis=0)
    lines: list[tuple[str, list[float], list[int] | None]] = []  # label, shares, and the marks of a set
    for name, use in sets.items():
        lines.append((outcomes.title("task", name), use["shares"], use["marks"]))
        labels = cast(TaskEntry, outcomes.benchmark.tasks[name]).labels
        lines += [(f"{labels[int(number)]} ", shares, None) for number, shares in use["classes"].items() if classes]
    shares = np.array([shares for _, shares, _ in lines])
    plots.show_use(axis, plots.divide_by_mean(shares, mean))
    axis.set_yticks(range(len(lines)), [label for label, _, _ in lines])
    for tick, (_, _, marks) in zip(axis.get_yticklabels(), lines, strict=True):
        tick.set_fontweight("normal" if marks is None else "bold")
    axis.set_xticks([])
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0)
    if not marked:
        return
    for line, (_, _, marks) in enumerate(lines if len(mean) <= _MOST_MARKED else ()):
        for expert, mark in enumerate(marks or ()):
            if mark:
                axis.plot(expert, line, "^" if mark > 0 else "v", ms=4, color="black", mec="white", mew=0.4)
    if shared := usage["shared"]:  # a line without points would be drawn in the corner of the figure
        axis.plot(shared, [len(lines) - 0.15] * len(shared), "o", ms=2.5, color="black", clip_on=False)


FIGURES = {
    "ood": Figure(
        partial(draw_scores, domains=[ID, OOD], by_task=True),
        "Scores by method and evaluation set. Each panel has one training domain and one evaluation domain. The dashed "
        "line is the baseline's mean. All panels share one axis, which does not start at zero.",
    ),
    "scores": Figure(
        partial(draw_scores, domains=[ID]),
        "Scores by method and training task. The dashed line is the baseline's mean. All panels share one axis, which "
        "does not start at zero.",
    ),
    "usage": Figure(
        draw_usage_by_set,
        "Use of experts by set after training, divided by the expert's mean use, for the first seed. The training set "
        "is first. Triangles mark use above (▲) or below (▼) chance, by shuffled rows at 5 % over the whole panel. Dots "
        "mark shared experts: every set uses them above the average and equally.",
    ),
}
