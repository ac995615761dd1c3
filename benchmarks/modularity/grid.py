"""Plan the runs that analyse pre-trained models.

There is one run for each model, method (which constructs the experts), varied setting and seed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

from benchmarks.harness.base import DefinitionError
from benchmarks.harness.config.benchmark import Part
from benchmarks.harness.config.catalogue import load_models, model_names
from benchmarks.harness.config.method_specs import VARIANT_KEYS, method_spec
from benchmarks.harness.config.runs import Run
from benchmarks.harness.config.yaml import check_names, parse, read
from benchmarks.modularity.definition import ModularityDefinition, ModularityPart, ModularitySpec
from benchmarks.text.definition import TaskFile
from benchmarks.text.grid import TextSets


class ModularityBenchmark(TextSets[ModularityDefinition, ModularityPart]):
    """A benchmark that analyses pre-trained text models on rows of several tasks."""

    package = "benchmarks.modularity"
    spec_model = ModularitySpec
    definition_model = ModularityDefinition
    part_model = ModularityPart
    recorded = ("measured", "matrix", "usage")
    paper_columns = ("method", "num_experts", "metric")

    @classmethod
    def load(cls, name: str, content: object, file: Path) -> Self:
        definition = parse(content, ModularityDefinition, str(file))
        task_file = read(file.parent / definition.tasks, TaskFile)
        benchmark = cls(name, definition, task_file.tasks, {})
        # nothing is trained, so the experts and their choice must follow from the weights
        for key, method in benchmark.methods().items():
            settings = method.given()
            is_emoe = method.kind == "emoe"
            # avg-k, the usual router, follows from the weights
            has_avg_k = settings.get("router", "avg_k") == "avg_k"
            # the partition "coactivation" is calibrated on rows
            has_experts_from_weights = settings.get("partition") != "coactivation"
            if not (is_emoe and has_avg_k and has_experts_from_weights):
                raise DefinitionError(
                    f"{file}: 'methods.{key}' must be an EMoE with avg-k and experts from the "
                    "weights"
                )
        return benchmark

    def specs(
        self, part: Part[ModularityPart], exclude: Collection[str], others: Sequence[Run]
    ) -> Iterator[dict[str, Any]]:
        methods = self.methods(part)
        task_names = part.settings.tasks
        check_names(part.where("tasks"), task_names, self.tasks)
        tasks = [self.tasks[name].spec() for name in task_names if name not in exclude]
        if len(tasks) < 2:
            raise DefinitionError(f"{part.where('tasks')} needs two tasks that are not excluded")
        # The spec of any run has one task and a list of OOD sets. A run of this benchmark reads all
        # tasks alike, so the first one is put in `task`, and the others in `ood`.
        first_task, *other_tasks = tasks
        reading = self.settings("reading", part).model_dump()
        # every task has the same share of the shown tokens, and at least one
        num_shown = reading["shown_tokens"]
        if num_shown < len(tasks):
            raise DefinitionError(
                f"{part.where('reading', 'shown_tokens')} is {num_shown}, but there are "
                f"{len(tasks)} tasks; show at least one token of each"
            )
        valid_names = {"model": model_names(None), "method": methods}
        axes = ("model", "method", *VARIANT_KEYS, "seed")
        # a point has one value for each axis, and `where` is its location in the suite's file
        for where, point in part.grid_points(valid_names, axes):
            method = method_spec(methods, point, point["seed"], lora=None, where=where)
            layers = method["config"]["layers"]
            # a run measures a single layer
            if not isinstance(layers, list) or len(layers) != 1:
                raise DefinitionError(
                    f"{where.at('layers')} must be lists of one layer each: [[5]], not {layers}"
                )
            model = point["model"]
            yield self.spec(
                method["variant"],
                model=load_models()[model].spec(model),
                task=first_task,
                ood=other_tasks,
                method=method,
                reading=reading,
                learning_rate=0.0,
                seed=point["seed"],
            )
