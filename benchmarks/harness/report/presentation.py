"""Present the finished runs of a benchmark: its tables, figures and sentences.

The module ``presentation`` of the benchmark's kind makes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import pandas as pd

from benchmarks.harness.config.benchmark import AnyBenchmark, load_benchmark
from benchmarks.harness.config.runs import Run
from benchmarks.harness.report.artifacts import Artifacts, artifacts_of
from benchmarks.harness.report.table import RUNS, Table
from benchmarks.harness.results.records import Record

NOTE = (
    "Differences are in points: means over paired seeds with 95 % confidence intervals. Verdicts "
    "use paired t-tests at 5 %, corrected with Holm's procedure over all rows of the table of "
    "tests. With two seeds a test has only two differences: read it as a hint."
)


# columns that link a table row to its runs
_ORIGIN = (
    "run_id",
    "protocol",
    "model",
    "task",
    "method",
    "tuning",
    "variant",
    "learning_rate",
    "layer",
    "num_experts",
    "seed",
)


@dataclass(frozen=True)
class Figure:
    """A figure that is not drawn yet.

    Attributes:
        draw: Writes the figure as PDF and PNG. Its last argument is a path without ending.
        caption: The caption. Its first sentence is the title.
    """

    draw: Callable[..., None]
    caption: str


@dataclass(frozen=True)
class Presentation:
    """The tables, figures and sentences of a benchmark, or of one of its sets.

    ``benchmark.yaml`` lists the tables and figures.

    Attributes:
        benchmark: The benchmark.
        table_functions: The functions that make tables, by name. Their arguments are ``outcomes``,
            and ``part`` if there is one.
        figure_functions: The figures by name. Their functions also take a path.
        outcomes: The finished ``runs``, and ``origins``, the run ids with the names of rows. If
            claims compare the benchmark's methods, ``claim_numbers()`` returns
            :func:`.common.join_claim_numbers`.
        part: The set, for tables and figures of one set; else None.
        verdicts: Sentences on differences to the dense model.
        note: An explanation of the verdicts.
        optimizer: The optimizer, shown in the report; empty if nothing is trained.
        parts: The presentations of sets; empty if sets share their tables.
    """

    benchmark: AnyBenchmark
    table_functions: Mapping[str, Callable[..., Table]]
    figure_functions: Mapping[str, Figure]
    outcomes: Any
    part: str | None = None
    verdicts: Sequence[str] = ()
    note: str = ""
    optimizer: str = ""
    parts: Mapping[str, Presentation] = field(default_factory=dict)

    @property
    def artifacts(self) -> Artifacts:
        """Return the names of the tables and figures."""
        return artifacts_of(self.benchmark.name, self.part)

    @cached_property
    def tables(self) -> list[Table]:
        """Make all tables, in order.

        Tables of models with random weights have no verdicts and no bold numbers.
        """
        return [self._table(name) for name in self.artifacts.tables]

    @property
    def figures(self) -> dict[str, Figure]:
        """Return the figures by file name without ending; their functions take only a path."""
        figures = {}
        for name in self.artifacts.figures:
            figure = self.figure_functions[name]
            draw_to_path = partial(figure.draw, *self._arguments)
            figures[self.artifacts.stem(name)] = replace(figure, draw=draw_to_path)
        return figures

    @property
    def _arguments(self) -> list[Any]:
        """Return the first arguments of the functions of tables and figures."""
        if self.part:
            return [self.outcomes, self.part]
        return [self.outcomes]

    def _table(self, name: str) -> Table:
        """Make the table with this name, with its file name and the runs of its rows."""
        made = self.table_functions[name](*self._arguments)
        named = replace(made, name=self.artifacts.stem(name))
        # a table of other runs brings its own
        origins = self.outcomes.origins if named.origins is None else named.origins
        table = with_runs(named, origins, self.benchmark.name)
        if has_random_weights(self.outcomes.runs):
            return table.with_random_weights_note()
        return table


def with_runs(table: Table, origins: pd.DataFrame, benchmark: str) -> Table:
    """Add the column :data:`~.table.RUNS` with the run folders of each row of a table.

    A run belongs to a row if both have the same names in every shared column, such as model and
    method. An empty name matches every name. A benchmark that chooses among finished runs
    (DomainBed's draws) lists all candidates, and a row of published numbers lists none.

    Args:
        table: The table.
        origins: The ``run_id`` and the names of each run, one or more rows per run.
        benchmark: The name of the benchmark.
    """
    keys = [key for key in _ORIGIN if key in table.frame and key in origins]
    if not keys:
        return table
    # some tables already list their runs
    if RUNS in table.frame:
        return table

    columns = list(keys)
    if "run_id" not in columns:
        columns.append("run_id")
    candidates = origins[columns].astype(str).drop_duplicates(ignore_index=True)

    # for each column, the places of the candidates with each name: an index, for many rows
    places_by_name = {key: candidates.groupby(key).indices for key in keys}
    folders = []
    for names in table.frame[keys].fillna("").astype(str).to_dict("records"):
        matching = set(candidates.index)
        for key, name in names.items():
            if name:
                matching.intersection_update(places_by_name[key].get(name, ()))
        runs = candidates["run_id"].iloc[sorted(matching)].unique()
        folders.append(" ".join(f"{benchmark}/{run}" for run in runs))
    return replace(table, frame=table.frame.assign(**{RUNS: folders}))


def has_random_weights(runs: Sequence[Run]) -> bool:
    """Return True if all models have random weights. Their scores mean nothing."""
    # a measurement has no method, and its weights do not matter
    models = [run.spec["model"] for run in runs if run.method]
    if not models:
        return False
    # transformers' models are built from a configuration, and timm's with 'random'
    return all("config" in model or "random" in model for model in models)


def present(benchmark: AnyBenchmark, records: Sequence[Record]) -> Presentation:
    """Present the finished runs of a benchmark."""
    presentation: Presentation = benchmark.checked_presentation().present(benchmark, records)
    return presentation


def check_presentations(benchmarks: Iterable[str]) -> None:
    """Check the names of tables and figures in ``benchmark.yaml`` before the first run starts."""
    for name in benchmarks:
        load_benchmark(name).checked_presentation()
