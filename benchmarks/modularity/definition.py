"""What the file of the benchmark says that looks into pre-trained models."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from benchmarks.harness.config.schema import UNIQUE, Count, Key, Names, PartOf, Share, Strict, Wholes
from benchmarks.harness.config.shared import TrainingDefinition, TrainingSuite, VariantAxes
from benchmarks.harness.config.specs import RunSpec
from benchmarks.text.definition import RunTask

EXPERTS = "experts"  # what is measured


class Reading(Strict):
    """What a model reads, and what is kept of it."""

    rows: Count
    """Rows of every task's reported split, drawn once and for all."""
    batch_size: Count
    """Rows of a batch."""
    max_length: Annotated[int, Field(ge=4)]
    """Tokens kept of a sentence or pair."""
    active_share: Share
    """A neuron is active for a token where its activation is among this share of the largest ones; of the paper's matrix 1.14 % is not zero."""
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


class ModularitySuite(TrainingSuite):
    """One suite's part of the benchmark."""

    tasks: Annotated[Names, UNIQUE]
    """Tasks whose rows are read, two at least."""
    reading: Annotated[Strict, PartOf(Reading)] = Strict()
    """Settings that differ in this suite."""
    grid: Annotated[list[ModularityBlock], Field(min_length=1)]
    """Blocks of runs; each is the product of its lists."""


class ModularityDefinition(TrainingDefinition):
    """A benchmark that trains nothing. It looks at how the neurons of pre-trained FFNs fire, and which experts the tokens of several tasks choose."""

    figures: dict[str, str]
    """The figures that it draws, each with its caption."""
    tasks: str
    """File with the task definitions, in the benchmark's folder."""
    reading: Reading
    """What a model reads; a suite may set its own."""
    suites: dict[Key, ModularitySuite]
    """What to run, by suite."""


class ModularitySpec(RunSpec):
    """What shapes the numbers of a run."""

    task: RunTask
    """The first task."""
    ood: list[RunTask]
    """The others."""
    reading: Reading
    """What is read of them."""
