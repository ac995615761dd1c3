"""Present finished measurements: a table for each measure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import pandas as pd

from benchmarks.harness.config.benchmark import AnyBenchmark
from benchmarks.harness.config.runs import Run
from benchmarks.harness.report.common import join_claim_numbers
from benchmarks.harness.report.presentation import Presentation
from benchmarks.harness.report.table import Column, Table
from benchmarks.harness.results.records import Record, tabulate_numbers
from benchmarks.speed.definition import MEASURES, MeasurementDefinition


@dataclass(frozen=True)
class Measurements:
    """Hold finished runs, and the frame of all their numbers: ``task`` is the measure, ``eval_task`` the candidate."""

    definition: MeasurementDefinition
    runs: list[Run]
    origins: pd.DataFrame

    def claim_numbers(self) -> pd.DataFrame:
        """Return the ratios of every setting, for claims."""
        ratios = self.origins[self.origins["metric"].str.startswith("ratio")]
        names = {"task": "domain", "eval_task": "method"}
        return join_claim_numbers(ratios.drop(columns="method").rename(columns=names))


def measure_table(name: str, measured: Measurements) -> Table:
    """Make the table of one measure: a row per run, in the order of the grid, with the numbers of each candidate."""
    measure, titles = measured.definition.measures[name], measured.definition.candidates
    keys = ["model", *(key for key in measure.settings.given() if key != "candidates")]
    runs = [run for run in measured.runs if run.task == name]
    rows = [{"run_id": run.id, "model": run.model, **run.spec["settings"]} for run in runs]
    numbers = measured.origins[measured.origins["task"] == name]
    numbers = numbers.assign(column=numbers["eval_task"] + "_" + numbers["metric"])
    values = numbers.pivot(index="run_id", columns="column", values="value")
    frame = pd.DataFrame(rows, columns=["run_id", *keys]).merge(values, on="run_id")
    columns = []
    for key, title in titles.items():
        interval = (f"{key}_ratio_low", f"{key}_ratio_high")
        columns += [
            Column("milliseconds", f"{key}_seconds", title),
            Column("ratio", f"{key}_ratio", f"{title} ÷ dense", interval=interval),
            Column("inertia", f"{key}_inertia", f"Unexplained, {title}"),
        ]
    shown = [
        column for column in columns if column.value in frame and column.value != "dense_ratio"
    ]
    headings = {key: key.replace("_", " ").capitalize() for key in keys}
    return Table(measure.title, measure.caption, headings, shown, frame)


TABLES = {name: partial(measure_table, name) for name in MEASURES}


def present(benchmark: AnyBenchmark, records: Sequence[Record]) -> Presentation:
    """Present finished runs."""
    runs = [record.run for record in records]
    measured = Measurements(benchmark.definition, runs, tabulate_numbers(records))
    return Presentation(benchmark, TABLES, {}, measured)
