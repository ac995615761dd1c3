"""Plan runs that evaluate the chosen runs of another benchmark: one for each of its cells and seeds."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from benchmarks.glue_ood.definition import (
    EvaluationDefinition,
    EvaluationFile,
    EvaluationPart,
    EvaluationSpec,
)
from benchmarks.harness.base import DefinitionError
from benchmarks.harness.config.benchmark import Part, benchmark_names, load_benchmark
from benchmarks.harness.config.methods import ABLATION
from benchmarks.harness.config.runs import Run
from benchmarks.harness.config.yaml import Location, check_names, parse
from benchmarks.text.grid import DOMAINS, TextBenchmark, TextSets, check_ablations, transformed_rows

_Cell = tuple[
    str, str, str, str
]  # model, task, protocol and method of the candidates; one per seed is chosen


class EvaluationBenchmark(TextSets[EvaluationDefinition, EvaluationPart]):
    """Evaluate the chosen runs of another benchmark on the OOD sets of their tasks."""

    package = "benchmarks.glue_ood"
    spec_model = EvaluationSpec
    definition_model, part_model = EvaluationFile, EvaluationPart
    recorded = ("scores", "data", "chosen", "routing", "usage")

    @classmethod
    def load(cls, name: str, content: object, file: Path) -> Self:
        evaluation_file = parse(content, EvaluationFile, str(file))
        check_names(Location(file, "evaluates"), [evaluation_file.evaluates], benchmark_names())
        other = load_benchmark(evaluation_file.evaluates)
        if not isinstance(other, TextBenchmark):
            raise DefinitionError(
                f"{file}: 'evaluates' is '{other.name}', which trains no text classifiers"
            )
        trained, methods = other.definition, other.methods()
        rows = {
            row: method for row, method in trained.methods.items() if methods[row].role != ABLATION
        }
        rows |= transformed_rows(evaluation_file.transformed, trained, file)
        definition = EvaluationDefinition(
            **evaluation_file.given(),
            baseline=trained.baseline,
            method_defaults=trained.method_defaults,
            methods=rows,
        )
        benchmark = cls(name, definition, other.tasks, DOMAINS)
        main = [row for row in definition.methods if row not in definition.transformed]
        check_names(Location(file, "ranked"), definition.ranked, main)
        check_ablations(benchmark)
        return benchmark

    def specs(
        self, part: Part[EvaluationPart], exclude: Collection[str], others: Sequence[Run]
    ) -> Iterator[dict[str, Any]]:
        # The evaluated learning rate and variant are unknown until the other benchmark's runs are finished, so a
        # spec names all candidates of its cell, over all seeds, and the run chooses among their records.
        trained = {run.folder: run.spec for run in others}
        settings = self.settings("evaluation", part).model_dump()
        cells: dict[_Cell, list[str]] = {}
        for folder, spec in trained.items():
            if not spec["training"]["keep_weights"]:
                raise DefinitionError(
                    f"{self.file}: 'evaluates' is '{self.evaluates}', whose runs in the suite '{part.suite}' do not "
                    "keep their weights; set training.keep_weights: true there"
                )
            model, task, method = (spec[key]["name"] for key in ("model", "task", "method"))
            if method in self.definition.methods:
                cells.setdefault((model, task, spec["protocol"], method), []).append(folder)
        for name, folders, used_as in _rows(self.definition, cells):
            first = trained[folders[0]]
            changes = _transform_overrides(name, used_as, trained, self.file)
            ood = [task for task in self.tasks[first["task"]["name"]].ood if task not in exclude]
            if not ood:
                continue
            for seed in dict.fromkeys(trained[folder]["seed"] for folder in folders):
                if used_as and seed not in changes:
                    continue
                yield self.spec(
                    "",
                    protocol=first["protocol"],
                    model=first["model"],
                    task=first["task"],
                    ood=[self.tasks[task].spec() for task in ood],
                    evaluation=settings,
                    candidates=folders,
                    learning_rate=0.0,
                    seed=seed,
                    **{
                        "method": {"name": name, "variant": "", "config": None},
                        **changes.get(seed, {}),
                    },
                )


def _rows(
    definition: EvaluationDefinition, cells: Mapping[_Cell, list[str]]
) -> Iterator[tuple[str, list[str], list[str]]]:
    """Yield each row's name, candidate runs, and the runs of its target method, if it is converted."""
    for (*_, method), folders in cells.items():
        yield method, folders, []
    for name, row in definition.transformed.items():
        for (model, task, protocol, method), folders in cells.items():
            used_as = cells.get((model, task, protocol, row.used_as))
            if method == row.trained and used_as:
                yield name, folders, used_as


def _transform_overrides(
    name: str, used_as: list[str], others: Mapping[str, Mapping[str, Any]], file: Path
) -> dict[int, dict[str, Any]]:
    """Return the spec overrides of a transformed row, by seed.

    Raises:
        DefinitionError: The target method has several settings.
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
                f"{file}: 'transformed.{name}.used_as' runs with several N, k or layers; it must have one setting"
            )
    return changes
