"""Finished measurements in one frame."""

from __future__ import annotations

from typing import Any

import pandas as pd

from benchmarks.harness.config.kinds import Benchmark
from benchmarks.harness.config.runs import Run
from benchmarks.harness.report.outcomes import compared
from benchmarks.harness.results.records import collect
from benchmarks.speed.definition import Measure, MeasurementDefinition


class Measurements:
    """The finished runs of the measurements.

    Attributes:
        name: of the benchmark.
        titles: of the candidates.
        records: every number with the settings of its run; the candidate stands in ``eval_task``.
        origins: the same, as tables name their runs.
    """

    def __init__(self, benchmark: Benchmark[MeasurementDefinition, Measure], runs: list[Run]) -> None:
        self.benchmark, self.name = benchmark, benchmark.name
        self.titles = {name: candidate.title for name, candidate in benchmark.definition.candidates.items()}
        sizes = ("neurons", "hidden")
        settings = [
            {"run_id": run.id, **{key: run.spec["model"].get(key) for key in sizes}, **run.spec["settings"]}
            for run in runs
        ]
        self.records = collect(runs).merge(pd.DataFrame(settings), on="run_id")
        models = {name: model.title for name, model in benchmark.definition.models.items()}
        self.records["model_title"] = self.records["model"].map(models)
        self.origins = self.records

    def wide(self, measure: str) -> pd.DataFrame:
        """A row a run, in the order of the grid, with columns ``<candidate>_<metric>``."""
        rows = self.records[self.records["task"] == measure]
        values = rows.assign(name=rows["eval_task"] + "_" + rows["metric"]).pivot_table(
            index="run_id", columns="name", values="value"
        )
        first = rows.drop_duplicates("run_id").set_index("run_id")
        frame = first.join(values).reset_index()
        for column in ("top_k_fraction", "num_experts", "tokens", "threads", "starts"):
            if column in frame:
                frame[column] = frame[column].map("{:g}".format)
        return frame

    def compared(self) -> pd.DataFrame:
        """Ratios of every setting, for claims."""
        found = self.records[self.records["metric"].str.startswith("ratio")]
        names = {"task": "domain", "eval_task": "method", "run_id": "pair"}
        return compared(found.drop(columns="method").rename(columns=names))

    def ratios(self, **where: Any) -> pd.DataFrame:
        """A row a run and candidate: its settings, ``ratio``, ``ratio_low``, ``ratio_high``."""
        rows = self.records[self.records["task"] == "layer"]
        for column, value in where.items():
            rows = rows[rows[column] == value]
        keys = ["run_id", "eval_task"]
        values = rows.pivot_table(index=keys, columns="metric", values="value", sort=False)
        return rows.drop_duplicates(keys).set_index(keys).join(values).reset_index()
