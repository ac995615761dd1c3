"""How a benchmark plugs in: the ``grid`` module of its kind says what its runs are, what they need, and what they read."""

from __future__ import annotations

import functools
import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from benchmarks.harness.base.errors import DefinitionError, RunError
from benchmarks.harness.base.paths import BENCHMARKS
from benchmarks.harness.config.counts import PublishedRows, count_note
from benchmarks.harness.config.method_rows import resolve_methods
from benchmarks.harness.config.schema import Strict, read_yaml
from benchmarks.harness.config.shared import Definition, Entry, MethodsDefinition, Resources
from benchmarks.harness.sources.packages import PackageFile
from emoe.errors import did_you_mean

ALL = "all"  # the one part of a set that is read as a whole
USUAL = "text"  # the kind of a benchmark that says none and has no grid of its own


D = TypeVar("D", bound=Definition)
E = TypeVar("E", bound=Entry)
D_co = TypeVar("D_co", bound=Definition, covariant=True)
E_co = TypeVar("E_co", bound=Entry, covariant=True)


@dataclass(frozen=True)
class Benchmark(Generic[D_co, E_co]):
    """One benchmark folder: its definition, its tasks (measures of measurements, sets of images or instructions), and where it is."""

    name: str
    definition: D_co
    tasks: Mapping[str, E_co]

    @functools.cached_property
    def kind(self) -> Kind[Any, Any]:
        return find_kind(self.definition.kind or usual_kind(self.name))

    @property
    def folder(self) -> Path:
        return BENCHMARKS / self.name

    @property
    def file(self) -> Path:
        return self.folder / "benchmark.yaml"

    @property
    def of_every_spec(self) -> dict[str, Any]:
        """What the specs of all its runs have."""
        return {"benchmark": self.name, "version": self.definition.version, "pipeline": self.definition.pipeline}


@dataclass(frozen=True)
class SetPart:
    """What ``python -m benchmarks data`` says of one part of one set.

    Attributes:
        name: the set's.
        part: ``train``, ``dev`` or ``test``; of an image set the environment; of instructions ``all``.
        rows: how many are used; None where the part is missing.
        dropped: rows left out, without a gold label or without text, or broken.
        expected: rows as the set's makers count them, where that is known.
        labels: rows by label, as text.
        source: where they came from.
        advice: what to do, where the part is missing.
        published: rows that the paper's authors score, where these are others.
        counts_dropped: whether the makers count rows that are left out too.
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
    def note(self) -> str | None:
        """How its rows differ from what is known of the set."""
        if self.rows is None:
            return None
        return count_note(
            self.name,
            self.part,
            self.rows,
            self.dropped,
            self.expected,
            self.published,
            counts_dropped=self.counts_dropped,
        )


@dataclass(frozen=True)
class Domain:
    """Numbers of a kind's runs by which claims compare two methods.

    Attributes:
        metrics: their names.
        pair: what two numbers have in common that are compared: ``seed``, ``trial``, ``question``, ``setting``.
        selections: names of what chose epoch and hyper-parameters, where several are reported.
    """

    metrics: tuple[str, ...]
    pair: str = "seed"
    selections: tuple[str, ...] = ()


OOD_MEAN = "ood_mean"  # the mean of a run's scores over its other sets
COUNTS = Domain(("parameters", "trainable_parameters"))  # of every model


@dataclass(frozen=True)
class Offer:
    """What a suite runs of a benchmark, by the names in its grid: methods, models, the domains that it has numbers of, and ways of tuning."""

    methods: frozenset[str]
    models: frozenset[str]
    domains: frozenset[str]
    tunings: frozenset[str] = frozenset()


class Kind(ABC, Generic[D, E]):
    """What the benchmarks of one kind have in common. The folder that the kind is named after has one in its ``grid`` module, as ``KIND``.

    Attributes:
        files: what its YAML files hold: names of schemas for editors, and the models.
        presentation: the module that shows its finished runs where a benchmark's folder has none; else every folder needs one.
        paper_columns: of its ``paper.csv``, those before value, status and source; none where it does not say.
        has_models: whether its runs have a model with weights; a measurement has not.
        has_seeds: whether its runs are seeded, so that their names say how.
        shows_parts: whether each of its sets, which the blocks of its grids name under ``set``, has tables and figures of its own.
        counts_labels: whether its report shows the labels of its sets.
        optimizer: what the report says of how it trains; empty where it does not.
        late_imports: modules that its runs import when they need them.
    """

    files: tuple[tuple[str, type[Strict]], ...]
    presentation: str | None = None
    paper_columns: tuple[str, ...] = ()
    has_models = True
    has_seeds = True
    shows_parts = False
    counts_labels = True
    optimizer = ""
    late_imports: tuple[str, ...] = ()

    @abstractmethod
    def load(self, content: object, file: Path) -> tuple[D, Mapping[str, E]]:
        """The definition, and the tasks.

        Args:
            content: of the file.
            file: ``benchmark.yaml``, beside which the others are.

        Raises:
            DefinitionError: one of the files is wrong; names the key and the nearest valid value.
        """

    @abstractmethod
    def specs(
        self,
        benchmark: Benchmark[D, E],
        suite: str,
        exclude: Collection[str],
        specs_of: Callable[[str], Mapping[str, Mapping[str, Any]]],
    ) -> Iterator[dict[str, Any]]:
        """The specs of a suite's grid, in its order.

        Args:
            benchmark: the benchmark.
            suite: the suite.
            exclude: sets to leave out.
            specs_of: gives the specs of another benchmark's runs in the suite, by their folders.

        Raises:
            DefinitionError: a name in the grid that does not exist, or settings that do not go together.
        """

    def check(self, definition: D, tasks: Mapping[str, E], folder: Path) -> None:
        """Check what is not to be seen in one key: that names exist and settings go together.

        Raises:
            DefinitionError: names the file, the key and the nearest valid value.
        """

    def excludable(self, tasks: Mapping[str, E]) -> Iterable[str]:
        """The sets that a suite may leave out."""
        return ()

    def evaluates(self, definition: D) -> str | None:
        """The benchmark whose runs its runs evaluate."""
        return None

    def resources(self, resources: Resources, spec: Mapping[str, Any]) -> dict[str, Any]:
        """What a run takes of its suite's resources."""
        return resources.model_dump()

    def check_processes(self, spec: Mapping[str, Any], processes: int, parallel: str) -> None:
        """See that a run can be spread over so many processes, before any of them starts to work.

        Raises:
            RunError: it cannot.
            DefinitionError: its settings do not fit.
        """
        if processes > 1:
            raise RunError(
                "only runs of instruction tuning that train are spread over several processes; start it on one"
            )

    def variant(self, spec: Mapping[str, Any]) -> str:
        """What is varied beside model, task and method, short."""
        return str(spec["method"]["variant"])

    def marks(self, spec: Mapping[str, Any]) -> list[str]:
        """What else a run's name says."""
        return []

    def sets(self, spec: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        """The sets of a run that may only exist by hand."""
        return list(spec["ood"])

    def package_files(self, task: Mapping[str, Any]) -> list[PackageFile]:
        """The files inside packages that a set is read from."""
        return []

    def inputs(self, spec: Mapping[str, Any]) -> list[str]:
        """Files that a run needs beside data, weights and partitions."""
        return []

    def figure_inputs(self, spec: Mapping[str, Any]) -> list[str]:
        """Files that the figures of a part need beside the runs' numbers."""
        return []

    def parts_read(self, spec: Mapping[str, Any], tasks: Mapping[str, E]) -> list[tuple[str, str]]:
        """Name and part of every set that a run reads."""
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
        """Read one of the parts, and say what is there.

        Args:
            spec: of a run that reads it.
            name: the set's.
            part: the part's.
            tasks: of the benchmark.
            open_files: open every file of a set of files, which takes minutes.
        """
        return iter(())

    def unpinned(self, spec: Mapping[str, Any]) -> Iterator[str]:
        """What a run reads from elsewhere as it is that day, beside models and sets of the hub."""
        return iter(())

    def compared_domains(self, definition: D) -> Mapping[str, Domain]:
        """The numbers by which claims may compare methods, by name; the presentation's ``compared`` has them."""
        return {}

    def row_titles(self, definition: D) -> Mapping[str, str]:
        """Titles of what claims may compare, by name."""
        methods = resolve_methods(definition) if isinstance(definition, MethodsDefinition) else {}
        return {name: method.title for name, method in methods.items()}

    def task_titles(self, definition: D, tasks: Mapping[str, E]) -> Mapping[str, str]:
        """Titles of what runs are trained or evaluated on, by the names that tables and claims have for it."""
        return {name: task.title for name, task in tasks.items()}

    def published_files(self, definition: D) -> list[str]:
        """The CSV files with published numbers, in the benchmark's folder, that its tables show."""
        return [definition.paper] if definition.paper else []

    def settings(self, definition: D, method: str) -> list[str]:
        """The variants with which suites run a method, where claims may be of one of them."""
        return []

    def offer(self, benchmark: Benchmark[D, E], suite: str) -> Offer:
        """What a suite runs of a benchmark."""
        blocks = getattr(benchmark.definition.suites[suite], "grid", ())
        return Offer(
            frozenset(name for block in blocks for name in block.method),
            frozenset(name for block in blocks for name in block.model),
            frozenset(self.compared_domains(benchmark.definition)),
        )


class WholeSets(Kind[D, E]):
    """What kinds share whose runs read one set each, as a whole, which a suite may leave out."""

    def excludable(self, tasks: Mapping[str, E]) -> Iterable[str]:
        return tasks

    def sets(self, spec: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        return [spec["task"]]

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
    """What is said of a set that is read as a whole and cannot be.

    Args:
        name: the set's.
        problem: what is wrong.
        instructions: where it comes from.
        expected: rows as its makers count them.
    """
    advice = f"{name}: {problem}\n    {instructions}. Without it: `exclude: [{name}]`"
    return SetPart(name, ALL, None, expected=expected, advice=advice)


def kind_names() -> list[str]:
    """The kinds: the folders that have a ``grid`` module."""
    return sorted(path.parent.name for path in BENCHMARKS.glob("*/grid.py"))


@functools.cache
def find_kind(name: str) -> Kind[Any, Any]:
    """The kind of that name.

    Raises:
        DefinitionError: there is none; names the nearest.
    """
    if name not in kind_names():
        raise DefinitionError(f"'kind' is {name!r}{did_you_mean(name, kind_names())}")
    found: Kind[Any, Any] = importlib.import_module(f"benchmarks.{name}.grid").KIND
    return found


def usual_kind(benchmark: str) -> str:
    """The kind of a benchmark whose file says none: its own folder's where that has a grid, else the usual one."""
    return benchmark if benchmark in kind_names() else USUAL


def kind_name(benchmark: str, content: object) -> Any:
    """What a benchmark's file says of its kind, or its usual one."""
    said = content.get("kind") if isinstance(content, dict) else None
    return usual_kind(benchmark) if said is None else said


@functools.cache
def kind_of(benchmark: str) -> Kind[Any, Any]:
    """The kind of a benchmark.

    Raises:
        DefinitionError: there is no such benchmark.
    """
    return find_kind(kind_name(benchmark, read_yaml(BENCHMARKS / benchmark / "benchmark.yaml")))
