"""Define the files of a multi-task benchmark."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from benchmarks.harness.config.benchmark import MethodsDefinition, TrainingPart
from benchmarks.harness.config.methods import VariantAxes
from benchmarks.harness.config.overlay import Changes
from benchmarks.harness.config.runs import RunSpec
from benchmarks.harness.config.yaml import UNIQUE, Count, Key, Names, Positives, Strict, Wholes
from benchmarks.text.definition import EpochTraining, RunTask


class Mixture(Strict):
    """Tasks that one model learns at once."""

    title: str
    """Label in tables."""
    tasks: Annotated[Names, UNIQUE]
    """Names in the task file."""


class MultitaskTraining(EpochTraining):
    """The training of a run; a suite may change the benchmark's."""

    rows_per_epoch: Count | None
    """Rows of a task in an epoch, at most: a larger task takes its next ones in each epoch. Null: all rows."""
    dev_rows: Count | None
    """Rows of every dev split, whose mean score over the tasks chooses; null for all."""


class MultitaskBlock(VariantAxes):
    """A product of lists. Lists of method settings become part of the method's variant."""

    model: Names
    """Names in models.yaml."""
    mixture: Names
    """Names of mixtures, or of tasks: each of these is learned alone."""
    method: Names
    """Names of methods."""
    learning_rate: Positives
    """Peak learning rates."""
    seed: Wholes
    """Seeds."""


class MultitaskPart(TrainingPart):
    """The benchmark's part of a suite."""

    training: Annotated[dict[str, Any], Changes(MultitaskTraining)] = Field({})
    """Settings that differ in this suite."""
    grid: Annotated[list[MultitaskBlock], Field(min_length=1)]
    """Blocks of runs; each is the product of its lists."""


class MultitaskDefinition(MethodsDefinition):
    """A benchmark whose encoder-decoder models learn several tasks at once, as text from text."""

    tasks: str
    """File with the task definitions, in the benchmark's folder."""
    mixtures: Annotated[dict[Key, Mixture], Field(min_length=1)]
    """Tasks that are learned at once, by name."""
    prefixes: dict[str, str] = Field({})
    """Prefixes of tasks whose rows do not begin with their name; only the rows tell tasks with one prefix apart."""
    training: MultitaskTraining
    """Settings of every run; a suite may set its own."""


class LearnedTask(RunTask):
    """A task that is learned."""

    prefix: str
    """The prefix of its rows."""


class OtherTask(RunTask):
    """A set that is only evaluated on."""

    read_as: str
    """The learned task that gives it prefix, field names and answers."""


class RunMixture(Strict):
    """The tasks of a run."""

    name: str
    """Name of the mixture, or of the single task."""
    tasks: list[LearnedTask]
    """Tasks that it learns at once."""


class MultitaskSpec(RunSpec):
    """The settings that shape the numbers of a run."""

    protocol: Literal["clean"]
    """The selection of epoch and hyper-parameters: by rows that are not reported."""
    task: RunMixture
    """The tasks that it is trained on."""
    ood: list[OtherTask]
    """The other sets that it is evaluated on."""
    training: MultitaskTraining
    """The training."""
