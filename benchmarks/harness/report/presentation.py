"""What a benchmark shows of its runs: tables, figures and sentences, by its own ``presentation`` module."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.harness.config.kinds import Benchmark
from benchmarks.harness.config.runs import Run
from benchmarks.harness.config.schema import check_names
from benchmarks.harness.config.shared import Definition, Entry
from benchmarks.harness.report.outcomes import compared_nothing, with_runs
from benchmarks.harness.report.rendering import Table

NOTE = (
    "In points, mean over paired seeds with its 95 % confidence interval; verdicts by paired t-tests at 5 %, corrected by Holm's procedure over a method's tasks, not over "
    "methods. With two seeds a test rests on two differences: read it as a hint."
)


@dataclass(frozen=True)
class Presentation:
    """What ``benchmarks/<name>/presentation.py`` gives back from ``present(benchmark, runs)``; :func:`make` makes it.

    Attributes:
        makers: what makes each of its ``tables``, or ``set_tables``, by the name of the file without ending.
        figures: what writes each of its ``figures``, or ``set_figures``, as PDF and PNG, by the name of the file without ending.
        verdicts: a sentence each: how do the methods differ from the dense model?
        note: how to read the verdicts.
        compared: gives the numbers that claims are tested on: a row a number, with the columns :data:`~benchmarks.harness.report.outcomes.COMPARED`.
        parts: what is shown of each of its sets alone, by the set's name; empty for benchmarks whose sets are shown together.
    """

    makers: Mapping[str, Callable[[], Table]]
    figures: dict[str, Callable[[Path], None]]
    verdicts: list[str] = field(default_factory=list)
    note: str = ""
    compared: Callable[[], pd.DataFrame] = compared_nothing
    parts: dict[str, Presentation] = field(default_factory=dict)

    @cached_property
    def tables(self) -> list[Table]:
        """All tables, in order; made when they are first asked for, since claims and figures need none."""
        return [make() for make in self.makers.values()]

    def draw(self, folder: Path) -> None:
        """Write all figures into a folder."""
        for name, draw in self.figures.items():
            draw(folder / name)


def make(
    benchmark: Benchmark[Definition, Entry],
    tables: Mapping[str, Callable[..., Table]],
    figures: Mapping[str, Callable[..., None]],
    outcomes: Any,
    *of: Any,
    part: str = "",
    **said: Any,
) -> Presentation:
    """Make the tables and figures that a definition names, and name their files.

    Args:
        benchmark: whose definition.
        tables: by name, what makes it of ``outcomes`` and ``of``.
        figures: by name, what draws it of these and a path without ending.
        outcomes: the finished runs, with their ``origins``.
        of: what else is given to those that make tables and figures.
        part: a set that is shown alone, ``<benchmark>_<set>_…``, by ``set_tables`` and ``set_figures``.
        said: ``verdicts``, ``note``, ``compared`` and ``parts``.

    Raises:
        DefinitionError: it names what there is not.
    """
    stem, prefix = (f"{benchmark.name}_{part}", "set_") if part else (benchmark.name, "")
    named = []
    for key, known in ((f"{prefix}tables", tables), (f"{prefix}figures", figures)):
        named.append(list(getattr(benchmark.definition, key)))
        check_names(f"{benchmark.file}: '", key, named[-1], known)

    def table(name: str) -> Table:
        made = replace(tables[name](outcomes, *of), name=f"{stem}_{name}")
        return with_runs(made, outcomes.origins, benchmark.name)

    return Presentation(
        {f"{stem}_{name}": partial(table, name) for name in named[0]},
        {f"{stem}_{name}": partial(figures[name], outcomes, *of) for name in named[1]},
        **said,
    )


def present(benchmark: Benchmark[Definition, Entry], runs: list[Run]) -> Presentation:
    """Present the finished runs of a benchmark, by its own presentation or, where a text benchmark has none, by the usual one.

    Raises:
        DefinitionError: its definition names tables or figures that are not made.
    """
    own = (benchmark.folder / "presentation.py").exists()
    module = f"benchmarks.{benchmark.name}.presentation" if own else str(benchmark.kind.presentation)
    presented: Presentation = importlib.import_module(module).present(benchmark, runs)
    return presented
