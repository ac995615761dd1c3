"""The finished runs of a benchmark, with what readers see in place of its names and in which order."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

import pandas as pd

from benchmarks.harness.config.benchmark import COUNTS, Benchmark, Entry, MethodsDefinition, resolve_methods
from benchmarks.harness.config.catalogue import load_models
from benchmarks.harness.config.methods import CONTROL
from benchmarks.harness.config.runs import Run
from benchmarks.harness.report.rendering import RUNS, Table
from benchmarks.harness.report.style import MethodStyle, style_of

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
    """Numbers in the columns :data:`COMPARED`; empty text in those that a part lacks."""
    return pd.concat([part.reindex(columns=COMPARED, fill_value="") for part in parts], ignore_index=True)


def compared_nothing() -> pd.DataFrame:
    """No numbers, in the columns :data:`COMPARED`."""
    return pd.DataFrame(columns=COMPARED)


def with_runs(table: Table, origins: pd.DataFrame, benchmark: str) -> Table:
    """Name the runs that each row of a table is made of, in the column :data:`~benchmarks.harness.report.rendering.RUNS`.

    These are the runs with the row's names in every column that both have; an empty name and :data:`ALL` stand for all. Where a benchmark chooses
    among finished runs (DomainBed's draws), all that it chose among are named. A row of others' numbers has none.

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
    return replace(table, frame=frame.assign(**{RUNS: found}))


def counts(records: pd.DataFrame) -> pd.DataFrame:
    """Numbers of parameters of all runs, as part of :func:`compared`."""
    found = records[(records["part"] == "model") & records["metric"].isin(COUNTS.metrics)]
    return found.rename(columns={"seed": "pair"}).assign(domain="model")


class Outcomes:
    """The finished runs of a benchmark that trains; a benchmark adds what it makes of them.

    Args:
        benchmark: its definition.
        runs: the finished runs, in the order of the grid.
        keys: columns of names that readers see as titles: ``model``, ``method``, ``task``, ``eval_task``, ``set``, or one of ``titles``.
        titles: of other columns: title by name, in the order in which rows stand.

    Attributes:
        name: of the benchmark.
        methods: their definitions.
        baseline: the method that others are compared with.
        titles: by column, title by name in the order of rows: models and tasks as they ran, then as they are defined.
        records: every number of every run; a benchmark gives it.
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
        """What readers see of a name: its title, or itself where it has none."""
        return self.titles[key].get(name, name)

    @property
    def origins(self) -> pd.DataFrame:
        """Which runs there are, by the names that rows of tables have: :func:`with_runs` reads it."""
        return self.records

    @property
    def baseline_title(self) -> str:
        return self.title("method", self.baseline)

    def role(self, method: str) -> str:
        """``baseline``, ``method`` or ``control``; of what a paper alone has, ``method``."""
        return self.methods[method].role if method in self.methods else "method"

    def style(self, method: str) -> MethodStyle:
        """How a method looks in figures; a setting of it looks as the method does."""
        return style_of(self.methods[method.partition(SETTING)[0]])

    def titled(self, frame: pd.DataFrame) -> pd.DataFrame:
        """Rows with ``<key>_title`` of every key that they have, and ``is_method``: whether they are no control."""
        titles = {f"{key}_title": [self.title(key, name) for name in frame[key]] for key in self.titles if key in frame}
        return frame.assign(**titles, is_method=[self.role(name) != CONTROL for name in frame["method"]])

    def order(self, frame: pd.DataFrame, keys: Sequence[str]) -> pd.DataFrame:
        """Titled rows, sorted by columns: names in the order of their titles, unknown ones last; other columns by value."""

        def place(column: pd.Series) -> pd.Series:
            places = {name: number for number, name in enumerate(self.titles.get(str(column.name), ()))}
            return column.map(lambda name: places.get(name, len(places))) if places else column

        return self.titled(frame.sort_values(list(keys), key=place, kind="stable").reset_index(drop=True))


def _that_ran_first(titles: Mapping[str, str], runs: Sequence[Run], part: str) -> dict[str, str]:
    """Titles by name: of the models or tasks of the runs, then of the others."""
    ran = [run.spec[part]["name"] for run in runs]
    return {name: titles[name] for name in dict.fromkeys([*ran, *titles]) if name in titles}
