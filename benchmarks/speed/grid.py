"""Runs of a benchmark that measures: one for each model and setting, with all candidates side by side."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.harness.base.errors import DefinitionError
from benchmarks.harness.config.kinds import Benchmark, Domain, Kind, Offer
from benchmarks.harness.config.schema import check_names, parse
from benchmarks.speed.definition import SETTINGS, Measure, MeasurementDefinition

# shape how much is measured, not what
_NOT_IN_VARIANT = ("candidates", "rounds")
_SHORT = {
    "num_experts": "N",
    "top_k_fraction": "k",
    "layers": "L",
    "tokens": "T",
    "threads": "t",
    "batch_size": "B",
    "starts": "x",
}


class MeasurementKind(Kind[MeasurementDefinition, Measure]):
    """Things measured side by side, each run under one setting; nothing is trained."""

    files = (("speed", MeasurementDefinition),)
    has_models = has_seeds = counts_labels = False

    def load(self, content: object, file: Path) -> tuple[MeasurementDefinition, Mapping[str, Measure]]:
        definition = parse(content, MeasurementDefinition, str(file))
        check_names(f"{file}: '", "measures", definition.measures, SETTINGS)
        for name, measure in definition.measures.items():
            parse(measure.settings, SETTINGS[name], str(file), "measures", name, "settings")
        return definition, definition.measures

    def specs(
        self,
        benchmark: Benchmark[MeasurementDefinition, Measure],
        suite: str,
        exclude: Collection[str],
        specs_of: Callable[[str], Mapping[str, Mapping[str, Any]]],
    ) -> Iterator[dict[str, Any]]:
        definition = benchmark.definition
        seen: set[tuple[str, str, str]] = set()
        for number, block in enumerate(definition.suites[suite].grid):
            where = f"{benchmark.file}: 'suites.{suite}.grid[{number}]"
            check_names(where, "measure", [block.measure], definition.measures)
            check_names(where, "model", block.model, definition.models)
            usual = definition.measures[block.measure].settings
            check_names(where, "settings", block.settings, usual)
            candidates = [name for values in block.settings.get("candidates", []) for name in values]
            check_names(where, "settings.candidates", candidates, definition.candidates)
            for model, *values in itertools.product(block.model, *block.settings.values()):
                settings = {**usual, **dict(zip(block.settings, values, strict=True))}
                parse(
                    settings, SETTINGS[block.measure], str(benchmark.file), "suites", suite, "grid", number, "settings"
                )
                spec = _spec(benchmark, block.measure, model, settings, usual)
                key = (block.measure, model, spec["method"]["variant"])
                if key in seen:
                    raise DefinitionError(f"{where}' measures {' '.join(filter(None, key))} a second time")
                seen.add(key)
                yield spec

    def compared_domains(self, definition: MeasurementDefinition) -> Mapping[str, Domain]:
        return dict.fromkeys(definition.measures, Domain(("ratio", "ratio_low", "ratio_high"), "setting"))

    def row_titles(self, definition: MeasurementDefinition) -> Mapping[str, str]:
        return {name: candidate.title for name, candidate in definition.candidates.items()}

    def offer(self, benchmark: Benchmark[MeasurementDefinition, Measure], suite: str) -> Offer:
        blocks = benchmark.definition.suites[suite].grid
        return Offer(
            frozenset(benchmark.definition.candidates),
            frozenset(name for block in blocks for name in block.model),
            frozenset(block.measure for block in blocks),
        )


KIND = MeasurementKind()


def _spec(
    benchmark: Benchmark[MeasurementDefinition, Measure],
    measure: str,
    model: str,
    settings: Mapping[str, Any],
    usual: Mapping[str, Any],
) -> dict[str, Any]:
    definition = benchmark.definition
    other = {name: value for name, value in settings.items() if value != usual[name] and name not in _NOT_IN_VARIANT}
    return {
        **benchmark.of_every_spec,
        "model": definition.models[model].spec(model),
        "task": {"name": measure},
        "ood": [],
        # nothing is trained: no method, no learning rate
        "method": {
            "name": "",
            "variant": "-".join(_short(name, value) for name, value in other.items()),
            "config": None,
        },
        "settings": dict(settings),
        "learning_rate": 0.0,
        "seed": 0,
    }


def _short(name: str, value: Any) -> str:
    return f"{_SHORT.get(name, '')}{value:g}" if isinstance(value, int | float) else f"{_SHORT.get(name, '')}{value}"
