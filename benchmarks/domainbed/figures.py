"""The pictures of one set: samples, accuracy, confusion, routing."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib import pyplot as plt
from numpy.typing import NDArray
from PIL import Image

from benchmarks.domainbed.grid import held_out_names
from benchmarks.domainbed.jobs import validation_job
from benchmarks.domainbed.outcomes import DomainOutcomes
from benchmarks.harness.base.errors import DataError
from benchmarks.harness.planning.runs import Run
from benchmarks.harness.reporting.plots import STYLE, USE, Panel, over_mean, placeholder_figure, save, score_panels
from benchmarks.harness.results.information import mutual_information
from benchmarks.harness.results.records import read_metrics

_SELECTION = "training"
_SHARE = mpl.cm.ScalarMappable(mpl.colors.Normalize(0, 1), "Blues")
_NO_SINGLE = "no run holds out one environment alone"
_FEW = 12  # as many names stand beside an axis


def draw_accuracy(outcomes: DomainOutcomes, name: str, path: Path) -> None:
    """Accuracy by method, a panel a held-out environment, under training-domain validation."""
    cells = outcomes.cells[(outcomes.cells["set"] == name) & (outcomes.cells["selection"] == _SELECTION)]
    if cells.empty:
        placeholder_figure(path, _NO_SINGLE)
        return
    panels = [
        [
            Panel(f"{outcomes.title('model', model)}\n{outcomes.title('set', name)}, {env} held out", rows)
            for env, rows in of_model.groupby("env", sort=False)
        ]
        for model, of_model in cells.groupby("model", sort=False)
    ]
    score_panels(outcomes, panels, path, "Accuracy (%); diamonds: mean over trials, dots: trials")


def draw_samples(outcomes: DomainOutcomes, name: str, path: Path) -> None:
    """The grid that the validation of the set made, with the environments' names beside it.

    Raises:
        DataError: that picture is not there.
    """
    job = next(validation_job(run.spec) for run in outcomes.runs if run.spec["task"]["name"] == name)
    picture = Path(job.picture)
    if not picture.exists():
        raise DataError(f"{picture} does not exist; get it with `snakemake --cores 1 {picture}`")
    grid = np.asarray(Image.open(picture))
    labels: list[str] = json.loads(Path(job.file).read_text())["samples"]
    with mpl.rc_context({**STYLE, "axes.grid": False}):
        width = 6.0
        figure, axis = plt.subplots(figsize=(width, width * grid.shape[0] / grid.shape[1]), layout="constrained")
        axis.imshow(grid)
        step = grid.shape[0] / len(labels)
        axis.set_yticks([(row + 0.5) * step for row in range(len(labels))], labels)
        axis.set_xticks([])
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
        save(figure, path)


def draw_confusion(outcomes: DomainOutcomes, name: str, path: Path) -> None:
    """Confusion on the held-out environment: a row a model and environment, a column a method; the first trial of each."""
    rows = _first_runs(outcomes, name)
    if not rows:
        placeholder_figure(path, _NO_SINGLE)
        return
    methods = [method for method in outcomes.methods if any(method in found for _, _, found in rows)]
    classes: list[str] = read_metrics(next(iter(rows[0][2].values())))["classes"]
    with mpl.rc_context({**STYLE, "axes.grid": False, "font.size": 7}):
        figure, axes = plt.subplots(
            len(rows),
            len(methods),
            figsize=(1.7 * len(methods) + 1.2, 1.7 * len(rows) + 0.5),
            squeeze=False,
            sharex=True,
            sharey=True,
            layout="constrained",
        )
        for axis_row, (model, env, found) in zip(axes, rows, strict=True):
            for axis, method in zip(axis_row, methods, strict=True):
                if method not in found:
                    axis.set_visible(False)
                    continue
                counts = np.array(read_metrics(found[method])["confusion"][env])
                shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
                axis.imshow(shares, norm=_SHARE.norm, cmap=_SHARE.cmap)
                accuracy = np.trace(counts) / max(counts.sum(), 1)
                axis.set_title(
                    f"{outcomes.title('method', method)}\n{env} held out: {accuracy * 100:.0f} %", fontsize=7
                )
                beside = _few(classes, _FEW)
                axis.set_xticks(range(len(beside)), beside, rotation=90)
                axis.set_yticks(range(len(beside)), beside)
            axis_row[0].set_ylabel(f"{textwrap.fill(outcomes.title('model', model), 24)}\ntrue class")
        for axis in axes[-1]:
            axis.set_xlabel("predicted class")
        figure.colorbar(_SHARE, ax=axes, shrink=0.6, label="share of the class")
        save(figure, path)


def draw_routing(outcomes: DomainOutcomes, name: str, path: Path) -> None:
    """Which experts the images of each class and of each environment use, by method and layer; first environment, first trial."""
    rows = _first_runs(outcomes, name)
    if not rows:
        placeholder_figure(path, _NO_SINGLE)
        return
    model, env, runs = rows[0]
    found = {method: read_metrics(run) for method, run in runs.items()}
    shown = [
        (method, layer, np.array(loads), metrics["routing"]["chance"][layer])
        for method, metrics in found.items()
        for layer, loads in sorted(metrics["routing"].get("loads", {}).items(), key=lambda one: int(one[0]))
    ]
    if not shown:
        placeholder_figure(path, "no method of these runs routes")
        return
    env_names = outcomes.environments(name)
    classes: list[str] = next(iter(found.values()))["classes"]
    heights = [min(len(classes), 20), len(env_names)]
    with mpl.rc_context({**STYLE, "axes.grid": False, "font.size": 7}):
        figure, axes = plt.subplots(
            2,
            len(shown),
            figsize=(1.9 * len(shown) + 1.6, 0.17 * sum(heights) + 1.9),
            squeeze=False,
            height_ratios=heights,
            layout="constrained",
        )
        for column, (method, layer, loads, chance) in enumerate(shown):
            for axis, counts, labels in (
                (axes[0, column], loads.sum(0), classes),
                (axes[1, column], loads.sum(1), env_names),
            ):
                axis.imshow(_relative(counts), norm=USE.norm, cmap=USE.cmap, aspect="auto")
                beside = _few(labels, 2 * _FEW) if column == 0 else []
                axis.set_yticks(range(len(beside)), beside)
                axis.set_xticks([])
            title = textwrap.fill(f"{outcomes.title('method', method)}, block {layer}", 26)
            axes[0, column].set_title(f"{title}\n{_told('class', loads.sum(0), chance)}", fontsize=7)
            axes[1, column].set_title(_told("environment", loads.sum(1), chance), fontsize=7)
            axes[1, column].set_xlabel(f"{loads.shape[2]} experts")
        axes[0, 0].set_ylabel("class")
        axes[1, 0].set_ylabel("environment")
        figure.colorbar(USE, ax=axes, shrink=0.6, label="use ÷ mean use of the expert", extend="max")
        figure.suptitle(f"{outcomes.title('set', name)}, {outcomes.title('model', model)}, {env} held out", fontsize=8)
        save(figure, path)


def _told(name: str, counts: NDArray[np.int64], chance: Mapping[str, tuple[float, float]]) -> str:
    mean, high = chance[name]
    return f"{name} {mutual_information(counts):.3f} bit\nchance {mean:.3f}, 95 % {high:.3f}"


def _relative(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Each row's share of every expert, over the expert's share in all rows together; 1 where a row is like the others."""
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    return over_mean(shares, shares.mean(0, keepdims=True))


def _first_runs(outcomes: DomainOutcomes, name: str) -> list[tuple[str, str, dict[str, Run]]]:
    """By model and single held-out environment: the first run of every method."""
    found: dict[tuple[str, str], dict[str, Run]] = {}
    for run in outcomes.runs:
        held_out = held_out_names(run.spec)
        if run.spec["task"]["name"] == name and len(held_out) == 1:
            found.setdefault((run.spec["model"]["name"], held_out[0]), {}).setdefault(run.spec["method"]["name"], run)
    order = outcomes.environments(name)
    models = list(dict.fromkeys(model for model, _ in found))
    keys = sorted(found, key=lambda key: (models.index(key[0]), order.index(key[1])))
    return [(model, env, found[model, env]) for model, env in keys]


def _few(names: list[str], most: int) -> list[str]:
    """Names to stand beside an axis; none where there are too many to read."""
    return names if len(names) <= most else []
