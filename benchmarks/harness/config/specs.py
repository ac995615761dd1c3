"""A run's spec, read back: what is the same for every kind of run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from benchmarks.harness.config.catalogue import ModelSource
from benchmarks.harness.config.schema import AsGiven, Count, Number, Strict, Whole, left_out
from benchmarks.harness.config.shared import Layers


class RunModel(ModelSource):
    """The model of a run, and in which form its weights are loaded."""

    name: str
    """Name in models.yaml."""
    weights: Literal["bf16"] | None = left_out()
    """Type of the weights, where it is not float32."""
    quantize: Literal["nf4", "fp4"] | None = left_out()
    """In 4 bits."""
    whole: Layers | None = left_out()
    """The FFNs that stay whole in a quantised model."""


class RunTune(AsGiven):
    """What is trained, where that is not everything."""

    blocks: str | list[int]
    """The blocks that are trained as a whole."""
    also: list[str]
    """Further modules, by the last part of their name."""
    tuning: str | None = None
    """Another registered way of tuning."""
    layers: Layers | None = None
    """What that is told."""
    head: bool | None = None
    """False where the head stays as it is."""


class RunMethod(AsGiven):
    """The method of a run."""

    name: str
    """The row of the comparison."""
    variant: str
    """What of it is varied, short."""
    noise: Number | None = None
    """Intensity of noisy tuning."""
    config: dict[str, Any] | None
    """The configuration of an EMoE or GMoE; null for a dense model."""
    tune: RunTune | None = None
    """What is trained; null for everything."""


class RunSpec(Strict):
    """What shapes a run's numbers; its dump is what is hashed."""

    benchmark: str
    """Whose run it is."""
    version: Count
    """Of the benchmark."""
    pipeline: str
    """The module that runs it."""
    model: RunModel
    """What is trained or evaluated."""
    method: RunMethod
    """How."""
    learning_rate: Number
    """Peak learning rate; 0 where nothing is trained."""
    seed: Whole
    """The run's seed."""


def trained_sets(spec: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The sets that a run is trained on: one, or of a mixture several."""
    found: list[Mapping[str, Any]] = spec["task"].get("tasks", [spec["task"]])
    return found


def all_sets(spec: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The sets that a run is trained or evaluated on."""
    return [*trained_sets(spec), *spec["ood"]]
