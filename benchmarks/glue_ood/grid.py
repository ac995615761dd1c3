"""Runs of a benchmark that evaluates the chosen runs of another: one for each of its cells and seeds."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from benchmarks.harness.base.errors import DefinitionError
from benchmarks.harness.planning.definition import Benchmark


def evaluation_specs(
    benchmark: Benchmark, suite: str, others: Mapping[str, Mapping[str, Any]], without: Collection[str]
) -> Iterator[dict[str, Any]]:
    """The specs of a suite: a model, training task, method, protocol and seed each.

    Which learning rate and variant is evaluated is known only when the other benchmark's runs are finished, so a spec
    names all candidates of its cell, over all seeds; the run chooses among them by their records.

    Args:
        benchmark: the one that evaluates.
        suite: the suite.
        others: specs of the other benchmark's runs in the suite, by folder.
        without: OOD sets to leave out.

    Raises:
        DefinitionError: the other runs do not keep their weights, or no OOD set is left.
    """
    definition = benchmark.definition
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
        ood = [name for name in benchmark.tasks[first["task"]["name"]]["ood"] if name not in without]
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
                "ood": [benchmark.task_spec(name) for name in ood],
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


def _cell(spec: Mapping[str, Any]) -> tuple[str, ...]:
    return (spec["model"]["name"], spec["task"]["name"], spec["method"]["name"], spec["protocol"])
