"""Present finished measurements: a table for each measure."""

from __future__ import annotations

from functools import partial

import pandas as pd

from benchmarks.harness.config.benchmark import AnyBenchmark
from benchmarks.harness.config.runs import Run
from benchmarks.harness.report.common import join_claim_numbers
from benchmarks.harness.report.presentation import Figure, Presentation
from benchmarks.harness.report.table import Column, Table
from benchmarks.harness.results.records import collect
from benchmarks.speed.definition import MEASURES, SETTINGS, MeasurementDefinition


class Measurements:
    """Hold the numbers of finished runs.

    Attributes:
        definition: The content of benchmark.yaml.
        runs: The finished runs.
        origins: Their numbers, a row for each; ``task`` is the measure, ``eval_task`` the candidate.
    """

    def __init__(self, definition: MeasurementDefinition, runs: list[Run]) -> None:
        self.definition, self.runs, self.origins = definition, runs, collect(runs)

    def claim_numbers(self) -> pd.DataFrame:
        """Return the ratios of every setting, for claims."""
        ratios = self.origins[self.origins["metric"].str.startswith("ratio")]
        names = {"task": "domain", "eval_task": "method", "run_id": "pair"}
        return join_claim_numbers(ratios.drop(columns="method").rename(columns=names))


def measure_table(name: str, measured: Measurements) -> Table:
    """Make the table of one measure: a row per run, in the order of the grid, with the numbers of each candidate."""
    definition = measured.definition
    measure = definition.measures[name]
    keys = {key: heading for key, (_, heading) in SETTINGS.items() if key in measure.settings.given()}
    runs = [run for run in measured.runs if run.spec["task"]["name"] == name]
    settings = [
        {"run_id": run.id, "title": definition.models[run.spec["model"]["name"]].title}
        | {key: run.spec["settings"][key] for key in keys}
        for run in runs
    ]
    numbers = measured.origins[measured.origins["task"] == name]
    numbers = numbers.assign(column=numbers["eval_task"] + "_" + numbers["metric"])
    values = numbers.pivot(index="run_id", columns="column", values="value")
    frame = pd.DataFrame(settings, columns=["run_id", "title", *keys]).merge(values, on="run_id", how="left")
    titles = {key: candidate.title for key, candidate in definition.candidates.items()}
    columns = [
        *(Column("milliseconds", f"{key}_seconds", titles[key]) for key in ("dense", "emoe", "kmeans_constrained")),
        *(
            Column("ratio", f"{key}_ratio", title, interval=(f"{key}_ratio_low", f"{key}_ratio_high"))
            for key, title in titles.items()
            if key != "dense" and f"{key}_ratio_low" in frame
        ),
        Column("expected_ratio", "sparse_expected_ratio"),
        Column("memory_ratio", "sparse_memory_ratio"),
        *(Column("inertia", f"{key}_inertia", f"Unexplained, {title}") for key, title in titles.items()),
    ]
    shown = [column for column in columns if column.value in frame]
    return Table(measure.title, measure.caption, {"title": "Model", **keys}, shown, frame)


TABLES = {name: partial(measure_table, name) for name in MEASURES}
FIGURES: dict[str, Figure] = {}


def present(benchmark: AnyBenchmark, runs: list[Run]) -> Presentation:
    """Present finished runs."""
    return Presentation(benchmark, TABLES, FIGURES, Measurements(benchmark.definition, runs))
