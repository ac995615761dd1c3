"""Define the YAML files of a benchmark that measures speed."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from benchmarks.harness.config.benchmark import Definition, Entry, Resources, SuitePart
from benchmarks.harness.config.methods import Layers
from benchmarks.harness.config.runs import RunSpec
from benchmarks.harness.config.yaml import Count, Names, Share, Strict, Whole, registered

MEASURES = ("layer", "step", "forward", "generate", "partition")


class Settings(Strict):
    """All settings of measurements. A run's name lists them in this order.

    A measure uses only the settings that its entry below `measures` has.
    """

    layers: Layers = "all"
    """Converted layers."""
    num_experts: Count
    """Number of experts, N, or of clusters."""
    top_k_fraction: Share = 1.0
    """Share of the experts that each token uses, k / N."""
    batch_size: Count = 1
    """Rows of a training step, or prompts that are answered together."""
    tokens: Count = 1
    """Number of tokens of a forward pass, a training row, or a prompt."""
    threads: Count
    """CPU threads of PyTorch."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights."""
    candidates: Names
    """Names of the compared implementations (candidates). All measures except `partition` also
    measure the dense model."""


class Measure(Entry):
    """A kind of measurement, such as the time of one FFN, with its default settings."""

    caption: str
    """Description of the measurement for the table."""
    settings: Settings
    """All settings of the measure with their default values."""


class MeasurementResources(Resources):
    """Resources that the scheduler reserves for one run."""

    threads: Whole = 0
    """CPU threads; 0 for all threads of the machine, so that no other run disturbs this one."""


class MeasurementBlock(Strict):
    """One block of a grid: every combination of its lists is a run of one measure."""

    measure: str
    """A name in measures."""
    model: Names
    """Names in models."""
    settings: dict[str, Annotated[list[Any], Field(min_length=1)]] = Field({})
    """Lists of values for settings of the measure; other settings have their default value."""


class MeasurementPart(SuitePart):
    """What a suite sets for this benchmark: the grid of its runs, and their resources."""

    resources: MeasurementResources = MeasurementResources()
    """Resources that the scheduler reserves for one run."""
    grid: Annotated[list[MeasurementBlock], Field(min_length=1)]
    """Blocks of runs. Every combination of a block's lists is a run."""


class MeasurementDefinition(Definition):
    """The benchmark.yaml of a benchmark that measures speed and trains nothing.

    Each run measures the compared implementations (candidates) under one setting.
    """

    models: dict[str, dict[str, Any] | None]
    """Models by name: a configuration for a model with random weights, or null for a model of
    models.yaml."""
    candidates: dict[str, str]
    """Titles of the candidates, by name, in the order of table columns."""
    measures: dict[Annotated[str, registered(MEASURES)], Measure]
    """Measures, by name."""


class MeasureName(Strict):
    """The measure of a run, such as ``layer``."""

    name: str
    """A name in `measures`."""


class MeasurementSpec(RunSpec):
    """The settings that determine what a run measures."""

    task: MeasureName
    ood: Annotated[list[Any], Field(max_length=0)]
    settings: Settings
