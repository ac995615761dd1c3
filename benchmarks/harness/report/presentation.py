"""Present the finished runs of a benchmark: tables, figures and sentences, from the module of its kind."""

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
    "Differences are in points: means over paired seeds with 95 % confidence intervals. Verdicts use paired t-tests at "
    "5 %, corrected with Holm's procedure over all rows of the table of tests. With two seeds a test has only two "
    "differences: read it as a hint."
)


# columns that link a table row to its runs
_ORIGIN = (
    *("run_id", "protocol", "model", "task", "method", "tuning", "variant", "learning_rate"),
    *("layer", "num_experts", "seed"),
)


@dataclass(frozen=True)
class Figure:
    """Pair the function that draws a figure with its caption."""

    draw: Callable[
        ..., None
    ]  # its last argument is a path without ending, to which it writes a PDF and a PNG
    caption: str  # its first sentence is the title


@dataclass(frozen=True)
class Presentation:
    """Present a benchmark, or one of its sets: the tables and figures that ``benchmark.yaml`` lists, and sentences.

    Attributes:
        benchmark: The benchmark.
        table_functions: The table functions by name. Arguments: ``outcomes``, and ``part`` if there is one.
        figure_functions: The figures by name. Their functions also take a path.
        outcomes: The finished ``runs``, and ``origins``, the run ids with the names of rows. If claims
            compare the benchmark's methods, ``claim_numbers()`` returns :func:`.common.join_claim_numbers`.
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
        """Make all tables, in order. Tables of models with random weights have no verdicts and no bold numbers."""
        return [self._table(name) for name in self.artifacts.tables]

    @property
    def figures(self) -> dict[str, Figure]:
        """Return the figures by file name without ending; their functions take only a path."""
        figures = {
            self.artifacts.stem(name): self.figure_functions[name]
            for name in self.artifacts.figures
        }
        return {
            file: replace(figure, draw=partial(figure.draw, *self._arguments))
            for file, figure in figures.items()
        }

    @property
    def _arguments(self) -> list[Any]:
        return [self.outcomes, self.part] if self.part else [self.outcomes]

    def _table(self, name: str) -> Table:
        table = replace(
            self.table_functions[name](*self._arguments), name=self.artifacts.stem(name)
        )
        origins = self.outcomes.origins if table.origins is None else table.origins
        table = with_runs(table, origins, self.benchmark.name)
        return table.with_random_weights_note() if has_random_weights(self.outcomes.runs) else table


def with_runs(table: Table, origins: pd.DataFrame, benchmark: str) -> Table:
    """Add the column :data:`~benchmarks.harness.report.table.RUNS` with the run folders of each row of a table.

    A run belongs to a row if both have the same names in every shared column. An empty name matches every name. A
    benchmark that chooses among finished runs (DomainBed's draws) lists all candidates; a row of published
    numbers lists none. ``origins`` has the ``run_id`` and the names, one or more rows per run.
    """
    keys = [key for key in _ORIGIN if key in table.frame and key in origins]
    if not keys or RUNS in table.frame:  # the table already lists its runs
        return table
    tried = (
        origins[[*dict.fromkeys([*keys, "run_id"])]].astype(str).drop_duplicates(ignore_index=True)
    )
    numbers = {key: tried.groupby(key).indices for key in keys}  # indices of runs by name
    folders = []
    for names in table.frame[keys].fillna("").astype(str).to_dict("records"):
        matching = (numbers[key].get(name, ()) for key, name in names.items() if name)
        of_row = sorted(set(tried.index).intersection(*matching))
        folders.append(
            " ".join(f"{benchmark}/{run}" for run in tried["run_id"].iloc[of_row].unique())
        )
    return replace(table, frame=table.frame.assign(**{RUNS: folders}))


def has_random_weights(runs: Sequence[Run]) -> bool:
    """Return True if all models have random weights. Their scores mean nothing."""
    models = [run.spec["model"] for run in runs if run.method]  # a measurement has no method
    return bool(models) and all({"config", "random"} & set(model) for model in models)


def present(benchmark: AnyBenchmark, records: Sequence[Record]) -> Presentation:
    """Present the finished runs of a benchmark."""
    presentation: Presentation = benchmark.checked_presentation().present(benchmark, records)
    return presentation


def check_presentations(benchmarks: Iterable[str]) -> None:
    """Check the names of tables and figures in ``benchmark.yaml`` before the first run starts."""
    for name in benchmarks:
        load_benchmark(name).checked_presentation()
