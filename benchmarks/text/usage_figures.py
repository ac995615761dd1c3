"""Which experts each set and class uses, as a map."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import matplotlib as mpl
import numpy as np

from benchmarks.harness.config.methods import CONTROL
from benchmarks.harness.report.common import Outcomes
from benchmarks.harness.report.plots import STYLE, USE, WIDTH, over_mean, panel_grid, placeholder_figure, save
from benchmarks.text.definition import TaskEntry
from benchmarks.text.outcomes import TextOutcomes

_MOST_MARKED = 32  # experts that a panel has room to mark
_MOST_LINES = 40  # of sets and classes
_MOST_PANELS = 3


@dataclass(frozen=True)
class UsagePanel:
    """What one panel shows.

    Attributes:
        title: of the panel.
        told: numbers by the names of metrics.yaml, as :func:`~benchmarks.text.usage.describe_usage` gives them.
        usage: shares and marks, likewise.
    """

    title: str
    told: Mapping[str, float]
    usage: Mapping[str, Any]


def draw_usage_by_set(outcomes: TextOutcomes, path: Path) -> None:
    """A panel a routed method (no controls, three at most) of the first model and training task, of its first seed."""
    found: dict[tuple[str, str], dict[str, UsagePanel]] = {}
    for record, content in outcomes.training:
        if content["usage"] and outcomes.role(record.method) != CONTROL:
            usage, sets = content["usage"], content["usage"]["tasks"]
            in_order = {name: sets[name] for name in dict.fromkeys([record.task, *sets])}
            trained = f"{outcomes.title('model', record.model)}, trained on {outcomes.title('task', record.task)}"
            panel = UsagePanel(
                f"{outcomes.title('method', record.method)}, {trained}",
                content["routing"],
                {**usage, "tasks": in_order},
            )
            found.setdefault((record.model, record.task), {}).setdefault(record.method, panel)
    panels = next(iter(found.values()), {})
    draw_usage(list(panels.values())[:_MOST_PANELS], outcomes, path)


def draw_usage(panels: Sequence[UsagePanel], outcomes: Outcomes, path: Path) -> None:
    """Draw panels below each other: sets, and where there is room their classes, down, experts across."""
    if not panels:
        placeholder_figure(path, "this suite has no experts to show")
        return
    heights = [sum(1 + len(one["classes"]) for one in panel.usage["tasks"].values()) for panel in panels]
    classes = sum(heights) <= _MOST_LINES
    if not classes:
        heights = [len(panel.usage["tasks"]) for panel in panels]
    with mpl.rc_context({**STYLE, "axes.grid": False, "font.size": 7}):
        figure, axes = panel_grid(
            len(panels), 1, (WIDTH, 0.19 * sum(heights) + 0.8 * len(panels) + 0.2), height_ratios=heights
        )
        for axis, panel in zip(axes[:, 0], panels, strict=True):
            _draw(axis, outcomes, panel.usage, classes=classes)
            axis.set_title("\n".join([panel.title, *_told(panel.told)]), fontsize=7.5)
        axes[-1, 0].set_xlabel("experts")
        figure.colorbar(USE, ax=axes, shrink=0.6, label="use ÷ mean use over sets", extend="max")
        save(figure, path)


def _told(found: Mapping[str, float]) -> list[str]:
    """What an expert tells, in a line; nothing where there is no set or class to tell."""
    parts = [
        f"{label} {found[name]:.3f} bit (chance {found[f'{name}_chance']:.3f}, 95 % {found[f'{name}_chance_95']:.3f})"
        for name, label in (("task_information", "set"), ("class_information", "class"))
        if name in found
    ]
    return ["; ".join(parts)] if parts else []


def _draw(axis: Any, outcomes: Outcomes, used: Mapping[str, Any], *, classes: bool) -> None:
    sets = used["tasks"]
    mean = np.mean([one["shares"] for one in sets.values()], axis=0)
    lines, labels, marked = [], [], []
    for name, one in sets.items():
        lines.append(one["shares"])
        labels.append(outcomes.titles["task"].get(name, name))
        marked.append(one["marks"])
        known = cast(TaskEntry, outcomes.benchmark.tasks[name]).labels
        for number, shares in one["classes"].items() if classes else ():
            lines.append(shares)
            labels.append(f"{known[int(number)] if known else number} ")
            marked.append([0] * len(mean))
    axis.imshow(over_mean(np.array(lines), mean), norm=USE.norm, cmap=USE.cmap, aspect="auto")
    axis.set_yticks(range(len(labels)), labels)
    for tick, label in zip(axis.get_yticklabels(), labels, strict=True):
        tick.set_fontweight("normal" if label.endswith(" ") else "bold")
    axis.set_xticks([])
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0)
    if len(mean) <= _MOST_MARKED:
        for line, marks in enumerate(marked):
            for expert, mark in enumerate(marks):
                if mark:
                    axis.plot(expert, line, "^" if mark > 0 else "v", ms=3, color="black", mec="white", mew=0.4)
    if used["shared"]:  # a line without points would take the figure's corner for its place
        axis.plot(used["shared"], [len(labels) - 0.15] * len(used["shared"]), "o", ms=2.5, color="black", clip_on=False)
