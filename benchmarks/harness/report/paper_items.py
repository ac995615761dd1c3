"""Read ``benchmarks/paper.yaml``: the paper's tables and figures, and our counterparts."""

from __future__ import annotations

import functools
import string
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from benchmarks.harness import base as paths
from benchmarks.harness.base import BENCHMARKS
from benchmarks.harness.config.benchmark import benchmark_names, load_benchmark
from benchmarks.harness.config.suite import Suite
from benchmarks.harness.config.yaml import (
    Key,
    Location,
    Names,
    Number,
    Strict,
    check_names,
    optional,
    read,
)
from benchmarks.harness.report.artifacts import FIGURE_FORMATS, FORMATS, Artifacts
from benchmarks.harness.report.claims import Comparison, check_comparison


class PaperPart(Strict):
    """One of our tables or figures."""

    exactly_one_of = ("table", "set_table", "figure")
    benchmark: str
    """A folder of benchmarks/."""
    table: str | None = optional()
    """One of its `tables`."""
    set_table: str | None = optional()
    """One of its `set_tables`, for every set that the suite runs."""
    figure: str | None = optional()
    """One of its `figures`."""
    rows: Names | None = optional()
    """The methods that the paper shows; by default all rows."""

    @property
    def name(self) -> str:
        return self.table or self.set_table or self.figure or ""


class PaperItem(Strict):
    """A table or figure of the paper."""

    exactly_one_of = ("parts", "missing", "main")
    title: str
    """Content of the item in a few words."""
    naacl: str
    """Number in the NAACL version, if known."""
    parts: Annotated[list[PaperPart], Field(min_length=1)] | None = optional()
    """Our tables and figures with the same content."""
    missing: str | None = optional()
    """Reason why no table or figure of ours has this content."""
    main: Literal[True] | None = optional()
    """True for the figure of the main averages, which `main` of this file defines."""
    caption: str | None = optional()
    """The caption of the main averages; other figures have a caption in their benchmark."""


class MainNumbers(Strict):
    """The source of our numbers for a main average."""

    benchmark: str
    """A folder of benchmarks/."""
    selection: str
    """The selection of epoch and hyper-parameters."""
    domain: str
    """The domain, as in claims.yaml."""
    metric: str
    """Name in metrics.yaml."""
    dense: str
    """The row of the dense model."""
    gmoe: str
    """The row of GMoE."""
    emoe: str
    """The row of EMoE."""

    def comparison(self, method: str) -> Comparison:
        """Compare a row with the dense model."""
        numbers = self.model_dump(exclude={"dense", "gmoe", "emoe"})
        return Comparison(**numbers, method=method, against=self.dense, direction="higher")


Published = dict[Literal["dense", "gmoe", "emoe"], Number]


class MainAverage(Strict):
    """A main average: a panel of the figure, with a line for each of our models and each of the paper's."""

    title: str
    """The sets of the average."""
    of: MainNumbers
    """Our numbers."""
    paper: dict[str, Published] = Field({})
    """The paper's scores in percent, by model."""


class PaperFile(Strict):
    """The paper's tables and figures."""

    items: Annotated[
        dict[Annotated[str, Field(pattern="^(table|figure)_[a-z0-9_]+$")], PaperItem],
        Field(min_length=1),
    ]
    """The items by name: `table_` or `figure_`, and the number in the first version."""
    unknown: list[Key]
    """Tables of the first version whose content is unknown."""
    main: dict[Key, MainAverage]
    """The main averages, in the order of the figure."""


@dataclass(frozen=True)
class PaperOutput:
    """The files of one part of an item.

    Attributes:
        name: The name of the files without ending: ``table_4``, ``table_3b``, ``table_8_pacs``.
        item: The name of the item.
        part: The part.
        of_set: The set of a ``set_table``.
    """

    name: str
    item: str
    part: PaperPart
    of_set: str | None = None

    @property
    def title(self) -> str:
        """Return the number and the title of the item."""
        kind, _, number = self.item.partition("_")
        source = (
            f"{kind.capitalize()} {number} of the paper (first version)"
            if number.isdigit()
            else "The paper"
        )
        return f"{source}: {load_paper().items[self.item].title}"

    def files(self, suite: str) -> list[str]:
        ends = FIGURE_FORMATS if self.part.figure else FORMATS
        return [str(paths.RESULTS / suite / "paper" / f"{self.name}.{end}") for end in ends]


@functools.cache
def load_paper() -> PaperFile:
    """Load the paper's tables and figures, and the averages of its main figure."""
    file = BENCHMARKS / "paper.yaml"
    content = read(file, PaperFile)
    for name, item in content.items.items():
        for number, part in enumerate(item.parts or ()):
            check_part(part, Location(file, f"items.{name}.parts[{number}]"))
    for name, average in content.main.items():
        for row in (average.of.gmoe, average.of.emoe):
            check_comparison(average.of.comparison(row), file, f"main.{name}.of")
    return content


def check_part(part: PaperPart, where: Location) -> None:
    """Check that benchmark, table, figure and rows of a part exist."""
    check_names(where.at("benchmark"), [part.benchmark], benchmark_names())
    benchmark = load_benchmark(part.benchmark)
    for kind in ("table", "set_table", "figure"):
        name = getattr(part, kind)
        known = getattr(benchmark.definition, f"{kind}s", ())
        if name and name not in known:
            # benchmark.yaml may have the mistake; only here, because the import takes a second
            benchmark.checked_presentation()
            check_names(where.at(kind), [name], known)
    check_names(where.at("rows"), part.rows or (), benchmark.row_titles)


def missing_items() -> dict[str, str]:
    """Return the paper's tables and figures that are not reproduced, each with the reason."""
    missing = {name: item.missing for name, item in load_paper().items.items() if item.missing}
    return missing | dict.fromkeys(
        load_paper().unknown, "its content is not known to this suite (docs/reproducing.md)"
    )


def item_benchmarks(item: PaperItem) -> list[str]:
    """List the benchmarks of an item."""
    averages = load_paper().main.values() if item.main else ()
    return sorted(
        {
            source.benchmark
            for source in (*(item.parts or ()), *(average.of for average in averages))
        }
    )


def paper_outputs() -> Iterator[PaperOutput]:
    """List the outputs of all items, whether a suite runs them or not."""
    for name, item in load_paper().items.items():
        parts = item.parts or []
        for letter, part in zip(string.ascii_lowercase, parts, strict=False):
            stem = f"{name}{'' if name[-1].isdigit() else '_'}{letter}" if len(parts) > 1 else name
            if part.set_table:
                for task in load_benchmark(part.benchmark).tasks:
                    yield PaperOutput(f"{stem}_{task}", name, part, task)
            else:
                yield PaperOutput(stem, name, part)


def outputs_of(artifacts: Artifacts) -> list[PaperOutput]:
    """List the paper's outputs that come from a benchmark, or from one of its sets."""
    key = (artifacts.benchmark, artifacts.part)
    return [output for output in paper_outputs() if (output.part.benchmark, output.of_set) == key]


def files_of(artifacts: Artifacts, suite: str) -> list[str]:
    """List the files of :func:`outputs_of`."""
    return [file for output in outputs_of(artifacts) for file in output.files(suite)]


def main_figure(suite: str) -> Path:
    """Return the path of the figure of the main averages, without ending."""
    name = next(name for name, item in load_paper().items.items() if item.main)
    return paths.RESULTS / suite / "paper" / name


def main_files(suite: str) -> list[str]:
    """List the files of :func:`main_figure`."""
    return [f"{main_figure(suite)}.{end}" for end in FIGURE_FORMATS]


def paper_files(suite: Suite, item: str | None = None) -> list[str]:
    """List a suite's files for the paper's items, or for one of them."""
    files = []
    for name, entry in load_paper().items.items():
        if (
            item in (None, name)
            and entry.main
            and set(item_benchmarks(entry)) & set(suite.settings.benchmarks)
        ):
            files += main_files(suite.name)
    for output in paper_outputs():
        benchmark = output.part.benchmark
        in_suite = benchmark in suite.settings.benchmarks and output.of_set in (
            None,
            *suite.parts(benchmark),
        )
        if item in (None, output.item) and in_suite:
            files += output.files(suite.name)
    return files
