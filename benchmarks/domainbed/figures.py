"""Draw the figures of one set: accuracy and routing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.domainbed.outcomes import DomainOutcomes
from benchmarks.harness.config.runs import Run
from benchmarks.harness.report import plots
from benchmarks.harness.report.common import our_means
from benchmarks.harness.report.presentation import Figure
from benchmarks.harness.report.style import distinct_styles
from benchmarks.harness.results.statistics import mutual_information

_SELECTION = "training"
_COLUMNS = 4


def draw_accuracy(outcomes: DomainOutcomes, name: str, path: Path) -> None:
    """Draw mean accuracies under training-domain validation: a panel per model, a line per held-out environment."""
    cells = outcomes.cells[
        (outcomes.cells["task"] == name) & (outcomes.cells["selection"] == _SELECTION)
    ]
    cell = ["model", "eval_task", "method"]
    rows = outcomes.order(our_means(cells.set_index(cell)["value"], cell), ["model", "method"])
    styles = distinct_styles((method, outcomes.style(method)) for method in rows["method"])
    drawn = rows.assign(
        panel=rows["model_title"],
        line=[f"{outcomes.env_title(name, env)} held out" for env in rows["eval_task"]],
        series=rows["method_title"],
        style=rows["method"].map(styles),
        delta=rows["ours"],
    )
    label = f"Accuracy (%), {plots.count_text(rows['n'], 'trials')}; bars: 95 % intervals"
    plots.draw_forest(drawn, path, label, zero=False)


def draw_routing(outcomes: DomainOutcomes, name: str, path: Path) -> None:
    """Draw the use of experts by class and environment, by method and layer, for the first environment and trial."""
    model, env, runs = _first_runs(outcomes, name)
    panels = []
    for method, run in runs.items():
        metrics = outcomes.finished[run.id].metrics
        classes = metrics.classes or []
        if metrics.routing:
            for layer in sorted(metrics.routing.loads, key=int):
                title = f"{outcomes.title('method', method)}, block {layer}"
                panels.append(
                    (title, np.array(metrics.routing.loads[layer]), metrics.routing.chance[layer])
                )
    if not panels:
        plots.placeholder_figure(path)
        return
    env_names = [outcomes.env_title(name, other) for other in outcomes.environments(name)]
    heights = [min(len(classes), 20), len(env_names)]
    columns = min(_COLUMNS, len(panels))
    lines = -(-len(panels) // columns)
    size = (min(1.6 * columns + 1.3, plots.WIDTH), (0.14 * sum(heights) + 1.7) * lines + 0.5)
    ratios = heights * lines
    with plots.panel_figure(
        path, 2 * lines, columns, size, plots.HEATMAP, height_ratios=ratios
    ) as (figure, axes):
        for number, (title, loads, chance) in enumerate(panels):
            line, column = divmod(number, columns)
            above, below = axes[2 * line, column], axes[2 * line + 1, column]
            for axis, counts, labels in (
                (above, loads.sum(0), classes),
                (below, loads.sum(1), env_names),
            ):
                shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)  # of a row's choices
                plots.show_use(axis, plots.divide_by_mean(shares, shares.mean(0, keepdims=True)))
                beside = labels if column == 0 and len(labels) <= heights[0] else []
                axis.set_yticks(range(len(beside)), beside)
                axis.set_xticks([])
            by_class = _information("class", loads.sum(0), chance.by_class)
            above.set_title(f"{plots.wrap_text(title, 1.4, 7)}\n{by_class}", fontsize=7)
            below.set_title(
                _information("environment", loads.sum(1), chance.environment), fontsize=7
            )
            below.set_xlabel(f"{loads.shape[2]} experts")
        figure.colorbar(
            plots.USE, ax=axes, shrink=0.6, label="use ÷ mean use of the expert", extend="max"
        )
        title = f"{outcomes.title('task', name)}, {outcomes.title('model', model)}, {env_names[env]} held out, first trial"
        figure.suptitle(plots.wrap_text(title, plots.WIDTH), fontsize=8)


def _information(name: str, counts: NDArray[np.int64], chance: list[float]) -> str:
    mean, high = chance
    return f"{name} {mutual_information(counts):.3f} bit\nchance {mean:.3f}, 95 % {high:.3f}"


def _first_runs(outcomes: DomainOutcomes, name: str) -> tuple[str, int, dict[str, Run]]:
    """Return a set's first model, first environment that is held out alone, and first run by method."""
    alone = [run for run in outcomes.runs if run.task == name and len(run.spec["test_envs"]) == 1]
    model = alone[0].model
    of_model = [run for run in alone if run.model == model]
    env = min(run.spec["test_envs"][0] for run in of_model)
    first: dict[str, Run] = {}
    for run in of_model:
        if run.spec["test_envs"] == [env]:
            first.setdefault(run.method, run)
    return model, env, first


SET_FIGURES = {
    "accuracy": Figure(
        draw_accuracy,
        "Accuracy on each held-out environment by method, with training-domain validation: means over trials, with 95 % "
        "intervals. The axis does not start at zero.",
    ),
    "routing": Figure(
        draw_routing,
        "Use of experts by class (above) and by environment (below): the share of each expert in the choices of their "
        "images, divided by the mean share. The number is the mutual information of expert and class or environment, "
        "in bits, beside its value by chance: the mean and 95 % quantile of 500 shuffles over images.",
    ),
}
