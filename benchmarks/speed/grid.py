"""Plan measurements: a run per model and setting, which measures all candidates."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Self

from benchmarks.harness.config.benchmark import Benchmark, Domain, Part
from benchmarks.harness.config.runs import Run
from benchmarks.harness.config.yaml import check_names, parse
from benchmarks.speed.definition import MEASURES, SETTINGS, Measure, MeasurementDefinition, MeasurementPart, Settings


class MeasurementBenchmark(Benchmark[MeasurementDefinition, Measure, MeasurementPart]):
    """Plan runs that measure all candidates under one setting, without training."""

    definition_model, part_model = MeasurementDefinition, MeasurementPart
    recorded = ("measured",)

    @classmethod
    def load(cls, name: str, content: object, file: Path) -> Self:
        definition = parse(content, MeasurementDefinition, str(file))
        check_names(f"{file}: '", "measures", definition.measures, MEASURES)
        domains = dict.fromkeys(definition.measures, Domain(("ratio", "ratio_low", "ratio_high"), "setting"))
        titles = {key: candidate.title for key, candidate in definition.candidates.items()}
        return cls(name, definition, definition.measures, domains, row_titles=titles)

    def specs(
        self, part: Part[MeasurementPart], exclude: Collection[str], others: Sequence[Run]
    ) -> Iterator[dict[str, Any]]:
        definition = self.definition
        for number, block in enumerate(part.settings.grid):
            where = part.where("grid", number)
            check_names(where, "measure", [block.measure], definition.measures)
            check_names(where, "model", block.model, definition.models)
            usual = definition.measures[block.measure].settings.given()
            check_names(where, "settings", block.settings, usual)
            at = ("benchmarks", self.name, "grid", number, "settings")
            for model, *values in itertools.product(block.model, *block.settings.values()):
                point = {**usual, **dict(zip(block.settings, values, strict=True))}
                settings = parse(point, Settings, part.file, *at).given()
                check_names(where, "settings.candidates", settings["candidates"], definition.candidates)
                variant = _variant(settings, usual)
                yield self.spec(
                    variant,
                    model={"name": model, **definition.models[model].model_dump(exclude={"title"})},
                    task={"name": block.measure},
                    ood=[],
                    # nothing is trained: no method, no learning rate
                    method={"name": "", "variant": variant, "config": None},
                    settings=settings,
                    learning_rate=0.0,
                    seed=0,
                )

    def pipeline(self) -> ModuleType:
        from benchmarks.speed import pipeline

        return pipeline

    def presentation(self) -> ModuleType:
        from benchmarks.speed import presentation

        return presentation


def _variant(settings: Mapping[str, Any], usual: Mapping[str, Any]) -> str:
    """Return a name for the settings that differ from the usual ones; rounds and candidates are left out."""
    changed = {name: value for name, value in settings.items() if name in SETTINGS and value != usual[name]}
    return "-".join(f"{SETTINGS[name][0]}{value}" for name, value in changed.items())
