"""What a benchmark shows: the files of its tables and figures, and those of the claims."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from benchmarks.harness.base import paths
from benchmarks.harness.base.paths import BENCHMARKS
from benchmarks.harness.config.benchmark import benchmark_names, load_benchmark

FORMATS = ("csv", "md", "tex", "html")
FIGURE_FORMATS = ("pdf", "png")


@dataclass(frozen=True)
class Artifacts:
    """Tables and figures that are made together: a benchmark's own, or those of one of its sets.

    Attributes:
        benchmark: the benchmark.
        part: the set; None for what is over all of them.
        tables: names of the tables.
        figures: names of the figures, with their captions.
    """

    benchmark: str
    part: str | None
    tables: list[str]
    figures: dict[str, str]

    @property
    def name(self) -> str:
        """What files begin with, and the target of the workflow."""
        return f"{self.benchmark}_{self.part}" if self.part else self.benchmark

    def stem(self, name: str) -> str:
        """What the file of a table or figure is called, without ending."""
        return f"{self.name}_{name}" if name else self.name

    def table_files(self, suite: str) -> list[str]:
        folder = paths.RESULTS / suite / "tables"
        return [str(folder / f"{self.stem(table)}.{end}") for table in self.tables for end in FORMATS]

    def short_caption(self, figure: str) -> str:
        """What a figure shows: its caption up to the first stop, which is not that of ``Fig. 4``."""
        return re.split(r"\. (?=[A-Z])|: ", self.figures[figure], maxsplit=1)[0].rstrip(".")

    def figure_labels(self, suite: str) -> dict[str, dict[str, str]]:
        """What Snakemake's report says of each file of :meth:`figure_files`."""
        folder = paths.RESULTS / suite / "figures"
        return {
            str(folder / f"{self.stem(figure)}.{end}"): {"figure": self.short_caption(figure), "format": end}
            for figure in self.figures
            for end in FIGURE_FORMATS
        }

    def figure_files(self, suite: str) -> list[str]:
        return list(self.figure_labels(suite))


CLAIMS = Artifacts(
    "claims",
    None,
    [""],
    {
        "": "The claims of the paper, as these runs see them: differences with their 95 % intervals (of a ratio its range), those that a test was made of. Blue circles are supported, orange crosses contradicted, "
        "grey diamonds undecided; open diamonds have no test. The band is the margin below which a difference makes no odds; a thin line marks what the paper says."
    },
)


def artifacts_of(benchmark: str, part: str | None = None) -> Artifacts:
    """What a benchmark shows, or a part of it."""
    definition = load_benchmark(benchmark).definition
    if part:
        return Artifacts(benchmark, part, definition.set_tables, definition.set_figures)
    return Artifacts(benchmark, part, definition.tables, definition.figures)


def code_files(*benchmarks: str) -> list[str]:
    """List the code of the benchmarks' tables: their packages, those of their kinds, and the harness's results and report."""
    kinds = [cls.__module__.split(".") for name in benchmarks for cls in type(load_benchmark(name).kind).__mro__]
    folders = {"harness/report", "harness/results", *benchmarks}
    folders |= {module[1] for module in kinds if module[0] == BENCHMARKS.name and module[1] != "harness"}
    files = [file for folder in sorted(folders) for file in sorted((BENCHMARKS / folder).glob("*.py"))]
    return [os.path.relpath(file) for file in files]


def page_files() -> list[str]:
    """List the template, style and script of the pages."""
    return [os.path.relpath(file) for file in sorted((BENCHMARKS / "harness/report").glob("report.*"))]


def all_artifacts() -> list[Artifacts]:
    """What all benchmarks and all their parts show, whether a suite runs them or not."""
    found = []
    for name in benchmark_names():
        loaded = load_benchmark(name)
        parts = list(loaded.tasks) if loaded.kind.shows_parts else []
        found += [artifacts_of(name, part) for part in (None, *parts)]
    return found
