"""Draw the figures of one image set: accuracy and routing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from benchmarks.domainbed.outcomes import DomainOutcomes
from benchmarks.harness.config.runs import Run
from benchmarks.harness.report import plots
from benchmarks.harness.report.common import our_means
from benchmarks.harness.report.presentation import Figure
from benchmarks.harness.report.style import distinct_styles
from benchmarks.harness.results.content import Chance
from benchmarks.harness.results.statistics import mutual_information

_SELECTION = "training"  # the selection that is drawn: training-domain validation
_COLUMNS = (4, 3)  # how many panels may be beside each other
_MOST_LABELS = 20  # most classes that are named
_PANEL_WIDTH = 1.4  # inches
_CHANCE = "bit: mutual information with the expert; chance: mean and 95 % quantile, images shuffled"


def draw_accuracy(outcomes: DomainOutcomes, name: str, path: Path) -> None:
    """Draw the mean accuracies of one image set under training-domain validation.

    There is a panel for each model, and a line for each held-out environment. The figure is a
    placeholder if no run holds out one environment alone.
    """
    is_of_set = outcomes.cells["task"] == name
    is_selected = outcomes.cells["selection"] == _SELECTION
    cells = outcomes.cells[is_of_set & is_selected]
    if cells.empty:
        plots.placeholder_figure(path)
        return
    # one mean over trials for each combination of model, environment and method
    mark = ["model", "eval_task", "method"]
    means = our_means(cells.set_index(mark)["value"], mark)
    rows = outcomes.order(means, ["model", "method"])
    styles = distinct_styles((method, outcomes.style(method)) for method in rows["method"])
    lines = [f"{outcomes.env_title(name, env)} held out" for env in rows["eval_task"]]
    # the columns that draw_forest reads; it draws ``delta``, which usually is a difference
    drawn = rows.assign(
        panel=rows["model_title"],
        line=lines,
        series=rows["method_title"],
        style=rows["method"].map(styles),
        delta=rows["ours"],
    )
    label = f"Accuracy (%), {plots.sample_text(drawn, 'trials')}"
    plots.draw_forest(drawn, path, label, zero=False)


class _Panel(NamedTuple):
    """The use of experts in one layer of one run."""

    title: str
    loads: NDArray[np.int64]
    """The choices of experts, ``[environments, classes, experts]``."""
    chance: Chance


class _FirstRuns(NamedTuple):
    """The runs whose routing is drawn: one of each method."""

    model: str
    """The name of the model of all runs."""
    env: int
    """The number of the environment that all runs hold out."""
    by_method: dict[str, Run]
    """The runs, by name of the method."""


def draw_routing(outcomes: DomainOutcomes, name: str, path: Path) -> None:
    """Draw the use of experts by class and by environment of one image set.

    There is a panel for each method and converted layer. It shows the first trial of the first
    model with the first held-out environment. A panel has two heatmaps, one above the other. The
    figure is a placeholder if none of these runs has experts.
    """
    first = _first_runs(outcomes, name)
    if first is None:
        plots.placeholder_figure(path)
        return
    panels, classes = _routing_panels(outcomes, first)
    if not panels:
        plots.placeholder_figure(path)
        return
    env_titles = [outcomes.env_title(name, env) for env in outcomes.environments(name)]
    title = (
        f"{outcomes.title('task', name)}, {outcomes.title('model', first.model)}, "
        f"{env_titles[first.env]} held out, first trial"
    )
    _draw_panels(path, title, panels, classes, env_titles)


def _draw_panels(
    path: Path,
    title: str,
    panels: Sequence[_Panel],
    classes: Sequence[str],
    env_titles: Sequence[str],
) -> None:
    """Draw a panel of two heatmaps for each element of ``panels``, and save the figure.

    Args:
        path: The path of the figure, without ending.
        title: The title of the figure.
        panels: The content of the panels.
        classes: The names of the classes.
        env_titles: The titles of the environments.
    """
    # the heights of the two heatmaps in lines of text: many classes get less than a line each
    heights = [min(len(classes), _MOST_LABELS), len(env_titles)]
    columns = _count_columns(len(panels))
    lines_of_panels = math.ceil(len(panels) / columns)
    # in inches: a column of panels has a width of 1.6, and a line of text a height of 0.14; the
    # other numbers are room for the titles and the colour bar
    width = min(1.6 * columns + 1.3, plots.WIDTH)
    height_of_panel = 0.14 * sum(heights) + 1.7
    size = (width, height_of_panel * lines_of_panels + 0.5)
    figure_of_panels = plots.panel_figure(
        path,
        2 * lines_of_panels,
        columns,
        size,
        plots.HEATMAP,
        height_ratios=heights * lines_of_panels,
    )
    with figure_of_panels as (figure, axes):
        for number, panel in enumerate(panels):
            line, column = divmod(number, columns)
            by_class = axes[2 * line, column]
            by_environment = axes[2 * line + 1, column]
            # sums over environments, and over classes
            _draw_use(by_class, panel.loads.sum(0))
            _draw_use(by_environment, panel.loads.sum(1))
            _label_panel(by_class, by_environment, panel)
            # only the left panels name classes and environments
            if column == 0:
                by_environment.set_yticks(range(len(env_titles)), env_titles)
            if column == 0 and len(classes) <= _MOST_LABELS:
                by_class.set_yticks(range(len(classes)), classes)
        figure.colorbar(
            plots.USE, ax=axes, shrink=0.6, label="use ÷ mean use of the expert", extend="max"
        )
        lines = [plots.wrap_text(title, width), plots.wrap_text(_CHANCE, width)]
        figure.suptitle("\n".join(lines), fontsize=8)


def _count_columns(num_panels: int) -> int:
    """Return how many panels are beside each other, so that the last line is as full as possible.

    Five panels are in lines of three and two, not of four and one.
    """

    def fill_of_last_line(columns: int) -> float:
        in_last_line = num_panels % columns or columns
        return in_last_line / columns

    most = max(_COLUMNS)
    if num_panels <= most:
        return num_panels
    # the largest of equally good numbers, because it needs fewer lines
    return max(_COLUMNS, key=fill_of_last_line)


def _first_runs(outcomes: DomainOutcomes, name: str) -> _FirstRuns | None:
    """Return the first run of each method on an image set.

    Only runs of the first model that hold out one environment alone are considered. All returned
    runs hold out the same environment: the one with the lowest number. The result is None if there
    is no such run.
    """
    # runs that hold out one environment alone, with its number
    alone: list[tuple[Run, int]] = []
    for run in outcomes.runs:
        test_envs = outcomes.specs[run.id].test_envs
        if run.task == name and len(test_envs) == 1:
            (env,) = test_envs
            alone.append((run, env))
    if not alone:
        return None
    # the first in the order of the grid
    first_run, _ = alone[0]
    model = first_run.model
    first_env = min(env for run, env in alone if run.model == model)
    by_method: dict[str, Run] = {}
    for run, env in alone:
        if run.model == model and env == first_env:
            by_method.setdefault(run.method, run)  # keeps the first run
    return _FirstRuns(model, first_env, by_method)


def _routing_panels(
    outcomes: DomainOutcomes, first: _FirstRuns
) -> tuple[list[_Panel], Sequence[str]]:
    """Return a panel for each method and converted layer, and the names of the classes.

    Dense models have no panel.
    """
    panels = []
    classes: Sequence[str] = []
    for method, run in first.by_method.items():
        metrics = outcomes.finished[run.id].metrics
        # all runs are on one image set, so they have the same classes
        classes = metrics.classes or []
        # needed only by mypy: the loads of a dense model are empty
        if metrics.routing is None:
            continue
        # layers are texts, because they are keys of a JSON object
        for layer in sorted(metrics.routing.loads, key=int):
            title = f"{outcomes.title('method', method)}, block {layer}"
            loads = np.array(metrics.routing.loads[layer])
            panels.append(_Panel(title, loads, metrics.routing.chance[layer]))
    return panels, classes


def _draw_use(axis: Any, counts: NDArray[np.int64]) -> None:
    """Draw a heatmap of expert choices without labels.

    ``counts`` is ``[classes or environments, experts]``. The colour shows the share of an expert in
    the choices of a class (or environment), divided by the mean of the expert's shares.
    """
    # at least 1, so that a class without choices has shares of 0
    num_choices = np.maximum(counts.sum(1, keepdims=True), 1)
    shares = counts / num_choices
    mean_shares = shares.mean(0, keepdims=True)
    plots.show_use(axis, plots.divide_by_mean(shares, mean_shares))
    axis.set_xticks([])
    axis.set_yticks([])


def _label_panel(by_class: Any, by_environment: Any, panel: _Panel) -> None:
    """Write a panel's title, the mutual information of both heatmaps, and the experts' numbers."""
    loads = panel.loads
    _, _, num_experts = loads.shape
    title = plots.wrap_text(panel.title, _PANEL_WIDTH, 7)
    # sums over environments, and over classes
    class_text = _information("class", loads.sum(0), panel.chance.by_class)
    env_text = _information("environment", loads.sum(1), panel.chance.environment)
    by_class.set_title(f"{title}\n{class_text}", fontsize=7)
    by_environment.set_title(env_text, fontsize=7)
    plots.number_experts(by_environment, num_experts, _PANEL_WIDTH)


def _information(name: str, counts: NDArray[np.int64], chance: list[float]) -> str:
    """Describe the mutual information of experts and a kind of label, beside its value by chance.

    Args:
        name: ``class`` or ``environment``.
        counts: The choices ``[classes or environments, experts]``.
        chance: The mean and the 95 % quantile of the information by chance.
    """
    mean, high = chance
    bits = mutual_information(counts)
    return f"{name} {bits:.3f} bit\nchance {mean:.3f}, 95 % {high:.3f}"


SET_FIGURES = {
    "accuracy": Figure(
        draw_accuracy,
        "Accuracy on each held-out environment by method, with training-domain validation: means "
        "over trials, with 95 % intervals from three trials on. The axis does not start at zero.",
    ),
    "routing": Figure(
        draw_routing,
        "Use of experts by class (above) and by environment (below): the share of each expert in "
        "the choices of their images, divided by the mean share. The number is the mutual "
        "information of expert and class or environment, in bits, beside its value by chance: the "
        "mean and 95 % quantile of 500 shuffles over images.",
    ),
}
