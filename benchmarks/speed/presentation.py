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
from benchmarks.speed.definition import MEASURES, MeasurementDefinition, MeasurementSpec


@dataclass(frozen=True)
class Measurements:
    """The finished runs of a benchmark, and all their numbers.

    Attributes:
        definition: The content of benchmark.yaml.
        runs: The finished runs.
        origins: A row for each number of a run, from :func:`tabulate_numbers`. ``task`` is the
            measure, and ``eval_task`` is the measured implementation (candidate).
    """

    definition: MeasurementDefinition
    runs: list[Run]
    origins: pd.DataFrame

    def claim_numbers(self) -> pd.DataFrame:
        """Return the ratios of every setting to the dense time, for claims."""
        is_ratio = self.origins["metric"].str.startswith("ratio")
        ratios = self.origins[is_ratio].drop(columns="method")
        # a claim compares methods in a domain; here it compares the candidates of a measure
        named = ratios.rename(columns={"task": "domain", "eval_task": "method"})
        return join_claim_numbers(named)


def measure_table(name: str, measured: Measurements) -> Table:
    """Make the table of the measure ``name``.

    It has a row per run, in the order of the grid. The columns are the settings of the run and the
    numbers of each measured implementation (candidate).
    """
    measure = measured.definition.measures[name]
    # a row is identified by the model and all settings except its candidates, which are columns
    settings = [key for key in measure.settings.given() if key != "candidates"]
    keys = ["model", *settings]
    settings_of_runs = _settings_of_runs(measured.runs, name, keys)
    numbers_of_runs = _numbers_of_runs(measured.origins, name)
    frame = settings_of_runs.merge(numbers_of_runs, on="run_id")

    shown_columns = []
    for candidate, title in measured.definition.candidates.items():
        for column in _candidate_columns(candidate, title):
            # the ratio of the dense model to itself is always 1, so it is not shown
            is_dense_ratio = column.value == "dense_ratio"
            if column.value in frame and not is_dense_ratio:
                shown_columns.append(column)
    # the heading of `batch_size` is "Batch size"
    headings = {key: key.replace("_", " ").capitalize() for key in keys}
    return Table(
        title=measure.title,
        caption=measure.caption,
        keys=headings,
        columns=shown_columns,
        frame=frame,
    )


def _settings_of_runs(runs: Sequence[Run], measure: str, keys: Sequence[str]) -> pd.DataFrame:
    """Return a row for each run of a measure, with the columns ``run_id`` and ``keys``.

    The keys are ``model`` and names of settings.
    """
    rows = []
    for run in runs:
        if run.task == measure:
            settings = MeasurementSpec.model_validate(run.spec).settings
            rows.append({"run_id": run.id, "model": run.model, **settings.model_dump()})
    return pd.DataFrame(rows, columns=["run_id", *keys])


def _numbers_of_runs(origins: pd.DataFrame, measure: str) -> pd.DataFrame:
    """Return the numbers of a measure, with a row for each run.

    The index is ``run_id``. There is a column for each number of a candidate, such as
    ``sparse_ratio``.

    Args:
        origins: A row for each number of a run, as in :class:`Measurements`.
        measure: The name of the measure.
    """
    numbers = origins[origins["task"] == measure]
    named = numbers.assign(column=numbers["eval_task"] + "_" + numbers["metric"])
    return named.pivot(index="run_id", columns="column", values="value")


def _candidate_columns(candidate: str, title: str) -> list[Column]:
    """Return all columns that a candidate can have in a table: time, ratio, inertia.

    The table of a measure has only those whose numbers the measure records.
    """
    interval = (f"{candidate}_ratio_low", f"{candidate}_ratio_high")
    return [
        Column("milliseconds", f"{candidate}_seconds", title),
        Column("ratio", f"{candidate}_ratio", f"{title} ÷ dense", interval=interval),
        Column("inertia", f"{candidate}_inertia", f"Unexplained, {title}"),
    ]


TABLES = {name: partial(measure_table, name) for name in MEASURES}


def present(benchmark: AnyBenchmark, records: Sequence[Record]) -> Presentation:
    """Make the tables of a benchmark's finished runs: one for each measure. It has no figures."""
    runs = [record.run for record in records]
    measured = Measurements(benchmark.definition, runs, tabulate_numbers(records))
    return Presentation(
        benchmark=benchmark, table_functions=TABLES, figure_functions={}, outcomes=measured
    )
