"""Plan measurements: a run per model and setting, with all candidates side by side."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from benchmarks.harness.config.benchmark import (
    Benchmark,
    Domain,
    Part,
)
from benchmarks.harness.config.runs import Run
from benchmarks.harness.config.yaml import check_names, parse
from benchmarks.speed.definition import (
    _LETTERS,
    MEASURES,
    Measure,
    MeasurementDefinition,
    MeasurementPart,
    Settings,
)


class MeasurementBenchmark(Benchmark[MeasurementDefinition, Measure, MeasurementPart]):
    """Measurements side by side, each run under one setting; nothing is trained."""

    definition_model, part_model = MeasurementDefinition, MeasurementPart
    recorded = ("measured",)

    @classmethod
    def load(cls, name: str, content: object, file: Path) -> Self:
        definition = parse(content, MeasurementDefinition, str(file))
        check_names(f"{file}: '", "measures", definition.measures, MEASURES)
        for key, measure in definition.measures.items():
            parse(measure.settings, Settings, str(file), "measures", key, "settings")
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
            usual = definition.measures[block.measure].settings
            check_names(where, "settings", block.settings, usual)
            candidates = [name for values in block.settings.get("candidates", []) for name in values]
            check_names(where, "settings.candidates", candidates, definition.candidates)
            for model, *values in itertools.product(block.model, *block.settings.values()):
                settings = {**usual, **dict(zip(block.settings, values, strict=True))}
                parse(settings, Settings, part.file, "benchmarks", self.name, "grid", number, "settings")
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


def _variant(settings: Mapping[str, Any], usual: Mapping[str, Any]) -> str:
    """Return a name for the settings that differ from the usual ones."""
    values = {name: settings[name] for name in settings if name in _LETTERS and settings[name] != usual[name]}
    return "-".join(
        f"{_LETTERS[name]}{value:g}" if isinstance(value, int | float) else f"{_LETTERS[name]}{value}"
        for name, value in values.items()
    )
