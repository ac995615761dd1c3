"""Draw the figures of one set: samples, accuracy, confusion, routing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import matplotlib as mpl
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks.domainbed.definition import held_out_names, validation_job
from benchmarks.domainbed.outcomes import DomainOutcomes
from benchmarks.harness.base import DataError
from benchmarks.harness.config.runs import Run
from benchmarks.harness.report import plots
from benchmarks.harness.results.records import read_metrics
from benchmarks.harness.results.statistics import mutual_information

_SELECTION = "training"
_SHARE = mpl.cm.ScalarMappable(mpl.colors.Normalize(0, 1), "Blues")
_FEW = 12  # maximum number of classes with axis labels
_COLUMNS = 4
_HIGHEST = 9.5  # inches, of a page


def draw_accuracy(outcomes: DomainOutcomes, name: str, path: Path) -> None:
    """Draw accuracy by method under training-domain validation, a panel per held-out environment."""
    cells = outcomes.cells[(outcomes.cells["set"] == name) & (outcomes.cells["selection"] == _SELECTION)]
    panels = []
    for model, of_model in cells.groupby("model", sort=False):
        title = f"{outcomes.title('model', model)}\n{outcomes.title('set', name)}"
        by_env = of_model.groupby("env", sort=False)
        held_out = [(outcomes.env_title(name, str(env)), rows) for env, rows in by_env]
        panels.append([(f"{title}, {env} held out", rows) for env, rows in held_out])
    plots.score_panels(outcomes, panels, path, "Accuracy (%); large marks: mean over trials, dots below: trials")


def draw_samples(outcomes: DomainOutcomes, name: str, path: Path) -> None:
    """Draw the grid of samples from the set's validation, with the names of environments."""
    job = next(validation_job(run.spec) for run in outcomes.runs if run.spec["task"]["name"] == name)
    picture = Path(job.picture)
    if not picture.exists():
        raise DataError(f"{picture} does not exist; delete {job.file} and a run of the set to make both again")
    grid = np.asarray(Image.open(picture))
    labels: list[str] = json.loads(Path(job.file).read_text())["samples"]
    height, width = grid.shape[:2]
    size = (6.0, 6.0 * height / width)
    with plots.panel_figure(path, 1, 1, size, {**plots.STYLE, "axes.grid": False}) as (_, ((axis,),)):
        axis.imshow(grid)
        middles = (np.arange(len(labels)) + 0.5) * height / len(labels)
        axis.set_yticks(middles, [outcomes.env_title(name, env) for env in labels])
        axis.set_xticks([])
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)


def draw_confusion(outcomes: DomainOutcomes, name: str, path: Path) -> None:
    """Draw confusion matrices of the held-out environments, summed over trials, a panel per model and method."""
    counts: dict[tuple[str, str], NDArray[np.int64]] = {}
    envs: dict[str, None] = {}
    trials: dict[tuple[str, str], set[int]] = {}
    for model, env, runs in _first_runs(outcomes, name):
        envs[outcomes.env_title(name, env)] = None
        for method in (method for method in outcomes.methods if method in runs):
            for run in runs[method]:
                metrics = read_metrics(run)
                classes: list[str] = metrics["classes"]
                counts[model, method] = counts.get((model, method), 0) + np.array(metrics["confusion"][env])
                trials.setdefault((model, method), set()).add(run.spec["seed"])
    columns = min(_COLUMNS, len(counts))
    lines = -(-len(counts) // columns)
    beside = classes if len(classes) <= _FEW else []
    models = list(dict.fromkeys(outcomes.title("model", model) for model, _ in counts))
    size = (min(1.5 * columns + 0.9, plots.WIDTH), min(1.75 * lines + 0.6, _HIGHEST))
    with plots.panel_figure(path, lines, columns, size, plots.HEATMAP, sharex=True, sharey=True) as (figure, axes):
        for axis, ((model, method), count) in zip(axes.flat, counts.items(), strict=False):
            axis.imshow(count / np.maximum(count.sum(1, keepdims=True), 1), norm=_SHARE.norm, cmap=_SHARE.cmap)
            title = f"{outcomes.title('method', method)}, {plots.count_text([len(trials[model, method])], 'trials')}"
            title = title if len(models) == 1 else f"{outcomes.title('model', model)}, {title}"
            axis.set_title(plots.wrap_text(title, 1.5, 7), fontsize=7)
            axis.set_xticks(range(len(beside)), beside, rotation=90)
            axis.set_yticks(range(len(beside)), beside)
        only = f", {models[0]}" if len(models) == 1 else ""
        title = f"{outcomes.title('set', name)}{only}, held out: {', '.join(envs)}"
        figure.suptitle(plots.wrap_text(title, size[0]), fontsize=8)
        figure.supxlabel("predicted class", fontsize=7)
        figure.supylabel("true class", fontsize=7)
        figure.colorbar(_SHARE, ax=axes, shrink=0.6, label="share of the class")


def draw_routing(outcomes: DomainOutcomes, name: str, path: Path) -> None:
    """Draw the use of experts by class and environment, by method and layer, for the first environment and trial."""
    model, env, runs = _first_runs(outcomes, name)[0]
    shown = []
    for method, (run, *_) in runs.items():
        metrics = read_metrics(run)
        classes: list[str] = metrics["classes"]
        for layer in sorted(metrics["routing"].get("loads", {}), key=int):
            loads, chance = (metrics["routing"][key][layer] for key in ("loads", "chance"))
            shown.append((f"{outcomes.title('method', method)}, block {layer}", np.array(loads), chance))
    if not shown:
        plots.placeholder_figure(path, "no method of these runs has experts")
        return
    env_names = [outcomes.env_title(name, other) for other in outcomes.environments(name)]
    heights = [min(len(classes), 20), len(env_names)]
    columns = min(_COLUMNS, len(shown))
    lines = -(-len(shown) // columns)
    size = (min(1.6 * columns + 1.3, plots.WIDTH), (0.14 * sum(heights) + 1.7) * lines + 0.5)
    ratios = heights * lines
    with plots.panel_figure(path, 2 * lines, columns, size, plots.HEATMAP, height_ratios=ratios) as (figure, axes):
        for number, (title, loads, chance) in enumerate(shown):
            line, column = divmod(number, columns)
            above, below = axes[2 * line, column], axes[2 * line + 1, column]
            for axis, counts, labels in ((above, loads.sum(0), classes), (below, loads.sum(1), env_names)):
                shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)  # of a row's choices
                plots.show_use(axis, plots.divide_by_mean(shares, shares.mean(0, keepdims=True)))
                beside = labels if column == 0 and len(labels) <= heights[0] else []
                axis.set_yticks(range(len(beside)), beside)
                axis.set_xticks([])
            by_class = _information("class", loads.sum(0), chance)
            above.set_title(f"{plots.wrap_text(title, 1.4, 7)}\n{by_class}", fontsize=7)
            below.set_title(_information("environment", loads.sum(1), chance), fontsize=7)
            below.set_xlabel(f"{loads.shape[2]} experts")
        figure.colorbar(plots.USE, ax=axes, shrink=0.6, label="use ÷ mean use of the expert", extend="max")
        held_out = outcomes.env_title(name, env)
        title = f"{outcomes.title('set', name)}, {outcomes.title('model', model)}, {held_out} held out, first trial"
        figure.suptitle(plots.wrap_text(title, plots.WIDTH), fontsize=8)


def _information(name: str, counts: NDArray[np.int64], chance: Mapping[str, tuple[float, float]]) -> str:
    mean, high = chance[name]
    return f"{name} {mutual_information(counts):.3f} bit\nchance {mean:.3f}, 95 % {high:.3f}"


def _first_runs(outcomes: DomainOutcomes, name: str) -> list[tuple[str, str, dict[str, list[Run]]]]:
    """Return the first run of every trial of every method, by model and single held-out environment."""
    first: dict[tuple[str, str], dict[str, dict[int, Run]]] = {}
    for run in outcomes.runs:
        held_out = held_out_names(run.spec)
        if run.spec["task"]["name"] == name and len(held_out) == 1:
            trials = first.setdefault((run.spec["model"]["name"], held_out[0]), {})
            trials.setdefault(run.spec["method"]["name"], {}).setdefault(run.spec["seed"], run)
    order = outcomes.environments(name)
    models = list(dict.fromkeys(model for model, _ in first))
    keys = sorted(first, key=lambda key: (models.index(key[0]), order.index(key[1])))
    return [(*key, {method: list(trials.values()) for method, trials in first[key].items()}) for key in keys]
