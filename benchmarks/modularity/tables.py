"""Tables of pre-trained models as they are: how concentrated activations are, and what the choice of an expert tells."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pandas as pd

from benchmarks.harness.config.benchmark import Benchmark
from benchmarks.harness.config.catalogue import load_metrics
from benchmarks.harness.config.runs import Run
from benchmarks.harness.report.common import Outcomes, read_published
from benchmarks.harness.report.table import Column, Table
from benchmarks.harness.results.records import collect, information_numbers, read_metrics
from benchmarks.harness.results.statistics import PERMUTATIONS
from benchmarks.modularity.grid import ModularityDefinition
from benchmarks.text.definition import TaskEntry

_PLACE = ["model", "layer"]
_CELL = [*_PLACE, "num_experts", "method"]
_KEYS = {"model_title": "Model", "layer": "Layer", "num_experts": "N", "method_title": "Neurons in blocks", "n": "n"}
_IN_PAPER = ("best_quarter", "usage_gini")


class ModularityOutcomes(Outcomes):
    """The finished runs.

    Attributes:
        rows: The numbers, a row a run, in the order of models and methods: ``model``, ``layer``, ``num_experts``,
            ``method``, ``seed``, ``run_id``, a column a metric, and titles.
        means: The means over seeds, with ``<metric>_std``, ``n`` and titles.
        paper: The numbers of the paper's matrices, as they are stored, by ``method``, ``num_experts`` and ``metric``.
    """

    benchmark: Benchmark[ModularityDefinition, TaskEntry]

    def __init__(self, benchmark: Benchmark[ModularityDefinition, TaskEntry], runs: list[Run]) -> None:
        super().__init__(benchmark, runs, ["model", "method", "task"])
        self._by_id = {run.id: run for run in runs}
        numbers = collect(runs).pivot_table(index="run_id", columns="metric", values="value", sort=False)
        rows = pd.DataFrame([_settings(run) for run in runs]).merge(numbers, left_on="run_id", right_index=True)
        self.records = self.rows = self.order(rows, [*_PLACE, "num_experts", "method", "seed"])
        by_cell = self.rows.groupby(_CELL, sort=False)
        means = by_cell[list(numbers)].mean().join(by_cell[list(numbers)].std().add_suffix("_std"))
        self.means = self.titled(means.join(by_cell.size().rename("n")).reset_index())
        published = read_published(benchmark)
        scales = [load_metrics()[metric].scale for metric in published["metric"]]
        self.paper = published.assign(value=published["value"].astype(float) / pd.Series(scales, dtype=float))

    def panels(self) -> Iterator[tuple[str, pd.DataFrame]]:
        """Yield the title and the rows of every model and layer."""
        for (model, layer), rows in self.rows.groupby(_PLACE, sort=False):
            yield f"{self.title('model', str(model))}, layer {layer}", rows

    def first_panels(self) -> list[tuple[str, pd.DataFrame]]:
        """Return the first panel of every model."""
        first: dict[str, tuple[str, pd.DataFrame]] = {}
        for title, rows in self.panels():
            first.setdefault(rows["model"].iloc[0], (title, rows))
        return list(first.values())

    def metrics_of(self, row: Any) -> dict[str, Any]:
        """Read the ``metrics.json`` of a row."""
        return read_metrics(self._by_id[row.run_id])


def _settings(run: Run) -> dict[str, Any]:
    config = run.spec["method"]["config"]
    return {
        "run_id": run.id,
        "model": run.spec["model"]["name"],
        "layer": config["layers"][0],
        "num_experts": config["num_experts"],
        "method": run.spec["method"]["name"],
        "seed": run.spec["seed"],
    }


def concentration(outcomes: ModularityOutcomes) -> Table:
    """Show the concentration by construction, beside the paper's matrices."""
    frame = outcomes.means.copy()
    for metric in _IN_PAPER:
        known = outcomes.paper[outcomes.paper["metric"] == metric].set_index(["method", "num_experts"])["value"]
        frame[f"{metric}_paper"] = [
            known.get((row.method, row.num_experts), float("nan")) for row in frame.itertuples()
        ]
    active = {run.spec["reading"]["active_share"] for run in outcomes.runs}
    return Table(
        "Activations in blocks of neurons, nothing trained",
        f"Means over n random partitions ± standard deviation; the other constructions have no seed. A neuron is active for a token where |activation| is among the {', '.join(f'{share * 100:g}' for share in sorted(active))} % largest of all "
        "tokens and neurons, as many as are not zero in the paper's matrix. Best quarter: share of a token's active neurons that are in the N/4 blocks with most of them, mean over tokens; of their "
        "magnitudes, all neurons counted. Gini: of the blocks' active neurons over all tokens. What avg-k keeps is the share of all magnitude in the top k of the row's own experts. Unexplained variance "
        "is that of the keys. The paper's two matrices are of a model, layer and set that it does not name (as they stand, and clustered), so that directions compare and values do not.",
        dict(_KEYS),
        [
            *(
                Column(metric, metric, std=f"{metric}_std")
                for metric in ("best_quarter", "best_quarter_mass", "usage_gini", "kept_top", "inertia")
            ),
            Column("best_quarter", "best_quarter_paper", "Paper: best quarter"),
            Column("usage_gini", "usage_gini_paper", "Paper: Gini"),
        ],
        frame,
    )


def selected(outcomes: ModularityOutcomes) -> Table:
    """Show the neurons that the top k and the bottom k experts use."""
    names = ["dead", *(f"{name}_{selection}" for name in ("dead", "active", "kept") for selection in ("top", "bottom"))]
    return Table(
        "Neurons in use by the top and the bottom k experts, nothing trained",
        "Are the experts with the lowest scores dead, which would explain that using them does harm (the paper's Table 4)? A neuron is dead here if it is active for none of the tokens that are read, and active "
        "as above. Shares are of the neurons of the experts in use, means over tokens; without a selection the share of dead neurons would be that of all. Kept is the share of all magnitude. Means over n random partitions ± standard "
        "deviation.",
        dict(_KEYS),
        [Column(name, name, std=f"{name}_std") for name in names],
        outcomes.means,
    )


def usage(outcomes: ModularityOutcomes) -> Table:
    """Show the information in the choice of an expert, beside chance."""
    metrics = [*information_numbers("task", "class"), "specialised_experts", "shared_experts"]
    frame = outcomes.means.reindex(columns=list(dict.fromkeys([*_KEYS, *_CELL, *metrics])))
    return Table(
        "What the choice of an expert tells, nothing trained",
        "Mutual information of a token's expert with the task that its row is of, and with the row's class (within a task, mean over the tasks that have classes). Chance: mean and 95 % quantile of "
        f"{PERMUTATIONS} shuffles of rows over the tasks, or within their task; more than the quantile is more than chance. Specialised experts are those that some task uses more than shuffles explain "
        "(5 %, all experts and tasks together); shared ones are used above 1/N by every task, and by none more or less than by the others. Means over random partitions.",
        {key: label for key, label in _KEYS.items() if key != "n"},
        [Column(metric, metric) for metric in metrics],
        frame,
    )


def verdicts(outcomes: ModularityOutcomes) -> Iterator[str]:
    """Yield a sentence a model and layer, at its largest N."""
    means = outcomes.means
    for key, rows in means.groupby(_PLACE, sort=False):
        largest = rows[rows["num_experts"] == rows["num_experts"].max()].set_index("method")
        own = largest.loc[outcomes.baseline] if outcomes.baseline in largest.index else None
        if own is None:
            continue
        others = ", ".join(
            f"{row.method_title.lower()} {row.best_quarter * 100:.0f} %"
            for row in largest.drop(index=outcomes.baseline).itertuples()
        )
        known = "more than" if own["task_information"] > own["task_information_chance_95"] else "no more than"
        yield (
            f"{own['model_title']}, layer {key[1]}, N = {own['num_experts']}: a token has {own['best_quarter'] * 100:.0f} % of its active neurons in the best quarter of the clusters"
            f"{f' ({others})' if others else ''}; the choice of an expert tells {known} chance of the task ({own['task_information']:.3f} bit, chance {own['task_information_chance']:.3f})."
        )


TABLES = {"concentration": concentration, "selected": selected, "usage": usage}
