"""Collect the numbers of pre-trained models without training."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pandas as pd

from benchmarks.harness.config.benchmark import AnyBenchmark
from benchmarks.harness.config.catalogue import load_metrics
from benchmarks.harness.config.runs import Run
from benchmarks.harness.report.common import Outcomes, average_over_seeds, read_published
from benchmarks.harness.results.records import collect, read_metrics

PLACE = ["model", "layer"]
CELL = [*PLACE, "num_experts", "method"]


class ModularityOutcomes(Outcomes):
    """Collect the finished runs.

    Attributes:
        rows: The numbers, a row per run, in the order of models and methods: ``model``, ``layer``, ``num_experts``,
            ``method``, ``seed``, ``run_id``, a column per metric, and titles.
        means: The means over seeds, with ``<metric>_std``, ``n`` and titles.
        paper: The unscaled numbers of the paper's matrices, by ``method``, ``num_experts`` and ``metric``.
    """

    benchmark: AnyBenchmark

    def __init__(self, benchmark: AnyBenchmark, runs: list[Run]) -> None:
        super().__init__(benchmark, runs, ["model", "method", "task"])
        self._by_id = {run.id: run for run in runs}
        numbers = collect(runs).pivot_table(index="run_id", columns="metric", values="value", sort=False)
        settings = [
            {
                "run_id": run.id,
                "model": run.spec["model"]["name"],
                "layer": run.spec["method"]["config"]["layers"][0],
                "num_experts": run.spec["method"]["config"]["num_experts"],
                "method": run.spec["method"]["name"],
                "seed": run.spec["seed"],
            }
            for run in runs
        ]
        rows = pd.DataFrame(settings).merge(numbers, left_on="run_id", right_index=True)
        self.records = self.rows = self.order(rows, [*PLACE, "num_experts", "method", "seed"])
        self.means = self.titled(average_over_seeds(self.rows, CELL, list(numbers)))
        published = read_published(benchmark)
        scales = [load_metrics()[metric].scale for metric in published["metric"]]
        self.paper = published.assign(value=published["value"].astype(float) / pd.Series(scales, dtype=float))

    def panels(self) -> Iterator[tuple[str, pd.DataFrame]]:
        """Yield the title and the rows of every model and layer."""
        for (model, layer), rows in self.rows.groupby(PLACE, sort=False):
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
