"""Define the files of a multi-task benchmark."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from benchmarks.harness.config.benchmark import Entry, MethodsDefinition, TrainingPart
from benchmarks.harness.config.methods import VariantAxes
from benchmarks.harness.config.overlay import Changes
from benchmarks.harness.config.runs import RunSpec
from benchmarks.harness.config.yaml import UNIQUE, Count, Key, Names, Positives, Strict, Wholes
from benchmarks.text.definition import EpochTraining, RunTask


class Mixture(Entry):
    """Tasks that one model learns at once."""

    tasks: Annotated[Names, UNIQUE]
    """Names in the task file."""


class MultitaskTraining(EpochTraining):
    """Training settings; a suite may override them."""

    rows_per_epoch: Count | None
    """Maximum rows of a task per epoch. The next epoch continues with the next rows. Null: all."""
    dev_rows: Count | None
    """Rows of every dev split; null for all. The mean dev score over the tasks selects epoch and
    hyper-parameters."""


class MultitaskBlock(VariantAxes):
    """One block of a grid: every combination of its lists is a run.

    Varied method settings name the variant.
    """

    mixture: Names
    """Names of mixtures, or of tasks, which are then learned alone."""
    learning_rate: Positives
    """Peak learning rates."""
    seed: Wholes
    """Seeds."""


class MultitaskPart(TrainingPart):
    """The benchmark's part of a suite."""

    training: Annotated[dict[str, Any], Changes(MultitaskTraining)] = Field({})
    """Settings that differ in this suite."""
    grid: Annotated[list[MultitaskBlock], Field(min_length=1)]
    """Blocks of runs. Every combination of a block's lists is a run."""


class MultitaskDefinition(MethodsDefinition):
    """A benchmark that trains encoder-decoder models on several tasks at once, as text to text."""

    tasks: str
    """File with the task definitions, in the benchmark's folder."""
    mixtures: Annotated[dict[Key, Mixture], Field(min_length=1)]
    """Tasks that are learned at once, by name."""
    prefixes: dict[str, str] = Field({})
    """Prefix of the rows of a task, by task; by default its name. Tasks may share a prefix."""
    training: MultitaskTraining
    """Training settings of every run; a suite may override them."""


class LearnedTask(RunTask):
    """A task that is learned."""

    prefix: str
    """The prefix of its rows."""


class OtherTask(RunTask):
    """An OOD evaluation set."""

    read_as: str
    """The learned task whose prefix, field names and answers the set uses."""


class RunMixture(Strict):
    """The tasks of a run."""

    name: str
    """Name of the mixture, or of the single task."""
    tasks: list[LearnedTask]
    """Tasks that the model learns at once."""


class MultitaskSpec(RunSpec):
    """The settings that determine the numbers of a run."""

    protocol: Literal["clean"]
    """The selection of epoch and hyper-parameters, by rows that are not reported."""
    task: RunMixture
    """Training tasks."""
    ood: list[OtherTask]
    """OOD evaluation sets."""
    training: MultitaskTraining
    """The training."""
