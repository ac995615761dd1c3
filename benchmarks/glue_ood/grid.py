"""Runs of a benchmark that evaluates the chosen runs of another: one for each of its cells and seeds."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.glue_ood.definition import EvaluationDefinition, EvaluationFile
from benchmarks.harness.base.errors import DefinitionError
from benchmarks.harness.base.paths import RUNS
from benchmarks.harness.planning.definition import benchmark_names, load_benchmark
from benchmarks.harness.planning.kinds import OOD_MEAN, Benchmark, Domain, Offer, kind_of
from benchmarks.harness.planning.schema import check_names, parse
from benchmarks.harness.planning.shared import Definition, MethodsDefinition
from benchmarks.text.definition import TaskEntry
from benchmarks.text.grid import OOD, TextKind, TextSets


class EvaluationKind(TextSets[EvaluationDefinition]):
    """The chosen runs of another benchmark, evaluated on the OOD sets of their tasks: one run for each of its cells and seeds."""

    files = (("glue_ood", EvaluationFile),)

    def load(self, content: object, file: Path) -> tuple[EvaluationDefinition, Mapping[str, TaskEntry]]:
        found = parse(content, EvaluationFile, str(file))
        trained = [name for name in benchmark_names() if isinstance(kind_of(name), TextKind)]
        check_names(f"{file}: '", "evaluates", [found.evaluates], trained)
        other = load_benchmark(found.evaluates)
        taken = {
            key: getattr(other.definition, key)
            for key in MethodsDefinition.model_fields
            if key not in Definition.model_fields
        }
        return EvaluationDefinition(**found.given(), **taken), other.tasks

    def check(self, definition: EvaluationDefinition, tasks: Mapping[str, TaskEntry], folder: Path) -> None:
        check_names(f"{folder / 'benchmark.yaml'}: '", "ranked", definition.ranked, definition.methods)

    def evaluates(self, definition: EvaluationDefinition) -> str:
        return definition.evaluates

    def specs(
        self,
        benchmark: Benchmark[EvaluationDefinition, TaskEntry],
        suite: str,
        exclude: Collection[str],
        specs_of: Callable[[str], Mapping[str, Mapping[str, Any]]],
    ) -> Iterator[dict[str, Any]]:
        # Which learning rate and variant is evaluated is known only when the other benchmark's runs are finished, so a spec
        # names all candidates of its cell, over all seeds; the run chooses among them by their records.
        definition = benchmark.definition
        others = specs_of(definition.evaluates)
        settings = definition.evaluation.changed(definition.suites[suite].evaluation).model_dump()
        cells: dict[tuple[str, ...], list[str]] = {}
        for folder, spec in others.items():
            if not spec["training"]["keep_weights"]:
                raise DefinitionError(
                    f"{benchmark.file}: 'evaluates' is '{definition.evaluates}', whose runs in the suite '{suite}' do not keep "
                    "their weights; set training.keep_weights: true there"
                )
            cells.setdefault(_cell(spec), []).append(folder)
        found = False
        for folders in cells.values():
            first = others[folders[0]]
            ood = [name for name in benchmark.tasks[first["task"]["name"]].ood if name not in exclude]
            if not ood:
                continue
            for seed in dict.fromkeys(others[folder]["seed"] for folder in folders):
                found = True
                yield {
                    "benchmark": benchmark.name,
                    "version": definition.version,
                    "pipeline": definition.pipeline,
                    "protocol": first["protocol"],
                    "model": first["model"],
                    "task": first["task"],
                    "ood": [benchmark.tasks[name].spec(name) for name in ood],
                    "method": {"name": first["method"]["name"], "variant": "", "config": None},
                    "evaluation": settings,
                    "candidates": folders,
                    "learning_rate": 0.0,
                    "seed": seed,
                }
        if not found:
            tasks = sorted({spec["task"]["name"] for spec in others.values()})
            raise DefinitionError(
                f"{benchmark.file}: no task of the suite '{suite}' ({', '.join(tasks)}) has an OOD set left"
            )

    def compared_domains(self, definition: EvaluationDefinition) -> Mapping[str, Domain]:
        found = super().compared_domains(definition)
        return {name: found[name] for name in (OOD, OOD_MEAN)}

    def offer(self, benchmark: Benchmark[EvaluationDefinition, TaskEntry], suite: str) -> Offer:
        other = load_benchmark(benchmark.definition.evaluates)
        trained = other.kind.offer(other, suite)
        return replace(trained, domains=frozenset(self.compared_domains(benchmark.definition)))

    def inputs(self, spec: Mapping[str, Any]) -> list[str]:
        return [str(RUNS / folder / "metrics.json") for folder in spec["candidates"]]


KIND = EvaluationKind()


def _cell(spec: Mapping[str, Any]) -> tuple[str, ...]:
    return (spec["model"]["name"], spec["task"]["name"], spec["method"]["name"], spec["protocol"])
