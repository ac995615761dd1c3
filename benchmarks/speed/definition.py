"""Define the YAML files of a benchmark that measures speed."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from benchmarks.harness.config.benchmark import Definition, Entry, Resources, SuitePart
from benchmarks.harness.config.methods import Layers
from benchmarks.harness.config.yaml import Count, Names, Share, Strict, Whole, optional

MEASURES = ("layer", "step", "decode", "prompt", "generate", "partition")
# settings in a run's name, with their letter, and in tables, with their heading
SETTINGS = {
    "layers": ("L", "Layers"),
    "num_experts": ("N", "N"),
    "starts": ("x", "Starts of the library"),
    "top_k_fraction": ("k", "k/N"),
    "batch_size": ("B", "Rows"),
    "tokens": ("T", "Tokens"),
    "threads": ("t", "Threads"),
    "dtype": ("", "Type"),
}


class MeasuredModel(Entry):
    """A model with random weights, or one layer of a model of models.yaml."""

    config: dict[str, Any] | None = optional()
    """Configuration of the model in transformers."""
    model: str | None = optional()
    """Name in models.yaml."""
    layer: Whole | None = optional()
    """Number of the layer."""


class Settings(Strict):
    """Settings, in the order of a run's name. Each measure uses the settings in its entry in `measures`."""

    layers: Layers = "all"
    """Converted layers."""
    num_experts: Count
    """N."""
    starts: Count = 1
    """Number of initialisations of k-means-constrained."""
    top_k_fraction: Share = 1.0
    """k / N."""
    batch_size: Count = 1
    """Rows of a training step."""
    tokens: Count = 1
    """Number of tokens of a forward pass, a training row, the prompt, or the answer."""
    threads: Count
    """Threads of PyTorch."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights."""
    rounds: Count = 1
    """Number of rounds; each round times all candidates in turn."""
    candidates: Names
    """Compared candidates, in addition to the dense model if there is one."""


class Measure(Entry):
    """A measurement, such as the time of one FFN."""

    caption: str
    """Description of the measurement for the table."""
    settings: Settings
    """All settings of the measure with their default values."""


class MeasurementResources(Resources):
    """Reservations of the scheduler for one run."""

    threads: Whole = 0
    """CPU threads; 0 for all threads of the machine, so that no other run disturbs the measurement."""


class MeasurementBlock(Strict):
    """A measure, and the product of its lists."""

    measure: str
    """A name in measures."""
    model: Names
    """Names in models."""
    settings: dict[str, Annotated[list[Any], Field(min_length=1)]] = Field({})
    """Lists of values for settings of the measure; other settings have their default value."""


class MeasurementPart(SuitePart):
    """The benchmark's part of a suite."""

    resources: MeasurementResources = MeasurementResources()
    """Reservations of the scheduler for one run."""
    grid: Annotated[list[MeasurementBlock], Field(min_length=1)]
    """Blocks of runs; each is the product of its lists."""


class MeasurementDefinition(Definition):
    """A benchmark that trains nothing. Each run measures all candidates under one setting."""

    models: Annotated[dict[str, MeasuredModel], Field(min_length=1)]
    """Measured models, by name."""
    candidates: Annotated[dict[str, Entry], Field(min_length=1)]
    """Candidates, in the order of table columns."""
    measures: Annotated[dict[str, Measure], Field(min_length=1)]
    """Measures, by name."""
