"""Draw the figures of one image set: accuracy, curves over steps, and routing."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from benchmarks.domainbed.outcomes import DomainOutcomes
from benchmarks.harness.config.runs import Run
from benchmarks.harness.report import plots
from benchmarks.harness.report.common import our_means
from benchmarks.harness.report.presentation import Figure
from benchmarks.harness.report.style import MethodStyle, distinct_styles
from benchmarks.harness.results.content import Chance, StepRecord
from benchmarks.harness.results.statistics import (
    PERMUTATIONS,
    mutual_information,
    paired_differences,
    shared_pairs,
)

_SELECTION = "training"  # the selection that is drawn: training-domain validation
_COLUMNS = (4, 3)  # how many panels may be beside each other, the largest number first
_MOST_LABELS = 20  # most classes that are named
_PANEL_WIDTH = 1.4  # inches of a panel without its margin
# inches, in the figure of routing
_COLUMN_WIDTH = 1.6  # a panel with its margin
_SIDE_WIDTH = 1.3  # the names on the left, and the colour bar
_TEXT_HEIGHT = 0.14  # a line of text
_PANEL_TITLES_HEIGHT = 1.7  # the titles of two heatmaps, and the experts' numbers
_FIGURE_TITLE_HEIGHT = 0.5
_CHANCE = "bit: mutual information with the expert; chance: mean and 95 % quantile, images shuffled"
_MOST_STEPS = 6  # most steps with differences to the baseline
_MOST_TICKS = 7  # most numbers below a panel of curves
_MARKS_GAP = 0.06  # between the marks of two methods, as a part of the space between two steps
_STEPS_HEIGHT = 1.5  # inches of a panel of curves


def draw_accuracy(outcomes: DomainOutcomes, data_set: str, path: Path) -> None:
    """Draw the mean accuracies of one image set under training-domain validation.

    There is a panel for each model, and a line for each held-out environment. The figure is a
    placeholder if no run holds out one environment alone.
    """
    is_of_set = outcomes.cells["task"] == data_set
    is_selected = outcomes.cells["selection"] == _SELECTION
    cells = outcomes.cells[is_of_set & is_selected]
    if cells.empty:
        plots.placeholder_figure(path)
        return
    # one mean over trials for each combination of model, environment and method
    keys_of_mark = ["model", "eval_task", "method"]
    accuracies = cells.set_index(keys_of_mark)["value"]
    means = our_means(accuracies, keys_of_mark)
    rows = outcomes.order(means, ["model", "method"])
    style_of_method = {method: outcomes.style(method) for method in rows["method"]}
    # methods with the same style get different dashes and markers
    styles = distinct_styles(style_of_method.items())
    lines = [f"{outcomes.env_title(data_set, env_name)} held out" for env_name in rows["eval_task"]]
    # the columns that draw_forest reads; ``delta`` usually is a difference, here an accuracy
    drawn = rows.assign(
        panel=rows["model_title"],
        line=lines,
        series=rows["method_title"],
        style=rows["method"].map(styles),
        delta=rows["ours"],
    )
    label = f"Accuracy (%), {plots.sample_text(drawn, 'trials')}"
    plots.draw_forest(drawn, path, label, zero=False)


# the drawn quantities of a run at a step
_LOSS = "loss"
_IN_DOMAIN = "in_domain"
_HELD_OUT = "held_out"


class _StepRow(NamedTuple):
    """One row of panels in the figure over steps."""

    quantity: str
    """The name of the drawn quantity."""
    label: str
    """The label of the vertical axis."""
    scale: float
    """The factor from the recorded value to the drawn one."""
    is_difference: bool
    """True to draw differences to the baseline."""


_STEP_ROWS = (
    _StepRow(_LOSS, "training loss", scale=1, is_difference=False),
    _StepRow(_LOSS, "Δ training loss", scale=1, is_difference=True),
    _StepRow(_IN_DOMAIN, "accuracy in domain (%)", scale=100, is_difference=False),
    _StepRow(_HELD_OUT, "held-out accuracy (%)", scale=100, is_difference=False),
    _StepRow(_HELD_OUT, "Δ held-out accuracy (points)", scale=100, is_difference=True),
)


def step_values(outcomes: DomainOutcomes, data_set: str) -> pd.DataFrame:
    """Collect the loss and the accuracies of the runs on an image set at each evaluated step.

    Only runs that hold out one environment alone are used. If a method has several settings, each
    environment and trial has the run that training-domain validation chooses.

    Returns:
        A row for each run, step and ``quantity``, with titles and these columns:

        - ``model``, ``method`` and ``run_id``
        - ``environment`` (the held-out one), ``trial``, and ``pair`` (environment and trial as one
          text)
        - ``step``: the number of the last update before the evaluation, counted from 0
        - ``quantity`` and ``value``: ``loss`` is the mean training loss since the evaluation
          before. ``in_domain`` is the mean accuracy on the *out* splits of the training
          environments. ``held_out`` is the accuracy on the *in* split of the held-out environment.
          The loss is nan if the model diverged.
    """
    rows = []
    for run, env in _chosen_runs(outcomes, data_set):
        env_name = outcomes.environments(data_set)[env]
        evaluated_steps = outcomes.finished[run.id].metrics.records or ()
        for record in evaluated_steps:
            values_at_step = _values_at_step(record, env)
            for quantity, value in values_at_step.items():
                row = {
                    "model": run.model,
                    "method": run.method,
                    "run_id": run.id,
                    "environment": env_name,
                    "seed": run.seed,
                    "pair": f"{env_name}, trial {run.seed}",
                    "step": record.step,
                    "quantity": quantity,
                    "value": value,
                }
                rows.append(row)
    # named, so that they exist even without rows
    columns = [
        "model",
        "method",
        "run_id",
        "environment",
        "seed",
        "pair",
        "step",
        "quantity",
        "value",
    ]
    values = pd.DataFrame(rows, columns=columns).astype({"value": float})
    return outcomes.order(values, ["model", "method"])


class _RunKey(NamedTuple):
    """What identifies a run on an image set, among the runs that hold out one environment."""

    model: str
    method: str
    variant: str
    env_name: str
    seed: int
    hparams_seed: int


class _SingleRun(NamedTuple):
    """A run that holds out one environment alone, and the number of this environment."""

    run: Run
    env: int


def _chosen_runs(outcomes: DomainOutcomes, data_set: str) -> Iterator[_SingleRun]:
    """Yield the runs on an image set that training-domain validation chooses.

    It chooses among the runs that hold out one environment alone.
    """
    is_of_set = outcomes.cells["task"] == data_set
    is_selected = outcomes.cells["selection"] == _SELECTION
    # cells have no run ids, so their runs are found by what identifies a run
    chosen_keys = set()
    for cell in outcomes.cells[is_of_set & is_selected].itertuples():
        chosen_key = _RunKey(
            model=cell.model,
            method=cell.method,
            variant=cell.variant,
            env_name=cell.eval_task,
            seed=cell.seed,
            hparams_seed=cell.hparams_seed,
        )
        chosen_keys.add(chosen_key)
    for single in _single_runs(outcomes, data_set):
        run = single.run
        key = _RunKey(
            model=run.model,
            method=run.method,
            variant=run.method_variant,
            env_name=outcomes.environments(data_set)[single.env],
            seed=run.seed,
            hparams_seed=outcomes.specs[run.id].hparams_seed,
        )
        if key in chosen_keys:
            yield single


def _values_at_step(record: StepRecord, env: int) -> dict[str, float]:
    """Return the value of each drawn quantity. ``env`` is the held-out environment."""
    accuracies = record.numbers()
    in_domain = []
    for key, accuracy in accuracies.items():
        if key.endswith("_out_acc") and key != f"env{env}_out_acc":
            in_domain.append(accuracy)
    loss = record.loss
    if loss is None:  # the model diverged
        loss = math.nan
    return {
        _LOSS: loss,
        _IN_DOMAIN: float(np.mean(in_domain)),
        _HELD_OUT: accuracies[f"env{env}_in_acc"],
    }


def step_differences(outcomes: DomainOutcomes, values: pd.DataFrame) -> pd.DataFrame:
    """Compare each method with the baseline at each step, except the first.

    The difference of a trial is the mean over its held-out environments that both methods have. The
    trials are the pairs, because the runs of a trial share images. The first step is one update,
    where methods barely differ.

    Args:
        outcomes: The results.
        values: The rows of :func:`step_values`.

    Returns:
        A row for each ``model``, ``quantity``, ``method`` and ``step``, with titles: the mean
        difference ``delta``, its 95 % interval from ``low`` to ``high``, and the count ``n`` of
        trials. The difference of the loss is nan if one of the models has diverged.
    """
    after_first = values[values["step"] > values["step"].min()]
    cell = ["model", "quantity", "method", "step"]
    differences = paired_differences(
        after_first[[*cell, "environment", "seed", "value"]],
        cell_columns=cell,
        reference={"method": outcomes.baseline},
        pair="seed",
    )
    # no figure shows the column ``values``, which counts runs
    return outcomes.order(differences.drop(columns=["p", "values"]), cell)


def draw_steps(outcomes: DomainOutcomes, data_set: str, path: Path) -> None:
    """Draw the training loss and the accuracies on one image set over the steps of the training.

    There is a column of panels for each model, and a line for each method. Lines are means over the
    pairs of held-out environment and trial that all methods of the model have. Two rows of panels
    show differences to the baseline with intervals, over all trials that a method shares with it. A
    model is left out if its runs have fewer than two evaluations after the first. The figure is a
    placeholder if there is nothing to draw.
    """
    values = step_values(outcomes, data_set)
    # transform gives each row the number of evaluated steps of its model
    num_steps_of_model = values.groupby("model")["step"].transform("nunique")
    # a line needs two steps besides the first, which has no differences
    drawn = values[num_steps_of_model > 2]
    # the values of the pairs that all methods have; empty if the suite has no such pair yet
    shared_values = shared_pairs(drawn, within=["model"], compared=["method"], pair="pair")
    # empty without the baseline
    differences = step_differences(outcomes, drawn)

    # rows of panels without any values are left out
    panel_rows = []
    for panel_row in _STEP_ROWS:
        panel_values = differences if panel_row.is_difference else shared_values
        if not panel_values.empty:
            panel_rows.append(panel_row)
    if not panel_rows:
        plots.placeholder_figure(path)
        return

    labels = [panel_row.label for panel_row in panel_rows]
    models = list(drawn["model_title"].unique())
    styles = outcomes.styles_by_title(drawn)
    with plots.curve_figure(path, models, labels, _STEPS_HEIGHT) as axes:
        for column, model in enumerate(models):
            values_of_model = shared_values[shared_values["model_title"] == model]
            differences_of_model = differences[differences["model_title"] == model]
            _draw_model(axes[:, column], panel_rows, values_of_model, differences_of_model, styles)
            label = _steps_label(outcomes, values_of_model, differences_of_model)
            plots.label_steps(axes[-1, column], label, _MOST_TICKS)


def _draw_model(
    axes: Sequence[Any],
    rows: Sequence[_StepRow],
    values: pd.DataFrame,
    differences: pd.DataFrame,
    styles: Mapping[str, MethodStyle],
) -> None:
    """Draw the column of panels of one model.

    Args:
        axes: The axes of the panels.
        rows: What each panel shows.
        values: The model's rows of :func:`step_values`, of the pairs that all methods have.
        differences: The model's rows of :func:`step_differences`.
        styles: The style of each method, by title.
    """
    for axis, row in zip(axes, rows, strict=True):
        if row.is_difference:
            points = differences[differences["quantity"] == row.quantity]
            _draw_differences(axis, points, styles, row.scale)
        else:
            points = values[values["quantity"] == row.quantity]
            scaled = points.assign(value=points["value"] * row.scale)
            plots.draw_means(axis, scaled, styles)


def _steps_label(outcomes: DomainOutcomes, values: pd.DataFrame, differences: pd.DataFrame) -> str:
    """Return the label of the steps of one model, with the counts of trials and the intervals."""
    lines = ["step"]
    if not values.empty:
        num_trials = values.groupby("method")["seed"].nunique()
        lines.append(f"lines without Δ: {plots.count_text(num_trials, 'trials')}")
    # a model that diverged has no loss, so its difference is not drawn
    drawn = differences[differences["delta"].notna()]
    if not drawn.empty:
        trials_and_intervals = plots.sample_text(drawn, "trials")
        lines.append(f"Δ to {outcomes.baseline_title}: {trials_and_intervals}")
    return plots.wrap_text("\n".join(lines), inches=3.2)


def _draw_differences(
    axis: Any, differences: pd.DataFrame, styles: Mapping[str, MethodStyle], scale: float
) -> None:
    """Draw the differences of one quantity to the baseline by step, and a line at zero.

    A mark has its 95 % interval. At most six steps are drawn, the last one among them. The marks of
    a step are beside each other, so that intervals do not overlap.
    """
    if differences.empty:
        return
    axis.axhline(0, color=plots.REFERENCE, lw=0.8, zorder=1)

    # the first step, the last step, and evenly spaced steps between them
    steps = np.sort(differences["step"].unique())
    num_shown = min(len(steps), _MOST_STEPS)
    spaced_positions = np.linspace(0, len(steps) - 1, num_shown)
    indices = spaced_positions.round().astype(int)
    shown_steps = steps[indices]
    shown = differences[differences["step"].isin(shown_steps)]

    # the marks of all methods are centred on their step
    methods = list(differences["method_title"].unique())
    middle = (len(methods) - 1) / 2
    gap = 0.0  # with a single step, there is no distance between steps to divide
    if len(shown_steps) > 1:
        gap = _MARKS_GAP * np.diff(shown_steps).min()
    for number, method in enumerate(methods):
        rows = shown[shown["method_title"] == method]
        shift = gap * (number - middle)
        half_intervals = rows["high"] - rows["delta"]
        # where() makes the interval nan if there are too few trials; nan is not drawn
        drawn_half_intervals = half_intervals.where(rows["n"] >= plots.FEW)
        axis.errorbar(
            rows["step"] + shift,
            rows["delta"] * scale,
            yerr=drawn_half_intervals * scale,
            label=method,
            lw=0.8,
            elinewidth=1.0,
            ms=3.5,
            **styles[method].line,
        )


class _Panel(NamedTuple):
    """The use of experts in one layer of one run.

    Attributes:
        title: The title of the panel.
        class_loads: The choices of experts by class, ``[classes, experts]``.
        env_loads: The choices of experts by environment, ``[environments, experts]``.
        chance: The mutual information of experts and shuffled labels.
    """

    title: str
    class_loads: NDArray[np.int64]
    env_loads: NDArray[np.int64]
    chance: Chance


class _FirstRuns(NamedTuple):
    """The runs whose routing is drawn: one of each method."""

    model: str
    """The name of the model of all runs."""
    env: int
    """The number of the environment that all runs hold out."""
    by_method: dict[str, Run]
    """The runs, by name of the method."""


def draw_routing(outcomes: DomainOutcomes, data_set: str, path: Path) -> None:
    """Draw the use of experts by class and by environment of one image set.

    There is a panel for each method and converted layer. It shows the first trial of the first
    model with the first held-out environment. A panel has two heatmaps, one above the other. The
    figure is a placeholder if none of these runs has experts.
    """
    first = _first_runs(outcomes, data_set)
    if first is None:
        plots.placeholder_figure(path)
        return
    panels = _routing_panels(outcomes, first)
    if not panels:
        plots.placeholder_figure(path)
        return
    # all runs are on one image set, so they have the same classes
    any_run = next(iter(first.by_method.values()))
    classes = outcomes.finished[any_run.id].metrics.classes or []
    env_names = outcomes.environments(data_set)
    env_titles = [outcomes.env_title(data_set, env_name) for env_name in env_names]
    title = (
        f"{outcomes.title('task', data_set)}, {outcomes.title('model', first.model)}, "
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
    num_columns = _count_columns(len(panels))
    num_rows = math.ceil(len(panels) / num_columns)  # of panels
    width = min(_COLUMN_WIDTH * num_columns + _SIDE_WIDTH, plots.WIDTH)
    # The heights of a panel's two heatmaps, in lines of text. A heatmap of many classes, which have
    # no labels, gets less than a line for each.
    class_lines = min(len(classes), _MOST_LABELS)
    env_lines = len(env_titles)
    panel_height = _TEXT_HEIGHT * (class_lines + env_lines) + _PANEL_TITLES_HEIGHT
    height = panel_height * num_rows + _FIGURE_TITLE_HEIGHT
    # each row of panels has two rows of heatmaps
    heights_of_heatmaps = [class_lines, env_lines] * num_rows
    figure_of_panels = plots.panel_figure(
        path,
        rows=len(heights_of_heatmaps),
        columns=num_columns,
        size=(width, height),
        style=plots.HEATMAP,
        height_ratios=heights_of_heatmaps,
    )
    with figure_of_panels as (figure, axes):
        for number, panel in enumerate(panels):
            row, column = divmod(number, num_columns)
            class_axis = axes[2 * row, column]
            env_axis = axes[2 * row + 1, column]
            _draw_use(class_axis, panel.class_loads)
            _draw_use(env_axis, panel.env_loads)
            _label_panel(class_axis, env_axis, panel)
            # only the left panels name classes and environments
            if column == 0:
                env_axis.set_yticks(range(len(env_titles)), env_titles)
                if len(classes) <= _MOST_LABELS:
                    class_axis.set_yticks(range(len(classes)), classes)
        figure.colorbar(
            plots.USE, ax=axes, shrink=0.6, label="use ÷ mean use of the expert", extend="max"
        )
        title_text = plots.wrap_text(title, inches=width)
        chance_text = plots.wrap_text(_CHANCE, inches=width)
        figure.suptitle(f"{title_text}\n{chance_text}", fontsize=8)


def _count_columns(num_panels: int) -> int:
    """Choose the number of columns that fills the last line of panels best.

    Five panels are in lines of three and two, not of four and one.
    """
    if num_panels <= max(_COLUMNS):
        return num_panels
    # `max` returns the first of equally good numbers: the largest, which needs fewer lines
    return max(_COLUMNS, key=lambda columns: _fill_of_last_line(num_panels, columns))


def _fill_of_last_line(num_panels: int, columns: int) -> float:
    """Return the share of the last line that has panels."""
    in_last_line = num_panels % columns
    if in_last_line == 0:
        return 1.0
    return in_last_line / columns


def _first_runs(outcomes: DomainOutcomes, data_set: str) -> _FirstRuns | None:
    """Return the first run of each method on an image set.

    Only runs of the first model that hold out one environment alone are considered. All returned
    runs hold out the same environment: the one with the lowest number. None if there is none.
    """
    single_runs = _single_runs(outcomes, data_set)
    if not single_runs:
        return None
    # the first in the order of the grid
    model = single_runs[0].run.model
    of_model = [single for single in single_runs if single.run.model == model]
    first_env = min(single.env for single in of_model)
    by_method: dict[str, Run] = {}
    for single in of_model:
        if single.env == first_env:
            by_method.setdefault(single.run.method, single.run)  # keeps the first run
    return _FirstRuns(model, first_env, by_method)


def _single_runs(outcomes: DomainOutcomes, data_set: str) -> list[_SingleRun]:
    """Return the runs on an image set that hold out one environment alone."""
    single_runs = []
    for run in outcomes.runs:
        test_envs = outcomes.specs[run.id].test_envs
        if run.task == data_set and len(test_envs) == 1:
            single_runs.append(_SingleRun(run, test_envs[0]))
    return single_runs


def _routing_panels(outcomes: DomainOutcomes, first: _FirstRuns) -> list[_Panel]:
    """Return a panel for each method and converted layer. Dense models have no panel."""
    panels = []
    for method, run in first.by_method.items():
        routing = outcomes.finished[run.id].metrics.routing
        # every run has the section, which is empty for a dense model; mypy cannot know that
        if routing is None:
            continue
        # layers are texts, because they are keys of a JSON object
        for layer in sorted(routing.loads, key=int):
            loads = np.array(routing.loads[layer])  # [environments, classes, experts]
            panel = _Panel(
                title=f"{outcomes.title('method', method)}, block {layer}",
                class_loads=loads.sum(axis=0),
                env_loads=loads.sum(axis=1),
                chance=routing.chance[layer],
            )
            panels.append(panel)
    return panels


def _draw_use(axis: Any, loads: NDArray[np.int64]) -> None:
    """Draw a heatmap of expert choices without labels.

    ``loads`` is ``[classes or environments, experts]``. The colour shows the share of an expert in
    the choices of a class (or environment), divided by the mean of the expert's shares.
    """
    # at least 1, so that a class without choices has shares of 0
    num_choices = np.maximum(loads.sum(1, keepdims=True), 1)
    shares = loads / num_choices
    mean_shares = shares.mean(0, keepdims=True)
    plots.show_use(axis, plots.divide_by_mean(shares, mean_shares))
    axis.set_xticks([])
    axis.set_yticks([])


def _label_panel(class_axis: Any, env_axis: Any, panel: _Panel) -> None:
    """Write a panel's title, the mutual information of both heatmaps, and the experts' numbers."""
    title = plots.wrap_text(panel.title, inches=_PANEL_WIDTH, size=7)
    class_text = _information_text("class", panel.class_loads, panel.chance.by_class)
    env_text = _information_text("environment", panel.env_loads, panel.chance.environment)
    class_axis.set_title(f"{title}\n{class_text}", fontsize=7)
    env_axis.set_title(env_text, fontsize=7)
    num_experts = panel.env_loads.shape[1]
    plots.number_experts(env_axis, num_experts, _PANEL_WIDTH)


def _information_text(label: str, loads: NDArray[np.int64], chance: list[float]) -> str:
    """Describe the mutual information of experts and labels, beside its value by chance.

    Args:
        label: The kind of label: ``class`` or ``environment``.
        loads: The choices of experts, ``[classes or environments, experts]``.
        chance: The mean and the 95 % quantile of the information by chance, in bits.
    """
    mean, quantile = chance
    bits = mutual_information(loads)
    return f"{label} {bits:.3f} bit\nchance {mean:.3f}, {quantile:.3f}"


SET_FIGURES = {
    "accuracy": Figure(
        draw_accuracy,
        "Accuracy on each held-out environment by method, with training-domain validation: means "
        "over trials, with 95 % intervals where n ≥ 3. The axis does not start at zero.",
    ),
    "steps": Figure(
        draw_steps,
        "Training loss and accuracy by step and method, and differences to the baseline (Δ). "
        "Training loss: the mean over the steps since the evaluation before, with the balance loss "
        "of methods that have one. Accuracy in domain: on the out splits of the training "
        "environments. Held-out accuracy: on the in split of the held-out environment. Lines are "
        "means over the trials and held-out environments that all methods have; differences are "
        "means over all trials that a method shares with the baseline, averaged over environments "
        "first. Bars are 95 % confidence intervals (Student's t) over the trials, not corrected "
        "for the number of steps. They need three trials. Differences leave out the first "
        "evaluation, which is after one update, and show at most six of the others; marks are "
        "shifted sideways so that bars do not overlap. Only runs that hold out one environment "
        "alone are used, with the settings that training-domain validation chooses. The axes do "
        "not start at zero.",
    ),
    "routing": Figure(
        draw_routing,
        "Use of experts by class (above) and by environment (below): the share of each expert in "
        "the choices of their images, divided by the mean share. The number is the mutual "
        "information of expert and class or environment, in bits, beside its value by chance: the "
        f"mean and 95 % quantile of {PERMUTATIONS} shuffles over images.",
    ),
}
