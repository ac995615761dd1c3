"""What the file of a benchmark says that measures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from benchmarks.harness.config.schema import Count, Key, Names, Share, Strict, Whole, left_out, parse
from benchmarks.harness.config.shared import Definition, Entry, Layers, Resources, SuitePart


class Candidate(Entry):
    """What is compared."""


class Measured(Strict):
    """What is measured on: one FFN by its sizes, one layer of a model of models.yaml, or a whole model with random weights."""

    hidden: Count | None = left_out()
    """Width of the FFN's input."""
    neurons: Count | None = left_out()
    """Neurons of the FFN."""
    gated: bool | None = left_out()
    """Whether the FFN is gated."""
    model: str | None = left_out()
    """Name in models.yaml."""
    layer: Whole | None = left_out()
    """Number of its layer."""
    config: dict[str, Any] | None = left_out()
    """Configuration of the whole model."""


class RunModel(Measured):
    """The ``model`` part of a run's spec."""

    name: str


class MeasuredModel(Measured, Entry):
    """What is measured on, as the file has it."""

    def spec(self, name: str) -> dict[str, Any]:
        """The ``model`` part of a run's spec."""
        return {"name": name, **self.model_dump(exclude={"title"})}


class Settings(Strict):
    """How anything is measured."""

    num_experts: Count
    """N."""
    threads: Count
    """Of torch."""
    candidates: Names
    """What is compared, beside the dense model where there is one."""


class TimedSettings(Settings):
    """How times are measured: all candidates in turn, several times."""

    top_k_fraction: Share
    """k / N."""
    rounds: Count
    """How often."""

    @property
    def top_k(self) -> int:
        return round(self.top_k_fraction * self.num_experts)


class DecodeSettings(TimedSettings):
    """One token through all FFNs."""

    dtype: Literal["float32", "bfloat16"]
    """Of the weights."""


class LayerSettings(DecodeSettings):
    """One FFN, forward and backward."""

    tokens: Count
    """Of a pass."""


class PromptSettings(DecodeSettings):
    """A prompt through all FFNs."""

    tokens: Count
    """Of the prompt."""


class GenerateSettings(DecodeSettings):
    """A greedy answer."""

    tokens: Count
    """Of the answer."""


class StepSettings(TimedSettings):
    """A training step of a whole model."""

    layers: Layers
    """Which are converted."""
    batch_size: Count
    """Rows."""
    length: Count
    """Tokens of a row."""


class PartitionSettings(Settings):
    """Clustering of one layer's keys."""

    starts: Count
    """Of k-means-constrained."""


SETTINGS: dict[str, type[Settings]] = {
    "layer": LayerSettings,
    "step": StepSettings,
    "decode": DecodeSettings,
    "prompt": PromptSettings,
    "generate": GenerateSettings,
    "partition": PartitionSettings,
}


def read_spec(spec: Mapping[str, Any], file: str) -> tuple[RunModel, Settings]:
    """What a run measures on, and how."""
    settings = SETTINGS[spec["task"]["name"]]
    return parse(spec["model"], RunModel, file, "model"), parse(spec["settings"], settings, file, "settings")


class Measure(Entry):
    """What is measured."""

    settings: dict[str, Any]
    """Every setting of the measure with its usual value."""


class MeasurementResources(Resources):
    """What the scheduler reserves for one run."""

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


class MeasurementSuite(SuitePart):
    """One suite's part of the benchmark."""

    resources: MeasurementResources = MeasurementResources()
    """What the scheduler reserves for one run."""
    grid: Annotated[list[MeasurementBlock], Field(min_length=1)]
    """Blocks of runs; each is the product of its lists."""


class MeasurementDefinition(Definition):
    """A benchmark that trains nothing. It measures things side by side, each run under one setting."""

    figures: dict[str, str]
    """The figures that it draws, each with its caption."""
    models: Annotated[dict[str, MeasuredModel], Field(min_length=1)]
    """What is measured on, by name."""
    candidates: Annotated[dict[str, Candidate], Field(min_length=1)]
    """What is compared; the order is that of columns and legends."""
    measures: Annotated[dict[str, Measure], Field(min_length=1)]
    """What is measured, by name."""
    suites: dict[Key, MeasurementSuite]
    """What to run, by suite."""
