"""Runs of a benchmark that evaluates the chosen runs of another: one for each of its cells and seeds."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.harness.base.errors import DefinitionError
from benchmarks.harness.base.paths import RUNS
from benchmarks.harness.planning.definition import benchmark_names, load_benchmark
from benchmarks.harness.planning.kinds import Benchmark, kind_of
from benchmarks.harness.planning.schema import check_names
from benchmarks.text.grid import TextKind, TextSets, task_spec


class EvaluationKind(TextSets):
    """The chosen runs of another benchmark, evaluated on the OOD sets of their tasks: one run for each of its cells and seeds."""

    schema = "evaluation"

    def load(self, definition: dict[str, Any], folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
        trained = [name for name in benchmark_names() if isinstance(kind_of(name), TextKind)]
        check_names(f"{folder / 'benchmark.yaml'}: '", "evaluates", [definition["evaluates"]], trained)
        other = load_benchmark(definition["evaluates"])
        return definition | {key: other.definition[key] for key in ("methods", "baseline")}, other.tasks

    def check(self, definition: Mapping[str, Any], tasks: Mapping[str, Any], folder: Path) -> None:
        check_names(f"{folder / 'benchmark.yaml'}: '", "ranked", definition["ranked"], definition["methods"])

    def specs(
        self,
        benchmark: Benchmark,
        suite: str,
        exclude: Collection[str],
        specs_of: Callable[[str], Mapping[str, Mapping[str, Any]]],
    ) -> Iterator[dict[str, Any]]:
        # Which learning rate and variant is evaluated is known only when the other benchmark's runs are finished, so a spec
        # names all candidates of its cell, over all seeds; the run chooses among them by their records.
        definition = benchmark.definition
        others = specs_of(definition["evaluates"])
        settings = {**definition["evaluation"], **definition["suites"][suite]["evaluation"]}
        cells: dict[tuple[str, ...], list[str]] = {}
        for folder, spec in others.items():
            if not spec["training"]["keep_weights"]:
                raise DefinitionError(
                    f"{benchmark.file}: 'evaluates' is '{definition['evaluates']}', whose runs in the suite '{suite}' do not keep "
                    "their weights; set training.keep_weights: true there"
                )
            cells.setdefault(_cell(spec), []).append(folder)
        found = False
        for folders in cells.values():
            first = others[folders[0]]
            ood = [name for name in benchmark.tasks[first["task"]["name"]]["ood"] if name not in exclude]
            if not ood:
                continue
            for seed in dict.fromkeys(others[folder]["seed"] for folder in folders):
                found = True
                yield {
                    "benchmark": benchmark.name,
                    "version": definition["version"],
                    "pipeline": definition["pipeline"],
                    "protocol": first["protocol"],
                    "model": first["model"],
                    "task": first["task"],
                    "ood": [task_spec(benchmark, name) for name in ood],
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

    def inputs(self, spec: Mapping[str, Any]) -> list[str]:
        return [str(RUNS / folder / "metrics.json") for folder in spec["candidates"]]


KIND = EvaluationKind()


def _cell(spec: Mapping[str, Any]) -> tuple[str, ...]:
    return (spec["model"]["name"], spec["task"]["name"], spec["method"]["name"], spec["protocol"])
