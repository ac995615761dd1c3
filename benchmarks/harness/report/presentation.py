"""Present the finished runs of a benchmark: its tables, figures and sentences.

The module ``presentation`` of the benchmark's kind makes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import pandas as pd

from benchmarks.harness.base import distinct
from benchmarks.harness.config.benchmark import AnyBenchmark, load_benchmark
from benchmarks.harness.config.runs import Run
from benchmarks.harness.report.artifacts import Artifacts, artifacts_of
from benchmarks.harness.report.table import RUNS_COLUMN, Table
from benchmarks.harness.results.records import Record

NOTE = (
    "Differences are in points: means over paired seeds with 95 % confidence intervals. Verdicts "
    "use paired t-tests at 5 %, corrected with Holm's procedure over all rows of the table of "
    "tests. With two seeds a test has only two differences: read it as a hint."
)


# columns that link a table row to its runs
_LINKING_COLUMNS = (
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
        draw: The function that writes the figure as PDF and PNG. The last argument is a path
            without ending.
        caption: The caption. Its first sentence is the title.
    """

    draw: Callable[..., None]
    caption: str


@dataclass(frozen=True)
class Presentation:
    """The tables, figures and sentences of a benchmark, or of one of its data sets.

    ``benchmark.yaml`` names the tables and figures that are made.

    Attributes:
        benchmark: The benchmark.
        table_functions: The functions that make tables, by name. They are called with ``outcomes``,
            and with ``data_set`` if there is one.
        figure_functions: The figures by name. Their functions are called with the same arguments,
            and with a path at the end.
        outcomes: The results of the finished runs, mostly :class:`.common.Outcomes`. It has
            ``runs`` and ``origins`` (which link runs to table rows). If claims compare the methods,
            it also has ``claim_numbers()``, a frame of :func:`.common.join_claim_numbers`.
        data_set: The data set, for tables and figures of one set; else None.
        verdicts: Sentences on differences to the dense model.
        note: An explanation of the verdicts.
        optimizer: The optimizer, shown in the report; empty if nothing is trained.
        presentations_of_sets: The presentations of data sets, by name; empty if these have no
            tables of their own.
        caption_note: A sentence for the captions of all tables, such as that only some of the runs
            are finished; empty if all are.
    """

    benchmark: AnyBenchmark
    table_functions: Mapping[str, Callable[..., Table]]
    figure_functions: Mapping[str, Figure]
    outcomes: Any
    data_set: str | None = None
    verdicts: Sequence[str] = ()
    note: str = ""
    optimizer: str = ""
    presentations_of_sets: Mapping[str, Presentation] = field(default_factory=dict)
    caption_note: str = ""

    @property
    def artifacts(self) -> Artifacts:
        """Return the names of the tables and figures."""
        return artifacts_of(self.benchmark.name, self.data_set)

    @cached_property
    def tables(self) -> list[Table]:
        """Make all tables that ``benchmark.yaml`` names, in that order.

        If all models have random weights, tables have no verdicts and no bold numbers.
        """
        return [self._table(name) for name in self.artifacts.tables]

    @property
    def figures(self) -> dict[str, Figure]:
        """Return the figures by file name without ending.

        Their ``draw`` takes only a path. The results, and the data set if there is one, are already
        filled in.
        """
        figures = {}
        for name in self.artifacts.figures:
            figure = self.figure_functions[name]
            draw_to_path = partial(figure.draw, *self._arguments)
            file_name = self.artifacts.stem(name)
            figures[file_name] = Figure(draw=draw_to_path, caption=figure.caption)
        return figures

    @property
    def _arguments(self) -> list[Any]:
        """Return the first arguments of every function that makes a table or figure.

        These are the results, and the data set if there is one.
        """
        if self.data_set:
            return [self.outcomes, self.data_set]
        return [self.outcomes]

    def _table(self, name: str) -> Table:
        """Make the table ``name``, with its file name and the runs behind each row.

        If all models have random weights, the caption says so, and verdicts and bold are removed.
        """
        table = self.table_functions[name](*self._arguments)
        # a table has its own origins if it shows only some of the runs, or other runs
        origins = self.outcomes.origins if table.origins is None else table.origins
        table_with_runs = with_runs(table, origins, self.benchmark.name)
        caption = table.caption
        if self.caption_note:
            caption = f"{self.caption_note}. {caption}"
        complete_table = replace(table_with_runs, name=self.artifacts.stem(name), caption=caption)
        if has_random_weights(self.outcomes.runs):
            return complete_table.with_random_weights_note()
        return complete_table


def with_runs(table: Table, origins: pd.DataFrame, benchmark: str) -> Table:
    """Add the column :data:`~.table.RUNS_COLUMN`: the folders of the runs that a row describes.

    A run belongs to a row if both have the same names in every shared column, such as model and
    method. An empty name in the table matches every run. A row without runs, such as one with only
    published numbers, gets an empty text.

    Args:
        table: The table. It is returned as it is if it has the column, or no shared column.
        origins: The ``run_id`` and the names of each run, in one or more rows per run.
        benchmark: The name of the benchmark, the first part of the folders.
    """
    shared_columns = []
    for column in _LINKING_COLUMNS:
        if column in table.frame and column in origins:
            shared_columns.append(column)
    # some tables already list their runs, and some share no column with the runs
    if RUNS_COLUMN in table.frame or not shared_columns:
        return table

    # `run_id` is also a shared column if each row of the table is a single run
    candidate_columns = distinct(["run_id", *shared_columns])
    # one row per run and combination of names
    candidates = origins[candidate_columns].astype(str).drop_duplicates(ignore_index=True)
    # Map each name of a column to the candidates with this name, as an array of row numbers. Each
    # row of the table then only looks up its names, which is faster than comparing all candidates.
    candidate_rows_by_name = {
        column: candidates.groupby(column).indices for column in shared_columns
    }

    folders_of_rows = []
    names_of_rows = table.frame[shared_columns].fillna("").astype(str)
    for names_of_row in names_of_rows.to_dict("records"):
        run_ids = _matching_runs(names_of_row, candidates, candidate_rows_by_name)
        folders = [f"{benchmark}/{run_id}" for run_id in run_ids]
        folders_of_rows.append(" ".join(folders))
    frame = table.frame.assign(**{RUNS_COLUMN: folders_of_rows})
    return replace(table, frame=frame)


def _matching_runs(
    names_of_row: Mapping[Any, str],
    candidates: pd.DataFrame,
    candidate_rows_by_name: Mapping[str, Mapping[Any, Any]],
) -> Iterable[str]:
    """Return the ids of the runs whose names match a row of a table, each id once.

    Args:
        names_of_row: The names in the row, by column. An empty name matches every run.
        candidates: The ``run_id`` and the names of each run. The index counts from 0.
        candidate_rows_by_name: For each column, a map from a name to the row numbers of the
            ``candidates`` that have it.
    """
    # each name of the row rules out the candidates that do not have it
    matching = set(candidates.index)
    for column, name in names_of_row.items():
        if not name:
            continue
        if name not in candidate_rows_by_name[column]:
            return []
        matching.intersection_update(candidate_rows_by_name[column][name])
    in_order = sorted(matching)
    return candidates["run_id"].iloc[in_order].unique()


def has_random_weights(runs: Sequence[Run]) -> bool:
    """Return True if all models have random weights. Their scores mean nothing."""
    # a measurement has no method, and its weights do not matter
    models = [run.model_spec for run in runs if run.method]
    if not models:
        return False
    # with one of these keys in models.yaml, a model has no pre-trained weights
    return all("config" in model or "random" in model for model in models)


def present(benchmark: AnyBenchmark, records: Sequence[Record]) -> Presentation:
    """Prepare the tables, figures and sentences of a benchmark's finished runs.

    The module ``presentation`` of the benchmark's kind makes them.
    """
    presentation: Presentation = benchmark.checked_presentation().present(benchmark, records)
    return presentation


def check_presentations(benchmarks: Iterable[str]) -> None:
    """Check the names of tables and figures in ``benchmark.yaml``, before the first run starts.

    Raises:
        DefinitionError: The benchmark's kind has no such table or figure.
    """
    for name in benchmarks:
        load_benchmark(name).checked_presentation()
