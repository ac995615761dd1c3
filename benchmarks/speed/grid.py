"""Plan measurements: a run per model and setting, which measures all compared implementations."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
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
    """A benchmark whose runs measure speed, without training.

    A run measures all compared implementations (candidates) under one setting.
    """

    package = "benchmarks.speed"
    spec_model = MeasurementSpec
    definition_model = MeasurementDefinition
    part_model = MeasurementPart
    recorded = ("measured",)

    @classmethod
    def load(cls, name: str, content: object, file: Path) -> Self:
        definition = parse(content, MeasurementDefinition, str(file))
        # claims can compare the ratios of every measure
        domains = {}
        for measure in definition.measures:
            domains[measure] = Domain(("ratio", "ratio_low", "ratio_high"), pair="setting")
        return cls(name, definition, definition.measures, domains, row_titles=definition.candidates)

    def specs(
        self, part: Part[MeasurementPart], exclude: Collection[str], others: Sequence[Run]
    ) -> Iterator[dict[str, Any]]:
        for index in range(len(part.settings.grid)):
            yield from self._specs_of_block(part, index)

    def _candidates_of(self, measure: str) -> list[str]:
        """Return the candidates that the grid may list for a measure.

        The measure ``partition`` compares ways to cluster the neurons. The other measures compare
        ways to compute layers and models.
        """
        clusterings: list[str] = []
        partition = self.definition.measures.get("partition")
        if partition is not None:
            # by default, it compares all clusterings that there are
            clusterings = partition.settings.given()["candidates"]
        if measure == "partition":
            return clusterings
        # the dense model is always measured, so it is not listed
        not_listed = {"dense", *clusterings}
        return [name for name in self.definition.candidates if name not in not_listed]

    def _specs_of_block(self, part: Part[MeasurementPart], index: int) -> Iterator[dict[str, Any]]:
        """Yield a spec for every model and every combination of a block's settings.

        Args:
            part: What the suite sets for this benchmark.
            index: The index of the block in the grid.

        Raises:
            DefinitionError: The block has an unknown name, or an invalid setting.
        """
        definition = self.definition
        block = part.settings.grid[index]
        # check all names of the block; `where` is its location, for error messages
        where = part.where("grid", index)
        check_names(where.at("measure"), [block.measure], definition.measures)
        check_names(where.at("model"), block.model, self._known_models())
        defaults = definition.measures[block.measure].settings.given()
        check_names(where.at("settings"), block.settings, defaults)
        known_candidates = self._candidates_of(block.measure)
        key_path = ("benchmarks", self.name, "grid", index, "settings")
        for model in block.model:
            for varied in _combinations(block.settings):
                # parsing checks the values; `given` leaves out settings that the measure lacks
                parsed = parse({**defaults, **varied}, Settings, part.file, *key_path)
                settings = parsed.given()
                candidates = settings["candidates"]
                check_names(where.at("settings", "candidates"), candidates, known_candidates)
                variant = _variant(settings, defaults)
                # nothing is trained: there is no method, learning rate or out-of-domain data
                yield self.spec(
                    variant,
                    model=self._model_spec(model),
                    task={"name": block.measure},
                    ood=[],
                    method={"name": "", "variant": variant, "config": None},
                    settings=settings,
                    learning_rate=0.0,
                    seed=0,
                )

    def _known_models(self) -> list[str]:
        """Return the models that can be built: they have a configuration or are in models.yaml."""
        names = []
        for name, config in self.definition.models.items():
            if config or name in load_models():
                names.append(name)
        return names

    def _model_spec(self, name: str) -> dict[str, Any]:
        """Return the ``model`` section of a run's spec."""
        config = self.definition.models[name]
        if config:
            return {"name": name, "config": config}
        return load_models()[name].spec(name)


def _combinations(values_by_setting: Mapping[str, list[Any]]) -> Iterator[dict[str, Any]]:
    """Yield every combination of values, with one value for each setting.

    >>> list(_combinations({"threads": [1, 2], "tokens": [64]}))
    [{'threads': 1, 'tokens': 64}, {'threads': 2, 'tokens': 64}]
    """
    for values in itertools.product(*values_by_setting.values()):
        yield dict(zip(values_by_setting, values, strict=True))


def _variant(settings: Mapping[str, Any], defaults: Mapping[str, Any]) -> str:
    """Name the settings that differ from their defaults, such as ``tokens=64-threads=2``."""
    changed = []
    for key, value in settings.items():
        # candidates are not part of the name, because each run measures several of them
        if key != "candidates" and value != defaults[key]:
            changed.append(f"{key}={value}")
    return "-".join(changed)
