"""How a benchmark plugs in: the ``grid`` module of its kind says what its runs are, what they need, and what they read."""

from __future__ import annotations

import functools
import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness.base.errors import DefinitionError, RunError
from benchmarks.harness.base.paths import BENCHMARKS
from benchmarks.harness.planning.schema import read_yaml
from benchmarks.harness.sources.counts import count_note
from benchmarks.harness.sources.packages import PackageFile
from emoe.errors import did_you_mean

ALL = "all"  # the one part of a set that is read as a whole
USUAL = "text"  # the kind of a benchmark that says none and has no grid of its own


@dataclass(frozen=True)
class Benchmark:
    """One benchmark folder: its definition, its tasks (measures of measurements, sets of images or instructions), and where it is."""

    name: str
    definition: dict[str, Any]
    tasks: dict[str, Any]

    @property
    def kind(self) -> Kind:
        return find_kind(kind_name(self.name, self.definition))

    @property
    def folder(self) -> Path:
        return BENCHMARKS / self.name

    @property
    def file(self) -> Path:
        return self.folder / "benchmark.yaml"


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
    """

    name: str
    part: str
    rows: int | None
    dropped: int = 0
    expected: int | None = None
    labels: str = ""
    source: str = ""
    advice: str = ""
    published: Mapping[str, Any] | None = None

    @property
    def note(self) -> str | None:
        """How its rows differ from what is known of the set."""
        if self.rows is None:
            return None
        return count_note(self.name, self.part, self.rows, self.dropped, self.expected, self.published)


class Kind(ABC):
    """What the benchmarks of one kind have in common. The folder that the kind is named after has one in its ``grid`` module, as ``KIND``.

    Attributes:
        schema: the schema of ``benchmark.yaml``.
        presentation: the module that shows its finished runs where a benchmark's folder has none; else every folder needs one.
        has_models: whether its runs have a model with weights; a measurement has not.
        has_seeds: whether its runs are seeded, so that their names say how.
        shows_parts: whether each of its sets has tables and figures of its own.
        counts_labels: whether its report shows the labels of its sets.
        optimizer: what the report says of how it trains; empty where it does not.
    """

    schema: str
    presentation: str | None = None
    has_models = True
    has_seeds = True
    shows_parts = False
    counts_labels = True
    optimizer = ""

    @abstractmethod
    def load(self, definition: dict[str, Any], folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
        """The whole definition, and the tasks, of a definition that follows the schema."""

    @abstractmethod
    def specs(
        self,
        benchmark: Benchmark,
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

    def check(self, definition: Mapping[str, Any], tasks: Mapping[str, Any], folder: Path) -> None:  # noqa: B027
        """Check what the schema cannot: that names exist and settings go together.

        Raises:
            DefinitionError: names the file, the key and the nearest valid value.
        """

    def excludable(self, tasks: Mapping[str, Any]) -> Iterable[str]:
        """The sets that a suite may leave out: all that are only evaluated."""
        return {name for task in tasks.values() for name in task.get("ood", ())}

    def resources(self, resources: Mapping[str, Any], spec: Mapping[str, Any]) -> dict[str, Any]:
        """What a run takes of its suite's resources."""
        return dict(resources)

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

    def parts_read(self, spec: Mapping[str, Any], tasks: Mapping[str, Any]) -> list[tuple[str, str]]:
        """Name and part of every set that a run reads."""
        return []

    def describe(
        self, spec: Mapping[str, Any], name: str, part: str, tasks: Mapping[str, Any], *, open_files: bool
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


def kind_names() -> list[str]:
    """The kinds: the folders that have a ``grid`` module."""
    return sorted(path.parent.name for path in BENCHMARKS.glob("*/grid.py"))


@functools.cache
def find_kind(name: str) -> Kind:
    """The kind of that name.

    Raises:
        DefinitionError: there is none; names the nearest.
    """
    if name not in kind_names():
        raise DefinitionError(f"'kind' is {name!r}{did_you_mean(name, kind_names())}")
    found: Kind = importlib.import_module(f"benchmarks.{name}.grid").KIND
    return found


def kind_name(benchmark: str, content: object) -> Any:
    """What a benchmark's file says of its kind; where it says nothing, its own folder's where that has a grid, else the usual one."""
    own = benchmark if benchmark in kind_names() else USUAL
    return content.get("kind", own) if isinstance(content, dict) else own


@functools.cache
def kind_of(benchmark: str) -> Kind:
    """The kind of a benchmark.

    Raises:
        DefinitionError: there is no such benchmark.
    """
    return find_kind(kind_name(benchmark, read_yaml(BENCHMARKS / benchmark / "benchmark.yaml")))
