"""Name the files of the tables and figures of each benchmark and of the claims, and the code that makes them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness import base as paths
from benchmarks.harness.base import BENCHMARKS
from benchmarks.harness.config.benchmark import benchmark_names, load_benchmark

FORMATS = ("csv", "md", "tex", "html")
FIGURE_FORMATS = ("pdf", "png")


@dataclass(frozen=True)
class Artifacts:
    """Name the tables and figures of a benchmark, of one of its sets, or of the claims.

    Attributes:
        benchmark: The name of the benchmark.
        part: The name of the set; None for tables over all sets.
        tables: The names of the tables.
        figures: The names of the figures.
    """

    benchmark: str
    part: str | None
    tables: list[str]
    figures: list[str]

    @property
    def name(self) -> str:
        """Return the prefix of the files, which is also the target of the workflow."""
        return f"{self.benchmark}_{self.part}" if self.part else self.benchmark

    def stem(self, name: str) -> str:
        """Return the name of a file without ending."""
        return f"{self.name}_{name}" if name else self.name

    def table_files(self, suite: str) -> list[str]:
        folder = paths.RESULTS / suite / "tables"
        return [str(folder / f"{self.stem(table)}.{end}") for table in self.tables for end in FORMATS]

    def figure_files(self, suite: str) -> list[str]:
        folder = paths.RESULTS / suite / "figures"
        return [str(folder / f"{self.stem(figure)}.{end}") for figure in self.figures for end in FIGURE_FORMATS]


CLAIMS = Artifacts("claims", None, [""], ["", "all"])


def artifacts_of(benchmark: str, part: str | None = None) -> Artifacts:
    """Return the tables and figures of a benchmark, or of one of its sets."""
    definition = load_benchmark(benchmark).definition
    if part:
        return Artifacts(benchmark, part, definition.set_tables, definition.set_figures)
    return Artifacts(benchmark, part, definition.tables, definition.figures)


def table_sources(*benchmarks: str) -> list[str]:
    """List the source files of the benchmarks' tables, besides the numbers of runs.

    These are code, definitions and published numbers of the benchmarks and of their kinds, the harness's results and
    report, and the lists of models, methods, metrics, claims and paper items.
    """
    kinds = [cls.__module__.split(".") for name in benchmarks for cls in type(load_benchmark(name)).__mro__]
    folders = {"harness/report", "harness/results", *benchmarks}
    folders |= {module[1] for module in kinds if module[0] == BENCHMARKS.name and module[1] != "harness"}
    patterns = ["*.yaml", "harness/report/table.html.j2"]
    patterns += [f"{folder}/{files}" for folder in sorted(folders) for files in ("*.py", "**/*.csv")]
    definitions = dict.fromkeys(file for name in benchmarks for file in _definitions(name))
    return [*_files(*patterns), *map(os.path.relpath, definitions)]


def _definitions(name: str) -> list[Path]:
    """List the YAML files of a benchmark, its file of tasks, and those of the benchmark that it evaluates."""
    loaded = load_benchmark(name)
    files = sorted(loaded.folder.glob("*.yaml"))
    if tasks := getattr(loaded.definition, "tasks", None):
        files.append((loaded.folder / tasks).resolve())
    return files + (_definitions(loaded.evaluates) if loaded.evaluates else [])


def page_sources() -> list[str]:
    """List the template, style and script of the pages, and the suite's file; its name is a wildcard of Snakemake."""
    return [*_files("harness/report/page.*"), os.path.relpath(paths.CONFIG / "{suite}.yaml")]


def _files(*patterns: str) -> list[str]:
    return [os.path.relpath(file) for pattern in patterns for file in sorted(BENCHMARKS.glob(pattern))]


def all_artifacts() -> list[Artifacts]:
    """Return the tables and figures of all benchmarks and all their sets, whether a suite runs them or not."""
    benchmarks = {name: load_benchmark(name) for name in benchmark_names()}
    return [
        artifacts_of(name, part)
        for name, benchmark in benchmarks.items()
        for part in (None, *(benchmark.tasks if benchmark.has_set_tables else ()))
    ]
