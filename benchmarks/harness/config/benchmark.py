"""Define benchmarks: the models of their YAML files, and the hooks of each kind of benchmark."""

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
    check_csv,
    check_names,
    key_path,
    optional,
    parse,
)
from emoe.errors import did_you_mean

Precision = Literal["fp32", "fp16", "bf16"]
# the keys of a method that describe a row of tables; all suites have the same rows
_ROW_KEYS = ("title", "role", "method")


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

    in_no_spec: ClassVar[set[str]] = {"by_model"}  # keys that a run's spec omits

    by_model: dict[str, dict[str, Any]] | None = optional()
    """Settings for single models, by the model's name. They override the other settings.

    A run's spec does not have this key.
    """

    def spec(self) -> dict[str, Any]:
        """Return the settings as plain values, without the keys that a run's spec omits."""
        return self.model_dump(exclude=self.in_no_spec)


class Entry(Strict):
    """One task, data set or measure of a benchmark."""

    title: str
    """Label in tables."""


class Definition(Strict):
    """The keys of every benchmark.yaml."""

    kind: str
    """The kind of benchmark, which plans, executes and shows its runs: a name in
    benchmarks/kinds.py."""
    version: Count
    """Part of every run's id. Increase it if the same settings give different or additional
    numbers."""
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
    """Default settings by kind of method: dense, emoe or gmoe. A row's own settings override them,
    and a suite's defaults override the benchmark's."""
    methods: Annotated[dict[Key, Method], Field(min_length=1)]
    """The compared methods of methods.yaml, in the order of the rows in tables. Settings here
    override the settings of that file."""


class SuitePart(Strict):
    """The settings of one benchmark in the file of a suite."""

    resources: Resources = Resources()
    """Resources that the scheduler reserves for one run."""
    note: str | None = optional()
    """A sentence for the report on how the suite differs from the paper's experiment."""


class TrainingPart(SuitePart):
    """The settings of one benchmark that trains models with methods, in the file of a suite."""

    method_defaults: dict[Kind, Method] = Field({})
    """Default settings by kind of method; they override the benchmark's defaults."""
    methods: dict[str, Method] = Field({})
    """Settings of single methods that differ in this suite, by the method's name. `title`, `role`
    and `method` are the same in every suite: set them in benchmark.yaml."""
    grid_defaults: dict[str, Any] = Field({})
    """Default lists for every block of the grid."""


# the models of one kind of benchmark
D = TypeVar("D", bound=Definition)
E = TypeVar("E", bound=Entry)
P = TypeVar("P", bound=SuitePart)


@dataclass(frozen=True)
class Part(Generic[P]):
    """A benchmark's part of a suite: its settings there, with names for error messages.

    Attributes:
        benchmark: The name of the benchmark.
        suite: The name of the suite.
        file: The file of the suite, for messages.
        settings: What the suite's file sets for the benchmark.
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
        """Yield every point of the grid, with the location of its block in the suite's file.

        A block has a list of values for each key. A point has one value of each list.

        Args:
            names: The valid names for each key of a block that lists names, such as ``model``.
            axes: The keys of a point. The value of the first key changes most slowly. A block may
                lack some of these keys.

        Raises:
            DefinitionError: A block has an invalid name.
        """
        # some kinds have no grid
        grid: Sequence[Strict] = getattr(self.settings, "grid", ())
        for number, block in enumerate(grid):
            where = self.where("grid", number)
            lists = block.model_dump()
            for key, valid in names.items():
                check_names(where.at(key), lists[key], valid)
            # every combination of the block's lists is a point
            present_axes = [key for key in axes if key in lists]
            lists_of_axes = [lists[key] for key in present_axes]
            for values in itertools.product(*lists_of_axes):
                point = dict(zip(present_axes, values, strict=True))
                yield where, point


@dataclass(frozen=True)
class Domain:
    """A group of numbers that claims can compare between two methods.

    Attributes:
        metrics: The names of the metrics.
        pair: The unit that pairs the numbers of two methods in a comparison: ``seed``, ``trial``,
            ``question`` or ``setting``.
        selections: The names of the ways to select epoch and hyper-parameters. A claim must name
            one of them. Empty if results of only one way are reported.
    """

    metrics: tuple[str, ...]
    pair: str = "seed"
    selections: tuple[str, ...] = ()


OOD_MEAN = "ood_mean"  # the mean of a run's scores over its out-of-distribution sets
COUNTS = Domain(("parameters", "trainable_parameters"))  # numbers that every model has


class Benchmark(ABC, Generic[D, E, P]):
    """One folder of benchmarks/: its definition, its tasks, and the hooks of its kind.

    A kind is a subclass, named in benchmarks/kinds.py. It sets the class attributes below, and has
    the hooks :meth:`load`, :meth:`specs`, :meth:`sets` and :meth:`check_processes`. Only the first
    two hooks are required.

    Attributes:
        package: The package of the modules :meth:`pipeline` and :meth:`presentation`, such as
            ``benchmarks.text``.
        definition_model: The model of benchmark.yaml.
        part_model: The model of the benchmark's part of a suite.
        task_files: The models of the benchmark's other YAML files, by the name of their schema.
        paper_columns: The columns of the CSV of published numbers, before value, status and source.
        spec_model: The model of the specs of the benchmark's runs.
        recorded: The keys of metrics.json that every run of the benchmark has.
        name: The name of the folder.
        definition: The content of benchmark.yaml.
        tasks: The tasks, image sets, sets of instructions, or measures, by name.
        domains: The groups of numbers that claims may compare, by name.
        row_titles: The titles of the rows that claims may compare, by name.
        task_titles: The titles of the tasks and, if there are any, of mixtures of tasks, by name.
    """

    package: ClassVar[str]
    definition_model: ClassVar[type[Definition]]
    part_model: ClassVar[type[SuitePart]]
    task_files: ClassVar[Mapping[str, type[Strict]]] = {}
    paper_columns: ClassVar[tuple[str, ...]] = ()
    spec_model: ClassVar[type[RunSpec]]
    recorded: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        name: str,
        definition: D,
        tasks: Mapping[str, E],
        domains: Mapping[str, Domain],
        row_titles: Mapping[str, str] | None = None,
        task_titles: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self.definition = definition
        self.tasks = tasks
        self.domains = domains
        self.task_titles = dict(task_titles or {})
        for key, task in tasks.items():
            self.task_titles[key] = task.title
        # checked first, because self.methods() looks up the names
        if isinstance(definition, MethodsDefinition):
            check_rows(definition, self.file)
        # unless the kind gives other rows, each method has a row
        titles_of_methods = {key: method.title for key, method in self.methods().items()}
        self.row_titles = row_titles or titles_of_methods
        self._check_paper()

    def _check_paper(self) -> None:
        """Check that the file of published numbers exists and has the right columns.

        The table ``paper`` compares our numbers with this file. A benchmark with this table must
        therefore name the file.

        Raises:
            DefinitionError: The file is missing or has other columns, or the benchmark names none.
        """
        definition = self.definition
        if definition.paper:
            location = Location(self.file, "paper")
            check_csv(location, definition.paper, self.folder, self.paper_columns)
        if "paper" in definition.tables and not definition.paper:
            raise DefinitionError(
                f"{self.file}: 'tables' names 'paper', so it needs the key 'paper'"
            )

    @property
    def folder(self) -> Path:
        """Return the path of the benchmark's folder."""
        return BENCHMARKS / self.name

    @property
    def file(self) -> Path:
        """Return the path of ``benchmark.yaml``."""
        return self.folder / "benchmark.yaml"

    # hooks

    @classmethod
    @abstractmethod
    def load(cls, name: str, content: object, file: Path) -> Self:
        """Read the definition and the tasks. Check that names exist and settings fit together.

        Args:
            name: The name of the benchmark.
            content: The content of ``benchmark.yaml``.
            file: The path of that file, in the same folder as the other files.
        """

    @abstractmethod
    def specs(
        self, part: Part[P], exclude: Collection[str], others: Sequence[Run]
    ) -> Iterator[dict[str, Any]]:
        """Yield the specs of the runs in a suite's grid, in the order of the grid.

        Args:
            part: The benchmark's part of the suite.
            exclude: The names of the data sets to leave out.
            others: The runs of another benchmark, if this benchmark evaluates them; else empty.
        """

    def sets(self, run: Run) -> list[SetReader]:
        """Return a reader for each split (or other part) of each data set that a run reads."""
        return []

    def check_processes(self, spec: Mapping[str, Any], processes: int, parallel: str) -> None:
        """Check that a run can use several processes with ``ddp`` or ``fsdp``.

        Raises:
            RunError: Runs of this kind use only one process.
            DefinitionError: The run's settings do not fit the number of processes.
        """
        if processes > 1:
            raise RunError("only training runs of instruction tuning can use several processes")

    # shared by all kinds

    def pipeline(self) -> ModuleType:
        """Import and return the kind's module that executes runs.

        The module has a function ``run(spec, folder, progress)``. The function gets the spec as a
        :attr:`spec_model`, and returns the content of ``metrics.json`` without the environment.
        """
        # imported only to execute a run, because it imports PyTorch, which would slow down planning
        return importlib.import_module(f"{self.package}.pipeline")

    def presentation(self) -> ModuleType:
        """Import and return the kind's module that makes the tables and figures of finished runs.

        The module has the dictionary ``TABLES``, with a function for each name, and ``FIGURES`` if
        the kind has figures. If each data set has its own tables, it also has ``SET_TABLES`` and
        ``SET_FIGURES``. Its function ``present(benchmark, records)`` makes a
        :class:`~benchmarks.harness.report.presentation.Presentation`.
        """
        return importlib.import_module(f"{self.package}.presentation")

    def checked_presentation(self) -> ModuleType:
        """Return the kind's module for tables and figures, after a check of benchmark.yaml.

        Raises:
            DefinitionError: benchmark.yaml names a table or figure that does not exist.
        """
        module = self.presentation()
        definition = self.definition
        # some kinds also make a table and a figure for each ablation that benchmark.yaml defines
        ablations = getattr(definition, "ablations", {})
        valid_tables = [*module.TABLES, *ablations]
        # some kinds have no figures
        valid_figures = [*getattr(module, "FIGURES", {}), *ablations]
        check_names(Location(self.file, "tables"), definition.tables, valid_tables)
        check_names(Location(self.file, "figures"), definition.figures, valid_figures)
        # only kinds with separate tables for each data set have these keys
        if hasattr(definition, "set_tables"):
            check_names(Location(self.file, "set_tables"), definition.set_tables, module.SET_TABLES)
        if hasattr(definition, "set_figures"):
            check_names(
                Location(self.file, "set_figures"), definition.set_figures, module.SET_FIGURES
            )
        return module

    def methods(self, part: Part[Any] | None = None) -> dict[str, Method]:
        """Return the benchmark's methods by name, each with all its settings.

        The settings are merged from five layers, and a later layer overrides an earlier one:

        1. the benchmark's ``method_defaults`` for the method's kind
        2. the suite's ``method_defaults`` for the method's kind
        3. ``methods.yaml``
        4. the benchmark's ``methods``
        5. the suite's ``methods``

        Args:
            part: The benchmark's part of a suite; None leaves out the suite's layers.

        Returns:
            The methods. Empty if the benchmark does not compare methods.
        """
        definition = self.definition
        if not isinstance(definition, MethodsDefinition):
            return {}
        # a suite can change methods only in the settings of a TrainingPart
        if part is None or not isinstance(part.settings, TrainingPart):
            return resolve_methods(definition)
        check_names(part.where("methods"), part.settings.methods, definition.methods)
        return resolve_methods(definition, part.settings.method_defaults, part.settings.methods)

    def settings(
        self, key: str, part: Part[P], *, model: str | None = None, task: str | None = None
    ) -> Any:
        """Return one section of the benchmark's settings, merged with the changes of a suite.

        Later layers override earlier ones:

        1. the section in ``benchmark.yaml``
        2. the section in the suite
        3. the changes for ``model`` in the section's ``by_model``
        4. the changes for ``task`` in its ``by_task``

        Args:
            key: The name of the section, such as ``training``.
            part: The benchmark's part of the suite.
            model: The name of the model whose ``by_model`` is applied; None applies none.
            task: The name of the task whose ``by_task`` is applied; None applies none.
        """
        section: Strict = getattr(self.definition, key)
        # Without the defaults that pydantic fills in. So the merged settings still record which of
        # their values come from a file.
        benchmark_settings = section.model_dump(exclude_unset=True)
        suite_changes = getattr(part.settings, key)
        suite_settings = merge(benchmark_settings, suite_changes)
        model_changes = _changes_for(model, suite_settings.get("by_model"))
        task_changes = _changes_for(task, suite_settings.get("by_task"))
        merged = merge(suite_settings, model_changes, task_changes)

        # No file contains the merged settings. So an error names the place of the changes that were
        # merged last: the settings before them are already known to be valid.
        where = part.where(key)
        if task_changes:
            where = self.location_of_changes(part, key, "by_task", str(task)).at(str(task))
        elif model_changes:
            where = self.location_of_changes(part, key, "by_model", str(model)).at(str(model))
        return parse(merged, type(section), str(where.file), where.key)

    def location_of_changes(self, part: Part[P], key: str, changes: str, name: str) -> Location:
        """Return the location of the changes for some models or tasks.

        They are in the suite's file if it changes the named model or task. Otherwise they are in
        benchmark.yaml.

        Args:
            part: The benchmark's part of the suite.
            key: The name of the section, such as ``training``.
            changes: The key of the changes: ``by_model`` or ``by_task``.
            name: The name of a model or task that the changes have.
        """
        suite_section = getattr(part.settings, key)
        suite_changes = suite_section.get(changes) or {}
        if name in suite_changes:
            return part.where(key, changes)
        return Location(self.file, key_path([key, changes]))

    @property
    def evaluated_benchmark(self) -> str | None:
        """Return the name of the benchmark whose runs this one evaluates, if any."""
        return getattr(self.definition, "evaluates", None)

    @property
    def has_set_tables(self) -> bool:
        """Return True if the benchmark has separate tables and figures for each data set."""
        return bool(getattr(self.definition, "set_tables", ()))

    def read_spec(self, run: Run) -> RunSpec:
        """Validate the spec of a run, and return it as the model of the kind's specs.

        Raises:
            DefinitionError: The spec does not fit the kind of the benchmark.
        """
        return parse(run.spec, self.spec_model, str(run.spec_file))

    def spec(self, variant: str, **content: Any) -> dict[str, Any]:
        """Make the spec of a run.

        Args:
            variant: A short name of the settings besides model, task and method.
            content: The keys that only specs of this kind have, with their values.
        """
        return {
            "benchmark": self.name,
            "version": self.definition.version,
            "variant": variant,
            **content,
        }


def _changes_for(
    name: str | None, changes_by_name: Mapping[str, dict[str, Any]] | None
) -> dict[str, Any]:
    """Return the changes of a section for one model or task; empty if there are none.

    Args:
        name: The name of the model or task; None applies no changes.
        changes_by_name: The section's ``by_model`` or ``by_task``; None if it has no such key.
    """
    if name is None or changes_by_name is None:
        return {}
    return changes_by_name.get(name, {})


AnyBenchmark = Benchmark[Any, Any, Any]
KINDS: dict[str, type[AnyBenchmark]] = {}  # by name; benchmarks/kinds.py fills it


def resolve_methods(
    definition: MethodsDefinition,
    suite_defaults: Mapping[Kind, Method] = {},
    suite_methods: Mapping[str, Method] = {},
) -> dict[str, Method]:
    """Merge the settings of each method that a benchmark compares.

    A later layer overrides an earlier one: the benchmark's defaults for the method's kind, the
    suite's defaults, ``methods.yaml``, the benchmark's own settings, the suite's own settings.

    Args:
        definition: The content of ``benchmark.yaml``.
        suite_defaults: The ``method_defaults`` of a suite, by kind of method.
        suite_methods: The ``methods`` of a suite, by name.

    Returns:
        The methods by name, each with all its settings.
    """
    resolved = {}
    for name, benchmark_method in definition.methods.items():
        # the key `method` names the method of methods.yaml, if its name there is another one
        name_in_catalogue = benchmark_method.method or name
        catalogue_method = load_methods()[name_in_catalogue]
        suite_method = suite_methods.get(name, Method())
        own_layers = [catalogue_method, benchmark_method, suite_method]
        # the kind is known after this merge, and decides which defaults the method has
        kind = merge_methods(*own_layers).kind
        default_layers = []
        if kind in definition.method_defaults:
            default_layers.append(definition.method_defaults[kind])
        if kind in suite_defaults:
            default_layers.append(suite_defaults[kind])
        resolved[name] = merge_methods(*default_layers, *own_layers)
    return resolved


def check_rows(definition: MethodsDefinition, file: Path) -> None:
    """Check that all compared methods exist, and that the baseline is one of them.

    Raises:
        DefinitionError: A name does not exist.
    """
    for name, row in definition.methods.items():
        # a row without the key `method` takes the settings of the method with the row's name
        if row.method:
            check_names(Location(file, f"methods.{name}.method"), [row.method], load_methods())
        else:
            check_names(Location(file, "methods"), [name], load_methods())
    check_names(Location(file, "baseline"), [definition.baseline], definition.methods)


def benchmark_names() -> list[str]:
    """Return the names of all benchmarks: the folders with a ``benchmark.yaml``."""
    return sorted(path.parent.name for path in BENCHMARKS.glob("*/benchmark.yaml"))


@functools.cache
def load_benchmark(name: str) -> AnyBenchmark:
    """Read and check one benchmark.

    ``benchmarks.kinds`` must have been imported before, because it fills :data:`KINDS`.

    Raises:
        DefinitionError: There is no such benchmark, or one of its files is wrong.
    """
    if name not in benchmark_names():
        near = did_you_mean(name, benchmark_names())
        raise DefinitionError(f"there is no benchmark '{name}'{near}")
    file = BENCHMARKS / name / "benchmark.yaml"
    # a folder may have a name that the workflow uses for something else
    check_name(name, file)
    content = read_yaml(file)
    # if the file names no kind, `kind` is empty, which is also an error
    kind = _named_kind(content)
    if kind not in KINDS:
        raise DefinitionError(f"{file}: 'kind' is '{kind}'{did_you_mean(kind, KINDS)}")
    # before the benchmark is loaded, because it may use names that plugins register
    load_methods()
    return KINDS[kind].load(name, content, file)


def _named_kind(content: object) -> str:
    """Return the kind that a benchmark.yaml names; empty if it names none."""
    if not isinstance(content, dict):
        return ""
    kind = content.get("kind")
    return kind if isinstance(kind, str) else ""


def parse_part(benchmark: AnyBenchmark, suite: str, file: Path, content: object) -> Part[Any]:
    """Validate the settings that a suite's file has for one benchmark.

    Args:
        benchmark: The benchmark.
        suite: The name of the suite.
        file: The file of the suite.
        content: The value of the key ``benchmarks.NAME`` in that file; None if the key has no
            value.

    Returns:
        The benchmark's part of the suite: the validated settings, with names for messages.

    Raises:
        DefinitionError: A setting is wrong. The error names the file, the key and the nearest valid
            value.
    """
    # with nothing after its key (`speed:`), the benchmark has the settings of benchmark.yaml
    given = {} if content is None else content
    filled = _apply_grid_defaults(given)
    settings = parse(filled, benchmark.part_model, str(file), "benchmarks", benchmark.name)
    part = Part(benchmark.name, suite, str(file), settings)
    _refuse_row_keys(benchmark, part)
    # For a section of benchmark.yaml such as `training`, the suite gives only the values that
    # differ. Only the merged section is complete, so parse() above could not validate it.
    for section in _overridable_sections(benchmark.part_model):
        _check_overridden_section(benchmark, part, section)
    return part


def _refuse_row_keys(benchmark: AnyBenchmark, part: Part[Any]) -> None:
    """Refuse the keys ``title``, ``role`` and ``method`` in the methods of a suite.

    They describe the rows of tables, which are the same in all suites.

    Raises:
        DefinitionError: A method or a default has such a key. The error names the file in which to
            set it.
    """
    if not isinstance(part.settings, TrainingPart):
        return
    for section in ("methods", "method_defaults"):
        for name, method in getattr(part.settings, section).items():
            for key in _ROW_KEYS:
                if key in method.model_fields_set:
                    where = part.where(section, name, key)
                    raise DefinitionError(
                        f"{where} has no effect in a suite; set it in {benchmark.file}"
                    )


def _overridable_sections(part_model: type[SuitePart]) -> list[str]:
    """Return the sections of benchmark.yaml that a suite may override, such as ``training``.

    Args:
        part_model: The model of the benchmark's part of a suite. An annotation ``Changes`` marks
            the fields that override a section.
    """
    sections = []
    for name, field in part_model.model_fields.items():
        if any(isinstance(annotation, Changes) for annotation in field.metadata):
            sections.append(name)
    return sections


def _apply_grid_defaults(content: object) -> object:
    """Add ``grid_defaults`` to each block of a part's grid; a block's own lists override them.

    Content of a wrong type is returned as it is, because its validation follows.
    """
    if not isinstance(content, dict):
        return content
    defaults = content.get("grid_defaults")
    blocks = content.get("grid")
    if not isinstance(defaults, dict) or not isinstance(blocks, list):
        return content
    filled_blocks = []
    for block in blocks:
        filled = {**defaults, **block} if isinstance(block, dict) else block
        filled_blocks.append(filled)
    return {**content, "grid": filled_blocks}


def _check_overridden_section(benchmark: AnyBenchmark, part: Part[Any], section: str) -> None:
    """Validate a section of benchmark.yaml after a suite's values have replaced some of its own.

    The section may have other settings for some models (``by_model``) or tasks (``by_task``). It is
    validated once without them, and once for each of these models and tasks.

    Args:
        benchmark: The benchmark.
        part: The benchmark's part of the suite.
        section: The name of the section, such as ``training``.

    Raises:
        DefinitionError: A value, a model or a task is wrong.
    """
    # settings() merges the values of both files, and raises the error if they are wrong
    merged = benchmark.settings(section, part)

    # not all sections have these two keys, and their default is None
    by_model = getattr(merged, "by_model", None) or {}
    for model, model_settings in by_model.items():
        where = benchmark.location_of_changes(part, section, "by_model", model)
        check_names(where, [model], load_models())
        _refuse_nested(model_settings, where.at(model))
        benchmark.settings(section, part, model=model)

    by_task = getattr(merged, "by_task", None) or {}
    for task, task_settings in by_task.items():
        where = benchmark.location_of_changes(part, section, "by_task", task)
        check_names(where, [task], benchmark.tasks)
        _refuse_nested(task_settings, where.at(task))
        benchmark.settings(section, part, task=task)


def _refuse_nested(settings: Mapping[str, Any], where: Location) -> None:
    """Raise a DefinitionError if a model's or task's settings have ``by_model`` or ``by_task``.

    They would not be applied.
    """
    for key in ("by_model", "by_task"):
        if key in settings:
            raise DefinitionError(f"{where.at(key)} must stand beside the other settings")
