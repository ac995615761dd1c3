"""What a benchmark shows of its runs: tables, figures and sentences, by its own ``presentation`` module."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.harness.base.errors import DefinitionError
from benchmarks.harness.planning.kinds import Benchmark
from benchmarks.harness.planning.runs import Run
from benchmarks.harness.planning.shared import Definition, Entry
from benchmarks.harness.reporting.rendering import Table

NOTE = (
    "In points, mean over paired seeds with its 95 % confidence interval; verdicts by paired t-tests at 5 %, corrected by Holm's procedure over a method's tasks, not over "
    "methods. With two seeds a test rests on two differences: read it as a hint."
)


@dataclass(frozen=True)
class Part:
    """Tables and figures of one set of a benchmark, named ``<benchmark>_<set>_…``."""

    tables: list[Table]
    draw: Callable[[Path], None]


@dataclass(frozen=True)
class Presentation:
    """What ``benchmarks/<name>/presentation.py`` gives back from ``present(benchmark, runs)``.

    Attributes:
        tables: as the benchmark's ``tables`` names them.
        verdicts: a sentence each: how do the methods differ from the dense model?
        note: how to read the verdicts.
        draw: writes the benchmark's ``figures``, as PDF and PNG, into a folder.
        parts: what is shown of each of its sets alone, by the set's name; empty for benchmarks whose sets are shown together.
    """

    tables: list[Table]
    verdicts: list[str]
    note: str
    draw: Callable[[Path], None] = lambda _: None
    parts: dict[str, Part] = field(default_factory=dict)


def present(benchmark: Benchmark[Definition, Entry], runs: list[Run]) -> Presentation:
    """Present the finished runs of a benchmark, by its own presentation or, where a text benchmark has none, by the usual one.

    Raises:
        DefinitionError: the tables are not those that its definition names.
    """
    own = (benchmark.folder / "presentation.py").exists()
    module = f"benchmarks.{benchmark.name}.presentation" if own else str(benchmark.kind.presentation)
    found: Presentation = importlib.import_module(module).present(benchmark, runs)
    _check(benchmark, "tables", found.tables, benchmark.name)
    for name, part in found.parts.items():
        _check(benchmark, "set_tables", part.tables, f"{benchmark.name}_{name}")
    return found


def _check(benchmark: Benchmark[Definition, Entry], key: str, tables: list[Table], prefix: str) -> None:
    made = [table.name for table in tables]
    named = [f"{prefix}_{table}" for table in getattr(benchmark.definition, key)]
    if made != named:
        raise DefinitionError(f"{benchmark.file}: '{key}' names {named}, but {made} are made")
