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
    """Its configuration of transformers."""
    model: str | None = optional()
    """Name in models.yaml."""
    layer: Whole | None = optional()
    """Number of the layer."""


class Settings(Strict):
    """Settings, in the order of a run's name. A measure takes those that its entry in `measures` lists."""

    layers: Layers = "all"
    """Layers that are converted."""
    num_experts: Count
    """N."""
    starts: Count = 1
    """Starts of k-means-constrained."""
    top_k_fraction: Share = 1.0
    """k / N."""
    batch_size: Count = 1
    """Rows of a training step."""
    tokens: Count = 1
    """Tokens of a pass, of a row of a training step, of the prompt, or of the answer."""
    threads: Count
    """Threads of PyTorch."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights."""
    rounds: Count = 1
    """Number of times that all candidates are timed in turn."""
    candidates: Names
    """Candidates that are compared, beside the dense model if there is one."""


class Measure(Entry):
    """A measure."""

    caption: str
    """What is measured, and how."""
    settings: Settings
    """Every setting of the measure with its usual value."""


class MeasurementResources(Resources):
    """Reservations of the scheduler for one run."""

    threads: Whole = 0
    """CPU threads; 0 for all of the machine's, so that nothing runs beside it."""


class MeasurementBlock(Strict):
    """A measure, and the product of its lists."""

    measure: str
    """A name in measures."""
    model: Names
    """Names in models."""
    settings: dict[str, Annotated[list[Any], Field(min_length=1)]] = Field({})
    """Values of the measure's settings to run, as lists; the others keep their usual value."""


class MeasurementPart(SuitePart):
    """The benchmark's part of a suite."""

    resources: MeasurementResources = MeasurementResources()
    """Reservations of the scheduler for one run."""
    grid: Annotated[list[MeasurementBlock], Field(min_length=1)]
    """Blocks of runs; each is the product of its lists."""


class MeasurementDefinition(Definition):
    """A benchmark that trains nothing. It measures candidates side by side, each run under one setting."""

    models: Annotated[dict[str, MeasuredModel], Field(min_length=1)]
    """Models that are measured, by name."""
    candidates: Annotated[dict[str, Entry], Field(min_length=1)]
    """Candidates; their order is that of columns."""
    measures: Annotated[dict[str, Measure], Field(min_length=1)]
    """Measures, by name."""
