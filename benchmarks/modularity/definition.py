"""Define the YAML files of a benchmark that analyses pre-trained models, and its run specs."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from benchmarks.harness.config.benchmark import MethodsDefinition, TrainingPart
from benchmarks.harness.config.methods import VariantAxes
from benchmarks.harness.config.overlay import Changes
from benchmarks.harness.config.runs import RunSpec
from benchmarks.harness.config.yaml import UNIQUE, Count, Names, Share, Strict, Wholes
from benchmarks.text.definition import RunTask

EXPERTS = "experts"  # the key of the measured numbers in metrics.json


class Reading(Strict):
    """The settings of the rows that the models read, and of the activations that are recorded."""

    rows: Count
    """Number of sampled rows of the reported split of every task. All runs read the same rows."""
    batch_size: Count
    """Rows per batch."""
    max_length: Annotated[int, Field(ge=4)]
    """Maximum number of tokens of a row. Longer rows are cut."""
    active_share: Share
    """Share of the activations that count as active: the largest ones. In the paper's matrix,
    1.14 % are not zero.
    """
    shown_tokens: Count
    """Number of tokens in the drawn matrix. Every task has the same share of these tokens."""


class ModularityBlock(VariantAxes):
    """One block of a grid: every combination of its lists is a run."""

    seed: Wholes
    """Seeds. They affect only random partitions."""


class ModularityPart(TrainingPart):
    """The section of a suite's file for a benchmark that analyses pre-trained models."""

    tasks: Annotated[Names, UNIQUE]
    """Tasks whose rows are read, at least two."""
    reading: Annotated[dict[str, Any], Changes(Reading)] = Field({})
    """Settings that differ in this suite."""
    grid: Annotated[list[ModularityBlock], Field(min_length=1)]
    """Blocks of runs. Every combination of a block's lists is a run."""


class ModularityDefinition(MethodsDefinition):
    """A benchmark that trains nothing.

    It measures active neurons and chosen experts of pre-trained models.
    """

    tasks: str
    """File with the task definitions, in the benchmark's folder."""
    reading: Reading
    """Settings of the rows and activations. A suite may override them."""


class ModularitySpec(RunSpec):
    """All settings that determine the results of a run."""

    task: RunTask
    """The first of the tasks whose rows are read."""
    ood: list[RunTask]
    """The other tasks whose rows are read."""
    reading: Reading
    """Settings of the rows and activations."""
