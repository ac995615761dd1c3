"""Draw the use of experts by sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from benchmarks.harness.config.methods import CONTROL
from benchmarks.harness.report import plots
from benchmarks.harness.report.common import Outcomes
from benchmarks.harness.report.presentation import Figure, has_random_weights
from benchmarks.text.definition import TaskEntry
from benchmarks.text.outcomes import TextOutcomes

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
        plots.placeholder_figure(path)
        return
    heights = [sum(1 + len(use["classes"]) for use in usage["tasks"].values()) for _, _, usage in panels]
    classes = sum(heights) <= _MOST_LINES
    if not classes:
        heights = [len(usage["tasks"]) for _, _, usage in panels]
    marked = not has_random_weights(outcomes.runs)
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
    for line, (_, _, marks) in enumerate(lines):
        for expert, mark in enumerate(marks or ()):
            if mark:
                axis.plot(expert, line, "^" if mark > 0 else "v", ms=4, color="black", mec="white", mew=0.4)
    if shared := usage["shared"]:  # a line without points would be drawn in the corner of the figure
        axis.plot(shared, [len(lines) - 0.15] * len(shared), "o", ms=2.5, color="black", clip_on=False)


USAGE = Figure(
    draw_usage_by_set,
    "Use of experts by set after training, divided by the expert's mean use, for the first seed. The training set is "
    "first. Triangles mark use above (▲) or below (▼) chance, by shuffled rows at 5 % over the whole panel. Dots mark "
    "shared experts: every set uses them above the average and equally.",
)
