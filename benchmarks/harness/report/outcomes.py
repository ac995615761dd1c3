"""The finished runs of a benchmark, with titles and their order; the paper's numbers."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

import pandas as pd

from benchmarks.harness.base.errors import DefinitionError
from benchmarks.harness.config.catalogue import load_models
from benchmarks.harness.config.kinds import COUNTS, Benchmark
from benchmarks.harness.config.method_rows import resolve_methods
from benchmarks.harness.config.runs import Run
from benchmarks.harness.config.schema import NUMBER_COLUMNS
from benchmarks.harness.config.shared import CONTROL, Definition, Entry, MethodsDefinition
from benchmarks.harness.report.looks import Look, look_of
from benchmarks.harness.report.rendering import RUN_BY, RUNS, Table
from benchmarks.harness.results.bundles import origin_of
from emoe.errors import did_you_mean

_STATUS = ("published", "inferred", "unknown")  # of a published number
SETTING = "|"  # between a row and a setting of it that is a row of its own
ALL = "*"  # in place of a name: a mean over all
_ORIGIN = (
    *("run_id", "protocol", "model", "task", "set", "method", "tuning", "variant", "learning_rate"),
    *("layer", "num_experts", "seed"),
)
# what claims are tested on: a row a number, see Presentation.compared
COMPARED = [
    *("selection", "domain", "metric", "model", "task", "eval_task", "tuning", "method", "setting", "pair", "value")
]


def compared(*parts: pd.DataFrame) -> pd.DataFrame:
    """Join numbers in the columns :data:`COMPARED`; a missing column is empty text."""
    return pd.concat([part.reindex(columns=COMPARED, fill_value="") for part in parts], ignore_index=True)


def compared_nothing() -> pd.DataFrame:
    """Return an empty frame with the columns :data:`COMPARED`."""
    return pd.DataFrame(columns=COMPARED)


def with_runs(table: Table, origins: pd.DataFrame, benchmark: str) -> Table:
    """Name the runs that each row of a table is made of, in the column :data:`~benchmarks.harness.report.rendering.RUNS`.

    These are the runs with the row's names in every column that both have; an empty name and :data:`ALL` stand for all. Where a benchmark chooses
    among finished runs (DomainBed's draws), all that it chose among are named. A row of others' numbers has none. Where runs were merged from
    elsewhere, :data:`~benchmarks.harness.report.rendering.RUN_BY` says who ran how many.

    Args:
        table: with names in its frame.
        origins: ``run_id`` and names, a row or more a run.
        benchmark: whose runs.
    """
    frame = table.frame
    keys = [key for key in _ORIGIN if key in frame and key in origins]
    if not keys or RUNS in frame:  # its maker has named them
        return table
    known = origins[[*dict.fromkeys([*keys, "run_id"])]].astype(str).drop_duplicates()
    runs = [f"{benchmark}/{run}" for run in known["run_id"]]
    places: dict[tuple[str, str], set[int]] = defaultdict(set)
    for place, names in enumerate(known[keys].to_dict("records")):
        for named in names.items():
            places[named].add(place)
    found = []
    for names in frame[keys].fillna("").astype(str).to_dict("records"):
        of_row = set(range(len(runs))).intersection(
            *(places[key, name] for key, name in names.items() if name not in ("", ALL))
        )
        found.append(" ".join(dict.fromkeys(runs[place] for place in sorted(of_row))))
    frame = frame.assign(**{RUNS: found})
    elsewhere = {run: name for run in dict.fromkeys(" ".join(found).split()) if (name := origin_of(run))}
    if elsewhere:
        frame[RUN_BY] = [_run_by(row.split(), elsewhere) for row in found]
    return replace(table, frame=frame)


def _run_by(runs: Sequence[str], elsewhere: Mapping[str, str]) -> str:
    counted = Counter(elsewhere.get(run, "here") for run in runs)
    return ", ".join(f"{name} ({count})" for name, count in counted.items())


def counts(records: pd.DataFrame) -> pd.DataFrame:
    """Select the numbers of parameters of all runs, for :func:`compared`."""
    rows = records[(records["part"] == "model") & records["metric"].isin(COUNTS.metrics)]
    return rows.rename(columns={"seed": "pair"}).assign(domain="model")


class Outcomes:
    """The finished runs of a benchmark that trains; a benchmark adds its numbers.

    Args:
        benchmark: The benchmark.
        runs: The finished runs, in the order of the grid.
        keys: The columns of names that have titles: ``model``, ``method``, ``task``, ``eval_task``, ``set``, or one of
            ``titles``.
        titles: The titles of other columns, by name, in the order of rows.

    Attributes:
        name: The name of the benchmark.
        methods: The definitions of its methods.
        baseline: The method that others are compared with.
        titles: The titles by column and name in the order of rows: models and tasks as they ran, then as defined.
        records: The numbers of all runs; a benchmark sets them.
    """

    records: pd.DataFrame

    def __init__(
        self,
        benchmark: Benchmark[MethodsDefinition, Entry],
        runs: Sequence[Run],
        keys: Sequence[str],
        **titles: Mapping[str, str],
    ) -> None:
        self.benchmark, self.runs, self.name = benchmark, list(runs), benchmark.name
        self.methods = resolve_methods(benchmark.definition)
        self.baseline = benchmark.definition.baseline
        models = _that_ran_first({name: model.title for name, model in load_models().items()}, runs, "model")
        tasks = _that_ran_first(benchmark.kind.task_titles(benchmark.definition, benchmark.tasks), runs, "task")
        methods = {name: method.title for name, method in self.methods.items()}
        known = {"model": models, "method": methods, **dict.fromkeys(("task", "eval_task", "set"), tasks), **titles}
        self.titles: dict[str, Mapping[str, str]] = {key: known[key] for key in keys}

    def title(self, key: str, name: str) -> str:
        """Return the title of a name, or the name if it has none."""
        return self.titles[key].get(name, name)

    @property
    def origins(self) -> pd.DataFrame:
        """Return the runs with the names that rows of tables have, for :func:`with_runs`."""
        return self.records

    @property
    def baseline_title(self) -> str:
        return self.title("method", self.baseline)

    def role(self, method: str) -> str:
        """Return ``baseline``, ``method`` or ``control``; ``method`` of a row that only a paper has."""
        return self.methods[method].role if method in self.methods else "method"

    def look(self, method: str) -> Look:
        """How a method looks in figures; a setting of it looks as the method does."""
        return look_of(self.methods[method.partition(SETTING)[0]])

    def titled(self, frame: pd.DataFrame) -> pd.DataFrame:
        """Add ``<key>_title`` of every key in a frame, and ``is_method``, False of controls."""
        titles = {f"{key}_title": [self.title(key, name) for name in frame[key]] for key in self.titles if key in frame}
        return frame.assign(**titles, is_method=[self.role(name) != CONTROL for name in frame["method"]])

    def order(self, frame: pd.DataFrame, keys: Sequence[str]) -> pd.DataFrame:
        """Sort and title rows: names in the order of their titles, unknown ones last; other columns by value."""

        def sort_key(column: pd.Series) -> pd.Series:
            positions = {name: number for number, name in enumerate(self.titles.get(str(column.name), ()))}
            return column.map(lambda name: positions.get(name, len(positions))) if positions else column

        return self.titled(frame.sort_values(list(keys), key=sort_key, kind="stable").reset_index(drop=True))


def _that_ran_first(titles: Mapping[str, str], runs: Sequence[Run], part: str) -> dict[str, str]:
    """Order titles by name: models or tasks of the runs first, then the others."""
    ran = [run.spec[part]["name"] for run in runs]
    return {name: titles[name] for name in dict.fromkeys([*ran, *titles]) if name in titles}


def read_published(
    benchmark: Benchmark[Definition, Entry], file: str | None = None, of: Sequence[str] | None = None
) -> pd.DataFrame:
    """Read a benchmark's ``paper.csv``: values in points (ranks as they are), each with status and source.

    Args:
        benchmark: The benchmark.
        file: The name of another file in its folder.
        of: The columns before the value, if they are not those of the kind.

    Raises:
        DefinitionError: a wrong column, status, or a value that does not go with its status.
    """
    file = file or benchmark.definition.paper
    columns = [*(of or benchmark.kind.paper_columns), *NUMBER_COLUMNS]
    if not file:
        return pd.DataFrame(columns=columns)
    path = benchmark.folder / file
    numbers = pd.read_csv(path, keep_default_na=False, na_values={"value": [""]})
    if list(numbers.columns) != columns:
        raise DefinitionError(f"{path}: the columns are {list(numbers.columns)}, but must be {columns}")
    for number, row in enumerate(numbers.itertuples(), 2):
        if row.status not in _STATUS:
            raise DefinitionError(f"{path}, line {number}: status is '{row.status}'{did_you_mean(row.status, _STATUS)}")
        if math.isnan(row.value) != (row.status == "unknown"):
            raise DefinitionError(
                f"{path}, line {number}: a value is given if the status is not 'unknown', and only then"
            )
    return numbers


def published_delta(published: pd.DataFrame, baseline: str) -> list[float]:
    """Subtract the baseline's ``value`` of the same ``model`` and ``scope``; nan for the baseline or without one."""
    base = published[published["method"] == baseline].set_index(["model", "scope"])["value"]
    return [
        math.nan if row.method == baseline else row.value - base.get((row.model, row.scope), math.nan)
        for row in published.itertuples()
    ]
