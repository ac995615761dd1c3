"""Benchmarks: the models of benchmark.yaml, the kinds that plan runs, and the loader of a benchmark's folder."""

from __future__ import annotations

import functools
import importlib
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Generic, Literal, TypeVar

from pydantic import Field

from benchmarks.harness.base import BENCHMARKS, DefinitionError, RunError
from benchmarks.harness.config.catalogue import load_models
from benchmarks.harness.config.methods import (
    ABLATION,
    Method,
    load_methods,
    merge_methods,
)
from benchmarks.harness.config.overlay import Changes, Layer, merge, overlay
from benchmarks.harness.config.yaml import (
    Count,
    Key,
    Names,
    Strict,
    Whole,
    check_file,
    check_names,
    left_out,
    read_yaml,
)
from benchmarks.harness.sources.packages import PackageFile
from emoe.errors import did_you_mean

Precision = Literal["fp32", "fp16", "bf16"]


class Resources(Strict):
    """Reservations of the scheduler for one run."""

    threads: Count = 1
    """CPU threads of one run."""
    mem_mb: Count = 3000
    """Megabytes of memory."""
    runtime: Count = 60
    """Minutes."""
    gpu: Whole = 0
    """GPUs."""


class Training(Strict):
    """The training of a run."""

    in_no_spec: ClassVar[set[str]] = {"by_model"}

    by_model: dict[str, dict[str, Any]] | None = left_out()
    """Settings of single models; in no run's spec."""

    def spec(self) -> dict[str, Any]:
        """Return the settings of a run's spec."""
        return self.model_dump(exclude=self.in_no_spec)


class Entry(Strict):
    """One task, set or measure of a benchmark."""

    title: str
    """Label in tables."""


class SuitePart(Strict):
    """One suite's part of a benchmark."""

    resources: Resources = Resources()
    """Reservations of the scheduler for one run."""
    note: str | None = left_out()
    """A sentence for the report: how far the suite is from the paper's experiment."""


class Definition(Strict):
    """The keys of every benchmark.yaml."""

    kind: str | None = left_out()
    """The folder of benchmarks/ whose grid.py plans the runs; if left out, this folder if it has one, else text."""
    version: Count
    """Part of every run's identity. Raise it when the same settings would give other numbers, or more of them."""
    title: str
    """Heading of the benchmark's tables and of its section in the report."""
    pipeline: str
    """Importable module with `run(spec, folder, progress)`."""
    tables: Names
    """The tables that the benchmark's presentation makes, in the order of the report."""
    figures: dict[str, str] = Field({})
    """The figures that it draws, each with its caption."""
    paper: str | None = None
    """CSV with published numbers, in the benchmark's folder; null where there are none."""
    suites: Mapping[str, SuitePart]
    """Runs by suite."""


class TrainingSuite(SuitePart):
    """One suite's part of a benchmark that trains models by methods."""

    method_defaults: dict[str, Method] = Field({})
    """Settings of methods that leave them open, by their kind; before the benchmark's."""
    methods: dict[str, Method] = Field({})
    """Settings of single methods that differ in this suite, by method."""


class MethodsDefinition(Definition):
    """The keys of a benchmark that compares methods."""

    baseline: str
    """The method that differences are taken against."""
    method_defaults: dict[str, Method] = Field({})
    """Settings of methods that leave them open, by their kind: dense, emoe or gmoe. A row's own setting goes before
    it, a suite's default before the benchmark's."""
    methods: Annotated[dict[Key, Method], Field(min_length=1)]
    """The compared methods of methods.yaml, each with the settings that differ here, in the order of the rows."""


class TrainingDefinition(MethodsDefinition):
    """The keys of a benchmark that trains models by methods."""

    suites: Mapping[str, TrainingSuite]
    """Runs by suite."""


ALL = "all"  # the one part of a set that is read as a whole
USUAL = "text"  # the kind of a benchmark that says none and has no grid of its own
D = TypeVar("D", bound=Definition)
E = TypeVar("E", bound=Entry)
D_co = TypeVar("D_co", bound=Definition, covariant=True)
E_co = TypeVar("E_co", bound=Entry, covariant=True)


@dataclass(frozen=True)
class Benchmark(Generic[D_co, E_co]):
    """Hold one benchmark folder: its definition, and its tasks (measures of measurements, sets of images or
    instructions).
    """

    name: str
    definition: D_co
    tasks: Mapping[str, E_co]

    @property
    def kind_name(self) -> str:
        return self.definition.kind or usual_kind(self.name)

    @functools.cached_property
    def kind(self) -> Kind[Any, Any]:
        return find_kind(self.kind_name)

    @property
    def folder(self) -> Path:
        return BENCHMARKS / self.name

    @property
    def file(self) -> Path:
        return self.folder / "benchmark.yaml"

    def settings(self, key: str, suite: str, model: str | None = None) -> Any:
        """Return settings of the benchmark, changed by a suite and by those of a model.

        Args:
            key: The key of the settings, in the benchmark and in the suite.
            suite: The name of the suite.
            model: The name of the model whose ``by_model`` counts; None for no model.

        Raises:
            DefinitionError: A setting is wrong; names the keys of the layer that gave it.
        """
        usual: Strict = getattr(self.definition, key)
        at, changes = ("suites", suite, key), getattr(self.definition.suites[suite], key)
        layers: list[Layer] = [((key,), usual.model_dump(exclude_unset=True)), (at, changes)]
        by_model = merge(*(values for _, values in layers)).get("by_model") or {}
        if model is not None and model in by_model:
            origin = at if model in (changes.get("by_model") or {}) else (key,)
            layers.append(((*origin, "by_model", model), by_model[model]))
        return overlay(type(usual), str(self.file), *layers)

    def grid_points(
        self, suite: str, names: Mapping[str, Collection[str]], axes: Iterable[str]
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield the points of a suite's grid, each after its block's place in the file.

        Args:
            suite: The name of the suite.
            names: The valid names by key of a block.
            axes: The keys of a point, the slowest first; a block may lack some.

        Raises:
            DefinitionError: A name does not exist.
        """
        part: Any = self.definition.suites[suite]
        for number, block in enumerate(part.grid):
            where, values = f"{self.file}: 'suites.{suite}.grid[{number}]", block.model_dump()
            for key, known in names.items():
                check_names(where, key, values[key], known)
            keys = [key for key in axes if key in values]
            for point in itertools.product(*(values[key] for key in keys)):
                yield where, dict(zip(keys, point, strict=True))

    @property
    def evaluates(self) -> str | None:
        """Return the benchmark whose runs its runs evaluate; None if it has runs of its own."""
        return getattr(self.definition, "evaluates", None)

    @property
    def shows_parts(self) -> bool:
        """Return True if each of its sets has tables and figures of its own."""
        return bool(getattr(self.definition, "set_tables", ()))

    @property
    def published_files(self) -> list[str]:
        """Return the CSV files that ``benchmark.yaml`` names: published numbers, which its tables show."""
        return sorted(set(_csv_names(self.definition.model_dump(exclude={"suites"}))))

    @property
    def of_every_spec(self) -> dict[str, Any]:
        """Return the part that the specs of all its runs share."""
        return {"benchmark": self.name, "version": self.definition.version, "pipeline": self.definition.pipeline}


def _csv_names(value: object) -> Iterator[str]:
    if isinstance(value, str) and value.endswith(".csv"):
        yield value
    elif isinstance(value, dict):
        for below in value.values():
            yield from _csv_names(below)


class PublishedRows(Strict):
    """Another number of rows that the paper's authors score."""

    rows: Count
    """Number of rows."""
    of: str
    """Source of that number."""
    why: str
    """Reason for the difference."""


@dataclass(frozen=True)
class SetPart:
    """One part of one set, as it was read.

    Attributes:
        name: The name of the set.
        part: ``train``, ``dev`` or ``test``; the environment of an image set; ``all`` of instructions.
        rows: The number of rows in use; None if the part is missing.
        dropped: The number of rows without a gold label or text, or broken, which are left out.
        expected: The number of rows by the set's makers, if it is known.
        labels: The number of rows by label, as text.
        source: The place that the rows came from.
        advice: The way to get the part if it is missing.
        published: The number of rows that the paper's authors score, if it differs.
        counts_dropped: True if the makers count the dropped rows too.
    """

    name: str
    part: str
    rows: int | None
    dropped: int = 0
    expected: int | None = None
    labels: str = ""
    source: str = ""
    advice: str = ""
    published: PublishedRows | None = None
    counts_dropped: bool = True

    @property
    def as_expected(self) -> bool:
        """Return True if the set's makers count as many rows, or no count of theirs is known."""
        return self.expected in (None, self.rows, self._counted)

    @property
    def _counted(self) -> int:
        return (self.rows or 0) + (self.dropped if self.counts_dropped else 0)

    @property
    def note(self) -> str | None:
        """Describe the difference to the known number of rows; None if there is none."""
        if self.rows is None or (self.published and self.published.rows == self.rows):
            return None
        if not self.as_expected:
            beside = f" beside {self.dropped:,} dropped" if self.dropped and not self.counts_dropped else ""
            return (
                f"{self.name} ({self.part}): {self._counted:,} rows{beside}, its makers count {self.expected:,}: "
                "another version, or not all of it"
            )
        if self.published:
            other = f"not {self.published.rows:,} as by {self.published.of}: {self.published.why}"
            return f"{self.name} ({self.part}): {self.rows:,} rows are scored, {other}"
        return None


@dataclass(frozen=True)
class Domain:
    """Name the numbers of a kind's runs by which claims compare two methods.

    Attributes:
        metrics: The names of the metrics.
        pair: The unit of pairs that are compared: ``seed``, ``trial``, ``question``, ``setting``.
        selections: The names of the selections of epoch and hyper-parameters, if several are reported.
    """

    metrics: tuple[str, ...]
    pair: str = "seed"
    selections: tuple[str, ...] = ()


OOD_MEAN = "ood_mean"  # the mean of a run's scores over its other sets
COUNTS = Domain(("parameters", "trainable_parameters"))  # of every model


@dataclass(frozen=True)
class Offer:
    """Name the methods, models, domains and ways of tuning in the grid of a suite."""

    methods: frozenset[str]
    models: frozenset[str]
    domains: frozenset[str]
    tunings: frozenset[str] = frozenset()


class Kind(ABC, Generic[D, E]):
    """Define what the benchmarks of one kind have in common. The folder of the kind has an instance in its ``grid``
    module, as ``KIND``.

    Attributes:
        files: The names of schemas for editors, and the models of its YAML files.
        paper_columns: The columns of its ``paper.csv`` before value, status and source.
        counts_labels: True if its report shows the labels of its sets.
        optimizer: The optimizer, for the report; empty if nothing is trained.
        late_imports: The modules that its runs import when they need them.
    """

    files: tuple[tuple[str, type[Strict]], ...]
    paper_columns: tuple[str, ...] = ()
    counts_labels = True
    optimizer = ""
    late_imports: tuple[str, ...] = ()

    @abstractmethod
    def load(self, content: object, file: Path) -> tuple[D, Mapping[str, E]]:
        """Read the definition and the tasks.

        Args:
            content: The content of the file.
            file: ``benchmark.yaml``, beside which the others are.

        Raises:
            DefinitionError: A file is wrong; names the key and the nearest valid value.
        """

    @abstractmethod
    def specs(
        self,
        benchmark: Benchmark[D, E],
        suite: str,
        exclude: Collection[str],
        specs_of: Callable[[str], Mapping[str, Mapping[str, Any]]],
    ) -> Iterator[dict[str, Any]]:
        """Yield the specs of a suite's grid, in its order.

        Args:
            benchmark: The benchmark.
            suite: The suite.
            exclude: The sets to exclude.
            specs_of: A function that gives the specs of another benchmark's runs in the suite, by their folders.

        Raises:
            DefinitionError: A name in the grid does not exist, or settings do not go together.
        """

    def check(self, benchmark: Benchmark[D, E]) -> None:
        """Check that names exist and settings go together.

        Raises:
            DefinitionError: Names the file, the key and the nearest valid value.
        """

    def excludable(self, tasks: Mapping[str, E]) -> Iterable[str]:
        """Return the sets that a suite may exclude."""
        return ()

    def check_processes(self, spec: Mapping[str, Any], processes: int, parallel: str) -> None:
        """Check that a run can be spread over a number of processes, before any of them starts to work.

        Raises:
            RunError: It cannot.
            DefinitionError: Its settings do not fit.
        """
        if processes > 1:
            raise RunError(
                "only runs of instruction tuning that train are spread over several processes; start it on one"
            )

    def variant(self, spec: Mapping[str, Any]) -> str:
        """Name the settings of a run that vary beside model, task and method."""
        return str(spec["method"]["variant"])

    def package_files(self, task: Mapping[str, Any]) -> list[PackageFile]:
        """Return the files inside packages that a set is read from."""
        return []

    def inputs(self, spec: Mapping[str, Any]) -> list[str]:
        """Return the files that a run needs beside data, weights and partitions."""
        return []

    def figure_inputs(self, spec: Mapping[str, Any]) -> list[str]:
        """Return the files that the figures of a part need beside the runs' numbers."""
        return []

    def parts_read(self, spec: Mapping[str, Any], tasks: Mapping[str, E]) -> list[tuple[str, str]]:
        """Return name and part of every set that a run reads."""
        return []

    def training_tokens(self, spec: Mapping[str, Any], tasks: Mapping[str, E]) -> float | None:
        """Count the tokens that a run trains on, roughly; None if that is unknown.

        A token that is read and not trained on counts a third: it takes no backward pass.

        Args:
            spec: The spec of the run.
            tasks: The tasks of the benchmark.
        """
        return None

    def describe(
        self, spec: Mapping[str, Any], name: str, part: str, tasks: Mapping[str, E], *, open_files: bool
    ) -> Iterator[SetPart]:
        """Read one part of a set, and describe it.

        Args:
            spec: The spec of a run that reads it.
            name: The name of the set.
            part: The name of the part.
            tasks: The tasks of the benchmark.
            open_files: True to open every file of a set of files, which takes minutes.
        """
        return iter(())

    def unpinned(self, spec: Mapping[str, Any]) -> Iterator[str]:
        """Yield what a run reads from elsewhere at no fixed version, beside models and sets of the hub."""
        return iter(())

    def compared_domains(self, definition: D) -> Mapping[str, Domain]:
        """Return the numbers by which claims may compare methods, by name; the presentation's ``compared`` has them."""
        return {}

    def row_titles(self, definition: D) -> Mapping[str, str]:
        """Return the titles of the rows that claims may compare, by name."""
        methods = resolve_methods(definition) if isinstance(definition, MethodsDefinition) else {}
        return {name: method.title for name, method in methods.items()}

    def task_titles(self, definition: D, tasks: Mapping[str, E]) -> Mapping[str, str]:
        """Return the titles of the sets of runs, by the names that tables and claims use."""
        return {name: task.title for name, task in tasks.items()}

    def settings(self, definition: D, method: str) -> list[str]:
        """Return the variants of a method that claims may name."""
        return []

    def offer(self, benchmark: Benchmark[D, E], suite: str) -> Offer:
        """Return the names in the grid of a suite."""
        blocks = getattr(benchmark.definition.suites[suite], "grid", ())
        return Offer(
            frozenset(name for block in blocks for name in block.method),
            frozenset(name for block in blocks for name in block.model),
            frozenset(self.compared_domains(benchmark.definition)),
        )


class WholeSets(Kind[D, E]):
    """Share the methods of kinds whose runs read one set each as a whole, which a suite may exclude."""

    def excludable(self, tasks: Mapping[str, E]) -> Iterable[str]:
        return tasks

    def parts_read(self, spec: Mapping[str, Any], tasks: Mapping[str, E]) -> list[tuple[str, str]]:
        return [(spec["task"]["name"], ALL)]


def text_tokens(rows: int | None, max_length: int, times: float) -> float | None:
    """Estimate the tokens of texts: rows fill about half of their longest length, with the padding of their batches.

    Args:
        rows: The number of rows; None if unknown.
        max_length: The most tokens of a row.
        times: The number of passes.
    """
    return None if rows is None else rows * max_length / 2 * times


def missing_set(name: str, problem: object, instructions: str, expected: int | None) -> SetPart:
    """Describe a set that is read as a whole and cannot be.

    Args:
        name: The name of the set.
        problem: The error.
        instructions: The source of the set.
        expected: The number of rows by its makers.
    """
    advice = f"{name}: {problem}\n    {instructions}. Without it: `exclude: [{name}]`"
    return SetPart(name, ALL, None, expected=expected, advice=advice)


def kind_names() -> list[str]:
    """Return the kinds: the folders that have a ``grid`` module."""
    return sorted(path.parent.name for path in BENCHMARKS.glob("*/grid.py"))


@functools.cache
def find_kind(name: str) -> Kind[Any, Any]:
    """Return the kind of a name.

    Raises:
        DefinitionError: There is no such kind; names the nearest.
    """
    if name not in kind_names():
        raise DefinitionError(f"'kind' is {name!r}{did_you_mean(name, kind_names())}")
    kind: Kind[Any, Any] = importlib.import_module(f"benchmarks.{name}.grid").KIND
    return kind


def usual_kind(benchmark: str) -> str:
    """Return the kind of a benchmark whose file names none: its own folder's if that has a grid, else ``text``."""
    return benchmark if benchmark in kind_names() else USUAL


def kind_name(benchmark: str, content: object) -> Any:
    """Return the kind that a benchmark's file names, or its usual one."""
    said = content.get("kind") if isinstance(content, dict) else None
    return usual_kind(benchmark) if said is None else said


@functools.cache
def kind_of(benchmark: str) -> Kind[Any, Any]:
    """Return the kind of a benchmark.

    Raises:
        DefinitionError: There is no such benchmark.
    """
    return find_kind(kind_name(benchmark, read_yaml(BENCHMARKS / benchmark / "benchmark.yaml")))


def check_rows(definition: MethodsDefinition, file: str) -> None:
    """Check the names of the methods that a benchmark compares, of the rows that its suites change, and of kinds.

    Raises:
        DefinitionError: A name does not exist.
    """
    for name, row in definition.methods.items():
        at, known = (f"methods.{name}.method", row.method) if row.method else ("methods", name)
        check_names(f"{file}: '", at, [known], load_methods())
    kinds = [method.kind for method in load_methods().values()]
    check_names(f"{file}: '", "method_defaults", definition.method_defaults, kinds)
    for name, suite in definition.suites.items():
        if isinstance(suite, TrainingSuite):
            check_names(f"{file}: 'suites.{name}", "methods", suite.methods, definition.methods)
            check_names(f"{file}: 'suites.{name}", "method_defaults", suite.method_defaults, kinds)


def resolve_methods(definition: MethodsDefinition, suite: str | None = None) -> dict[str, Method]:
    """Return a benchmark's methods with all their settings, for itself or for one of its suites.

    A setting is taken from the first of these that gives it: the suite's ``methods``, the benchmark's ``methods``,
    ``methods.yaml``, the suite's ``method_defaults`` for the method's kind, the benchmark's.
    """
    resolved = {}
    part = definition.suites[suite] if suite else None
    defaults, changes = (part.method_defaults, part.methods) if isinstance(part, TrainingSuite) else ({}, {})
    for name, row in definition.methods.items():
        layers = [load_methods()[row.method or name], row, changes.get(name, Method())]
        kind = merge_methods(*layers).kind
        usual = [settings[kind] for settings in (definition.method_defaults, defaults) if kind in settings]
        resolved[name] = merge_methods(*usual, *layers)
    return resolved


def check_settings(benchmark: AnyBenchmark) -> None:
    """Check what the suites change of the benchmark's settings.

    Raises:
        DefinitionError: A setting is wrong, or a model does not exist.
    """
    for suite, part in benchmark.definition.suites.items():
        for key, field in type(part).model_fields.items():
            if any(isinstance(mark, Changes) for mark in field.metadata):
                by_model = getattr(benchmark.settings(key, suite), "by_model", None) or {}
                check_names(f"{benchmark.file}: 'suites.{suite}.{key}", "by_model", by_model, load_models())
                for model, settings in by_model.items():
                    benchmark.settings(key, suite, model)
                    if "by_model" in settings:
                        raise DefinitionError(
                            f"{benchmark.file}: 'suites.{suite}.{key}.by_model.{model}' has a by_model"
                        )


# as it is loaded by name, whatever its kind
AnyBenchmark = Benchmark[Any, Any]


def benchmark_names() -> list[str]:
    """Return the names of all benchmarks: the folders with a ``benchmark.yaml``."""
    return sorted(path.parent.name for path in BENCHMARKS.glob("*/benchmark.yaml"))


@functools.cache
def load_benchmark(name: str) -> AnyBenchmark:
    """Read and check one benchmark.

    Raises:
        DefinitionError: There is no such benchmark, or its files are wrong.
    """
    if name not in benchmark_names():
        raise DefinitionError(f"there is no benchmark '{name}'{did_you_mean(name, benchmark_names())}")
    folder = BENCHMARKS / name
    file = folder / "benchmark.yaml"
    content = read_yaml(file)
    try:
        kind = find_kind(kind_name(name, content))
    except DefinitionError as error:
        raise DefinitionError(f"{file}: {error}") from error
    load_methods()  # first, because its plugins make names known
    benchmark = Benchmark(name, *kind.load(content, file))
    check_references(benchmark)
    return benchmark


def check_references(benchmark: AnyBenchmark) -> None:
    """Check that names and files exist, and that settings go together.

    Raises:
        DefinitionError: Names the file, the key and the nearest valid value.
    """
    definition, file, kind = benchmark.definition, benchmark.file, benchmark.kind
    modules = [f"benchmarks.{path.parent.name}.pipeline" for path in BENCHMARKS.glob("*/pipeline.py")]
    if definition.pipeline not in modules:
        near = did_you_mean(definition.pipeline, modules)
        raise DefinitionError(f"{file}: 'pipeline' is '{definition.pipeline}', which is no module{near}")
    if isinstance(definition, MethodsDefinition):
        check_rows(definition, str(file))
        ablations = [row for row, method in resolve_methods(definition).items() if method.role == ABLATION]
        if ablations and not hasattr(definition, "ablations"):
            raise DefinitionError(
                f"{file}: 'methods.{ablations[0]}' has role: {ABLATION}, but the benchmark has no 'ablations'"
            )
        if definition.baseline not in definition.methods:
            near = did_you_mean(definition.baseline, definition.methods)
            raise DefinitionError(f"{file}: 'baseline' is '{definition.baseline}', which is no method{near}")
    if definition.paper:
        check_file(f"{file}: '", "paper", definition.paper, benchmark.folder, kind.paper_columns)
    if "paper" in definition.tables and not definition.paper:
        raise DefinitionError(f"{file}: 'tables' names 'paper', so it needs 'paper': a CSV with published numbers")
    check_settings(benchmark)
    kind.check(benchmark)
