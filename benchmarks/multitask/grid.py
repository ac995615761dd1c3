"""Runs of models that learn several tasks at once: one for each model, mixture, method, learning rate and seed."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.harness.base.errors import DefinitionError
from benchmarks.harness.config.benchmark import (
    COUNTS,
    OOD_MEAN,
    Benchmark,
    Domain,
    resolve_methods,
    suite_methods,
    text_tokens,
    training_settings,
)
from benchmarks.harness.config.catalogue import load_models, model_names
from benchmarks.harness.config.methods import VARIANT_KEYS, method_spec
from benchmarks.harness.config.yaml import check_names, parse, read
from benchmarks.harness.training.label_mapping import label_mapping
from benchmarks.multitask.definition import Mixture, MultitaskDefinition, MultitaskTraining
from benchmarks.text.definition import TaskEntry, TaskFile
from benchmarks.text.grid import CLEAN, ID, OOD, TextSets
from emoe.errors import EMoEError

ID_MEAN = "id_mean"  # the mean of a run's scores over its tasks
_SCORES = Domain(("score",), selections=(CLEAN,))
_AXES = ("model", "mixture", "method", *VARIANT_KEYS, "learning_rate", "seed")


class MultitaskKind(TextSets[MultitaskDefinition]):
    """Encoder-decoder models that learn several tasks at once, as text from text, and are judged on each and on other sets."""

    files = (("multitask", MultitaskDefinition),)
    paper_columns = ("domain", "method")
    optimizer = "AdamW, linear decay, no clipping"

    def load(self, content: object, file: Path) -> tuple[MultitaskDefinition, Mapping[str, TaskEntry]]:
        definition = parse(content, MultitaskDefinition, str(file))
        return definition, read(file.parent / definition.tasks, TaskFile).tasks

    def check(self, definition: MultitaskDefinition, tasks: Mapping[str, TaskEntry], folder: Path) -> None:
        where = f"{folder / 'benchmark.yaml'}: '"
        check_names(where, "prefixes", definition.prefixes, tasks)
        for name, mixture in definition.mixtures.items():
            at = f"{where}mixtures.{name}"
            if name in tasks:
                raise DefinitionError(f"{at}' has the name of a task, by which it is learned alone")
            if len(mixture.tasks) < 2:
                raise DefinitionError(f"{at}.tasks' must be two at least; a task alone needs no mixture")
            _check_tasks(at, "tasks", mixture.tasks, tasks)
        for name, method in resolve_methods(definition).items():
            if method.tune is not None or method.also_train is not None:
                raise DefinitionError(f"{where}methods.{name}' trains a part of the model; here everything is trained")
            if method.given().get("partition") == "coactivation":
                raise DefinitionError(
                    f"{where}methods.{name}' groups neurons by co-activation, for which no rows are read here; take kmeans, random or contiguous"
                )

    def task_titles(self, definition: MultitaskDefinition, tasks: Mapping[str, TaskEntry]) -> Mapping[str, str]:
        mixtures = {name: mixture.title for name, mixture in definition.mixtures.items()}
        return mixtures | dict(super().task_titles(definition, tasks))

    def training_tokens(self, spec: Mapping[str, Any], tasks: Mapping[str, TaskEntry]) -> float | None:
        training = spec["training"]
        rows = sum(training["rows_per_epoch"] or tasks[task["name"]].rows.train or 0 for task in spec["task"]["tasks"])
        return text_tokens(rows or None, training["max_length"], training["epochs"])

    def marks(self, spec: Mapping[str, Any]) -> list[str]:
        return []

    def compared_domains(self, definition: MultitaskDefinition) -> Mapping[str, Domain]:
        return {ID: _SCORES, OOD: _SCORES, OOD_MEAN: _SCORES, "model": COUNTS}

    def specs(
        self,
        benchmark: Benchmark[MultitaskDefinition, TaskEntry],
        suite: str,
        exclude: Collection[str],
        specs_of: Callable[[str], Mapping[str, Mapping[str, Any]]],
    ) -> Iterator[dict[str, Any]]:
        definition, methods = benchmark.definition, suite_methods(benchmark, suite)
        part, place = definition.suites[suite], f"{benchmark.file}: 'suites.{suite}"
        mixtures = definition.mixtures | {
            name: Mixture(title=task.title, tasks=[name]) for name, task in benchmark.tasks.items()
        }
        for number, block in enumerate(part.grid):
            where = f"{place}.grid[{number}]"
            check_names(where, "model", block.model, model_names("seq2seq"))
            check_names(where, "mixture", block.mixture, mixtures)
            check_names(where, "method", block.method, methods)
            for name in block.mixture:
                _check_tasks(where, "mixture", mixtures[name].tasks, benchmark.tasks)
            given = block.model_dump()
            axes = [key for key in _AXES if key in given]
            for values in itertools.product(*(given[key] for key in axes)):
                point = dict(zip(axes, values, strict=True))
                names = mixtures[point["mixture"]].tasks
                training = training_settings(definition.training, part.training, point["model"], f"{place}.training")
                yield {
                    **benchmark.of_every_spec,
                    "protocol": CLEAN,
                    "model": load_models()[point["model"]].spec(point["model"]),
                    "task": {"name": point["mixture"], "tasks": [_written(benchmark, name) for name in names]},
                    "ood": [
                        benchmark.tasks[other].spec(other) | {"read_as": name}
                        for other, name in _others(benchmark.tasks, names).items()
                        if other not in exclude
                    ],
                    "method": method_spec(methods, point, point["seed"], None, where),
                    "training": training.model_dump(include=set(MultitaskTraining.model_fields)),
                    "learning_rate": float(point["learning_rate"]),
                    "seed": point["seed"],
                }


KIND = MultitaskKind()


def _written(benchmark: Benchmark[MultitaskDefinition, TaskEntry], name: str) -> dict[str, Any]:
    """A task that is learned, as a run's spec has it."""
    return benchmark.tasks[name].spec(name) | {"prefix": benchmark.definition.prefixes.get(name, name)}


def _others(tasks: Mapping[str, TaskEntry], names: Collection[str]) -> dict[str, str]:
    """The other sets of some tasks, each with the first task that names it; those that are learned are no others."""
    found: dict[str, str] = {}
    for name in names:
        for other in tasks[name].ood:
            if other not in names:
                found.setdefault(other, name)
    return found


def _check_tasks(where: str, key: str, names: Collection[str], tasks: Mapping[str, TaskEntry]) -> None:
    """Check that tasks can be learned as text from text, and their other sets be read as they are.

    Raises:
        DefinitionError: names the task and what it lacks.
    """
    check_names(where, key, names, tasks)
    where = f"{where}.{key}'"
    for name in names:
        task = tasks[name]
        if not task.labels:
            raise DefinitionError(f"{where} has '{name}', a regression: an answer is the name of a class")
        if not (task.splits.train and task.splits.dev):
            raise DefinitionError(f"{where} has '{name}', which has no split to train on, or none to choose by")
        if len(set(task.labels)) < len(task.labels):
            raise DefinitionError(f"{where} has '{name}', two of whose classes have one name")
    for other, name in _others(tasks, names).items():
        if len(tasks[other].fields) != len(tasks[name].fields):
            counts = f"{len(tasks[other].fields)} texts a row and {len(tasks[name].fields)}"
            raise DefinitionError(f"{where}: '{other}' cannot be read as '{name}': they have {counts}")
        try:
            label_mapping(tasks[name], tasks[other], other)
        except EMoEError as error:
            raise DefinitionError(f"{where}: {error}") from error
