"""Draw the figures of one set: samples, accuracy, confusion, routing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image

from benchmarks.domainbed.definition import held_out_names, validation_job
from benchmarks.domainbed.outcomes import DomainOutcomes
from benchmarks.harness.base import DataError
from benchmarks.harness.report import plots
from benchmarks.harness.report.common import our_means
from benchmarks.harness.report.presentation import Figure
from benchmarks.harness.report.style import distinct_styles
from benchmarks.harness.results.records import read_metrics
from benchmarks.harness.results.statistics import mutual_information

_SELECTION = "training"
_SHARE = mpl.cm.ScalarMappable(mpl.colors.Normalize(0, 1), "Blues")
_FEW = 12  # maximum number of classes with axis labels
_COLUMNS = 4
_HIGHEST = 9.5  # inches, of a page


def draw_accuracy(outcomes: DomainOutcomes, name: str, path: Path) -> None:
    """Draw mean accuracies under training-domain validation: a panel per model, a line per held-out environment."""
    cells = outcomes.cells[(outcomes.cells["set"] == name) & (outcomes.cells["selection"] == _SELECTION)]
    cell = ["model", "env", "method"]
    means = our_means(cells.set_index(cell)["value"], cell).rename(columns={"ours": "delta"})
    rows = outcomes.order(means, ["model", "method"]).rename(columns={"model_title": "panel", "method_title": "series"})
    lines = [f"{outcomes.env_title(name, env)} held out" for env in rows["env"]]
    styles = distinct_styles((method, outcomes.style(method)) for method in rows["method"])
    label = f"Accuracy (%), {plots.count_text(rows['n'], 'trials')}; bars: 95 % intervals"
    plots.draw_forest(rows.assign(line=lines, style=rows["method"].map(styles)), path, label, zero=False)


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
    runs = _first_runs(outcomes, name)
    classes: list[str] = read_metrics(runs["run"].iloc[0])["classes"]
    groups = runs.groupby(["model", "method"], observed=True)
    columns = min(_COLUMNS, len(groups))
    lines = -(-len(groups) // columns)
    beside = classes if len(classes) <= _FEW else []
    models = [outcomes.title("model", model) for model in runs["model"].unique()]
    size = (min(1.5 * columns + 0.9, plots.WIDTH), min(1.75 * lines + 0.6, _HIGHEST))
    with plots.panel_figure(path, lines, columns, size, plots.HEATMAP, sharex=True, sharey=True) as (figure, axes):
        for axis, ((model, method), group) in zip(axes.flat, groups, strict=False):
            count = np.sum([read_metrics(row.run)["confusion"][row.env] for row in group.itertuples()], axis=0)
            axis.imshow(count / np.maximum(count.sum(1, keepdims=True), 1), norm=_SHARE.norm, cmap=_SHARE.cmap)
            title = f"{outcomes.title('method', method)}, {plots.count_text([group['trial'].nunique()], 'trials')}"
            title = title if len(models) == 1 else f"{outcomes.title('model', model)}, {title}"
            axis.set_title(plots.wrap_text(title, 1.5, 7), fontsize=7)
            axis.set_xticks(range(len(beside)), beside, rotation=90)
            axis.set_yticks(range(len(beside)), beside)
        envs = ", ".join(outcomes.env_title(name, env) for env in runs.sort_values("model")["env"].unique())
        only = f", {models[0]}" if len(models) == 1 else ""
        title = f"{outcomes.title('set', name)}{only}, held out: {envs}"
        figure.suptitle(plots.wrap_text(title, size[0]), fontsize=8)
        figure.supxlabel("predicted class", fontsize=7)
        figure.supylabel("true class", fontsize=7)
        figure.colorbar(_SHARE, ax=axes, shrink=0.6, label="share of the class")


def draw_routing(outcomes: DomainOutcomes, name: str, path: Path) -> None:
    """Draw the use of experts by class and environment, by method and layer, for the first environment and trial."""
    runs = _first_runs(outcomes, name)
    model, env = runs[["model", "env"]].iloc[0]
    shown = []
    for row in runs[(runs["model"] == model) & (runs["env"] == env)].drop_duplicates("method").itertuples():
        metrics = read_metrics(row.run)
        classes: list[str] = metrics["classes"]
        for layer in sorted(metrics["routing"].get("loads", {}), key=int):
            loads, chance = (metrics["routing"][key][layer] for key in ("loads", "chance"))
            shown.append((f"{outcomes.title('method', row.method)}, block {layer}", np.array(loads), chance))
    if not shown:
        plots.placeholder_figure(path)
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


def _first_runs(outcomes: DomainOutcomes, name: str) -> pd.DataFrame:
    """Return the first run of every trial: ``run`` by ``model``, single held-out ``env``, ``method`` and ``trial``."""
    cell = ["model", "env", "method", "trial"]
    rows = [
        (spec["model"]["name"], held_out_names(spec)[0], spec["method"]["name"], spec["seed"], run)
        for run in outcomes.runs
        if (spec := run.spec)["task"]["name"] == name and len(spec["test_envs"]) == 1
    ]
    runs = pd.DataFrame(rows, columns=[*cell, "run"]).drop_duplicates(cell)
    orders = {"model": runs["model"].unique(), "env": outcomes.environments(name), "method": list(outcomes.methods)}
    ordered = runs.assign(**{key: pd.Categorical(runs[key], order) for key, order in orders.items()})
    return ordered.sort_values(["model", "env"], kind="stable")


SET_FIGURES = {
    "accuracy": Figure(
        draw_accuracy,
        "Accuracy on each held-out environment by method, with training-domain validation: means over trials, with 95 % "
        "intervals. The axis does not start at zero.",
    ),
    "samples": Figure(
        draw_samples,
        "Images of each environment as model inputs, for evaluation and, if images are augmented, below them for "
        "training.",
    ),
    "confusion": Figure(
        draw_confusion,
        "Confusion on the held-out environment, by method. Each row is a true class, as shares of its images, at the "
        "last step of all trials together, on the out splits.",
    ),
    "routing": Figure(
        draw_routing,
        "Use of experts by class (above) and by environment (below): the share of each expert in the choices of their "
        "images, divided by the mean share. The number is the mutual information of expert and class or environment, "
        "in bits, beside its value by chance: the mean and 95 % quantile of 500 shuffles over images.",
    ),
}
