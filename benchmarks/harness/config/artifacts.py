"""Name the files of the tables and figures of each benchmark and of the claims, and the code that makes them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness import base as paths
from benchmarks.harness.base import BENCHMARKS, DefinitionError
from benchmarks.harness.config.benchmark import benchmark_names, load_benchmark
from benchmarks.harness.config.methods import plugin_files
from benchmarks.harness.config.suite import Suite

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

    def section_file(self, suite: str) -> str:
        """Return the path of the section: the JSON that pages are written from."""
        return str(paths.RESULTS / suite / "sections" / f"{self.name}.json")


_LISTS = ("models.yaml", "metrics.yaml", "methods.yaml", "paper.yaml")
# files in these rooms that shape only the claims, or no table
_OF_CLAIMS = ("harness/config/claims.py", "harness/report/claims.py", "harness/results/claims.py")
_NO_TABLES = (
    *("harness/config/listing.py", "harness/config/schemas.py", "harness/report/page.py", "__main__.py"),
    *("harness/results/check.py", "harness/results/mlflow.py", "harness/results/reference.py"),
)
# the rooms of the harness that shape tables
_HARNESS = ("harness/config", "harness/report", "harness/results", "harness/sources")
CLAIMS = Artifacts("claims", None, [""], ["", "all"])


def records_file(suite: str, benchmark: str, part: str | None = None) -> Path:
    """Return the file of the records of a benchmark's runs, or of the runs of one of its parts."""
    return paths.RESULTS / suite / "records" / f"{artifacts_of(benchmark, part).name}.jsonl"


def numbers_file(suite: str, benchmark: str) -> str:
    """Return the file of the numbers that claims compare."""
    return str(paths.RESULTS / suite / "numbers" / f"{benchmark}.jsonl")


def artifacts_of(benchmark: str, part: str | None = None) -> Artifacts:
    """Return the tables and figures of a benchmark, or of one of its sets."""
    definition = load_benchmark(benchmark).definition
    if part:
        return Artifacts(benchmark, part, definition.set_tables, definition.set_figures)
    return Artifacts(benchmark, part, definition.tables, definition.figures)


def table_sources(*benchmarks: str) -> list[str]:
    """List the files that shape the benchmarks' tables, besides the records of runs.

    These are the code of the harness (but not of training), of the benchmarks' kinds and of plugins, the definitions,
    the published numbers, and the lists of models, methods, metrics, claims and paper items.
    """
    folders = {*_HARNESS, *benchmarks}
    for name in benchmarks:
        for cls in type(load_benchmark(name)).__mro__:
            module = cls.__module__.split(".")
            if module[0] == BENCHMARKS.name and module[1] != "harness":
                folders.add(module[1])
    patterns = [*_LISTS, "*.py", "harness/*.py", "harness/report/table.html.j2"]
    for folder in sorted(folders):
        patterns += [f"{folder}/*.py", f"{folder}/**/*.csv"]
    definitions: dict[Path, None] = {}
    for name in benchmarks:
        definitions |= dict.fromkeys(_definitions(name))
    shape_nothing = set(_files(*_OF_CLAIMS, *_NO_TABLES))
    files = [file for file in _files(*patterns) if file not in shape_nothing]
    return [*files, *map(os.path.relpath, definitions), *map(os.path.relpath, plugin_files())]


def _definitions(name: str) -> list[Path]:
    """List the YAML files of a benchmark, its file of tasks, and those of the benchmark that it evaluates."""
    loaded = load_benchmark(name)
    files = sorted(loaded.folder.glob("*.yaml"))
    if tasks := getattr(loaded.definition, "tasks", None):
        files.append((loaded.folder / tasks).resolve())
    return files + (_definitions(loaded.evaluates) if loaded.evaluates else [])


def record_sources() -> list[str]:
    """List the code that shapes the files of records."""
    return _files("harness/results/records.py", "harness/results/content.py")


def claim_sources() -> list[str]:
    """List the claims, and the code that shapes their table and figures alone."""
    return _files("claims.yaml", *_OF_CLAIMS)


def page_sources() -> list[str]:
    """List the code, template, style and script of the pages, and the paper's items."""
    return _files("harness/report/page.*", "harness/report/paper.py", "harness/config/paper_items.py", "paper.yaml")


def _files(*patterns: str) -> list[str]:
    return [os.path.relpath(file) for pattern in patterns for file in sorted(BENCHMARKS.glob(pattern))]


def all_artifacts() -> list[Artifacts]:
    """Return the tables and figures of all benchmarks and all their sets, whether a suite runs them or not.

    Raises:
        DefinitionError: A benchmark has the name of another benchmark's set, so the workflow cannot tell them apart.
    """
    shown = []
    for name in benchmark_names():
        benchmark = load_benchmark(name)
        shown.append(artifacts_of(name))
        if benchmark.has_set_tables:
            shown += [artifacts_of(name, part) for part in benchmark.tasks]
    for of_set in shown:
        if of_set.part and of_set.name in benchmark_names():
            raise DefinitionError(
                f"{BENCHMARKS / of_set.name}: '{of_set.name}' is also the target of the set '{of_set.part}' of "
                f"'{of_set.benchmark}'; choose another name"
            )
    return shown


def suite_artifacts(suite: Suite) -> list[Artifacts]:
    """Return the tables and figures of a suite's benchmarks, and of their sets."""
    artifacts = []
    for name in suite.settings.benchmarks:
        artifacts += [artifacts_of(name, part) for part in (None, *suite.parts(name))]
    return artifacts
