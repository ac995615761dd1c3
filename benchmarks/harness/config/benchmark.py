"""Benchmarks: the models of benchmark.yaml and of their part of a suite, and the hooks of each kind."""

from __future__ import annotations

import functools
import importlib
import itertools
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, ClassVar, Generic, Literal, Self, TypeVar

from pydantic import Field

from benchmarks.harness.base import BENCHMARKS, DefinitionError, RunError, read_yaml
from benchmarks.harness.config.catalogue import load_models
from benchmarks.harness.config.methods import Kind, Method, load_methods, merge_methods
from benchmarks.harness.config.names import check_name
from benchmarks.harness.config.overlay import Changes, merge
from benchmarks.harness.config.runs import Run, RunSpec
from benchmarks.harness.config.sets import SetReader
from benchmarks.harness.config.yaml import (
    Count,
    Key,
    Location,
    Names,
    Strict,
    Whole,
    check_file,
    check_names,
    key_path,
    optional,
    parse,
)
from emoe.errors import did_you_mean

Precision = Literal["fp32", "fp16", "bf16"]


class Resources(Strict):
    """Resources that the scheduler reserves for one run."""

    threads: Count = 1
    """CPU threads of one run."""
    mem_mb: Count = 3000
    """Megabytes of memory."""
    runtime: Count = 60
    """Minutes."""
    gpu: Whole = 0
    """GPUs."""


class Training(Strict):
    """Training settings of a run."""

    in_no_spec: ClassVar[set[str]] = {"by_model"}

    by_model: dict[str, dict[str, Any]] | None = optional()
    """Settings that override the others for single models, by name; not part of a run's spec."""

    def spec(self) -> dict[str, Any]:
        """Return the settings of a run's spec."""
        return self.model_dump(exclude=self.in_no_spec)


class Entry(Strict):
    """One task, set or measure of a benchmark."""

    title: str
    """Label in tables."""


class Definition(Strict):
    """The keys of every benchmark.yaml."""

    kind: str
    """The kind of benchmark, which plans, executes and shows its runs: a name in benchmarks/kinds.py."""
    version: Count
    """Part of every run's id. Increase it if the same settings give different or additional numbers."""
    title: str
    """Heading of the benchmark's tables and of its section in the report."""
    tables: Names
    """Names of the report's tables, in order: the kind's tables and those of `ablations`."""
    figures: list[str] = Field([])
    """Names of the report's figures: the kind's figures and those of `ablations`."""
    paper: str | None = None
    """CSV with published numbers, in the benchmark's folder; null if there are none."""


class MethodsDefinition(Definition):
    """The keys of a benchmark that compares methods."""

    baseline: str
    """The method that the others are compared with."""
    method_defaults: dict[Kind, Method] = Field({})
    """Default settings by kind of method: dense, emoe or gmoe. A row's own settings override them, and a suite's
    defaults override the benchmark's."""
    methods: Annotated[dict[Key, Method], Field(min_length=1)]
    """The compared methods of methods.yaml, in the order of the rows, with the settings that differ here."""


class SuitePart(Strict):
    """A benchmark's part of a suite."""

    resources: Resources = Resources()
    """Resources that the scheduler reserves for one run."""
    note: str | None = optional()
    """A sentence for the report on how the suite differs from the paper's experiment."""


class TrainingPart(SuitePart):
    """The suite's part of a benchmark that trains models with methods."""

    method_defaults: dict[Kind, Method] = Field({})
    """Default settings by kind of method; they override the benchmark's defaults."""
    methods: dict[str, Method] = Field({})
    """Settings of single methods that differ in this suite, by method."""
    grid_defaults: dict[str, Any] = Field({})
    """Default lists for every block of the grid."""


D = TypeVar("D", bound=Definition)
E = TypeVar("E", bound=Entry)
P = TypeVar("P", bound=SuitePart)


@dataclass(frozen=True)
class Part(Generic[P]):
    """Hold a benchmark's part of a suite.

    Attributes:
        benchmark: The name of the benchmark.
        suite: The name of the suite.
        file: The file of the suite, for messages.
        settings: The content of the part.
    """

    benchmark: str
    suite: str
    file: str
    settings: P

    def where(self, *keys: str | int) -> Location:
        """Return the location of a setting in the suite's file, for :func:`check_names`."""
        return Location(self.file, key_path(["benchmarks", self.benchmark, *keys]))

    def grid_points(
        self, names: Mapping[str, Collection[str]], axes: Iterable[str]
    ) -> Iterator[tuple[Location, dict[str, Any]]]:
        """Yield every point of the grid, with the location of its block in the file.

        Args:
            names: The valid names, by key of a block.
            axes: The keys of a point, the slowest first; a block may lack some.
        """
        grid: Sequence[Strict] = getattr(self.settings, "grid", ())
        for number, block in enumerate(grid):
            where, values = self.where("grid", number), block.model_dump()
            for key, known in names.items():
                check_names(where.at(key), values[key], known)
            keys = [key for key in axes if key in values]
            for point in itertools.product(*(values[key] for key in keys)):
                yield where, dict(zip(keys, point, strict=True))


@dataclass(frozen=True)
class Domain:
    """Describe a group of numbers that claims can compare between two methods.

    Attributes:
        metrics: The names of the metrics.
        pair: The unit of a paired comparison: ``seed``, ``trial``, ``question``, ``setting``.
        selections: The names of the selections of epoch and hyper-parameters, if several are reported.
    """

    metrics: tuple[str, ...]
    pair: str = "seed"
    selections: tuple[str, ...] = ()


OOD_MEAN = "ood_mean"  # the mean of a run's scores over its out-of-distribution sets
COUNTS = Domain(("parameters", "trainable_parameters"))  # for every model


class Benchmark(ABC, Generic[D, E, P]):
    """One folder of benchmarks/: its definition, its tasks, and the hooks of its kind.

    A kind is a subclass, named in benchmarks/kinds.py. It names the package of its modules ``pipeline`` and
    ``presentation``, and has the models of its YAML and the hooks :meth:`load`, :meth:`specs`, :meth:`sets` and
    :meth:`check_processes`; only the first two are required.

    Attributes:
        name: The name of the folder.
        definition: The content of benchmark.yaml.
        tasks: The tasks, sets of images or instructions, or measures, by name.
        domains: The groups of numbers that claims may compare, by name.
        row_titles: The titles of the rows that claims may compare, by name.
        task_titles: The titles of the sets of runs, by the names that tables and claims use.
    """

    package: ClassVar[
        str
    ]  # of the modules :meth:`pipeline` and :meth:`presentation`, such as ``benchmarks.text``
    definition_model: ClassVar[type[Definition]]
    part_model: ClassVar[type[SuitePart]]
    task_files: ClassVar[Mapping[str, type[Strict]]] = {}  # models of its other YAML files, by name
    paper_columns: ClassVar[tuple[str, ...]] = ()  # of paper.csv, before value, status and source
    spec_model: ClassVar[type[RunSpec]]  # of the specs of its runs
    recorded: ClassVar[tuple[str, ...]] = ()  # the keys of metrics.json that each of its runs has

    def __init__(
        self,
        name: str,
        definition: D,
        tasks: Mapping[str, E],
        domains: Mapping[str, Domain],
        row_titles: Mapping[str, str] | None = None,
        task_titles: Mapping[str, str] | None = None,
    ) -> None:
        self.name, self.definition, self.tasks, self.domains = name, definition, tasks, domains
        self.task_titles = {
            **(task_titles or {}),
            **{key: task.title for key, task in tasks.items()},
        }
        if isinstance(definition, MethodsDefinition):
            check_rows(definition, self.file)
        self.row_titles = row_titles or {
            key: method.title for key, method in self.methods().items()
        }
        if definition.paper:
            location = Location(self.file, "paper")
            check_file(location, definition.paper, self.folder, self.paper_columns)
        if "paper" in definition.tables and not definition.paper:
            raise DefinitionError(
                f"{self.file}: 'tables' names 'paper', so it needs the key 'paper'"
            )

    @property
    def folder(self) -> Path:
        return BENCHMARKS / self.name

    @property
    def file(self) -> Path:
        return self.folder / "benchmark.yaml"

    # hooks

    @classmethod
    @abstractmethod
    def load(cls, name: str, content: object, file: Path) -> Self:
        """Read the definition and the tasks, and check that names exist and settings go together.

        Args:
            name: The name of the benchmark.
            content: The content of ``benchmark.yaml``.
            file: The path of that file, in the same folder as the other files.
        """

    @abstractmethod
    def specs(
        self, part: Part[P], exclude: Collection[str], others: Sequence[Run]
    ) -> Iterator[dict[str, Any]]:
        """Yield the specs of a suite's grid, in its order.

        Args:
            part: The benchmark's part of the suite.
            exclude: The sets to exclude.
            others: The runs that the benchmark evaluates; empty if it evaluates none.
        """

    def sets(self, spec: Mapping[str, Any]) -> list[SetReader]:
        """Return a reader for each part of each set that a run reads."""
        return []

    def check_processes(self, spec: Mapping[str, Any], processes: int, parallel: str) -> None:
        """Check that a run can use several processes with ``ddp`` or ``fsdp``.

        Raises:
            RunError: Only one process works.
            DefinitionError: Its settings do not fit the number of processes.
        """
        if processes > 1:
            raise RunError("only training runs of instruction tuning can use several processes")

    # shared by all kinds

    def pipeline(self) -> ModuleType:
        """Import the module of the kind that executes runs.

        Its function ``run(spec, folder, progress)`` gets a :attr:`spec_model` and returns the content of ``metrics.json`` without the environment.
        """
        # imported when it is needed, because it imports PyTorch, and planning is fast without
        return importlib.import_module(f"{self.package}.pipeline")

    def presentation(self) -> ModuleType:
        """Import the module of the kind that makes the tables and figures of finished runs.

        It has functions by name in ``TABLES`` and ``FIGURES``, and in ``SET_TABLES`` and ``SET_FIGURES`` if each set
        has tables of its own. Its function ``present(benchmark, runs)`` makes a
        :class:`~benchmarks.harness.report.presentation.Presentation`.
        """
        return importlib.import_module(f"{self.package}.presentation")

    def checked_presentation(self) -> ModuleType:
        """Import the module of :meth:`presentation`, and check the names of tables and figures in benchmark.yaml."""
        module = self.presentation()
        ablations = getattr(self.definition, "ablations", {})
        for key in ("tables", "figures", "set_tables", "set_figures"):
            valid = [*getattr(module, key.upper(), ()), *ablations]
            check_names(Location(self.file, key), getattr(self.definition, key, ()), valid)
        return module

    def methods(self, part: Part[Any] | None = None) -> dict[str, Method]:
        """Return the methods with all their settings, for the benchmark or its part of a suite.

        Later layers override earlier ones: the benchmark's ``method_defaults`` for the method's kind, the suite's
        ``method_defaults``, ``methods.yaml``, the benchmark's ``methods``, the suite's ``methods``.
        """
        definition = self.definition
        if not isinstance(definition, MethodsDefinition):
            return {}
        if part is None or not isinstance(part.settings, TrainingPart):
            return resolve_methods(definition)
        check_names(part.where("methods"), part.settings.methods, definition.methods)
        return resolve_methods(definition, part.settings.method_defaults, part.settings.methods)

    def settings(self, key: str, part: Part[P], model: str | None = None) -> Any:
        """Return one section of the benchmark's settings, overridden by the suite, then by ``by_model``.

        Args:
            key: The name of the section, such as ``training``.
            part: The benchmark's part of the suite.
            model: The name of the model; None does not apply ``by_model``.
        """
        usual: Strict = getattr(self.definition, key)
        settings = merge(usual.model_dump(exclude_unset=True), getattr(part.settings, key))
        at = ["benchmarks", self.name, key]
        if model is not None and model in (settings.get("by_model") or {}):
            settings = merge(settings, settings["by_model"][model])
            at += ["by_model", model]
        return parse(settings, type(usual), part.file, *at)

    @property
    def evaluates(self) -> str | None:
        """Return the name of the benchmark whose runs this one evaluates, if any."""
        return getattr(self.definition, "evaluates", None)

    @property
    def has_set_tables(self) -> bool:
        """Return True if the benchmark has separate tables and figures for each set."""
        return bool(getattr(self.definition, "set_tables", ()))

    def read_spec(self, run: Run) -> RunSpec:
        """Validate the spec of a run; raise :class:`DefinitionError` if it does not fit the kind."""
        return parse(run.spec, self.spec_model, str(run.spec_file))

    def spec(self, variant: str, **content: Any) -> dict[str, Any]:
        """Make the spec of a run. ``variant`` names its settings besides model, task and method."""
        return {
            "benchmark": self.name,
            "version": self.definition.version,
            "variant": variant,
            **content,
        }


AnyBenchmark = Benchmark[Any, Any, Any]
KINDS: dict[str, type[AnyBenchmark]] = {}  # by name; benchmarks/kinds.py fills it


def resolve_methods(
    definition: MethodsDefinition,
    defaults: Mapping[Kind, Method] = {},
    changes: Mapping[str, Method] = {},
) -> dict[str, Method]:
    """Return the methods of a definition with all their settings.

    Args:
        definition: The definition.
        defaults: A suite's ``method_defaults``.
        changes: A suite's ``methods``.
    """
    resolved = {}
    for name, row in definition.methods.items():
        layers = [load_methods()[row.method or name], row, changes.get(name, Method())]
        kind = merge_methods(*layers).kind
        usual = [
            settings[kind]
            for settings in (definition.method_defaults, defaults)
            if kind in settings
        ]
        resolved[name] = merge_methods(*usual, *layers)
    return resolved


def check_rows(definition: MethodsDefinition, file: Path) -> None:
    """Check the names of the methods that a benchmark compares, and of the baseline."""
    for name, row in definition.methods.items():
        at, known = (f"methods.{name}.method", row.method) if row.method else ("methods", name)
        check_names(Location(file, at), [known], load_methods())
    check_names(Location(file, "baseline"), [definition.baseline], definition.methods)


def benchmark_names() -> list[str]:
    """Return the names of all benchmarks: the folders with a ``benchmark.yaml``."""
    return sorted(path.parent.name for path in BENCHMARKS.glob("*/benchmark.yaml"))


@functools.cache
def load_benchmark(name: str) -> AnyBenchmark:
    """Read and check one benchmark."""
    if name not in benchmark_names():
        raise DefinitionError(
            f"there is no benchmark '{name}'{did_you_mean(name, benchmark_names())}"
        )
    file = BENCHMARKS / name / "benchmark.yaml"
    check_name(name, file)
    content = read_yaml(file)
    kind = content.get("kind") if isinstance(content, dict) else None
    kind = kind if isinstance(kind, str) else ""
    if kind not in KINDS:  # benchmarks/kinds.py has to be imported first
        raise DefinitionError(f"{file}: 'kind' is '{kind}'{did_you_mean(kind, KINDS)}")
    load_methods()  # first, because its plugins register names
    return KINDS[kind].load(name, content, file)


def parse_part(benchmark: AnyBenchmark, suite: str, file: Path, content: object) -> Part[Any]:
    """Validate a benchmark's part of a suite, and apply ``grid_defaults`` to the blocks of its grid."""
    given: Any = {} if content is None else content
    match given:
        case {"grid_defaults": dict(defaults), "grid": list(blocks)}:
            full = [{**defaults, **block} if isinstance(block, dict) else block for block in blocks]
            given = {**given, "grid": full}
    settings = parse(given, benchmark.part_model, str(file), "benchmarks", benchmark.name)
    part = Part(benchmark.name, suite, str(file), settings)
    for key, field in benchmark.part_model.model_fields.items():
        if any(isinstance(mark, Changes) for mark in field.metadata):
            by_model = getattr(benchmark.settings(key, part), "by_model", None) or {}
            check_names(part.where(key, "by_model"), by_model, load_models())
            for name in by_model:
                benchmark.settings(key, part, name)
    return part
