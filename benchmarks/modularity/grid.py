"""Plan runs that analyse pre-trained models: one per model, construction of experts, setting and seed."""

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
    """Plan runs that analyse pre-trained text models on rows of several tasks, without training."""

    package = "benchmarks.modularity"
    spec_model = ModularitySpec
    definition_model, part_model = ModularityDefinition, ModularityPart
    recorded = ("measured", "matrix", "usage")
    paper_columns = ("method", "num_experts", "metric")

    @classmethod
    def load(cls, name: str, content: object, file: Path) -> Self:
        definition = parse(content, ModularityDefinition, str(file))
        benchmark = cls(name, definition, read(file.parent / definition.tasks, TaskFile).tasks, {})
        for row, method in benchmark.methods().items():
            given = method.given()
            if (
                method.kind != "emoe"
                or "router" in given
                or given.get("partition") == "coactivation"
            ):
                raise DefinitionError(
                    f"{file}: 'methods.{row}' must be an EMoE with avg-k and experts from the weights"
                )
        return benchmark

    def specs(
        self, part: Part[ModularityPart], exclude: Collection[str], others: Sequence[Run]
    ) -> Iterator[dict[str, Any]]:
        methods, names = self.methods(part), part.settings.tasks
        check_names(part.where("tasks"), names, self.tasks)
        tasks = [self.tasks[name].spec() for name in names if name not in exclude]
        if len(tasks) < 2:
            raise DefinitionError(f"{part.where('tasks')} needs two tasks that are not excluded")
        reading = self.settings("reading", part).model_dump()
        valid = {"model": model_names(None), "method": methods}
        for where, point in part.grid_points(valid, (*valid, *VARIANT_KEYS, "seed")):
            method = method_spec(methods, point, point["seed"], None, where)
            layers = method["config"]["layers"]
            if not isinstance(layers, list) or len(layers) != 1:
                raise DefinitionError(
                    f"{where.at('layers')} must be lists of one layer each: [[5]], not {layers}"
                )
            yield self.spec(
                method["variant"],
                model=load_models()[point["model"]].spec(point["model"]),
                task=tasks[0],
                ood=tasks[1:],
                method=method,
                reading=reading,
                learning_rate=0.0,
                seed=point["seed"],
            )
