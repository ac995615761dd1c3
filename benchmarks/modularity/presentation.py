"""Present pre-trained models: numbers, tables, figures and verdicts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas as pd
from matplotlib import pyplot as plt

from benchmarks.harness.config.benchmark import AnyBenchmark
from benchmarks.harness.report import plots
from benchmarks.harness.report.common import Outcomes, average_over_seeds, read_published
from benchmarks.harness.report.presentation import Figure, Presentation
from benchmarks.harness.report.style import EMOE
from benchmarks.harness.report.table import Column, Table
from benchmarks.harness.results.content import Matrix
from benchmarks.harness.results.records import Record
from benchmarks.harness.results.statistics import PERMUTATIONS, information_numbers
from benchmarks.modularity.definition import EXPERTS
from benchmarks.text.routing import UsagePanel, draw_usage

PLACE = ["model", "layer"]
CELL = [*PLACE, "num_experts", "method"]
_KEYS = {
    "model_title": "Model",
    "layer": "Layer",
    "num_experts": "N",
    "method_title": "Neurons in blocks",
    "n": "n",
}
_PAPERS_N = 64  # of Fig. 4


class ModularityOutcomes(Outcomes):
    """Collect the finished runs.

    Attributes:
        rows: A row per run, in the order of models and methods: the columns :data:`CELL`, ``seed``, ``run_id``, a
            column per metric, ``usage`` and ``matrix`` of its metrics, and titles.
        means: The means over seeds, with ``<metric>_std``, ``n`` and titles.
    """

    def __init__(self, benchmark: AnyBenchmark, finished: Sequence[Record]) -> None:
        super().__init__(
            benchmark, [record.run for record in finished], ["model", "method", "task"]
        )
        rows: list[dict[str, Any]] = []
        numbers: list[str] = []
        for record in finished:
            run, metrics = record.run, record.metrics
            measured = (metrics.measured or {})[EXPERTS]
            cell = {
                "model": run.model,
                "layer": run.config["layers"][0],
                "num_experts": run.config["num_experts"],
                "method": run.method,
            }
            named = {
                "seed": run.seed,
                "run_id": run.id,
                "usage": metrics.usage,
                "matrix": metrics.matrix,
            }
            rows.append({**cell, **named, **measured})
            numbers = list(measured)
        self.records = self.rows = self.order(pd.DataFrame(rows), [*CELL, "seed"])
        self.means = self.with_titles(average_over_seeds(self.rows, CELL, numbers))

    def panels(self) -> Iterator[tuple[str, pd.DataFrame]]:
        """Yield a title and the rows of the first layer of every model."""
        for model, rows in self.rows.groupby("model", sort=False):
            layer = rows["layer"].iloc[0]
            yield f"{self.title('model', str(model))}, layer {layer}", rows[rows["layer"] == layer]


def concentration(outcomes: ModularityOutcomes) -> Table:
    """Make a table of the concentration by construction, beside the paper's matrices."""
    cell = ["method", "num_experts"]
    published = (
        read_published(outcomes.benchmark)
        .pivot(index=cell, columns="metric", values="value")
        .astype(float)
    )
    frame = outcomes.means.join(published.add_suffix("_paper"), on=cell)
    frame["best_quarter_paper"] /= 100
    (share,) = {run.spec["reading"]["active_share"] for run in outcomes.runs}
    return Table(
        "Activations in blocks of neurons, nothing trained",
        "Means over n random partitions ± standard deviation; the other constructions have no seed. A neuron is active "
        f"for a token if |activation| is among the {share * 100:g} % largest of all tokens and neurons, as many as are "
        "not zero in the paper's matrix. Best quarter: share of a token's active neurons that are in the N/4 blocks "
        "with most of them, mean over tokens; of their magnitudes, all neurons counted. Gini: of the blocks' active "
        "neurons over all tokens. What avg-k keeps is the share of all magnitude in the top k experts. Unexplained "
        "variance is that of the keys. The paper's two matrices are of a model, layer and set that it does not name, "
        "so directions compare and values do not.",
        dict(_KEYS),
        [
            *_columns("best_quarter", "best_quarter_mass", "usage_gini", "kept_top", "inertia"),
            Column("best_quarter", "best_quarter_paper", "Paper: best quarter"),
            Column("usage_gini", "usage_gini_paper", "Paper: Gini"),
        ],
        frame,
    )


def _columns(*metrics: str) -> list[Column]:
    return [Column(metric, metric, std=f"{metric}_std") for metric in metrics]


def neurons_in_use(outcomes: ModularityOutcomes) -> Table:
    """Make a table of dead neurons, active neurons and kept magnitude with the top k and the bottom k experts."""
    return Table(
        "Neurons in use by the top and the bottom k experts, nothing trained",
        "Are the experts with the lowest scores dead, which would explain that using them does harm (the paper's Table "
        "4)? A neuron is dead if it is active, as above, for no token. Shares are of the neurons of the experts in "
        "use, means over tokens. Kept is the share of all magnitude. Means over n random partitions ± standard "
        "deviation.",
        dict(_KEYS),
        _columns(
            "dead",
            "dead_top",
            "dead_bottom",
            "active_top",
            "active_bottom",
            "kept_top",
            "kept_bottom",
        ),
        outcomes.means,
    )


def usage(outcomes: ModularityOutcomes) -> Table:
    """Make a table of the mutual information of experts with task and class, beside chance."""
    metrics = [*information_numbers("task", "class"), "specialised_experts", "shared_experts"]
    frame = outcomes.means.reindex(columns=list(dict.fromkeys([*_KEYS, *CELL, *metrics])))
    return Table(
        "Information in the choice of an expert, nothing trained",
        "Mutual information of a token's expert with the task of its row, and with the row's class (within a task, "
        f"mean over the tasks with classes). Chance: mean and 95 % quantile of {PERMUTATIONS} shuffles of rows over "
        "the tasks, or within their task. Specialised experts: a task uses them more than by chance (5 %, over all "
        "experts and tasks). Shared experts: every task uses them above 1/N, and no task differs from chance. Means "
        "over random partitions.",
        {key: label for key, label in _KEYS.items() if key != "n"},
        [Column(metric, metric) for metric in metrics],
        frame,
    )


TABLES = {"concentration": concentration, "selected": neurons_in_use, "usage": usage}


def draw_activations(outcomes: ModularityOutcomes, path: Path) -> None:
    """Draw a dot per active neuron: panel rows are models (first layer), columns constructions."""
    panels = [(title, list(_first_runs(rows).itertuples())) for title, rows in outcomes.panels()]
    columns = max(len(runs) for _, runs in panels)
    size, shared = (plots.WIDTH, 2.3 * len(panels) + 0.4), {"sharex": "row", "sharey": "row"}
    with plots.panel_figure(path, len(panels), columns, size, plots.HEATMAP, **shared) as (_, axes):
        for axis_row, (title, runs) in zip(axes, panels, strict=True):
            for axis, run in zip(axis_row, runs, strict=False):
                _draw_matrix(axis, run.matrix, run.num_experts)
                axis.set_title(f"{run.method_title}, N = {run.num_experts}", fontsize=7.5)
                axis.set_xlabel("neurons, expert by expert")
            tasks = runs[0].matrix.tasks
            middles = pd.Series(range(len(tasks))).groupby(tasks, sort=False).mean()
            axis_row[0].set_yticks(
                middles, [outcomes.title("task", str(name)) for name in middles.index]
            )
            axis_row[0].tick_params(axis="y", length=0)
            axis_row[0].set_ylabel(f"{title}\ntokens of")


def _draw_matrix(axis: Any, matrix: Matrix, experts: int) -> None:
    size = matrix.neurons // experts
    for edge in range(size, matrix.neurons, size):
        axis.axvline(edge - 0.5, color="#e3e3e3", lw=0.3, zorder=0)
    axis.plot(
        matrix.places,
        matrix.tokens,
        "s",
        ms=0.9,
        mew=0,
        color=EMOE.colour,
        alpha=0.8,
        rasterized=True,
    )
    axis.set(xlim=(-0.5, matrix.neurons - 0.5), ylim=(len(matrix.tasks) - 0.5, -0.5))
    axis.set_xticks([0, matrix.neurons])


def draw_activations_3d(outcomes: ModularityOutcomes, path: Path) -> None:
    """Draw magnitudes of the first model and layer in 3D, before and after clustering, as the paper does."""
    title, rows = next(outcomes.panels())
    runs = list(
        _first_runs(rows[rows["method"].isin(["contiguous", outcomes.baseline])]).itertuples()
    )
    with mpl.rc_context({**plots.STYLE, "font.size": 7}):
        figure = plt.figure(figsize=(plots.WIDTH, 3.0), layout="constrained")
        for number, run in enumerate(runs, 1):
            axis: Any = figure.add_subplot(1, len(runs), number, projection="3d")
            axis.scatter(
                run.matrix.places, run.matrix.tokens, run.matrix.values,
                c=run.matrix.values, cmap="viridis", s=1.2, linewidths=0, rasterized=True,
            )  # fmt: skip
            axis.set_xlabel("neurons", labelpad=-1)
            axis.set_ylabel("tokens", labelpad=-4)
            axis.set_zlabel("|activation|", labelpad=-8)
            axis.tick_params(pad=-2, labelsize=7)
            axis.view_init(elev=35, azim=-70)
            axis.set_box_aspect((1.3, 1, 0.6), zoom=1.1)
            for side in (axis.xaxis, axis.yaxis, axis.zaxis):
                side.set_major_locator(mpl.ticker.MaxNLocator(4))
            axis.set_title(f"{run.method_title}, N = {run.num_experts}", fontsize=7.5)
        figure.suptitle(title, fontsize=8)
        plots.save(figure, path)


def _first_runs(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the first run of each construction at the paper's N, else at the largest N."""
    size = _PAPERS_N if _PAPERS_N in set(rows["num_experts"]) else rows["num_experts"].max()
    return rows[rows["num_experts"] == size].drop_duplicates("method")


def draw_experts(outcomes: ModularityOutcomes, path: Path) -> None:
    """Draw the use of experts by task and class, a panel per model (first layer, smallest N)."""
    panels: list[UsagePanel] = []
    for title, rows in outcomes.panels():
        clusters = rows[rows["method"] == outcomes.baseline].sort_values(
            "num_experts", kind="stable"
        )
        for row in clusters.head(1).itertuples():
            panels.append((f"{title}, N = {row.num_experts}", row.usage))
    draw_usage(panels, outcomes, path)


FIGURES = {
    "activations": Figure(
        draw_activations,
        "Active neurons of tokens of several tasks. Neurons are in the order of the experts: the checkpoint's order, "
        "clusters of similar keys, or random. Each row is a token, task by task; vertical lines separate experts. If "
        "few experts hold most of a token's activations, its row shows a few dashes instead of scattered dots.",
    ),
    "activations_3d": Figure(
        draw_activations_3d,
        "The same as the paper draws it (Fig. 4 of the first version): height is the activation's "
        "magnitude, before clustering and after.",
    ),
    "experts": Figure(
        draw_experts,
        "Use of experts by task, divided by the expert's mean use. Triangles mark use above (▲) or below (▼) chance, "
        "by shuffled rows at 5 % over the whole panel. Dots mark shared experts: every task uses them above the "
        "average and equally.",
    ),
}


def verdicts(outcomes: ModularityOutcomes) -> Iterator[str]:
    """Yield a sentence per model and layer, for its largest N."""
    for (_, layer), rows in outcomes.means.groupby(PLACE, sort=False):
        largest = rows[rows["num_experts"] == rows["num_experts"].max()].set_index("method")
        if outcomes.baseline not in largest.index:
            continue
        baseline, others = largest.loc[outcomes.baseline], largest.drop(index=outcomes.baseline)
        shares = ", ".join(
            f"{row.method_title.lower()} {row.best_quarter * 100:.0f} %"
            for row in others.itertuples()
        )
        bits, chance, most = (baseline[name] for name in information_numbers("task"))
        yield (
            f"{baseline['model_title']}, layer {layer}, N = {baseline['num_experts']}: a token has "
            f"{baseline['best_quarter'] * 100:.0f} % of its active neurons in the best quarter of the clusters"
            f"{f' ({shares})' if shares else ''}; the choice of an expert tells "
            f"{'more' if bits > most else 'no more'} than chance of the task ({bits:.3f} bit, chance {chance:.3f})."
        )


_NOTE = (
    "Nothing is trained, so only random partitions vary. A mark, or information above chance, shows that experts are "
    "used differently, not that this helps."
)


def present(benchmark: AnyBenchmark, records: Sequence[Record]) -> Presentation:
    """Present finished runs."""
    outcomes = ModularityOutcomes(benchmark, records)
    return Presentation(
        benchmark, TABLES, FIGURES, outcomes, verdicts=list(verdicts(outcomes)), note=_NOTE
    )
