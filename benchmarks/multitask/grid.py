"""Plan multi-task runs: one per model, mixture, method, learning rate and seed."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

from benchmarks.harness.base import DefinitionError
from benchmarks.harness.config.benchmark import COUNTS, OOD_MEAN, Domain, Part
from benchmarks.harness.config.catalogue import load_models, model_names
from benchmarks.harness.config.method_specs import VARIANT_KEYS, method_spec
from benchmarks.harness.config.runs import Run
from benchmarks.harness.config.yaml import Location, check_names, parse, read
from benchmarks.multitask.definition import (
    MultitaskDefinition,
    MultitaskPart,
    MultitaskSpec,
    MultitaskTraining,
)
from benchmarks.text.definition import CLEAN, ID, LOSSES, OOD, TaskFile
from benchmarks.text.grid import TextSets, check_validation_rows

_SCORES_AND_LOSSES = Domain(("score", *LOSSES), selections=(CLEAN,))
_DOMAINS = {
    ID: _SCORES_AND_LOSSES,
    OOD: Domain(("score",), selections=(CLEAN,)),
    OOD_MEAN: _SCORES_AND_LOSSES,
    "model": COUNTS,
}


class MultitaskBenchmark(TextSets[MultitaskDefinition, MultitaskPart]):
    """A benchmark of encoder-decoder models that learn several tasks at once.

    They are evaluated on these tasks and on the tasks' OOD sets.
    """

    package = "benchmarks.multitask"
    spec_model = MultitaskSpec
    definition_model = MultitaskDefinition
    part_model = MultitaskPart
    recorded = ("scores", "data", "model", "routing")
    paper_columns = ("model", "task", "domain", "method")

    @classmethod
    def load(cls, name: str, content: object, file: Path) -> Self:
        definition = parse(content, MultitaskDefinition, str(file))
        tasks = read(file.parent / definition.tasks, TaskFile).tasks
        mixture_titles = {key: mixture.title for key, mixture in definition.mixtures.items()}
        benchmark = cls(name, definition, tasks, _DOMAINS, task_titles=mixture_titles)
        check_names(Location(file, "prefixes"), definition.prefixes, tasks)
        for key, mixture in definition.mixtures.items():
            # a grid names both mixtures and single tasks in its key `mixture`
            if key in tasks:
                raise DefinitionError(
                    f"{file}: 'mixtures.{key}' has the name of a task in {definition.tasks}; "
                    "give the mixture another name"
                )
            check_names(
                Location(file, f"mixtures.{key}.tasks"), mixture.tasks, benchmark.trainable()
            )
        for method_name, method in benchmark.methods().items():
            # with these settings, only the parameters that they name are trained
            trains_only_a_part = method.tune or method.also_train
            # such groups need calibration rows, which runs of this benchmark do not have
            groups_by_coactivation = method.given().get("partition") == "coactivation"
            if trains_only_a_part or groups_by_coactivation:
                raise DefinitionError(
                    f"{file}: 'methods.{method_name}' must train everything, "
                    "without co-activation groups"
                )
        return benchmark

    def trainable(self) -> list[str]:
        """Return the tasks that a run can learn: they have classes, a train and a dev split."""
        trainable = []
        for name, task in self.tasks.items():
            if task.labels and task.splits.train and task.splits.dev:
                trainable.append(name)
        return trainable

    def specs(
        self, part: Part[MultitaskPart], exclude: Collection[str], others: Sequence[Run]
    ) -> Iterator[dict[str, Any]]:
        methods = self.methods(part)
        # a task that is learned alone is a mixture of one
        tasks_of_mixture = {name: [name] for name in self.trainable()}
        for name, mixture in self.definition.mixtures.items():
            tasks_of_mixture[name] = mixture.tasks
        valid_names = {
            "model": model_names("seq2seq"),
            "mixture": tasks_of_mixture,
            "method": methods,
        }
        axes = (*valid_names, *VARIANT_KEYS, "learning_rate", "seed")

        # a suite may change the settings of a model; they are merged once, not for each of its runs
        @functools.cache
        def training_settings(model: str) -> MultitaskTraining:
            return self.settings("training", part, model=model)

        # a point has one value for each axis, and `where` is its location in the suite's file
        for where, point in part.grid_points(valid_names, axes):
            tasks = tasks_of_mixture[point["mixture"]]
            # a mixture with an excluded task is not learned
            if any(name in exclude for name in tasks):
                continue
            model = point["model"]
            method = method_spec(methods, point, point["seed"], lora=None, where=where)
            training = training_settings(model)
            check_validation_rows(training, part.where("training"))
            yield self.spec(
                method["variant"],
                protocol=CLEAN,
                model=load_models()[model].spec(model),
                task={"name": point["mixture"], "tasks": self._learned_tasks(tasks)},
                ood=self._ood_sets(tasks, exclude),
                method=method,
                training=training.spec(),
                learning_rate=float(point["learning_rate"]),
                seed=point["seed"],
            )

    def _learned_tasks(self, tasks: Iterable[str]) -> list[dict[str, Any]]:
        """Make the specs of learned tasks, each with the ``prefix`` of its rows."""
        specs = []
        for name in tasks:
            prefix = self.definition.prefixes.get(name, name)
            specs.append({**self.tasks[name].spec(), "prefix": prefix})
        return specs

    def _ood_sets(self, tasks: Collection[str], exclude: Collection[str]) -> list[dict[str, Any]]:
        """Make the specs of the OOD sets of learned tasks.

        Sets that are excluded or learned are left out. The spec of a set has the key ``read_as``:
        the first task that lists the set. The set gets the prefix, field names and answers of this
        task.

        Raises:
            DefinitionError: A set and a task that lists it have different numbers of text fields.
        """
        read_as: dict[str, str] = {}  # by name of the OOD set
        for task_name in tasks:
            task = self.tasks[task_name]
            for set_name in task.ood:
                # a learned set is not out of domain
                if set_name in tasks or set_name in exclude:
                    continue
                # its texts get the field names of the learned task
                if len(self.tasks[set_name].fields) != len(task.fields):
                    raise DefinitionError(
                        f"{self.file}: '{set_name}' cannot be read as '{task_name}', because they "
                        "have different numbers of text fields"
                    )
                # if several tasks list the set, keep the first one
                read_as.setdefault(set_name, task_name)
        specs = []
        for set_name, task_name in read_as.items():
            specs.append({**self.tasks[set_name].spec(), "read_as": task_name})
        return specs
