"""Runs of models that learn several tasks at once: one for each model, mixture, method, learning rate and seed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from benchmarks.harness.base import DefinitionError
from benchmarks.harness.config.benchmark import (
    COUNTS,
    OOD_MEAN,
    Benchmark,
    Domain,
    Training,
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
    AS_GIVEN,
    UNIQUE,
    Count,
    Key,
    Names,
    NotNegative,
    Positive,
    Positives,
    Rate,
    Strict,
    Wholes,
    check_names,
    parse,
    read,
)
from benchmarks.harness.training.label_mapping import label_mapping
from benchmarks.text.definition import RunTask, TaskEntry, TaskFile
from benchmarks.text.grid import CLEAN, ID, OOD, TextSets
from emoe.errors import EMoEError

ID_MEAN = "id_mean"  # the mean of a run's scores over its tasks
_SCORES = Domain(("score",), selections=(CLEAN,))


class Mixture(Strict):
    """Tasks that one model learns at once."""

    title: str
    """Label in tables."""
    tasks: Annotated[Names, UNIQUE]
    """Names in the task file."""


class MultitaskTraining(Training):
    """The training of a run; a suite may change the benchmark's."""

    epochs: Positive
    """Passes over the rows that `rows_per_epoch` leaves."""
    rows_per_epoch: Count | None
    """Rows of a task in an epoch, at most: a larger task takes its next ones in each epoch. Null: all rows."""
    batch_size: Count
    """Rows per step, of all tasks."""
    eval_batch_size: Count
    """Rows per evaluation batch."""
    max_length: Annotated[int, Field(ge=4)]
    """Tokens kept of a row, its task's name included."""
    sampling: Literal["random", "group_by_length"]
    """Order of an epoch's rows: shuffled, or shuffled in groups of like length (less padding)."""
    eval_rows: Count | None
    """Rows of every split that is reported; null for all."""
    dev_rows: Count | None
    """Rows of every split that chooses; null for all."""
    weight_decay: NotNegative
    """AdamW's weight decay."""
    warmup: Rate
    """Share of the steps with a rising rate."""
    checkpoint_selection: Literal["last", "best"]
    """The epoch whose weights are evaluated: the last, or the one with the best mean dev score over the tasks."""
    gradient_accumulation_steps: Count
    """Batches whose gradients one step adds up."""
    precision: Literal["fp32", "bf16"]
    """Arithmetic on accelerators: float32 or mixed. A CPU always computes in float32, and the record says so."""
    validation_fraction: Annotated[float, Field(gt=0, lt=1), AS_GIVEN]
    """Share of the training rows that is held out to choose by, of tasks without a split for that."""


class MultitaskBlock(VariantAxes):
    """A product of lists. Lists of method settings become part of the method's variant."""

    model: Names
    """Names in models.yaml."""
    mixture: Names
    """Names of mixtures, or of tasks: each of these is learned alone."""
    method: Names
    """Names of methods."""
    learning_rate: Positives
    """Peak learning rates."""
    seed: Wholes
    """Seeds."""


class MultitaskSuite(TrainingSuite):
    """One suite's part of the benchmark."""

    training: Annotated[dict[str, Any], Changes(MultitaskTraining)] = Field({})
    """Settings that differ in this suite."""
    grid: Annotated[list[MultitaskBlock], Field(min_length=1)]
    """Blocks of runs; each is the product of its lists."""


class MultitaskDefinition(TrainingDefinition):
    """A benchmark whose encoder-decoder models learn several tasks at once, as text from text."""

    figures: dict[str, str]
    """The figures that it draws, each with its caption."""
    tasks: str
    """File with the task definitions, in the benchmark's folder."""
    mixtures: Annotated[dict[Key, Mixture], Field(min_length=1)]
    """Tasks that are learned at once, by name."""
    prefixes: dict[str, str] = Field({})
    """Prefixes of tasks whose rows do not begin with their name; only the rows tell tasks with one prefix apart."""
    training: MultitaskTraining
    """Settings of every run; a suite may set its own."""
    suites: dict[Key, MultitaskSuite]
    """The runs of each suite."""


class WrittenTask(RunTask):
    """A task that is learned."""

    prefix: str
    """The prefix of its rows."""


class OtherTask(RunTask):
    """A set that is only evaluated on."""

    read_as: str
    """The learned task that gives it prefix, field names and answers."""


class RunMixture(Strict):
    """The tasks of a run."""

    name: str
    """Name of the mixture, or of the single task."""
    tasks: list[WrittenTask]
    """Tasks that it learns at once."""


class MultitaskSpec(RunSpec):
    """The settings that shape the numbers of a run."""

    protocol: Literal["clean"]
    """The selection of epoch and hyper-parameters: by rows that are not reported."""
    task: RunMixture
    """The tasks that it is trained on."""
    ood: list[OtherTask]
    """The other sets that it is evaluated on."""
    training: MultitaskTraining
    """The training."""


class MultitaskKind(TextSets[MultitaskDefinition]):
    """Plan encoder-decoder models that learn several tasks at once and are evaluated on each and on other sets."""

    files = (("multitask", MultitaskDefinition),)
    paper_columns = ("domain", "method")
    optimizer = "AdamW, linear decay, no clipping"

    def load(self, content: object, file: Path) -> tuple[MultitaskDefinition, Mapping[str, TaskEntry]]:
        definition = parse(content, MultitaskDefinition, str(file))
        return definition, read(file.parent / definition.tasks, TaskFile).tasks

    def check(self, benchmark: Benchmark[MultitaskDefinition, TaskEntry]) -> None:
        definition, tasks, where = benchmark.definition, benchmark.tasks, f"{benchmark.file}: '"
        check_names(where, "prefixes", definition.prefixes, tasks)
        for name, mixture in definition.mixtures.items():
            at = f"{where}mixtures.{name}"
            if name in tasks:
                raise DefinitionError(f"{at}' has the name of a task, by which it is learned alone")
            _check_tasks(at, "tasks", mixture.tasks, tasks)
        for name, method in resolve_methods(definition).items():
            if method.tune is not None or method.also_train is not None:
                raise DefinitionError(f"{where}methods.{name}' trains a part of the model; here everything is trained")
            if method.given().get("partition") == "coactivation":
                raise DefinitionError(
                    f"{where}methods.{name}' groups neurons by co-activation, for which no rows are read here; "
                    "take kmeans, random or contiguous"
                )

    def task_titles(self, definition: MultitaskDefinition, tasks: Mapping[str, TaskEntry]) -> Mapping[str, str]:
        mixtures = {name: mixture.title for name, mixture in definition.mixtures.items()}
        return mixtures | dict(super().task_titles(definition, tasks))

    def training_tokens(self, spec: Mapping[str, Any], tasks: Mapping[str, TaskEntry]) -> float | None:
        training = spec["training"]
        rows = sum(training["rows_per_epoch"] or tasks[task["name"]].rows.train or 0 for task in spec["task"]["tasks"])
        return text_tokens(rows or None, training["max_length"], training["epochs"])

    def compared_domains(self, definition: MultitaskDefinition) -> Mapping[str, Domain]:
        return {ID: _SCORES, OOD: _SCORES, OOD_MEAN: _SCORES, "model": COUNTS}

    def specs(
        self,
        benchmark: Benchmark[MultitaskDefinition, TaskEntry],
        suite: str,
        exclude: Collection[str],
        specs_of: Callable[[str], Mapping[str, Mapping[str, Any]]],
    ) -> Iterator[dict[str, Any]]:
        definition, methods = benchmark.definition, resolve_methods(benchmark.definition, suite)
        mixtures = definition.mixtures | {
            name: Mixture(title=task.title, tasks=[name]) for name, task in benchmark.tasks.items()
        }
        names = {"model": model_names("seq2seq"), "mixture": mixtures, "method": methods}
        training = functools.cache(functools.partial(benchmark.settings, "training", suite))
        for where, point in benchmark.grid_points(suite, names, (*names, *VARIANT_KEYS, "learning_rate", "seed")):
            tasks = mixtures[point["mixture"]].tasks
            _check_tasks(where, "mixture", tasks, benchmark.tasks)
            yield {
                **benchmark.of_every_spec,
                "protocol": CLEAN,
                "model": load_models()[point["model"]].spec(point["model"]),
                "task": {"name": point["mixture"], "tasks": [_written(benchmark, name) for name in tasks]},
                "ood": [
                    benchmark.tasks[other].spec(other) | {"read_as": name}
                    for other, name in _others(benchmark.tasks, tasks).items()
                    if other not in exclude
                ],
                "method": method_spec(methods, point, point["seed"], None, where),
                "training": training(point["model"]).spec(),
                "learning_rate": float(point["learning_rate"]),
                "seed": point["seed"],
            }


KIND = MultitaskKind()


def _written(benchmark: Benchmark[MultitaskDefinition, TaskEntry], name: str) -> dict[str, Any]:
    """Resolve a task that is learned, for a spec."""
    return benchmark.tasks[name].spec(name) | {"prefix": benchmark.definition.prefixes.get(name, name)}


def _others(tasks: Mapping[str, TaskEntry], names: Collection[str]) -> dict[str, str]:
    """Find the other sets of some tasks, each with the first task that names it."""
    others: dict[str, str] = {}
    for name in names:
        for other in tasks[name].ood:
            if other not in names:
                others.setdefault(other, name)
    return others


def _check_tasks(where: str, key: str, names: Collection[str], tasks: Mapping[str, TaskEntry]) -> None:
    """Check that tasks can be learned as text from text, and that their other sets can be read as they are.

    Raises:
        DefinitionError: it names the task and the problem.
    """
    check_names(where, key, names, tasks)
    where = f"{where}.{key}'"
    for name in names:
        task = tasks[name]
        if not task.labels:
            raise DefinitionError(f"{where} has '{name}', a regression: an answer is the name of a class")
        if not (task.splits.train and task.splits.dev):
            raise DefinitionError(f"{where} has '{name}', which has no split to train on, or none to choose by")
    for other, name in _others(tasks, names).items():
        if len(tasks[other].fields) != len(tasks[name].fields):
            counts = f"{len(tasks[other].fields)} texts a row and {len(tasks[name].fields)}"
            raise DefinitionError(f"{where}: '{other}' cannot be read as '{name}': they have {counts}")
        try:
            label_mapping(tasks[name], tasks[other], other)
        except EMoEError as error:
            raise DefinitionError(f"{where}: {error}") from error
