"""Define the files of a benchmark that measures speed."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from benchmarks.harness.config.benchmark import (
    Definition,
    Entry,
    Resources,
    SuitePart,
)
from benchmarks.harness.config.methods import Layers
from benchmarks.harness.config.yaml import Count, Names, Share, Strict, Whole, optional

MEASURES = ("layer", "step", "decode", "prompt", "generate", "partition")
# settings in a run's name, by their letter; candidates and rounds say how much is measured, not what
_LETTERS = {
    "num_experts": "N",
    "top_k_fraction": "k",
    "layers": "L",
    "tokens": "T",
    "threads": "t",
    "batch_size": "B",
    "starts": "x",
    "dtype": "",
    "length": "",
}


class MeasuredModel(Entry):
    """One FFN by its sizes, one layer of a model of models.yaml, or a whole model with random weights."""

    hidden: Count | None = optional()
    """Width of the FFN's input."""
    neurons: Count | None = optional()
    """Neurons of the FFN."""
    gated: bool | None = optional()
    """True for a gated FFN."""
    model: str | None = optional()
    """Name in models.yaml."""
    layer: Whole | None = optional()
    """Number of its layer."""
    config: dict[str, Any] | None = optional()
    """Configuration of the whole model."""


class Settings(Strict):
    """Settings of a measure; each measure takes those that its entry in `measures` lists."""

    num_experts: Count
    """N."""
    candidates: Names
    """Candidates that are compared, beside the dense model if there is one."""
    threads: Count
    """Threads of PyTorch."""
    top_k_fraction: Share = 1.0
    """k / N."""
    rounds: Count = 1
    """Number of times that all candidates are timed in turn."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights."""
    tokens: Count = 1
    """Tokens of a pass, of the prompt, or of the answer."""
    layers: Layers = "all"
    """Layers that are converted."""
    batch_size: Count = 1
    """Rows of a training step."""
    length: Count = 1
    """Tokens of a row."""
    starts: Count = 1
    """Starts of k-means-constrained."""

    @property
    def top_k(self) -> int:
        return round(self.top_k_fraction * self.num_experts)


class Measure(Entry):
    """A measure."""

    settings: dict[str, Any]
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
    """Candidates; their order is that of columns and legends."""
    measures: Annotated[dict[str, Measure], Field(min_length=1)]
    """Measures, by name."""
