"""Name the files of the tables and figures of each benchmark and of the claims."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.harness import base as paths
from benchmarks.harness.base import BENCHMARKS, DefinitionError
from benchmarks.harness.config.benchmark import benchmark_names, load_benchmark
from benchmarks.harness.config.names import target_name
from benchmarks.harness.config.suite import Suite

FORMATS = ("csv", "md", "tex", "html")
FIGURE_FORMATS = ("pdf", "png")


@dataclass(frozen=True)
class Artifacts:
    """The names of the tables and figures of a benchmark, of one of its sets, or of the claims.

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
        return target_name(self.benchmark, self.part)

    def stem(self, name: str) -> str:
        """Return the name of a file without ending."""
        return f"{self.name}_{name}" if name else self.name

    def table_files(self, suite: str) -> list[str]:
        folder = paths.RESULTS / suite / "tables"
        return [
            str(folder / f"{self.stem(table)}.{end}") for table in self.tables for end in FORMATS
        ]

    def figure_files(self, suite: str) -> list[str]:
        folder = paths.RESULTS / suite / "figures"
        return [
            str(folder / f"{self.stem(figure)}.{end}")
            for figure in self.figures
            for end in FIGURE_FORMATS
        ]

    def section_file(self, suite: str) -> str:
        """Return the path of the section: the JSON that pages are written from."""
        return str(paths.RESULTS / suite / "sections" / f"{self.name}.json")


CLAIMS = Artifacts("claims", None, [""], ["", "all"])


def numbers_file(suite: str, benchmark: str) -> str:
    """Return the file of the numbers that claims compare."""
    return str(paths.RESULTS / suite / "numbers" / f"{benchmark}.jsonl")


def artifacts_of(benchmark: str, part: str | None = None) -> Artifacts:
    """Return the tables and figures of a benchmark, or of one of its sets."""
    definition = load_benchmark(benchmark).definition
    if part:
        return Artifacts(benchmark, part, definition.set_tables, definition.set_figures)
    return Artifacts(benchmark, part, definition.tables, definition.figures)


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
