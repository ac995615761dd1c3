"""What came out: a row a run with its numbers, and what figures draw of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pandas as pd

from benchmarks.harness.config.catalogue import load_metrics
from benchmarks.harness.config.kinds import Benchmark
from benchmarks.harness.config.runs import Run
from benchmarks.harness.report.outcomes import Outcomes
from benchmarks.harness.report.published import read_published
from benchmarks.harness.results.records import collect, read_metrics
from benchmarks.modularity.definition import ModularityDefinition
from benchmarks.text.definition import TaskEntry

PLACE = ["model", "layer"]
CELL = [*PLACE, "num_experts", "method"]


class ModularityOutcomes(Outcomes):
    """The finished runs.

    Attributes:
        rows: a row a run, in the order of models and methods: :data:`CELL`, ``seed``, ``run_id``, a column a number, and titles.
        paper: what is known of the paper's matrices, values as they are stored, by ``method``, ``num_experts`` and ``metric``.
    """

    benchmark: Benchmark[ModularityDefinition, TaskEntry]

    def __init__(self, benchmark: Benchmark[ModularityDefinition, TaskEntry], runs: list[Run]) -> None:
        super().__init__(benchmark, runs, ["model", "method", "task"])
        self._by_id = {run.id: run for run in runs}
        numbers = collect(runs).pivot_table(index="run_id", columns="metric", values="value", sort=False)
        self.metrics = list(numbers.columns)
        rows = pd.DataFrame([_settings(run) for run in runs]).merge(numbers, left_on="run_id", right_index=True)
        self.rows = self.order(rows, [*PLACE, "num_experts", "method", "seed"])
        published = read_published(benchmark)
        scales = [load_metrics()[metric].scale for metric in published["metric"]]
        self.records = self.rows
        self.paper = published.assign(value=published["value"].astype(float) / pd.Series(scales, dtype=float))

    def means(self) -> pd.DataFrame:
        """A row a :data:`CELL`: means over seeds, ``<metric>_std``, ``n``, and titles."""
        by_cell = self.rows.groupby(CELL, sort=False)
        found = by_cell[self.metrics].mean().join(by_cell[self.metrics].std().add_suffix("_std"))
        return self.titled(found.join(by_cell.size().rename("n")).reset_index())

    def places(self) -> Iterator[tuple[str, str, pd.DataFrame]]:
        """Every model and layer: name of the model, title of both, and its rows."""
        for (model, layer), rows in self.rows.groupby(PLACE, sort=False):
            yield str(model), f"{self.title('model', str(model))}, layer {layer}", rows

    def first_places(self) -> Iterator[tuple[str, pd.DataFrame]]:
        """The first layer of every model: title of both, and its rows."""
        seen: set[str] = set()
        for model, title, rows in self.places():
            if model not in seen:
                seen.add(model)
                yield title, rows

    def found(self, row: Any) -> dict[str, Any]:
        """The ``metrics.json`` of a row."""
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
