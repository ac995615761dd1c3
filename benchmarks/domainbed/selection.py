"""DomainBed's three ways to choose a step and hyper-parameters, over records; training knows nothing of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Record = Mapping[str, Any]


@dataclass(frozen=True)
class RunRecords:
    """The records of one run, in the order of its steps.

    Attributes:
        test_envs: numbers of the environments that it held out.
        choice: what was varied, in the order in which it was tried (DomainBed's ``hparams_seed``).
        records: with ``step``, ``env<i>_in_acc`` and ``env<i>_out_acc``.
    """

    test_envs: tuple[int, ...]
    choice: int
    records: Sequence[Record]


@dataclass(frozen=True)
class Chosen:
    """What a selection chose.

    Attributes:
        value: by which it was chosen.
        record: the record.
        choice: of the run that it is from.
    """

    value: float
    record: Record
    choice: int

    def test_accuracy(self, env: int) -> float:
        """Accuracy on the *in* split of a held-out environment."""
        return float(self.record[f"env{env}_in_acc"])


def best_record(records: Sequence[Record], test_envs: Sequence[int], choice: int = 0) -> Chosen:
    """Training-domain validation within one run: the first of the records with the highest mean *out* accuracy of the training environments."""
    best: Chosen | None = None
    for record in records:
        value = float(np.mean([record[f"env{env}_out_acc"] for env in _environments(record) if env not in test_envs]))
        if best is None or value > best.value:
            best = Chosen(value, record, choice)
    if best is None:
        raise ValueError("a run without records")
    return best


def training_domain_validation(runs: Sequence[RunRecords], env: int) -> Chosen | None:
    """The step and run with the highest mean *out* accuracy of the training environments.

    Args:
        runs: of one set, method and trial, for all held-out environments.
        env: the held-out environment that is judged.
    """
    return _best([best_record(run.records, run.test_envs, run.choice) for run in _single(runs, env)])


def leave_one_domain_out(runs: Sequence[RunRecords], env: int) -> Chosen | None:
    """The step and run with the highest mean accuracy on each other environment, when that is held out too.

    Needs the runs that hold out ``env`` and one more, for every other environment; None without them.
    """
    return _best([found for run in _single(runs, env) if (found := _left_out(run, runs, env)) is not None])


def _left_out(run: RunRecords, runs: Sequence[RunRecords], env: int) -> Chosen | None:
    pairs = {
        next(other for other in pair.test_envs if other != env): {record["step"]: record for record in pair.records}
        for pair in runs
        if len(pair.test_envs) == 2 and env in pair.test_envs and pair.choice == run.choice
    }
    best: Chosen | None = None
    for record in run.records:
        others = [other for other in _environments(record) if other != env]
        if not all(other in pairs and record["step"] in pairs[other] for other in others):
            continue
        value = float(np.sum([pairs[other][record["step"]][f"env{other}_in_acc"] for other in others]) / len(others))
        if best is None or value > best.value:
            best = Chosen(value, record, run.choice)
    return best


def oracle_validation(runs: Sequence[RunRecords], env: int) -> Chosen | None:
    """The run whose *last* record has the highest accuracy on the held-out environment's *out* split (an oracle)."""
    return _best(
        [
            Chosen(float(record[f"env{env}_out_acc"]), record, run.choice)
            for run in _single(runs, env)
            for record in (max(run.records, key=lambda record: record["step"]),)
        ]
    )


Selection = Callable[[Sequence[RunRecords], int], Chosen | None]
SELECTIONS: dict[str, tuple[str, Selection]] = {
    "training": ("training-domain validation", training_domain_validation),
    "leave_one_out": ("leave-one-domain-out", leave_one_domain_out),
    "oracle": ("test-domain validation (oracle)", oracle_validation),
}


def standard_error(values: Sequence[float]) -> float:
    """DomainBed's ±: the population's standard deviation over the root of the number of trials."""
    return float(np.std(values) / math.sqrt(len(values)))


def _single(runs: Sequence[RunRecords], env: int) -> list[RunRecords]:
    return [run for run in runs if tuple(run.test_envs) == (env,)]


def _best(found: Sequence[Chosen]) -> Chosen | None:
    """The highest value; of equal ones the last choice, as DomainBed's reversed stable sort has it."""
    return max(found, key=lambda chosen: (chosen.value, chosen.choice)) if found else None


def _environments(record: Record) -> list[int]:
    """Numbers of the environments of a record."""
    return sorted(int(name[3:-8]) for name in record if name.startswith("env") and name.endswith("_out_acc"))
