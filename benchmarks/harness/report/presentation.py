"""Present the finished runs of a benchmark: tables, figures and sentences, from the module of its kind."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas as pd

from benchmarks.harness.config.benchmark import AnyBenchmark, load_benchmark
from benchmarks.harness.config.runs import Run
from benchmarks.harness.config.yaml import check_names
from benchmarks.harness.report.table import RUNS, Table

NOTE = (
    "Differences are in points: means over paired seeds with 95 % confidence intervals. Verdicts use paired t-tests at "
    "5 %, corrected with Holm's procedure over all rows of the table of tests. With two seeds a test has only two "
    "differences: read it as a hint."
)


_ORIGIN = (
    *("run_id", "protocol", "model", "task", "set", "method", "tuning", "variant", "learning_rate"),
    *("layer", "num_experts", "seed"),
)


@dataclass(frozen=True)
class Figure:
    """Pair the function that draws a figure with its caption."""

    draw: Callable[..., None]  # its last argument is a path without ending, to which it writes a PDF and a PNG
    caption: str  # its first sentence is the title


@dataclass(frozen=True)
class Presentation:
    """Hold the tables, figures and sentences of a benchmark or set. Create it with :func:`make`."""

    makers: Mapping[str, Callable[[], Table]]  # functions that make the tables, by file name without ending
    figures: Mapping[str, Figure]  # by file name without ending; their functions take only a path
    verdicts: list[str] = field(default_factory=list)  # sentences on differences to the dense model
    note: str = ""  # explains the verdicts
    optimizer: str = ""  # shown in the report; empty if nothing is trained
    claim_numbers: Callable[[], pd.DataFrame] = pd.DataFrame  # see join_claim_numbers of common; empty without claims
    parts: Mapping[str, Presentation] = field(default_factory=dict)  # by set; empty if sets share their tables

    @cached_property
    def tables(self) -> list[Table]:
        """Make all tables, in order."""
        return [make() for make in self.makers.values()]

    def draw(self, folder: Path) -> None:
        """Write all figures into a folder."""
        for name, figure in self.figures.items():
            figure.draw(folder / name)


def make_presentation(
    benchmark: AnyBenchmark,
    tables: Mapping[str, Callable[..., Table]],
    figures: Mapping[str, Figure],
    outcomes: Any,
    part: str = "",
    **sentences: Any,
) -> Presentation:
    """Make the presentation of a benchmark: the tables and figures that ``benchmark.yaml`` lists.

    Tables of models with random weights have no verdicts and no bold numbers.

    Args:
        benchmark: The benchmark.
        tables: The functions of tables by name. They take ``outcomes``, and ``part`` if it is not empty.
        figures: The figures by name. They take the same, and a path.
        outcomes: The finished ``runs``, and in ``origins`` the records from which rows find their runs.
        part: The set, for tables and figures of one set.
        **sentences: The other attributes of the presentation.
    """
    definition: Any = benchmark.definition
    stem, shown, drawn = benchmark.name, definition.tables, definition.figures
    arguments = [outcomes]
    if part:
        stem, shown, drawn = f"{stem}_{part}", definition.set_tables, definition.set_figures
        arguments.append(part)

    def make_table(name: str) -> Table:
        table = replace(tables[name](*arguments), name=f"{stem}_{name}")
        table = with_runs(table, outcomes.origins if table.origins is None else table.origins, benchmark.name)
        return table.without_verdicts() if has_random_weights(outcomes.runs) else table

    return Presentation(
        {f"{stem}_{name}": partial(make_table, name) for name in shown},
        {f"{stem}_{name}": Figure(partial(figures[name].draw, *arguments), figures[name].caption) for name in drawn},
        **sentences,
    )


def with_runs(table: Table, origins: pd.DataFrame, benchmark: str) -> Table:
    """Add the column :data:`~benchmarks.harness.report.table.RUNS` with the run folders of each row of a table.

    A run belongs to a row if both have the same names in every shared column. An empty name matches every name. A
    benchmark that chooses among finished runs (DomainBed's draws) lists all candidates; a row of published
    numbers lists none. ``origins`` has the ``run_id`` and the names, one or more rows per run.
    """
    keys = [key for key in _ORIGIN if key in table.frame and key in origins]
    if not keys or RUNS in table.frame:  # the table already lists its runs
        return table
    tried = origins[[*dict.fromkeys([*keys, "run_id"])]].astype(str).drop_duplicates(ignore_index=True)
    numbers = {key: tried.groupby(key).indices for key in keys}  # of the runs with a name
    folders = []
    for names in table.frame[keys].fillna("").astype(str).to_dict("records"):
        matching = (numbers[key].get(name, ()) for key, name in names.items() if name)
        of_row = sorted(set(tried.index).intersection(*matching))
        folders.append(" ".join(f"{benchmark}/{run}" for run in tried["run_id"].iloc[of_row].unique()))
    return replace(table, frame=table.frame.assign(**{RUNS: folders}))


def has_random_weights(runs: Sequence[Run]) -> bool:
    """Return True if all models have random weights. Their scores mean nothing."""
    models = [run.spec["model"] for run in runs if run.spec["method"]["name"]]  # a measurement has no method
    return bool(models) and all({"config", "random"} & set(model) for model in models)


def present(benchmark: AnyBenchmark, runs: list[Run]) -> Presentation:
    """Present the finished runs of a benchmark."""
    presentation: Presentation = _module(benchmark).present(benchmark, runs)
    return presentation


def check_presentations(benchmarks: Iterable[str]) -> None:
    """Check the names of tables and figures in ``benchmark.yaml`` before the first run starts."""
    for name in benchmarks:
        _module(load_benchmark(name))


def _module(benchmark: AnyBenchmark) -> ModuleType:
    """Return the module that presents a benchmark, and check the names of its tables and figures."""
    module = benchmark.presentation()
    ablations = getattr(benchmark.definition, "ablations", {})
    for key in ("tables", "figures", "set_tables", "set_figures"):
        valid = [*getattr(module, key.upper(), ()), *ablations]
        check_names(f"{benchmark.file}: '", key, getattr(benchmark.definition, key, ()), valid)
    return module
