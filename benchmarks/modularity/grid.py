"""Runs that look into pre-trained models: one for each model, construction of experts, setting and seed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from benchmarks.harness.base import DefinitionError
from benchmarks.harness.config.benchmark import (
    Benchmark,
    Domain,
    TrainingDefinition,
    TrainingSuite,
    resolve_methods,
    text_tokens,
)
from benchmarks.harness.config.catalogue import load_models, model_names
from benchmarks.harness.config.methods import VARIANT_KEYS, VariantAxes, method_spec
from benchmarks.harness.config.overlay import Changes
from benchmarks.harness.config.runs import RunSpec
from benchmarks.harness.config.yaml import (
    UNIQUE,
    Count,
    Key,
    Names,
    Share,
    Strict,
    Wholes,
    check_names,
    parse,
    read,
)
from benchmarks.text.definition import RunTask, TaskEntry, TaskFile
from benchmarks.text.grid import TextSets

EXPERTS = "experts"  # the name of the measurement
# the keys that a row may set: how neurons are grouped, and the scores of groups
_FREE = {"kind", "title", "role", "method", "num_experts", "top_k", "top_k_fraction", "layers", "partition"}
_FREE |= {"partition_seed", "score", "score_bias"}


class Reading(Strict):
    """The rows that a model reads, and the activations that are kept."""

    rows: Count
    """Rows of every task's reported split, drawn once and for all."""
    batch_size: Count
    """Rows of a batch."""
    max_length: Annotated[int, Field(ge=4)]
    """Tokens kept of a sentence or pair."""
    active_share: Share
    """The share of the largest activations, whose neurons are active; of the paper's matrix 1.14 % is not zero."""
    shown_tokens: Count
    """Tokens of the matrix that is drawn, as many of every task."""


class ModularityBlock(VariantAxes):
    """A product of lists. Lists of method settings become part of the method's variant."""

    model: Names
    """Names in models.yaml."""
    method: Names
    """Names of methods."""
    seed: Wholes
    """Seeds, which shape random partitions alone."""


class ModularitySuite(TrainingSuite):
    """One suite's part of the benchmark."""

    tasks: Annotated[Names, UNIQUE]
    """Tasks whose rows are read, two at least."""
    reading: Annotated[dict[str, Any], Changes(Reading)] = Field({})
    """Settings that differ in this suite."""
    grid: Annotated[list[ModularityBlock], Field(min_length=1)]
    """Blocks of runs; each is the product of its lists."""


class ModularityDefinition(TrainingDefinition):
    """A benchmark that trains nothing: neurons of pre-trained FFNs that fire, and experts that tokens choose."""

    figures: dict[str, str]
    """The figures that it draws, each with its caption."""
    tasks: str
    """File with the task definitions, in the benchmark's folder."""
    reading: Reading
    """Settings of reading; a suite may set its own."""
    suites: dict[Key, ModularitySuite]
    """The runs of each suite."""


class ModularitySpec(RunSpec):
    """The settings that shape the numbers of a run."""

    task: RunTask
    """The first task."""
    ood: list[RunTask]
    """The others."""
    reading: Reading
    """Settings of reading."""


class ModularityKind(TextSets[ModularityDefinition]):
    """Pre-trained text models that read rows of several tasks; nothing is trained."""

    files = (("modularity", ModularityDefinition),)
    paper_columns = ("method", "num_experts", "metric")
    counts_labels = False

    def load(self, content: object, file: Path) -> tuple[ModularityDefinition, Mapping[str, TaskEntry]]:
        definition = parse(content, ModularityDefinition, str(file))
        return definition, read(file.parent / definition.tasks, TaskFile).tasks

    def check(self, benchmark: Benchmark[ModularityDefinition, TaskEntry]) -> None:
        definition, where = benchmark.definition, f"{benchmark.file}: '"
        for name, method in resolve_methods(definition).items():
            if method.kind != "emoe" or method.given().get("partition") == "coactivation":
                raise DefinitionError(
                    f"{where}methods.{name}' must be an EMoE with experts of its weights, or random ones"
                )
            if other := sorted(set(method.given()) - _FREE):
                raise DefinitionError(f"{where}methods.{name}' sets '{other[0]}', which needs training")
        for name, suite in definition.suites.items():
            check_names(where, f"suites.{name}.tasks", suite.tasks, benchmark.tasks)

    def training_tokens(self, spec: Mapping[str, Any], tasks: Mapping[str, TaskEntry]) -> float | None:
        reading = spec["reading"]  # three passes over the rows: the dense model, its best experts, its worst
        return text_tokens(reading["rows"] * (1 + len(spec["ood"])), reading["max_length"], 3 / 3)

    def compared_domains(self, definition: ModularityDefinition) -> Mapping[str, Domain]:
        return {}

    def specs(
        self,
        benchmark: Benchmark[ModularityDefinition, TaskEntry],
        suite: str,
        exclude: Collection[str],
        specs_of: Callable[[str], Mapping[str, Mapping[str, Any]]],
    ) -> Iterator[dict[str, Any]]:
        definition, methods = benchmark.definition, resolve_methods(benchmark.definition, suite)
        tasks = [name for name in definition.suites[suite].tasks if name not in exclude]
        if len(tasks) < 2:
            raise DefinitionError(f"{benchmark.file}: 'suites.{suite}.tasks' needs two tasks that are not excluded")
        first, *others = (benchmark.tasks[name].spec(name) for name in tasks)
        reading = benchmark.settings("reading", suite).model_dump()
        names = {"model": model_names(None), "method": methods}
        for where, point in benchmark.grid_points(suite, names, (*names, *VARIANT_KEYS, "seed")):
            method = method_spec(methods, point, point["seed"], None, where)
            layers = method["config"]["layers"]
            if not isinstance(layers, list) or len(layers) != 1:
                raise DefinitionError(f"{where}.layers' must be lists of one layer each: [[5]], not {layers}")
            yield {
                **benchmark.of_every_spec,
                "model": load_models()[point["model"]].spec(point["model"]),
                "task": first,
                "ood": others,
                "method": method,
                "reading": reading,
                "learning_rate": 0.0,
                "seed": point["seed"],
            }


KIND = ModularityKind()
