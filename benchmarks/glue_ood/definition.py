"""The files of a benchmark that evaluates the chosen runs of another."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from benchmarks.harness.config.benchmark import Definition, MethodsDefinition, SuitePart
from benchmarks.harness.config.overlay import Changes
from benchmarks.harness.config.runs import RunSpec
from benchmarks.harness.config.yaml import UNIQUE, Count, Strict, optional
from benchmarks.text.definition import Ablated, Protocol, RunTask

# the name of a domain and of its only metric, the mean rank of a method over the OOD sets
OOD_RANK = "ood_rank"


class Evaluation(Strict):
    """Evaluation settings; a suite may override them."""

    batch_size: Count
    """Rows per batch."""
    max_length: Annotated[int, Field(ge=4)]
    """Maximum tokens of a sentence or pair; longer rows are cut."""
    rows: Count | None
    """Number of sampled rows per set, the same rows for all runs; null for all rows."""


class EvaluationPart(SuitePart):
    """The benchmark's part of a suite."""

    evaluation: Annotated[dict[str, Any], Changes(Evaluation)] = Field({})
    """Settings that differ in this suite."""


class EvaluationFile(Definition, Ablated):
    """The ``benchmark.yaml`` of a benchmark that evaluates the chosen runs of another benchmark.

    The chosen runs are evaluated on their training task, and on the out-of-distribution (OOD) sets
    of this task. Nothing is trained.
    """

    evaluates: str
    """The benchmark whose runs are evaluated, with its methods, baseline and tasks. It must keep
    its runs' weights."""
    ranked: Annotated[list[str], Field(min_length=2), UNIQUE]
    """Methods that are ranked against each other."""
    evaluation: Evaluation
    """The evaluation of every set; a suite may change it."""


class EvaluationDefinition(EvaluationFile, MethodsDefinition):
    """The content of ``benchmark.yaml``, with methods and baseline of the evaluated benchmark."""


class EvaluationSpec(RunSpec):
    """The spec of a run that evaluates a run of another benchmark.

    A spec has all settings that determine the numbers of a run. The evaluated run is chosen among
    candidates: runs of the other benchmark that differ in learning rate, variant and seed.
    """

    protocol: Protocol
    """The protocol that chooses among the candidates."""
    task: RunTask
    """The task that the candidates were trained on."""
    ood: list[RunTask]
    """The other sets that the chosen run is evaluated on."""
    trained: str
    """The method of the evaluated runs."""
    used_as: str | None = optional()
    """The method that the chosen model is converted to before its evaluation. The configuration is
    that of this method's own chosen run with the same seed. By default it is not converted."""
    evaluation: Evaluation
    """The evaluation."""
    candidates: list[str]
    """Folders of the candidate runs: those of `trained` and, if it is set, of `used_as`. One run of
    each method is chosen."""
