"""Figures of one set: samples, accuracy, confusion, routing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib import pyplot as plt
from numpy.typing import NDArray
from PIL import Image

from benchmarks.domainbed.definition import held_out_names, validation_job
from benchmarks.domainbed.outcomes import DomainOutcomes
from benchmarks.harness.base import DataError
from benchmarks.harness.config.runs import Run
from benchmarks.harness.report.plots import (
    STYLE,
    USE,
    WIDTH,
    Panel,
    hide_empty,
    over_mean,
    panel_grid,
    placeholder_figure,
    save,
    score_panels,
    wrapped,
)
from benchmarks.harness.results.records import read_metrics
from benchmarks.harness.results.statistics import mutual_information

_SELECTION = "training"
_SHARE = mpl.cm.ScalarMappable(mpl.colors.Normalize(0, 1), "Blues")
_NO_SINGLE = "no run holds out one environment alone"
_FEW = 12  # as many names of classes stand beside an axis
_COLUMNS = 4


def draw_accuracy(outcomes: DomainOutcomes, name: str, path: Path) -> None:
    """Draw accuracy by method, a panel a held-out environment, under training-domain validation."""
    cells = outcomes.cells[(outcomes.cells["set"] == name) & (outcomes.cells["selection"] == _SELECTION)]
    if cells.empty:
        placeholder_figure(path, _NO_SINGLE)
        return
    panels = []
    for model, of_model in cells.groupby("model", sort=False):
        title = f"{outcomes.title('model', model)}\n{outcomes.title('set', name)}"
        by_env = of_model.groupby("env", sort=False)
        panels.append([Panel(f"{title}, {outcomes.env_title(name, str(env))} held out", rows) for env, rows in by_env])
    score_panels(outcomes, panels, path, "Accuracy (%); large marks: mean over trials, dots below: trials")


def draw_samples(outcomes: DomainOutcomes, name: str, path: Path) -> None:
    """Draw the grid that the validation of the set made, with the environments' names beside it.

    Raises:
        DataError: The grid is missing.
    """
    job = next(validation_job(run.spec) for run in outcomes.runs if run.spec["task"]["name"] == name)
    picture = Path(job.picture)
    if not picture.exists():
        raise DataError(f"{picture} does not exist; delete {job.file} and a run of the set, which makes both again")
    grid = np.asarray(Image.open(picture))
    labels: list[str] = json.loads(Path(job.file).read_text())["samples"]
    with mpl.rc_context({**STYLE, "axes.grid": False}):
        width = 6.0
        figure, axis = plt.subplots(figsize=(width, width * grid.shape[0] / grid.shape[1]), layout="constrained")
        axis.imshow(grid)
        step = grid.shape[0] / len(labels)
        axis.set_yticks(
            [(row + 0.5) * step for row in range(len(labels))], [outcomes.env_title(name, env) for env in labels]
        )
        axis.set_xticks([])
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
        save(figure, path)


def draw_confusion(outcomes: DomainOutcomes, name: str, path: Path) -> None:
    """Draw the summed confusion on the held-out environments: a panel a model and method, the first trial of each."""
    rows = _first_runs(outcomes, name)
    if not rows:
        placeholder_figure(path, _NO_SINGLE)
        return
    classes: list[str] = read_metrics(next(iter(rows[0][2].values())))["classes"]
    counts: dict[tuple[str, str], dict[str, NDArray[np.int64]]] = {}
    for model, env, by_method in rows:
        for method in (method for method in outcomes.methods if method in by_method):
            read = np.array(read_metrics(by_method[method])["confusion"][env])
            counts.setdefault((model, method), {})[outcomes.env_title(name, env)] = read
    columns = min(_COLUMNS, len(counts))
    lines = -(-len(counts) // columns)
    beside = classes if len(classes) <= _FEW else []
    models = [outcomes.title("model", model) for model in dict.fromkeys(model for model, _ in counts)]
    with mpl.rc_context({**STYLE, "axes.grid": False, "font.size": 7}):
        figure, axes = panel_grid(
            lines, columns, (min(1.5 * columns + 0.9, WIDTH), 1.75 * lines + 0.5), sharex=True, sharey=True
        )
        for axis, ((model, method), by_env) in zip(axes.flat, counts.items(), strict=False):
            total = sum(by_env.values(), np.zeros((len(classes), len(classes)), dtype=np.int64))
            axis.imshow(total / np.maximum(total.sum(1, keepdims=True), 1), norm=_SHARE.norm, cmap=_SHARE.cmap)
            accuracy = np.trace(total) / max(total.sum(), 1)
            title = f"{outcomes.title('method', method)}: {accuracy * 100:.0f}\u00a0%"
            title = title if len(models) == 1 else f"{outcomes.title('model', model)}, {title}"
            axis.set_title(wrapped(title, 1.5, 7), fontsize=7)
            axis.set_xticks(range(len(beside)), beside, rotation=90)
            axis.set_yticks(range(len(beside)), beside)
        hide_empty(axes)
        envs = ", ".join(dict.fromkeys(env for by_env in counts.values() for env in by_env))
        only = f", {models[0]}" if len(models) == 1 else ""
        figure.suptitle(f"{outcomes.title('set', name)}{only}, held out: {envs}", fontsize=8)
        figure.supxlabel("predicted class", fontsize=7)
        figure.supylabel("true class", fontsize=7)
        figure.colorbar(_SHARE, ax=axes, shrink=0.6, label="share of the class")
        save(figure, path)


def draw_routing(outcomes: DomainOutcomes, name: str, path: Path) -> None:
    """Draw the use of experts by class and environment, by method and layer, for the first environment and trial."""
    rows = _first_runs(outcomes, name)
    if not rows:
        placeholder_figure(path, _NO_SINGLE)
        return
    model, env, runs = rows[0]
    metrics_by_method = {method: read_metrics(run) for method, run in runs.items()}
    shown = [
        (method, layer, np.array(loads), metrics["routing"]["chance"][layer])
        for method, metrics in metrics_by_method.items()
        for layer, loads in sorted(metrics["routing"].get("loads", {}).items(), key=lambda one: int(one[0]))
    ]
    if not shown:
        placeholder_figure(path, "no method of these runs routes")
        return
    env_names = [outcomes.env_title(name, one) for one in outcomes.environments(name)]
    classes: list[str] = next(iter(metrics_by_method.values()))["classes"]
    heights = [min(len(classes), 20), len(env_names)]
    columns = min(_COLUMNS, len(shown))
    lines = -(-len(shown) // columns)
    with mpl.rc_context({**STYLE, "axes.grid": False, "font.size": 7}):
        figure, axes = panel_grid(
            2 * lines,
            columns,
            (min(1.6 * columns + 1.3, WIDTH), (0.14 * sum(heights) + 1.7) * lines + 0.5),
            height_ratios=heights * lines,
        )
        for place, (method, layer, loads, chance) in enumerate(shown):
            above, below = (axes[2 * (place // columns) + half, place % columns] for half in (0, 1))
            for axis, counts, labels in ((above, loads.sum(0), classes), (below, loads.sum(1), env_names)):
                axis.imshow(_relative(counts), norm=USE.norm, cmap=USE.cmap, aspect="auto")
                beside = labels if place % columns == 0 and len(labels) <= heights[0] else []
                axis.set_yticks(range(len(beside)), beside)
                axis.set_xticks([])
            title = wrapped(f"{outcomes.title('method', method)}, block {layer}", 1.4, 7)
            above.set_title(f"{title}\n{_information('class', loads.sum(0), chance)}", fontsize=7)
            below.set_title(_information("environment", loads.sum(1), chance), fontsize=7)
            below.set_xlabel(f"{loads.shape[2]} experts")
        hide_empty(axes)
        figure.colorbar(USE, ax=axes, shrink=0.6, label="use ÷ mean use of the expert", extend="max")
        held_out = outcomes.env_title(name, env)
        title = f"{outcomes.title('set', name)}, {outcomes.title('model', model)}, {held_out} held out"
        figure.suptitle(wrapped(title, WIDTH), fontsize=8)
        save(figure, path)


def _information(name: str, counts: NDArray[np.int64], chance: Mapping[str, tuple[float, float]]) -> str:
    mean, high = chance[name]
    return f"{name} {mutual_information(counts):.3f} bit\nchance {mean:.3f}, 95 % {high:.3f}"


def _relative(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Divide each row's share of every expert by the expert's share in all rows together."""
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    return over_mean(shares, shares.mean(0, keepdims=True))


def _first_runs(outcomes: DomainOutcomes, name: str) -> list[tuple[str, str, dict[str, Run]]]:
    """Return the first run of every method, by model and single held-out environment."""
    first: dict[tuple[str, str], dict[str, Run]] = {}
    for run in outcomes.runs:
        held_out = held_out_names(run.spec)
        if run.spec["task"]["name"] == name and len(held_out) == 1:
            first.setdefault((run.spec["model"]["name"], held_out[0]), {}).setdefault(run.spec["method"]["name"], run)
    order = outcomes.environments(name)
    models = list(dict.fromkeys(model for model, _ in first))
    keys = sorted(first, key=lambda key: (models.index(key[0]), order.index(key[1])))
    return [(model, env, first[model, env]) for model, env in keys]
