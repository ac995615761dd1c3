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
    """Settings of the rows that a model reads and of the recorded activations."""

    rows: Count
    """Number of sampled rows of every task's reported split, the same rows for all runs."""
    batch_size: Count
    """Rows per batch."""
    max_length: Annotated[int, Field(ge=4)]
    """Maximum tokens of a sentence or pair; longer rows are cut."""
    active_share: Share
    """Share of the largest activations that count as active. In the paper's matrix, 1.14 % are not zero."""
    shown_tokens: Count
    """Number of tokens in the drawn matrix, equal for every task."""


class ModularityBlock(VariantAxes):
    """A block of the grid."""

    seed: Wholes
    """Seeds; they affect only random partitions."""


class ModularityPart(TrainingPart):
    """The benchmark's part of a suite."""

    tasks: Annotated[Names, UNIQUE]
    """Tasks whose rows are read, at least two."""
    reading: Annotated[dict[str, Any], Changes(Reading)] = Field({})
    """Settings that differ in this suite."""
    grid: Annotated[list[ModularityBlock], Field(min_length=1)]
    """Blocks of runs; each is the product of its lists."""


class ModularityDefinition(MethodsDefinition):
    """A benchmark that trains nothing. It measures active neurons and chosen experts of pre-trained models."""

    tasks: str
    """File with the task definitions, in the benchmark's folder."""
    reading: Reading
    """Settings of the rows and activations; a suite may override them."""


class ModularitySpec(RunSpec):
    """The settings that determine the numbers of a run."""

    task: RunTask
    """The first task."""
    ood: list[RunTask]
    """The others."""
    reading: Reading
    """Settings of reading."""
