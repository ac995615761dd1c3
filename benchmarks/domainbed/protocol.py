"""DomainBed's protocol (Gulrajani and Lopez-Paz, ICLR 2021): seeds, splits, hyper-parameters, selections.

Facts from github.com/facebookresearch/DomainBed at b93c22a, and for the registry ``emoe`` from the authors' fork.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

HOLDOUT_FRACTION = 0.2
BASELINE = "ERM"
SMALL_IMAGES = ("Debug28", "RotatedMNIST", "ColoredMNIST")
Registry = Literal["domainbed", "emoe"]

# lr and weight decay by data set in the authors' fork, for GMoE and EMoE; other sets use defaults
_FORK: Mapping[str, tuple[float, float]] = {
    "VLCS": (3e-5, 1e-6),
    "PACS": (3e-5, 1e-6),
    "OfficeHome": (1e-5, 1e-6),
    "TerraIncognita": (5e-5, 1e-4),
    "DomainNet": (5e-5, 0.0),
}
_FORK_LR = 3e-5


def seed_hash(*parts: object) -> int:
    """Return DomainBed's seed for a tuple of values: the md5 of its text, modulo 2**31.

    >>> seed_hash(0, 3)
    1796103049
    """
    text = str(parts)
    return int(hashlib.md5(text.encode(), usedforsecurity=False).hexdigest(), 16) % 2**31


def sweep_seed(
    dataset: str, algorithm: str, test_envs: Sequence[int], hparams_seed: int, trial_seed: int
) -> int:
    """Return the general seed that DomainBed's sweep passes to a run."""
    return seed_hash(dataset, algorithm, list(test_envs), hparams_seed, trial_seed)


class Split(NamedTuple):
    """Hold the indices of one environment: ``within`` (DomainBed's *in*) and ``out``, in DomainBed's order."""

    within: list[int]
    out: list[int]


def split_environment(rows: int, env: int, trial_seed: int, *, is_test: bool) -> Split:
    """Split an environment's rows.

    Args:
        rows: The number of rows of the environment.
        env: The number of the environment.
        trial_seed: The seed of the trial.
        is_test: True for a held-out environment. Its *in* split is shuffled again, as in DomainBed.
    """
    seed, count = seed_hash(trial_seed, env), int(rows * HOLDOUT_FRACTION)
    keys = _shuffle(range(rows), seed)
    within = keys[count:]
    return Split(_shuffle(within, seed) if is_test else within, keys[:count])


def _shuffle(rows: Sequence[int], seed: int) -> list[int]:
    shuffled = list(rows)
    np.random.RandomState(seed).shuffle(shuffled)
    return shuffled


def held_out_combinations(count: int) -> Iterator[tuple[int, ...]]:
    """Yield every single environment and every pair (for leave-one-domain-out selection), in a sweep's order."""
    for first in range(count):
        yield (first,)
        yield from ((first, second) for second in range(first + 1, count))


@functools.cache  # a sweep's methods and held-out environments share their draws
def hyper_parameters(
    registry: Registry, dataset: str, hparams_seed: int, trial_seed: int
) -> Mapping[str, Any]:
    """Return a run's hyper-parameters.

    Args:
        registry: The source of defaults and distributions: DomainBed, or the EMoE authors' fork for GMoE and EMoE.
        dataset: DomainBed's name of the set.
        hparams_seed: The seed of the draw: 0 for the defaults, others for a random draw.
        trial_seed: The seed of the trial; random draws differ between trials.

    Returns:
        DomainBed's hyper-parameters by name. Those of a ResNet have no effect; they make draws comparable with
        DomainBed's. The fork's older registry has no ``vit_dropout``.
    """
    definitions = _definitions(registry, dataset)
    if hparams_seed == 0:
        return {name: default for name, (default, _) in definitions.items()}
    seed = seed_hash(hparams_seed, trial_seed)
    return {
        name: draw(np.random.RandomState(seed_hash(seed, name)))
        for name, (_, draw) in definitions.items()
    }


_Draw = Callable[[np.random.RandomState], Any]


def _definitions(registry: Registry, dataset: str) -> dict[str, tuple[Any, _Draw]]:
    """Return the default value and the random distribution of every hyper-parameter."""
    definitions: dict[str, tuple[Any, _Draw]] = {
        "data_augmentation": (True, lambda _: True),
        "resnet18": (False, lambda _: False),
        "resnet_dropout": (0.0, _dropout),
        "class_balanced": (False, lambda _: False),
        "nonlinear_classifier": (False, lambda _: False),
    }
    if registry == "domainbed":
        definitions["vit_dropout"] = (0.0, _dropout)
    if dataset in SMALL_IMAGES:
        definitions["lr"] = (1e-3, _log10_uniform(-4.5, -2.5))
        definitions["weight_decay"] = (0.0, lambda _: 0.0)
        definitions["batch_size"] = (64, _log2_uniform(3, 9))
        return definitions
    definitions["batch_size"] = (32, _log2_uniform(3, 5 if dataset == "DomainNet" else 5.5))
    if registry == "emoe" and dataset in _FORK:
        lr, weight_decay = _FORK[dataset]
        definitions["lr"] = (lr, _log10_uniform(-4.5, -2.5))
        definitions["weight_decay"] = (weight_decay, lambda _: 0.0)
    else:
        definitions["lr"] = (_FORK_LR if registry == "emoe" else 5e-5, _log10_uniform(-5, -3.5))
        definitions["weight_decay"] = (0.0, _log10_uniform(-6, -2))
    return definitions


def _dropout(random: np.random.RandomState) -> float:
    return float(random.choice([0.0, 0.1, 0.5]))


def _log10_uniform(low: float, high: float) -> _Draw:
    return lambda random: float(10 ** random.uniform(low, high))


def _log2_uniform(low: float, high: float) -> _Draw:
    """Draw ``2 ** u`` with ``u`` uniform between the bounds, rounded down."""
    return lambda random: int(2 ** random.uniform(low, high))


Record = Mapping[str, Any]


@dataclass(frozen=True)
class RunRecords:
    """Hold the records of one run, in the order of its steps.

    Attributes:
        test_envs: The numbers of the held-out environments.
        choice: The number of the draw, in DomainBed's order (``hparams_seed``).
        records: Dictionaries with ``step``, ``env<i>_in_acc`` and ``env<i>_out_acc``.
    """

    test_envs: tuple[int, ...]
    choice: int
    records: Sequence[Record]


@dataclass(frozen=True)
class SelectedRecord:
    """Hold the record that a selection chose, its selection value, and the number of its run's draw."""

    value: float
    record: Record
    choice: int

    def test_accuracy(self, env: int) -> float:
        """Return the accuracy on the *in* split of a held-out environment."""
        return float(self.record[f"env{env}_in_acc"])


def best_record(
    records: Sequence[Record], test_envs: Sequence[int], choice: int = 0
) -> SelectedRecord:
    """Choose the first of a run's records with the highest mean *out* accuracy of the training environments."""

    def value(record: Record) -> float:
        return float(
            np.mean(
                [
                    record[f"env{env}_out_acc"]
                    for env in _environments(record)
                    if env not in test_envs
                ]
            )
        )

    return _first_best([SelectedRecord(value(record), record, choice) for record in records])


def training_domain_validation(runs: Sequence[RunRecords], env: int) -> SelectedRecord | None:
    """Choose the step and run with the highest mean *out* accuracy of the training environments.

    Args:
        runs: The runs of one set, method and trial, for all held-out environments.
        env: The number of the held-out environment.
    """
    return _best(
        [
            best_record(run.records, run.test_envs, run.choice)
            for run in _runs_holding_out(runs, env)
        ]
    )


def leave_one_domain_out(runs: Sequence[RunRecords], env: int) -> SelectedRecord | None:
    """Choose the step and run with the highest cross-validated accuracy over the other environments.

    Each other environment is evaluated by the run that holds out both; None if such a run is missing.
    """
    return _best(
        [
            chosen
            for run in _runs_holding_out(runs, env)
            if (chosen := _cross_validate(run, runs, env)) is not None
        ]
    )


def _cross_validate(run: RunRecords, runs: Sequence[RunRecords], env: int) -> SelectedRecord | None:
    pairs = {
        next(other for other in pair.test_envs if other != env): {
            record["step"]: record for record in pair.records
        }
        for pair in runs
        if len(pair.test_envs) == 2 and env in pair.test_envs and pair.choice == run.choice
    }
    candidates = []
    for record in run.records:
        step, others = record["step"], [other for other in _environments(record) if other != env]
        if all(step in pairs.get(other, {}) for other in others):
            value = float(
                np.sum([pairs[other][step][f"env{other}_in_acc"] for other in others]) / len(others)
            )
            candidates.append(SelectedRecord(value, record, run.choice))
    return _first_best(candidates) if candidates else None


def oracle_validation(runs: Sequence[RunRecords], env: int) -> SelectedRecord | None:
    """Choose the run whose *last* record is the best on the held-out environment's *out* split (an oracle)."""
    candidates = []
    for run in _runs_holding_out(runs, env):
        last = max(run.records, key=lambda record: record["step"])
        candidates.append(SelectedRecord(float(last[f"env{env}_out_acc"]), last, run.choice))
    return _best(candidates)


Selection = Callable[[Sequence[RunRecords], int], SelectedRecord | None]
SELECTIONS: dict[str, tuple[str, Selection]] = {
    "training": ("training-domain validation", training_domain_validation),
    "leave_one_out": ("leave-one-domain-out", leave_one_domain_out),
    "oracle": ("test-domain validation (oracle)", oracle_validation),
}


def _runs_holding_out(runs: Sequence[RunRecords], env: int) -> list[RunRecords]:
    return [run for run in runs if tuple(run.test_envs) == (env,)]


def _best(candidates: Sequence[SelectedRecord]) -> SelectedRecord | None:
    """Return the candidate with the highest value; the last choice wins a tie, as in DomainBed."""
    return max(candidates, key=lambda chosen: (chosen.value, chosen.choice)) if candidates else None


def _first_best(candidates: Sequence[SelectedRecord]) -> SelectedRecord:
    return max(candidates, key=lambda chosen: chosen.value)


def _environments(record: Record) -> list[int]:
    """Return the numbers of the environments of a record."""
    return sorted(
        int(name[3:-8]) for name in record if name.startswith("env") and name.endswith("_out_acc")
    )
