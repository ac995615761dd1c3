"""Plan runs that evaluate the chosen runs of another benchmark: one for each of its cells and seeds."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.glue_ood.definition import EvaluationDefinition, EvaluationFile
from benchmarks.harness.base import RUNS, DefinitionError
from benchmarks.harness.config.benchmark import (
    Benchmark,
    Definition,
    MethodsDefinition,
    Offer,
    benchmark_names,
    kind_of,
    load_benchmark,
    resolve_methods,
    text_tokens,
)
from benchmarks.harness.config.methods import ABLATION
from benchmarks.harness.config.yaml import check_names, parse
from benchmarks.text.definition import TaskEntry
from benchmarks.text.grid import TextKind, TextSets, check_ablations, transformed_rows


class EvaluationKind(TextSets[EvaluationDefinition]):
    """Evaluate the chosen runs of another benchmark on the OOD sets of their tasks."""

    files = (("glue_ood", EvaluationFile),)

    def load(self, content: object, file: Path) -> tuple[EvaluationDefinition, Mapping[str, TaskEntry]]:
        own_file = parse(content, EvaluationFile, str(file))
        trained = [name for name in benchmark_names() if isinstance(kind_of(name), TextKind)]
        check_names(f"{file}: '", "evaluates", [own_file.evaluates], trained)
        other = load_benchmark(own_file.evaluates)
        taken = {
            key: getattr(other.definition, key)
            for key in MethodsDefinition.model_fields
            if key not in Definition.model_fields
        }
        resolved = resolve_methods(other.definition)
        rows = {name: row for name, row in taken["methods"].items() if resolved[name].role != ABLATION}
        rows |= transformed_rows(own_file.transformed, other.definition, file)
        return EvaluationDefinition(**own_file.given(), **{**taken, "methods": rows}), other.tasks

    def check(self, benchmark: Benchmark[EvaluationDefinition, TaskEntry]) -> None:
        definition = benchmark.definition
        main = [name for name in definition.methods if name not in definition.transformed]
        check_names(f"{benchmark.file}: '", "ranked", definition.ranked, main)
        check_ablations(definition, definition.ablations, benchmark.file)

    def specs(
        self,
        benchmark: Benchmark[EvaluationDefinition, TaskEntry],
        suite: str,
        exclude: Collection[str],
        specs_of: Callable[[str], Mapping[str, Mapping[str, Any]]],
    ) -> Iterator[dict[str, Any]]:
        # Which learning rate and variant is evaluated is known only when the other benchmark's runs are finished, so a
        # spec
        # names all candidates of its cell, over all seeds; the run chooses among them by their records.
        definition = benchmark.definition
        others = specs_of(definition.evaluates)
        settings = benchmark.settings("evaluation", suite).model_dump()
        cells: dict[_Cell, list[str]] = {}
        for folder, spec in others.items():
            if not spec["training"]["keep_weights"]:
                raise DefinitionError(
                    f"{benchmark.file}: 'evaluates' is '{definition.evaluates}', whose runs in the suite '{suite}' do "
                    "not keep "
                    "their weights; set training.keep_weights: true there"
                )
            if spec["method"]["name"] in definition.methods:
                cells.setdefault(_Cell.of(spec), []).append(folder)
        has_specs = False
        for name, folders, used_as in _rows(definition, cells):
            first = others[folders[0]]
            changes = _changes(name, used_as, others, benchmark.file)
            ood = [task for task in benchmark.tasks[first["task"]["name"]].ood if task not in exclude]
            if not ood:
                continue
            for seed in dict.fromkeys(others[folder]["seed"] for folder in folders):
                if used_as and seed not in changes:
                    continue
                has_specs = True
                yield {
                    **benchmark.of_every_spec,
                    "protocol": first["protocol"],
                    "model": first["model"],
                    "task": first["task"],
                    "ood": [benchmark.tasks[task].spec(task) for task in ood],
                    "evaluation": settings,
                    "candidates": folders,
                    "learning_rate": 0.0,
                    "seed": seed,
                    "method": {"name": name, "variant": "", "config": None},
                    **changes.get(seed, {}),
                }
        if not has_specs:
            tasks = sorted({spec["task"]["name"] for spec in others.values()})
            raise DefinitionError(
                f"{benchmark.file}: no task of the suite '{suite}' ({', '.join(tasks)}) has an OOD set left"
            )

    def offer(self, benchmark: Benchmark[EvaluationDefinition, TaskEntry], suite: str) -> Offer:
        other = load_benchmark(benchmark.definition.evaluates)
        trained = other.kind.offer(other, suite)
        methods = trained.methods & set(benchmark.definition.methods)
        transformed = {
            name
            for name, row in benchmark.definition.transformed.items()
            if {row.trained, row.used_as} <= trained.methods
        }
        domains = frozenset(self.compared_domains(benchmark.definition))
        return replace(trained, methods=methods | transformed, domains=domains)

    def training_tokens(self, spec: Mapping[str, Any], tasks: Mapping[str, TaskEntry]) -> float | None:
        settings = spec["evaluation"]
        rows = sum(settings["rows"] or tasks[other["name"]].rows.test or 0 for other in spec["ood"])
        return text_tokens(rows, settings["max_length"], 1 / 3)

    def inputs(self, spec: Mapping[str, Any]) -> list[str]:
        return [str(RUNS / folder / "metrics.json") for folder in spec["candidates"]]


KIND = EvaluationKind()


class _Cell(NamedTuple):
    """Group the candidates of one evaluation: the chosen run of every seed."""

    model: str
    task: str
    method: str
    protocol: str

    @classmethod
    def of(cls, spec: Mapping[str, Any]) -> _Cell:
        return cls(spec["model"]["name"], spec["task"]["name"], spec["method"]["name"], spec["protocol"])


def _rows(
    definition: EvaluationDefinition, cells: Mapping[_Cell, list[str]]
) -> Iterator[tuple[str, list[str], list[str]]]:
    """Yield every row, the runs that it chooses among, and the runs of the method that it is evaluated as, if
    another."""
    for cell, folders in cells.items():
        yield cell.method, folders, []
    for name, row in definition.transformed.items():
        for cell, folders in cells.items():
            used_as = cells.get(cell._replace(method=row.used_as))
            if cell.method == row.trained and used_as:
                yield name, folders, used_as


def _changes(
    name: str, used_as: list[str], others: Mapping[str, Mapping[str, Any]], file: Path
) -> dict[int, dict[str, Any]]:
    """Return the changes to the spec of a transformed row, by seed.

    Raises:
        DefinitionError: The row that it is used as has several settings.
    """
    changes: dict[int, dict[str, Any]] = {}
    for folder in used_as:
        config, seed = others[folder]["method"]["config"], others[folder]["seed"]
        change = {
            "transform": "emoe" if config else "dense",
            "method": {"name": name, "variant": "", "config": config},
        }
        if changes.setdefault(seed, change) != change:
            raise DefinitionError(
                f"{file}: 'transformed.{name}.used_as' runs with several N, k or layers, so that it is open which are "
                "meant"
            )
    return changes
