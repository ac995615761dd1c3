"""What a benchmark shows of its runs: tables, figures and sentences, by its own ``presentation`` module."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness.definition import Benchmark, DefinitionError
from benchmarks.harness.rendering import Table
from benchmarks.harness.runs import Run

NOTE = (
    "In points, mean over paired seeds with its 95 % confidence interval; verdicts by paired t-tests at 5 %, corrected by Holm's procedure over a method's tasks, not over "
    "methods. With two seeds a test rests on two differences: read it as a hint."
)


@dataclass(frozen=True)
class Presentation:
    """What ``benchmarks/<name>/presentation.py`` gives back from ``present(benchmark, runs)``.

    Attributes:
        tables: as the benchmark's ``tables`` names them.
        verdicts: a sentence each: how do the methods differ from the dense model?
        note: how to read the verdicts.
        draw: writes the benchmark's ``figures``, as PDF and PNG, into a folder.
    """

    tables: list[Table]
    verdicts: list[str]
    note: str
    draw: Callable[[Path], None]


def present(benchmark: Benchmark, runs: list[Run]) -> Presentation:
    """Present the finished runs of a benchmark.

    Raises:
        DefinitionError: the tables are not those that its definition names.
    """
    found: Presentation = importlib.import_module(f"benchmarks.{benchmark.name}.presentation").present(benchmark, runs)
    made = [table.name for table in found.tables]
    named = [f"{benchmark.name}_{table}" for table in benchmark.definition["tables"]]
    if made != named:
        raise DefinitionError(f"{benchmark.file}: 'tables' names {named}, but {made} are made")
    return found
