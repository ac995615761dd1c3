"""What the file of the benchmark says whose models learn several tasks at once: which tasks, how they are mixed, what its suites run."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from benchmarks.harness.config.benchmark import TrainingDefinition, TrainingSettings, TrainingSuite
from benchmarks.harness.config.methods import VariantAxes
from benchmarks.harness.config.runs import RunSpec
from benchmarks.harness.config.yaml import (
    AS_GIVEN,
    UNIQUE,
    Count,
    Key,
    Names,
    NotNegative,
    PartOf,
    Positive,
    Positives,
    Rate,
    Strict,
    Wholes,
)
from benchmarks.text.definition import RunTask


class Mixture(Strict):
    """Tasks that one model learns at once."""

    title: str
    """Label in tables."""
    tasks: Annotated[Names, UNIQUE]
    """Names in the task file, two at least."""


class MultitaskTraining(Strict):
    """How a run is trained."""

    epochs: Positive
    """Passes; of each the rows are those that `rows_per_epoch` leaves."""
    rows_per_epoch: Count | None
    """Rows of a task in an epoch, at most: a task with more takes its next ones in each epoch. Batches mix the tasks in proportion to what is left. Null: all rows."""
    batch_size: Count
    """Rows per step, of all tasks."""
    eval_batch_size: Count
    """Rows per evaluation batch."""
    max_length: Annotated[int, Field(ge=4)]
    """Tokens kept of a row, its task's name included."""
    sampling: Literal["random", "group_by_length"]
    """Order of an epoch's rows: shuffled, or shuffled in groups of like length (less padding)."""
    eval_rows: Count | None
    """Rows of every split that is reported; null for all."""
    dev_rows: Count | None
    """Rows of every split that chooses; null for all."""
    weight_decay: NotNegative
    """AdamW's weight decay."""
    warmup: Rate
    """Share of the steps with a rising rate."""
    checkpoint_selection: Literal["last", "best"]
    """Which epoch's weights are evaluated: the last, or that with the best mean dev score over the tasks."""
    gradient_accumulation_steps: Count
    """Batches whose gradients one step adds up."""
    precision: Literal["fp32", "bf16"]
    """Arithmetic on accelerators: float32 or mixed. A CPU always computes in float32, and the record says so."""
    validation_fraction: Annotated[float, Field(gt=0, lt=1), AS_GIVEN]
    """Share of the training rows that is held out to choose by, of tasks without a split for that."""


class MultitaskTrainingSettings(MultitaskTraining, TrainingSettings):
    """How every run is trained; a suite may set its own."""

    by_model: dict[str, Annotated[Strict, PartOf(MultitaskTraining)]] = Field({})
    """Settings of single models."""


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


class MultitaskSuite(TrainingSuite):
    """One suite's part of the benchmark."""

    training: Annotated[Strict, PartOf(MultitaskTrainingSettings)] = Strict()
    """Settings that differ in this suite."""
    grid: Annotated[list[MultitaskBlock], Field(min_length=1)]
    """Blocks of runs; each is the product of its lists."""


class MultitaskDefinition(TrainingDefinition):
    """A benchmark whose encoder-decoder models learn several tasks at once, as text from text."""

    figures: dict[str, str]
    """The figures that it draws, each with its caption."""
    tasks: str
    """File with the task definitions, in the benchmark's folder."""
    mixtures: Annotated[dict[Key, Mixture], Field(min_length=1)]
    """Which tasks are learned at once, by name."""
    prefixes: dict[str, str] = Field({})
    """What stands in front of a task's rows, where that is not its name: tasks with the same one are told apart by their rows alone."""
    training: MultitaskTrainingSettings
    """How every run is trained; a suite may set its own."""
    suites: dict[Key, MultitaskSuite]
    """What to run, by suite."""


class WrittenTask(RunTask):
    """A task that is learned, as text from text."""

    prefix: str
    """What stands in front of its rows."""


class OtherTask(RunTask):
    """A set that is only evaluated on."""

    read_as: str
    """The task that is learned whose prefix, names of fields and answers it takes."""


class RunMixture(Strict):
    """What a run is trained on."""

    name: str
    """Of the mixture, or of the single task."""
    tasks: list[WrittenTask]
    """What it learns at once."""


class MultitaskSpec(RunSpec):
    """What shapes the numbers of a run."""

    protocol: Literal["clean"]
    """What chooses epoch and hyper-parameters: rows that are not reported."""
    task: RunMixture
    """What it is trained on."""
    ood: list[OtherTask]
    """What it is evaluated on beside."""
    training: MultitaskTraining
    """How it is trained."""
