"""Name the files of the tables and figures of each benchmark and of the claims."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.harness import base as paths
from benchmarks.harness.base import BENCHMARKS, DefinitionError
from benchmarks.harness.config.benchmark import benchmark_names, load_benchmark
from benchmarks.harness.config.catalogue import load_metrics
from benchmarks.harness.config.names import target_name
from benchmarks.harness.config.suite import Suite
from benchmarks.harness.report.claims import claimed_benchmarks, load_claims

FORMATS = ("csv", "md", "tex", "html")
FIGURE_FORMATS = ("pdf", "png")
NARROW = "narrow"  # the name of a figure for telephones


@dataclass(frozen=True)
class Artifacts:
    """The names of the tables and figures of a benchmark, of one of its sets, or of the claims.

    A set is a data set of a benchmark, such as PACS of DomainBed.

    Attributes:
        benchmark: The name of the benchmark.
        data_set: The name of the set. None for tables and figures over all sets.
        tables: The names of the tables.
        figures: The names of the figures.
    """

    benchmark: str
    data_set: str | None
    tables: list[str]
    figures: list[str]

    @property
    def name(self) -> str:
        """Return the prefix of the file names, which is also the target of the workflow."""
        return target_name(self.benchmark, self.data_set)

    def stem(self, name: str) -> str:
        """Return the file name of a table or figure, without ending."""
        if not name:
            return self.name
        return f"{self.name}_{name}"

    def table_files(self, suite_name: str) -> list[str]:
        """List the files of all tables, in every format."""
        folder = paths.RESULTS / suite_name / "tables"
        return self._files(folder, self.tables, FORMATS)

    def figure_files(self, suite_name: str) -> list[str]:
        """List the files of all figures, in every format."""
        folder = paths.RESULTS / suite_name / "figures"
        return self._files(folder, self.figures, FIGURE_FORMATS)

    def _files(self, folder: Path, names: Sequence[str], formats: Sequence[str]) -> list[str]:
        """List the paths of the named tables or figures in a folder, one path per format."""
        files = []
        for name in names:
            stem = self.stem(name)
            for ending in formats:
                files.append(str(folder / f"{stem}.{ending}"))
        return files

    def section_file(self, suite_name: str) -> str:
        """Return the path of the section file: the JSON file that pages are written from."""
        return str(paths.RESULTS / suite_name / "sections" / f"{self.name}.json")


# the table `claims`, and the figures of the headline tests: `claims` and `claims_narrow`
CLAIMS = Artifacts("claims", None, [""], ["", NARROW])


def remake_advice(path: Path, suite_name: str) -> str:
    """Return the advice of error messages on how to remake a damaged file of a suite."""
    # without --force, Snakemake keeps a damaged file
    return f"`snakemake --cores all --force {path} --config suite={suite_name}` makes it again"


def claim_artifacts(suite: Suite) -> Artifacts:
    """Return the names of the table and all figures of the claims.

    Besides the figures of the headline tests, each benchmark with a test in points has a figure of
    all its tests, such as ``claims_glue``.
    """
    return replace(CLAIMS, figures=[*CLAIMS.figures, *claimed_in_points(suite)])


def claimed_in_points(suite: Suite) -> list[str]:
    """List a suite's benchmarks for which a claim compares scores in percent.

    The differences of such scores are in points.
    """
    metrics = load_metrics()
    in_points = set()
    for claim in load_claims().values():
        for test in claim.tests:
            if test.compare and metrics[test.compare.metric].unit == "%":
                in_points.add(test.compare.benchmark)
    return [name for name in claimed_benchmarks(suite) if name in in_points]


def numbers_file(suite_name: str, benchmark: str) -> str:
    """Return the path of the JSON-lines file for the numbers of a benchmark that claims compare."""
    return str(paths.RESULTS / suite_name / "numbers" / f"{benchmark}.jsonl")


def artifacts_of(benchmark: str, data_set: str | None = None) -> Artifacts:
    """Return the names of the tables and figures of a benchmark, or of one of its sets."""
    definition = load_benchmark(benchmark).definition
    if data_set:
        return Artifacts(benchmark, data_set, definition.set_tables, definition.set_figures)
    return Artifacts(benchmark, None, definition.tables, definition.figures)


def all_artifacts() -> list[Artifacts]:
    """List the tables and figures of all benchmarks, even if no suite runs them.

    Some benchmarks also have tables of each of their data sets, which are listed apart.

    Raises:
        DefinitionError: A benchmark has the target name of another benchmark's set, so the
            workflow cannot tell them apart.
    """
    listed = []
    for name in benchmark_names():
        benchmark = load_benchmark(name)
        listed.append(artifacts_of(name))
        if benchmark.has_set_tables:
            for data_set in benchmark.tasks:
                listed.append(artifacts_of(name, data_set))

    # the workflow would write a benchmark and a set with the same target to the same files
    for artifacts in listed:
        is_of_set = artifacts.data_set is not None
        if is_of_set and artifacts.name in benchmark_names():
            raise DefinitionError(
                f"{BENCHMARKS / artifacts.name}: '{artifacts.name}' is also the target of the set "
                f"'{artifacts.data_set}' of '{artifacts.benchmark}'; choose another name"
            )
    return listed


def suite_artifacts(suite: Suite) -> list[Artifacts]:
    """List the tables and figures of a suite's benchmarks, and of their sets."""
    artifacts = []
    for name in suite.settings.benchmarks:
        artifacts.append(artifacts_of(name))
        for data_set in suite.sets_with_tables(name):
            artifacts.append(artifacts_of(name, data_set))
    return artifacts
