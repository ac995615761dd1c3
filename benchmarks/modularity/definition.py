"""Define the files of a benchmark that analyses pre-trained models."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from benchmarks.harness.config.benchmark import MethodsDefinition, TrainingPart
from benchmarks.harness.config.methods import VariantAxes
from benchmarks.harness.config.overlay import Changes
from benchmarks.harness.config.runs import RunSpec
from benchmarks.harness.config.yaml import UNIQUE, Count, Names, Share, Strict, Wholes
from benchmarks.text.definition import RunTask

EXPERTS = "experts"  # the name of the measurement


class Reading(Strict):
    """The rows that a model reads, and the activations that are kept."""

    rows: Count
    """Rows of every task's reported split, drawn once and for all."""
    batch_size: Count
    """Rows of a batch."""
    max_length: Annotated[int, Field(ge=4)]
    """Tokens kept of a sentence or pair."""
    active_share: Share
    """The share of the largest activations, whose neurons are active; of the paper's matrix 1.14 % is not zero."""
    shown_tokens: Count
    """Tokens of the matrix that is drawn, as many of every task."""


class ModularityBlock(VariantAxes):
    """A product of lists. Lists of method settings become part of the method's variant."""

    model: Names
    """Names in models.yaml."""
    method: Names
    """Names of methods."""
    seed: Wholes
    """Seeds, which shape random partitions alone."""


class ModularityPart(TrainingPart):
    """The benchmark's part of a suite."""

    tasks: Annotated[Names, UNIQUE]
    """Tasks whose rows are read, two at least."""
    reading: Annotated[dict[str, Any], Changes(Reading)] = Field({})
    """Settings that differ in this suite."""
    grid: Annotated[list[ModularityBlock], Field(min_length=1)]
    """Blocks of runs; each is the product of its lists."""


class ModularityDefinition(MethodsDefinition):
    """A benchmark that trains nothing: neurons of pre-trained FFNs that fire, and experts that tokens choose."""

    tasks: str
    """File with the task definitions, in the benchmark's folder."""
    reading: Reading
    """Settings of reading; a suite may set its own."""


class ModularitySpec(RunSpec):
    """The settings that shape the numbers of a run."""

    task: RunTask
    """The first task."""
    ood: list[RunTask]
    """The others."""
    reading: Reading
    """Settings of reading."""
