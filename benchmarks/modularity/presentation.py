"""Present pre-trained models: numbers, tables, figures and verdicts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import matplotlib as mpl
import pandas as pd
from matplotlib import pyplot as plt

from benchmarks.harness.base import distinct
from benchmarks.harness.config.benchmark import AnyBenchmark
from benchmarks.harness.config.runs import Run
from benchmarks.harness.report import plots
from benchmarks.harness.report.common import Outcomes, average_over_seeds, read_published
from benchmarks.harness.report.presentation import Figure, Presentation
from benchmarks.harness.report.style import EMOE
from benchmarks.harness.report.table import Column, Table
from benchmarks.harness.results.content import Matrix
from benchmarks.harness.results.records import Record
from benchmarks.harness.results.statistics import PERMUTATIONS, information_metrics
from benchmarks.modularity.definition import EXPERTS, ModularitySpec
from benchmarks.text.routing import UsagePanel, draw_usage

PLACE = ["model", "layer"]
# the columns that identify a cell, which is a row of a table
CELL = [*PLACE, "num_experts", "method"]
# the headings of the columns that name a row
_HEADINGS = {
    "model_title": "Model",
    "layer": "Layer",
    "num_experts": "N",
    "method_title": "Neurons in blocks",
    "n": "n",
}
_PAPERS_N = 64  # the number of experts in the paper's Fig. 4


class ModularityOutcomes(Outcomes):
    """The finished runs of a benchmark that analyses pre-trained models.

    Attributes:
        rows: A row for each run, sorted by :data:`CELL` and ``seed``. Other columns are ``run_id``,
            every measured number, ``usage`` and ``matrix`` as in ``metrics.json``, and titles.
        means: The means of the measured numbers over seeds, one row for each :data:`CELL`. Other
            columns are the standard deviations ``<number>_std``, the number of seeds ``n``, and
            titles.
    """

    def __init__(self, benchmark: AnyBenchmark, finished: Sequence[Record]) -> None:
        runs = [record.run for record in finished]
        super().__init__(benchmark, runs, ["model", "method", "task"])
        rows = [_to_row(record) for record in finished]
        self.rows = self.order(pd.DataFrame(rows), [*CELL, "seed"])
        # the base class finds the runs behind the rows of a table with it
        self.recorded_numbers = self.rows
        numbers = list(_measured(finished[0]))  # the same for all runs
        self.means = self.with_titles(average_over_seeds(self.rows, CELL, numbers))

    def panels(self) -> Iterator[tuple[str, pd.DataFrame]]:
        """Yield for every model a title and the rows of its first layer."""
        for model, rows in self.rows.groupby("model", sort=False):
            first_layer = rows["layer"].iloc[0]
            model_title = self.title("model", str(model))
            yield f"{model_title}, layer {first_layer}", rows[rows["layer"] == first_layer]


def _measured(record: Record) -> Mapping[str, float]:
    """Return the measured numbers of a run."""
    return (record.metrics.measured or {})[EXPERTS]


def _to_row(record: Record) -> dict[str, Any]:
    """Return a run's row of :attr:`ModularityOutcomes.rows`, without titles."""
    run = record.run
    (layer,) = run.config["layers"]
    return {
        "model": run.model,
        "layer": layer,
        "num_experts": run.config["num_experts"],
        "method": run.method,
        "seed": run.seed,
        "run_id": run.id,
        "usage": record.metrics.usage,
        "matrix": record.metrics.matrix,
        **_measured(record),
    }


def concentration(outcomes: ModularityOutcomes) -> Table:
    """Make the table of the concentration of active neurons, beside the paper's numbers."""
    published_keys = ["method", "num_experts"]
    published = read_published(outcomes.benchmark)
    # the paper's numbers, with a row for each method and N, and a column for each metric
    by_metric = published.pivot(index=published_keys, columns="metric", values="value")
    paper_columns = by_metric.astype(float).add_suffix("_paper")
    joined = outcomes.means.join(paper_columns, on=published_keys)
    # the paper has percentages, our numbers are shares of 1
    frame = joined.assign(best_quarter_paper=joined["best_quarter_paper"] / 100)
    return Table(
        title="Activations in blocks of neurons, nothing trained",
        caption=_concentration_caption(outcomes),
        keys=dict(_HEADINGS),
        columns=[
            *_columns("best_quarter", "best_quarter_mass", "usage_gini", "kept_top", "inertia"),
            Column(metric="best_quarter", value="best_quarter_paper", label="Paper: best quarter"),
            Column(metric="usage_gini", value="usage_gini_paper", label="Paper: Gini"),
        ],
        frame=frame,
    )


def _concentration_caption(outcomes: ModularityOutcomes) -> str:
    """Return the caption of :func:`concentration`."""
    # a suite has the same share for all runs
    (share,) = {_active_share(outcomes.benchmark, run) for run in outcomes.runs}
    return (
        "Means over n random partitions ± standard deviation; the other constructions have no "
        f"seed. A neuron is active for a token if |activation| is among the {share * 100:g} % "
        "largest of all tokens and neurons, as many as are not zero in the paper's matrix. Best "
        "quarter: the share of a token's active neurons in the N/4 blocks that hold most of them, "
        "mean over tokens. The next column is the same for the magnitudes of all neurons. Gini: "
        "the Gini coefficient of the blocks' numbers of active neurons, over all tokens. Avg-k "
        "chooses the top k experts; their magnitude is a share of that of all neurons. Unexplained "
        "variance is that of the keys. The paper does not name the model, layer and set of its two "
        "matrices, so only directions can be compared."
    )


def _active_share(benchmark: AnyBenchmark, run: Run) -> float:
    """Return the share of the activations that count as active in a run."""
    spec = cast(ModularitySpec, benchmark.read_spec(run))
    return spec.reading.active_share


def _columns(*metrics: str) -> list[Column]:
    """Return a column for each metric, with its standard deviation."""
    return [Column(metric=name, value=name, std=f"{name}_std") for name in metrics]


_NEURONS_CAPTION = (
    "Are the experts with the lowest scores dead, which would explain that using them does harm "
    "(the paper's Table 4)? A neuron is dead if it is active, as above, for no token. Avg-k "
    "chooses the top k experts; the bottom k have the lowest scores. Their dead and active "
    "neurons are shares of their neurons, means over tokens. Their magnitude is a share of the "
    "magnitude of all neurons. Means over n random partitions ± standard deviation."
)


def neurons_in_use(outcomes: ModularityOutcomes) -> Table:
    """Make the table of the dead and active neurons in the top k and the bottom k experts."""
    return Table(
        title="Neurons in use by the top and the bottom k experts, nothing trained",
        caption=_NEURONS_CAPTION,
        keys=dict(_HEADINGS),
        columns=_columns(
            "dead",
            "dead_top",
            "dead_bottom",
            "active_top",
            "active_bottom",
            "kept_top",
            "kept_bottom",
        ),
        frame=outcomes.means,
    )


_USAGE_CAPTION = (
    "Mutual information of a token's expert with the task of its row, and with the row's class "
    "(within a task, mean over the tasks with classes). Chance: mean and 95 % quantile of "
    f"{PERMUTATIONS} shuffles of rows over the tasks, or within their task. Specialised experts: a "
    "task uses them more than by chance (5 %, over all experts and tasks). Shared experts: each "
    "gets more than 1/N of the choices of every task, and no task differs from chance. Means over "
    "random partitions."
)


def usage_table(outcomes: ModularityOutcomes) -> Table:
    """Make the table of the mutual information of experts with task and class, beside chance."""
    metrics = [*information_metrics("task", "class"), "specialised_experts", "shared_experts"]
    columns = distinct([*_HEADINGS, *CELL, *metrics])
    # reindex adds missing columns: tasks without classes have no class information
    frame = outcomes.means.reindex(columns=columns)
    return Table(
        title="Information in the choice of an expert, nothing trained",
        caption=_USAGE_CAPTION,
        keys={column: heading for column, heading in _HEADINGS.items() if column != "n"},
        columns=[Column(metric=name, value=name) for name in metrics],
        frame=frame,
    )


TABLES = {"concentration": concentration, "selected": neurons_in_use, "usage": usage_table}


def draw_activations(outcomes: ModularityOutcomes, path: Path) -> None:
    """Draw a dot for each active neuron of some tokens.

    Each row of panels shows the first layer of a model. It has one panel for each method, which
    constructs the experts in its own way.
    """
    # for each model (by title), one run of each method
    runs_by_title = {}
    for title, rows in outcomes.panels():
        runs_by_title[title] = list(_first_runs(rows).itertuples())
    num_models = len(runs_by_title)
    most_methods = max(len(runs) for runs in runs_by_title.values())
    size = (plots.WIDTH, 3.0 * num_models + 0.4)  # inches
    figure_of_panels = plots.panel_figure(
        path,
        rows=num_models,
        columns=most_methods,
        size=size,
        style=plots.HEATMAP,
        sharex="row",
        sharey="row",
    )
    with figure_of_panels as (_, axes):
        for axes_of_model, (title, runs) in zip(axes, runs_by_title.items(), strict=True):
            # zip is not strict, because a model may have fewer methods than there are columns
            for axis, run in zip(axes_of_model, runs, strict=False):
                _draw_matrix(axis, run.matrix, run.num_experts)
                axis.set_title(f"{run.method_title}, N = {run.num_experts}", fontsize=7.5)
                axis.set_xlabel("neurons, expert by expert")
            # all panels of a model show the same tokens, so only the first names the tasks
            first_axis = axes_of_model[0]
            first_axis.set_ylabel("tokens of")
            plots.draw_heading(first_axis, first_axis.title, title, "left")
            _name_tasks(first_axis, runs[0].matrix.tasks, outcomes)


def _name_tasks(axis: Any, tasks_of_tokens: Sequence[str], outcomes: ModularityOutcomes) -> None:
    """Write the title of each task on the vertical axis, in the middle of the task's tokens.

    ``tasks_of_tokens`` has the name of the task of each token, from the top to the bottom.
    """
    positions = pd.Series(range(len(tasks_of_tokens)))
    # a task's tokens are neighbours, so their middle is their mean position
    middles = positions.groupby(tasks_of_tokens, sort=False).mean()
    titles = [outcomes.title("task", str(name)) for name in middles.index]
    axis.set_yticks(middles, titles)


def _draw_matrix(axis: Any, matrix: Matrix, experts: int) -> None:
    """Draw the active neurons of tokens as dots, and the borders of the experts as lines."""
    expert_size = matrix.neurons // experts
    # neurons of one expert are neighbours
    for edge in range(expert_size, matrix.neurons, expert_size):
        axis.axvline(edge - 0.5, color="#e3e3e3", lw=0.3, zorder=0)
    axis.plot(matrix.places, matrix.tokens, "o", ms=1.4, mew=0, color=EMOE.colour, rasterized=True)
    # the first token is at the top
    axis.set(xlim=(-0.5, matrix.neurons - 0.5), ylim=(len(matrix.tasks) - 0.5, -0.5))
    axis.set_xticks([0, matrix.neurons])
    axis.tick_params(axis="y", length=0)  # the ticks are tasks, not values


def draw_activations_3d(outcomes: ModularityOutcomes, path: Path) -> None:
    """Draw the magnitudes of activations in the first layer of the first model, as the paper does.

    One 3D panel shows the neurons before clustering, and the other panel shows them after it. Both
    have the same axes. If the model has neither method, or the tokens have no active neuron, the
    figure is a placeholder.
    """
    title, rows = next(outcomes.panels())
    # the method "contiguous" keeps the order of the checkpoint, the baseline clusters the neurons
    is_shown = rows["method"].isin(["contiguous", outcomes.baseline])
    runs = list(_first_runs(rows[is_shown]).itertuples())
    if not runs:
        plots.placeholder_figure(path)
        return
    magnitudes: list[float] = []  # of both panels
    for run in runs:
        magnitudes.extend(run.matrix.values)
    # a suite may show so few tokens that none has an active neuron
    if not magnitudes:
        plots.placeholder_figure(path)
        return
    with mpl.rc_context({**plots.STYLE, "font.size": 7}):
        figure = plt.figure(figsize=(plots.WIDTH, 3.0), layout="constrained")
        for number, run in enumerate(runs, 1):
            axis = figure.add_subplot(1, len(runs), number, projection="3d")
            _draw_matrix_3d(axis, run.matrix)
            axis.set_zlim(0, max(magnitudes))
            axis.set_title(f"{run.method_title}, N = {run.num_experts}", fontsize=7.5)
        figure.suptitle(title, fontsize=8)
        plots.save(figure, path)


def _draw_matrix_3d(axis: Any, matrix: Matrix) -> None:
    """Draw the active neurons of tokens in 3D. Height and colour show the magnitude."""
    axis.scatter(
        matrix.places,
        matrix.tokens,
        matrix.values,
        c=matrix.values,
        cmap="viridis",
        s=2.5,
        linewidths=0,
        rasterized=True,
    )
    axis.set(xlim=(0, matrix.neurons), ylim=(0, len(matrix.tasks)))
    axis.set_xlabel("neurons", labelpad=0)
    axis.set_ylabel("tokens", labelpad=0)
    axis.set_zlabel("|activation|", labelpad=-3)
    axis.tick_params(pad=-2, labelsize=7)
    axis.view_init(elev=35, azim=-70)
    axis.set_box_aspect((1.3, 1, 0.6), zoom=1.0)
    for side in (axis.xaxis, axis.yaxis, axis.zaxis):
        side.set_major_locator(mpl.ticker.MaxNLocator(4))
    # the lowest number would touch a number of the tokens
    axis.zaxis.set_major_locator(mpl.ticker.MaxNLocator(4, prune="lower"))


def _first_runs(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the first row of each method with the paper's number of experts.

    If no row has this number, rows with the largest number are returned.
    """
    num_experts = _PAPERS_N
    if _PAPERS_N not in rows["num_experts"].to_numpy():
        num_experts = rows["num_experts"].max()
    candidates = rows[rows["num_experts"] == num_experts]
    return candidates.drop_duplicates("method")


def draw_experts(outcomes: ModularityOutcomes, path: Path) -> None:
    """Draw the baseline's use of experts by task and class.

    There is a panel for each model, with the first layer and the smallest number of experts.
    """
    panels: list[UsagePanel] = []
    for title, rows in outcomes.panels():
        baseline_runs = rows[rows["method"] == outcomes.baseline]
        if baseline_runs.empty:
            continue
        # the first run after sorting has the smallest number of experts
        by_size = baseline_runs.sort_values("num_experts", kind="stable")
        run = next(by_size.itertuples())
        panels.append(UsagePanel(f"{title}, N = {run.num_experts}", run.usage))
    draw_usage(panels, outcomes, path)


FIGURES = {
    "activations": Figure(
        draw_activations,
        "Active neurons of tokens of several tasks. Neurons are in the order of the experts: the "
        "checkpoint's order, clusters of similar keys, or random. Each row is a token, task by "
        "task; vertical lines separate experts. If few experts hold most of a token's activations, "
        "its row shows a few dashes instead of scattered dots.",
    ),
    "activations_3d": Figure(
        draw_activations_3d,
        "The same as the paper draws it (Fig. 4 of the first version): height is the activation's "
        "magnitude, before clustering and after.",
    ),
    "experts": Figure(
        draw_experts,
        "Use of experts by task, divided by the expert's mean use. Triangles mark use above (▲) or "
        "below (▼) chance, by shuffled rows at 5 % over the whole panel. Dots mark shared experts: "
        "every task uses them above the average and equally.",
    ),
}


def verdicts(outcomes: ModularityOutcomes) -> Iterator[str]:
    """Yield a sentence on the baseline for each model and layer.

    Only the largest number of experts is described. The sentence has the share of a token's active
    neurons in the best quarter of the blocks, with the shares of other methods in brackets. It also
    has the information that the choice of an expert has on the task, and the value by chance.
    """
    for (_model, layer), rows in outcomes.means.groupby(PLACE, sort=False):
        has_most_experts = rows["num_experts"] == rows["num_experts"].max()
        by_method = rows[has_most_experts].set_index("method")
        # the suite may lack the baseline
        if outcomes.baseline not in by_method.index:
            continue
        baseline = by_method.loc[outcomes.baseline]
        others = by_method.drop(index=outcomes.baseline)
        yield (
            f"{baseline['model_title']}, layer {layer}, N = {baseline['num_experts']}: a token has "
            f"{baseline['best_quarter'] * 100:.0f} % of its active neurons in the best quarter of "
            f"the clusters{_shares_text(others)}; the choice of an expert has "
            f"{_information_text(baseline)}."
        )


def _shares_text(methods: pd.DataFrame) -> str:
    """List each method's share of active neurons in the best quarter, in brackets.

    The text begins with a blank. It is empty without methods.
    """
    shares = []
    for row in methods.itertuples():
        shares.append(f"{row.method_title.lower()} {row.best_quarter * 100:.0f} %")
    if not shares:
        return ""
    return f" ({', '.join(shares)})"


def _information_text(row: pd.Series) -> str:
    """Describe whether the choice of an expert has more information on the task than chance."""
    bits = row["task_information"]
    chance = row["task_information_chance"]
    amount = "more" if bits > row["task_information_chance_95"] else "no more"
    return f"{amount} information on the task than chance ({bits:.3f} bit, chance {chance:.3f})"


_NOTE = (
    "Nothing is trained, so only random partitions vary. A mark, or information above chance, "
    "shows that experts are used differently, not that this helps."
)


def present(benchmark: AnyBenchmark, records: Sequence[Record]) -> Presentation:
    """Make the tables, figures and verdicts of finished runs."""
    outcomes = ModularityOutcomes(benchmark, records)
    return Presentation(
        benchmark=benchmark,
        table_functions=TABLES,
        figure_functions=FIGURES,
        outcomes=outcomes,
        verdicts=list(verdicts(outcomes)),
        note=_NOTE,
    )
