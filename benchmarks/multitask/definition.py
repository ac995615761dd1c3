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
    """Maximum rows of a task per epoch; null for all. The next epoch continues with the next
    rows."""
    dev_rows: Count | None
    """Rows of every dev split; null for all. The mean dev score over the tasks selects epoch and
    hyper-parameters."""


class MultitaskBlock(VariantAxes):
    """One block of a grid: every combination of its lists is a run.

    Method settings that a block varies are part of a run's name, such as ``N16``.
    """

    mixture: Names
    """Names of mixtures, or of single tasks. A run of a single task learns only this task."""
    learning_rate: Positives
    """Peak learning rates."""
    seed: Wholes
    """Seeds."""


class MultitaskPart(TrainingPart):
    """What a suite sets for this benchmark: the grid of its runs, and the settings that differ."""

    training: Annotated[dict[str, Any], Changes(MultitaskTraining)] = Field({})
    """Settings that differ in this suite."""
    grid: Annotated[list[MultitaskBlock], Field(min_length=1)]
    """Blocks of runs. Every combination of a block's lists is a run."""


class MultitaskDefinition(MethodsDefinition):
    """The benchmark.yaml of a benchmark that trains encoder-decoders on several tasks at once."""

    tasks: str
    """File with the task definitions, in the benchmark's folder."""
    mixtures: Annotated[dict[Key, Mixture], Field(min_length=1)]
    """Mixtures by name: each has the tasks that are learned at once."""
    prefixes: dict[str, str] = Field({})
    """Beginning of the text of every row of a task, by task. The default is the task's name. Tasks
    may share a prefix."""
    training: MultitaskTraining
    """Training settings of every run; a suite may override them."""


class LearnedTask(RunTask):
    """A task that a run learns, with the prefix that marks the rows of the task."""

    prefix: str
    """Beginning of the text of each row."""


class OtherTask(RunTask):
    """An out-of-domain (OOD) evaluation set, which a run does not learn."""

    read_as: str
    """The learned task whose prefix, field names and answers the set uses."""


class RunMixture(Strict):
    """The tasks that a run learns at once, or the single task that it learns."""

    name: str
    """Name of the mixture, or of the single task."""
    tasks: list[LearnedTask]
    """Tasks that the model learns at once."""


class MultitaskSpec(RunSpec):
    """The settings that determine the numbers of a run on several tasks."""

    protocol: Literal["clean"]
    """The protocol ``clean``: rows that are not reported choose epoch and hyper-parameters."""
    task: RunMixture
    """Training tasks."""
    ood: list[OtherTask]
    """OOD evaluation sets."""
    training: MultitaskTraining
    """The training."""
