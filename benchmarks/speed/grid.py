"""Plan measurements: a run per model and setting, which measures all candidates."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

from benchmarks.harness.config.benchmark import Benchmark, Domain, Part
from benchmarks.harness.config.catalogue import load_models
from benchmarks.harness.config.runs import Run
from benchmarks.harness.config.yaml import check_names, parse
from benchmarks.speed.definition import (
    Measure,
    MeasurementDefinition,
    MeasurementPart,
    MeasurementSpec,
    Settings,
)


class MeasurementBenchmark(Benchmark[MeasurementDefinition, Measure, MeasurementPart]):
    """Plan runs that measure all candidates under one setting, without training."""

    package = "benchmarks.speed"
    spec_model = MeasurementSpec
    definition_model, part_model = MeasurementDefinition, MeasurementPart
    recorded = ("measured",)

    @classmethod
    def load(cls, name: str, content: object, file: Path) -> Self:
        definition = parse(content, MeasurementDefinition, str(file))
        domains = dict.fromkeys(
            definition.measures, Domain(("ratio", "ratio_low", "ratio_high"), "setting")
        )
        return cls(name, definition, definition.measures, domains, row_titles=definition.candidates)

    def specs(
        self, part: Part[MeasurementPart], exclude: Collection[str], others: Sequence[Run]
    ) -> Iterator[dict[str, Any]]:
        definition = self.definition
        models = [
            name for name, config in definition.models.items() if config or name in load_models()
        ]
        for number, block in enumerate(part.settings.grid):
            where = part.where("grid", number)
            check_names(where.at("measure"), [block.measure], definition.measures)
            check_names(where.at("model"), block.model, models)
            usual = definition.measures[block.measure].settings.given()
            check_names(where.at("settings"), block.settings, usual)
            at = ("benchmarks", self.name, "grid", number, "settings")
            for model, *values in itertools.product(block.model, *block.settings.values()):
                point = usual | dict(zip(block.settings, values, strict=True))
                settings = parse(point, Settings, part.file, *at).given()
                check_names(
                    where.at("settings", "candidates"),
                    settings["candidates"],
                    definition.candidates,
                )
                changed = {
                    key: value
                    for key, value in settings.items()
                    if key != "candidates" and value != usual[key]
                }
                variant = "-".join(f"{key}={value}" for key, value in changed.items())
                config = definition.models[model]
                yield self.spec(
                    variant,
                    model={"name": model, "config": config}
                    if config
                    else load_models()[model].spec(model),
                    task={"name": block.measure},
                    ood=[],
                    method={"name": "", "variant": variant, "config": None},
                    settings=settings,
                    learning_rate=0.0,
                    seed=0,
                )
