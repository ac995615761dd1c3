"""Define the file of a benchmark that evaluates the chosen runs of another."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from benchmarks.harness.config.benchmark import Definition, MethodsDefinition, SuitePart
from benchmarks.harness.config.overlay import Changes
from benchmarks.harness.config.runs import RunSpec
from benchmarks.harness.config.yaml import UNIQUE, Count, Strict, optional
from benchmarks.text.definition import Ablated, Protocol, RunTask


class Evaluation(Strict):
    """The evaluation of every set; a suite may change it."""

    batch_size: Count
    """Rows of a batch."""
    max_length: Annotated[int, Field(ge=4)]
    """Tokens kept of a sentence or pair."""
    rows: Count | None
    """Rows of every set, drawn once and for all; null for all."""


class EvaluationPart(SuitePart):
    """The benchmark's part of a suite."""

    evaluation: Annotated[dict[str, Any], Changes(Evaluation)] = Field({})
    """Settings that differ in this suite."""


class EvaluationFile(Definition, Ablated):
    """A benchmark that trains nothing. It evaluates the chosen runs of another on their task and on the OOD sets of
    it."""

    evaluates: str
    """The benchmark whose runs are evaluated; it keeps their weights. Methods, baseline and tasks are its."""
    ranked: Annotated[list[str], Field(min_length=2), UNIQUE]
    """Methods that are ranked together; a rank means something among them only."""
    evaluation: Evaluation
    """The evaluation of every set; a suite may change it."""


class EvaluationDefinition(EvaluationFile, MethodsDefinition):
    """The same, with methods and baseline of the benchmark that it evaluates."""


class EvaluationSpec(RunSpec):
    """The settings that shape the numbers of a run that evaluates a run of another benchmark."""

    protocol: Protocol
    """The protocol that chose among the candidates."""
    task: RunTask
    """The task that they were trained on."""
    ood: list[RunTask]
    """The other sets that the chosen run is evaluated on."""
    transform: Literal["dense", "emoe"] | None = optional()
    """The model that it is turned into first, by ``method.config``; left out: the model as it was trained."""
    evaluation: Evaluation
    """The evaluation."""
    candidates: list[str]
    """Folders of the runs among which one is chosen."""
