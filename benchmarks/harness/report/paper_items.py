"""Read ``benchmarks/paper.yaml``: the paper's tables and figures, and our counterparts."""

from __future__ import annotations

import functools
import string
from collections.abc import Iterator, Sequence
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


class PaperSource(Strict):
    """One of our tables or figures that has the content of a table or figure of the paper."""

    exactly_one_of = ("table", "set_table", "figure")
    benchmark: str
    """A folder of benchmarks/."""
    table: str | None = optional()
    """Name of one of the benchmark's `tables`."""
    set_table: str | None = optional()
    """Name of one of the benchmark's `set_tables`. Every set that the suite runs has this table."""
    figure: str | None = optional()
    """Name of one of the benchmark's `figures`."""
    rows: Names | None = optional()
    """The methods that the paper shows; by default all rows."""

    @property
    def name(self) -> str:
        """Return the name of the table or figure."""
        return self.table or self.set_table or self.figure or ""


class PaperItem(Strict):
    """A table or figure of the paper."""

    exactly_one_of = ("parts", "missing", "main")
    title: str
    """Content of the item in a few words."""
    naacl: str
    """Number in the NAACL version, if known."""
    parts: Annotated[list[PaperSource], Field(min_length=1)] | None = optional()
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
    """The group of numbers, such as `id` or `held_out`, as in claims.yaml."""
    metric: str
    """Name in metrics.yaml."""
    dense: str
    """The row of the dense model."""
    gmoe: str
    """The row of GMoE."""
    emoe: str
    """The row of EMoE."""

    def comparison(self, method: str) -> Comparison:
        """Return the comparison of a method with the dense model, in the form that claims use."""
        numbers = self.model_dump(exclude={"dense", "gmoe", "emoe"})
        return Comparison(**numbers, method=method, against=self.dense, direction="higher")


Published = dict[Literal["dense", "gmoe", "emoe"], Number]


class MainAverage(Strict):
    """A main average, such as the mean over GLUE: one panel of the figure.

    The panel has a line for each of our models and for each of the paper's.
    """

    title: str
    """Title of the panel, which says what is averaged."""
    of: MainNumbers
    """The source of our numbers."""
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
    """One of our tables or figures, in the version that is written for the paper.

    Attributes:
        name: The name of the files without ending: ``table_4``, ``table_3b``, ``table_8_pacs``.
        item: The paper's table or figure, by its name in ``paper.yaml``.
        source: Our table or figure.
        of_set: The data set of a table of one set; None for all other tables and figures.
    """

    name: str
    item: str
    source: PaperSource
    of_set: str | None = None

    @property
    def title(self) -> str:
        """Return the number (if it has one) and the title of the paper's table or figure."""
        title = load_paper().items[self.item].title
        # an item is named after its number, such as table_4, or after its content: table_mmlu
        kind, _, number_or_content = self.item.partition("_")
        if not number_or_content.isdigit():
            return f"The paper: {title}"
        return f"{kind.capitalize()} {number_or_content} of the paper (first version): {title}"

    def files(self, suite_name: str) -> list[str]:
        """List the paths of the files, in every format."""
        folder = paths.RESULTS / suite_name / "paper"
        formats = FIGURE_FORMATS if self.source.figure else FORMATS
        return [str(folder / f"{self.name}.{ending}") for ending in formats]


@functools.cache
def load_paper() -> PaperFile:
    """Read ``paper.yaml``: the paper's tables and figures, and the averages of its main figure.

    Raises:
        DefinitionError: The file is damaged, or has a name that does not exist.
    """
    file = BENCHMARKS / "paper.yaml"
    content = read(file, PaperFile)
    for item_name, item in content.items.items():
        for number, source in enumerate(item.parts or ()):
            check_source(source, Location(file, f"items.{item_name}.parts[{number}]"))
    # a main average compares GMoE and EMoE with the dense model
    for average_name, average in content.main.items():
        our_numbers = average.of
        for method in (our_numbers.gmoe, our_numbers.emoe):
            comparison = our_numbers.comparison(method)
            check_comparison(comparison, Location(file, f"main.{average_name}.of"))
    return content


def check_source(source: PaperSource, where: Location) -> None:
    """Check that the benchmark, the table or figure, and the methods of a source exist.

    Args:
        source: The source to check.
        where: The location of the source in ``paper.yaml``, for messages.

    Raises:
        DefinitionError: A name does not exist.
    """
    check_names(where.at("benchmark"), [source.benchmark], benchmark_names())
    benchmark = load_benchmark(source.benchmark)
    definition = benchmark.definition
    # a source has one of the keys `table`, `set_table` and `figure`; the others are None
    if source.table:
        key = "table"
        known = definition.tables
    elif source.set_table:
        key = "set_table"
        known = getattr(definition, "set_tables", [])  # only some kinds of benchmarks have them
    else:
        key = "figure"
        known = definition.figures
    if source.name not in known:
        # If benchmark.yaml lists a table that does not exist, this check reports that mistake
        # instead. Known names skip it, because it imports the presentation for a second.
        benchmark.checked_presentation()
        check_names(where.at(key), [source.name], known)
    check_names(where.at("rows"), source.rows or (), benchmark.row_titles)


def missing_items() -> dict[str, str]:
    """Return the paper's tables and figures that are not reproduced, each with the reason."""
    reasons = {}
    for name, item in load_paper().items.items():
        if item.missing:
            reasons[name] = item.missing
    for name in load_paper().unknown:
        reasons[name] = "its content is not known to this suite (docs/reproducing.md)"
    return reasons


def item_benchmarks(item: PaperItem) -> list[str]:
    """List the benchmarks whose numbers an item shows, sorted by name."""
    benchmarks = {source.benchmark for source in item.parts or ()}
    if item.main:
        for average in load_paper().main.values():
            benchmarks.add(average.of.benchmark)
    return sorted(benchmarks)


def paper_outputs() -> Iterator[PaperOutput]:
    """Yield our versions of all the paper's tables and figures, even if no suite makes them."""
    for name, item in load_paper().items.items():
        sources = item.parts or []
        stems = _stems_of_outputs(name, len(sources))
        for stem, source in zip(stems, sources, strict=True):
            # every data set has its own table of the kind that `set_table` names
            if source.set_table:
                for data_set in load_benchmark(source.benchmark).tasks:
                    yield PaperOutput(f"{stem}_{data_set}", name, source, data_set)
            else:
                yield PaperOutput(stem, name, source)


def _stems_of_outputs(item: str, count: int) -> list[str]:
    """Return a file name per output of an item: ``table_3``, or ``table_3a`` and ``table_3b``."""
    if count == 1:
        return [item]
    # a letter follows a number directly, but a word with an underscore
    stem = item if item[-1].isdigit() else f"{item}_"
    return [f"{stem}{letter}" for letter in string.ascii_lowercase[:count]]


def outputs_of(artifacts: Artifacts) -> list[PaperOutput]:
    """List the paper's tables and figures that this benchmark or data set provides."""
    outputs = []
    for output in paper_outputs():
        is_of_benchmark = output.source.benchmark == artifacts.benchmark
        if is_of_benchmark and output.of_set == artifacts.data_set:
            outputs.append(output)
    return outputs


def files_of(artifacts: Artifacts, suite_name: str) -> list[str]:
    """List the files of the paper's tables and figures made from a benchmark or data set."""
    files = []
    for output in outputs_of(artifacts):
        files += output.files(suite_name)
    return files


def main_item() -> str:
    """Return the name of the figure with the main averages, such as ``figure_2``.

    Raises:
        LookupError: ``paper.yaml`` has no such item.
    """
    for name, item in load_paper().items.items():
        if item.main:
            return name
    raise LookupError("no item of paper.yaml has 'main: true'")


def main_figure(suite_name: str) -> Path:
    """Return the path of the figure of the main averages, without ending."""
    return paths.RESULTS / suite_name / "paper" / main_item()


def main_files(suite_name: str) -> list[str]:
    """List the paths of the main figure in every format."""
    return [f"{main_figure(suite_name)}.{end}" for end in FIGURE_FORMATS]


def paper_files(suite: Suite, item: str | None = None) -> list[str]:
    """List the files that a suite makes for all items of the paper, or for the named item."""
    all_items = load_paper().items
    asked = list(all_items) if item is None else [item]
    files = []
    # The main figure comes first. It is made if the suite runs at least one benchmark of the main
    # averages.
    main = main_item()
    if main in asked and _runs_any(suite, item_benchmarks(all_items[main])):
        files += main_files(suite.name)
    for output in paper_outputs():
        if output.item in asked and _makes(suite, output):
            files += output.files(suite.name)
    return files


def _runs_any(suite: Suite, benchmarks: Sequence[str]) -> bool:
    """Return True if a suite runs at least one of some benchmarks."""
    return any(name in suite.settings.benchmarks for name in benchmarks)


def _makes(suite: Suite, output: PaperOutput) -> bool:
    """Return True if a suite runs the benchmark of an output, and its data set if it has one."""
    benchmark = output.source.benchmark
    if benchmark not in suite.settings.benchmarks:
        return False
    return output.of_set is None or output.of_set in suite.sets_with_tables(benchmark)
