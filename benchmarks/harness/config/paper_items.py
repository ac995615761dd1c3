"""What the paper shows, and which tables and figures of ours show the same: ``benchmarks/paper.yaml``."""

from __future__ import annotations

import functools
import string
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from benchmarks.harness.base import paths
from benchmarks.harness.base.errors import DefinitionError
from benchmarks.harness.base.paths import BENCHMARKS
from benchmarks.harness.config.artifacts import FIGURE_FORMATS, FORMATS, Artifacts
from benchmarks.harness.config.benchmark import benchmark_names, kind_of, load_benchmark
from benchmarks.harness.config.claims import Comparison, check_comparison
from benchmarks.harness.config.runs import Run, canonical_json
from benchmarks.harness.config.suite import Suite
from benchmarks.harness.config.yaml import Key, Names, Number, Strict, check_names, left_out, read

_FILE = "paper.yaml"


class PaperPart(Strict):
    """A table or a figure of a benchmark of ours."""

    benchmark: str
    """A folder of benchmarks/."""
    table: str | None = left_out()
    """One of its `tables`."""
    set_table: str | None = left_out()
    """One of its `set_tables`, of every set that the suite runs."""
    figure: str | None = left_out()
    """One of its `figures`."""
    rows: Names | None = left_out()
    """The methods that the paper shows; left out: all rows of the table."""

    def model_post_init(self, _context: Any, /) -> None:
        self.need_one_of("table", "set_table", "figure")

    @property
    def shown(self) -> str:
        return self.table or self.set_table or self.figure or ""


class PaperItem(Strict):
    """A table or figure of the paper."""

    title: str
    """What it shows, in a few words."""
    naacl: str
    """Where it is in the NAACL version, as far as that is known."""
    parts: Annotated[list[PaperPart], Field(min_length=1)] | None = left_out()
    """What shows the same."""
    missing: str | None = left_out()
    """Why nothing does."""
    main: Literal[True] | None = left_out()
    """It is the figure of the main averages: over several benchmarks, by `main` of this file."""
    caption: str | None = left_out()
    """What it claims and how to read it, of the main averages; other figures have a caption in their benchmark."""

    def model_post_init(self, _context: Any, /) -> None:
        self.need_one_of("parts", "missing", "main")


class MainNumbers(Strict):
    """Where our numbers of a main average are."""

    benchmark: str
    """A folder of benchmarks/."""
    selection: str
    """What chose epoch and hyper-parameters."""
    domain: str
    """Where: as in claims.yaml."""
    metric: str
    """Name in metrics.yaml."""
    dense: str
    """The row of the dense model."""
    gmoe: str
    """The row of GMoE."""
    emoe: str
    """The row of EMoE."""

    def comparison(self, method: str) -> Comparison:
        """One of the rows against the dense model."""
        given = self.model_dump(exclude={"dense", "gmoe", "emoe"})
        return Comparison(**given, method=method, against=self.dense, direction="higher")


class MainPaper(Strict):
    """The paper's numbers of a model."""

    dense: Number
    """Of the dense model."""
    gmoe: Number
    """Of GMoE."""
    emoe: Number
    """Of EMoE."""


class MainAverage(Strict):
    """A main average: an axis of the paper's radar for each of its models, and one for each of ours."""

    title: str
    """What it is an average over."""
    of: MainNumbers
    """Where ours are."""
    paper: dict[str, MainPaper] = Field({})
    """The paper's scores in percent, by model."""
    paper_ranks: dict[str, MainPaper] = Field({})
    """The paper's ranks, by model, where it gives these; lower is better."""


class PaperFile(Strict):
    """The paper's tables and figures."""

    items: Annotated[dict[Key, PaperItem], Field(min_length=1)]
    """By name: `table_` or `figure_`, and the number in the first version."""
    main: dict[Key, MainAverage]
    """The main averages, in the order of the figure."""


@dataclass(frozen=True)
class PaperOutput:
    """The files of one part of an item.

    Attributes:
        name: what they begin with: ``table_4``, ``table_3b``, ``table_8_pacs``.
        item: whose part it is.
        part: which.
        of_set: the set, where it is of one.
    """

    name: str
    item: str
    part: PaperPart
    of_set: str | None = None

    @property
    def title(self) -> str:
        """The item's number and what it shows."""
        kind, _, number = self.item.partition("_")
        where = f"{kind.capitalize()} {number} of the paper (first version)" if number.isdigit() else "The paper"
        return f"{where}: {load_paper_items()[self.item].title}"

    def files(self, suite: str) -> list[str]:
        ends = FIGURE_FORMATS if self.part.figure else FORMATS
        return [str(paths.RESULTS / suite / "paper" / f"{self.name}.{end}") for end in ends]

    def is_in(self, suite: Suite) -> bool:
        """Whether the suite runs what it shows."""
        if self.part.benchmark not in suite.settings.benchmarks:
            return False
        return self.of_set is None or self.of_set in suite.parts(self.part.benchmark)


def load_paper_items() -> Mapping[str, PaperItem]:
    """The paper's tables and figures, by name.

    Raises:
        DefinitionError: the file is wrong, or names a benchmark, table, figure or method that does not exist; names the nearest.
    """
    return _load().items


def shown_benchmarks(item: PaperItem) -> list[str]:
    """The benchmarks that show an item of the paper, or a part of it."""
    parts = {part.benchmark for part in item.parts or ()}
    return sorted(parts or {average.of.benchmark for average in load_main_averages().values()})


def load_main_averages() -> Mapping[str, MainAverage]:
    """The averages of the paper's main figure, by name.

    Raises:
        DefinitionError: as :func:`load_paper_items`.
    """
    return _load().main


@functools.cache
def _load() -> PaperFile:
    file = BENCHMARKS / _FILE
    found = read(file, PaperFile)
    for name, item in found.items.items():
        if not name.startswith(("table_", "figure_")):
            raise DefinitionError(f"{file}: 'items.{name}' must begin with table_ or figure_")
        for number, part in enumerate(item.parts or ()):
            check_part(part, file, f"items.{name}.parts[{number}]")
    for name, average in found.main.items():
        for row in (average.of.gmoe, average.of.emoe):
            check_comparison(average.of.comparison(row), file, f"main.{name}.of")
    return found


def check_part(part: PaperPart, file: Path, at: str) -> None:
    """Check that what a part names exists.

    Raises:
        DefinitionError: names the file, the key and the nearest valid value.
    """
    where = f"{file}: '{at}"
    check_names(where, "benchmark", [part.benchmark], benchmark_names())
    benchmark = load_benchmark(part.benchmark)
    definition = benchmark.definition
    for key in ("table", "set_table", "figure"):
        named = getattr(part, key)
        if named is not None:
            check_names(where, key, [named], getattr(definition, f"{key}s", ()))
    check_names(where, "rows", part.rows or (), benchmark.kind.row_titles(definition))


def paper_outputs() -> Iterator[PaperOutput]:
    """All files that show what the paper shows, whether a suite runs them or not."""
    for name, item in load_paper_items().items():
        parts = item.parts or []
        for letter, part in zip(string.ascii_lowercase, parts, strict=False):
            own = f"{name}{'' if name[-1].isdigit() else '_'}{letter}" if len(parts) > 1 else name
            if part.set_table:
                for found in load_benchmark(part.benchmark).tasks:
                    yield PaperOutput(f"{own}_{found}", name, part, found)
            else:
                yield PaperOutput(own, name, part)


def outputs_of(shown: Artifacts) -> list[PaperOutput]:
    """Those that are made with the tables and figures of a benchmark, or of one of its sets."""
    return [
        output for output in paper_outputs() if output.part.benchmark == shown.benchmark and output.of_set == shown.part
    ]


def files_of(shown: Artifacts, suite: str) -> list[str]:
    """Their files."""
    return [file for output in outputs_of(shown) for file in output.files(suite)]


def items_text(shown: Artifacts) -> str:
    """Everything that ``paper.yaml`` says of them, so that they are made again when it says something else."""
    return canonical_json([[output.name, output.part.model_dump(), output.title] for output in outputs_of(shown)])


def main_files(suite: str) -> list[str]:
    """The files of the main averages: a radar, and differences with their intervals."""
    names = [name for name, item in load_paper_items().items() if item.main]
    return [
        str(paths.RESULTS / suite / "paper" / f"{name}{letter}.{end}")
        for name in names
        for letter in "ab"
        for end in FIGURE_FORMATS
    ]


def main_text() -> str:
    """Everything that ``paper.yaml`` says of them, so that they are made again when it says something else."""
    items = [item.model_dump() for item in load_paper_items().values() if item.main]
    return canonical_json([items, *(average.model_dump() for average in load_main_averages().values())])


def paper_files(suite: Suite, item: str | None = None) -> list[str]:
    """The files of a suite that show what the paper shows, or one item of it."""
    found = [output for output in paper_outputs() if item in (None, output.item) and output.is_in(suite)]
    ran = any(average.of.benchmark in suite.settings.benchmarks for average in load_main_averages().values())
    main = ran and (item is None or bool(load_paper_items()[item].main))
    return [file for output in found for file in output.files(suite.name)] + (main_files(suite.name) if main else [])


def runs_shown(suite: Suite, item: str) -> list[Run]:
    """The runs of a suite that a table or figure of the paper shows, with those that they evaluate; fewer than its target runs, which makes all tables of a benchmark.

    Raises:
        DefinitionError: there is no such table or figure; names the nearest.
    """
    check_names("paper.yaml: '", "items", [item], load_paper_items())
    chosen: list[Run] = []
    for output in paper_outputs():
        if output.item == item and output.is_in(suite):
            part = output.part
            definition = load_benchmark(part.benchmark).definition
            rows = part.rows or load_benchmark(part.benchmark).kind.rows_shown(definition, part.shown)
            chosen += [run for run in suite.runs_of(part.benchmark, output.of_set) if _is_row(run, rows)]
    if load_paper_items()[item].main:
        for average in load_main_averages().values():
            of = average.of
            chosen += [run for run in suite.runs_of(of.benchmark) if _is_row(run, (of.dense, of.gmoe, of.emoe))]
    found = {run.folder: run for run in chosen}
    for run in chosen:
        for file in kind_of(run.benchmark).inputs(run.spec):
            folder = file.removeprefix(f"{paths.RUNS}/").removesuffix("/metrics.json")
            if folder in suite.runs_by_folder:
                found[folder] = suite.runs_by_folder[folder]
    return list(found.values())


def _is_row(run: Run, rows: Collection[str] | None) -> bool:
    return rows is None or run.spec["method"]["name"] in rows
