"""DomainBed's protocol: seeds, splits, hyper-parameters and selections.

Gulrajani and Lopez-Paz, ICLR 2021. The values are from github.com/facebookresearch/DomainBed at
b93c22a. The values of the registry ``emoe`` are from the EMoE authors' fork of DomainBed.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

HOLDOUT_FRACTION = 0.2  # share of an environment's images in its *out* split
BASELINE = "ERM"
SMALL_IMAGES = ("Debug28", "RotatedMNIST", "ColoredMNIST")
Registry = Literal["domainbed", "emoe"]

_DOMAINBED_DEFAULT_LR = 5e-5  # for images, except small ones


class _ForkDefaults(NamedTuple):
    """The default learning rate and weight decay of a data set in the EMoE authors' fork."""

    lr: float
    weight_decay: float


# the data sets for which the fork has its own defaults; it uses them for GMoE and EMoE
_FORK_DEFAULTS: Mapping[str, _ForkDefaults] = {
    "VLCS": _ForkDefaults(3e-5, 1e-6),
    "PACS": _ForkDefaults(3e-5, 1e-6),
    "OfficeHome": _ForkDefaults(1e-5, 1e-6),
    "TerraIncognita": _ForkDefaults(5e-5, 1e-4),
    "DomainNet": _ForkDefaults(5e-5, 0.0),
}
_FORK_DEFAULT_LR = 3e-5  # the fork's default for other data sets, except small images


def seed_hash(*parts: object) -> int:
    """Return DomainBed's seed for a tuple of values: the md5 of the tuple's text, modulo 2**31.

    >>> seed_hash(0, 3)
    1796103049
    """
    text = str(parts)
    digest = hashlib.md5(text.encode(), usedforsecurity=False)
    return int(digest.hexdigest(), 16) % 2**31


def sweep_seed(
    dataset: str, algorithm: str, test_envs: Sequence[int], hparams_seed: int, trial_seed: int
) -> int:
    """Return the ``seed`` that DomainBed's sweep passes to a run."""
    return seed_hash(dataset, algorithm, list(test_envs), hparams_seed, trial_seed)


class Split(NamedTuple):
    """The row numbers of one environment's two splits, in DomainBed's order."""

    within: list[int]
    """DomainBed's *in* split: 80 % of the rows. They train the model, or test it if the environment
    is held out.
    """
    out: list[int]
    """The other rows, for selections."""


def split_environment(rows: int, env: int, trial_seed: int, *, is_test: bool) -> Split:
    """Split the rows of an environment at random.

    Args:
        rows: The number of rows of the environment.
        env: The number of the environment.
        trial_seed: The seed of the trial.
        is_test: True for a held-out environment. Its *in* split is shuffled again, as in DomainBed.
    """
    seed = seed_hash(trial_seed, env)
    num_out = int(rows * HOLDOUT_FRACTION)
    shuffled = _shuffle(range(rows), seed)
    out = shuffled[:num_out]
    within = shuffled[num_out:]
    # DomainBed splits the rows of a held-out environment a second time, to set some aside for
    # domain adaptation. Here it sets none aside, but the second split still shuffles the rows.
    if is_test:
        within = _shuffle(within, seed)
    return Split(within, out)


def _shuffle(rows: Sequence[int], seed: int) -> list[int]:
    """Return a shuffled copy. NumPy's old generator gives DomainBed's order."""
    shuffled = list(rows)
    np.random.RandomState(seed).shuffle(shuffled)
    return shuffled


def held_out_combinations(count: int) -> Iterator[tuple[int, ...]]:
    """Yield every environment alone and every pair, in the order of DomainBed's sweep.

    Leave-one-domain-out selection needs the pairs.

    >>> list(held_out_combinations(3))
    [(0,), (0, 1), (0, 2), (1,), (1, 2), (2,)]
    """
    for first in range(count):
        yield (first,)
        for second in range(first + 1, count):
            yield (first, second)


@functools.cache  # runs that differ only in method or held-out environments have the same values
def hyper_parameters(
    registry: Registry, dataset: str, hparams_seed: int, trial_seed: int
) -> Mapping[str, Any]:
    """Return a run's hyper-parameters.

    Args:
        registry: The source of defaults and distributions: ``domainbed``, or ``emoe`` for the EMoE
            authors' fork, which uses them for GMoE and EMoE.
        dataset: DomainBed's name of the set.
        hparams_seed: 0 for the defaults, another number for random values.
        trial_seed: The seed of the trial. Random values differ between trials.

    Returns:
        The values of DomainBed's hyper-parameters, by name. The hyper-parameters of ResNets are
        included. The fork's older registry has no ``vit_dropout``.
    """
    definitions = _definitions(registry, dataset)
    if hparams_seed == 0:
        return {name: definition.default for name, definition in definitions.items()}
    seed = seed_hash(hparams_seed, trial_seed)
    values = {}
    for name, definition in definitions.items():
        # each hyper-parameter has its own generator, so its value does not depend on the others
        random = np.random.RandomState(seed_hash(seed, name))
        values[name] = definition.draw(random)
    return values


_Draw = Callable[[np.random.RandomState], Any]


class _HyperParameter(NamedTuple):
    """A hyper-parameter: its default value, and the function that draws a random value."""

    default: Any
    draw: _Draw


def _definitions(registry: Registry, dataset: str) -> dict[str, _HyperParameter]:
    """Return the definition of every hyper-parameter, by name.

    The ranges of the random values are those of DomainBed or of the EMoE authors' fork. In both,
    small images have their own ranges. The arguments are those of :func:`hyper_parameters`.
    """
    shared = {
        "data_augmentation": _fixed(True),
        "resnet18": _fixed(False),
        "resnet_dropout": _HyperParameter(0.0, _dropout),
        "class_balanced": _fixed(False),
        "nonlinear_classifier": _fixed(False),
    }
    # only DomainBed's registry has this one; the fork's registry is older
    vit_dropout = {}
    if registry == "domainbed":
        vit_dropout = {"vit_dropout": _HyperParameter(0.0, _dropout)}

    if dataset in SMALL_IMAGES:
        of_data_set = _small_image_definitions()
    elif registry == "domainbed":
        of_data_set = _image_definitions(dataset, _DOMAINBED_DEFAULT_LR)
    elif dataset in _FORK_DEFAULTS:
        of_data_set = _fork_definitions(dataset, _FORK_DEFAULTS[dataset])
    else:
        # the fork uses DomainBed's ranges for other data sets, with another default
        of_data_set = _image_definitions(dataset, _FORK_DEFAULT_LR)
    return {**shared, **vit_dropout, **of_data_set}


def _small_image_definitions() -> dict[str, _HyperParameter]:
    """Define what depends on the data set, for small images."""
    return {
        "lr": _HyperParameter(1e-3, _log10_uniform(-4.5, -2.5)),
        "weight_decay": _fixed(0.0),
        "batch_size": _HyperParameter(64, _log2_uniform(3, 9)),
    }


def _image_definitions(dataset: str, default_lr: float) -> dict[str, _HyperParameter]:
    """Define what depends on the data set, with DomainBed's ranges for large images."""
    return {
        "lr": _HyperParameter(default_lr, _log10_uniform(-5, -3.5)),
        "weight_decay": _HyperParameter(0.0, _log10_uniform(-6, -2)),
        "batch_size": _batch_size(dataset),
    }


def _fork_definitions(dataset: str, defaults: _ForkDefaults) -> dict[str, _HyperParameter]:
    """Define what depends on the data set, for a set with defaults in the authors' fork."""
    return {
        "lr": _HyperParameter(defaults.lr, _log10_uniform(-4.5, -2.5)),
        # the fork has a weight decay by default, but none among its random values
        "weight_decay": _HyperParameter(defaults.weight_decay, draw=lambda _: 0.0),
        "batch_size": _batch_size(dataset),
    }


def _batch_size(dataset: str) -> _HyperParameter:
    """Define the batch size for large images."""
    # the base-2 logarithm of the largest batch, which is smaller for DomainNet
    log2_largest = 5 if dataset == "DomainNet" else 5.5
    return _HyperParameter(32, _log2_uniform(3, log2_largest))


def _fixed(value: Any) -> _HyperParameter:
    """Define a hyper-parameter that always has the same value."""
    return _HyperParameter(value, lambda _: value)


def _dropout(random: np.random.RandomState) -> float:
    """Draw one of DomainBed's three dropout rates."""
    return float(random.choice([0.0, 0.1, 0.5]))


def _log10_uniform(low: float, high: float) -> _Draw:
    """Return a function that draws ``10 ** u`` with a uniform ``u``."""
    return lambda random: float(10 ** random.uniform(low, high))


def _log2_uniform(low: float, high: float) -> _Draw:
    """Return a function that draws ``2 ** u``, rounded down, with a uniform ``u``."""
    return lambda random: int(2 ** random.uniform(low, high))


# the accuracies at one step: ``step``, ``env<i>_in_acc`` and ``env<i>_out_acc``
Record = Mapping[str, Any]


@dataclass(frozen=True)
class RunRecords:
    """The accuracies of one run at all evaluated steps.

    Attributes:
        test_envs: The numbers of the held-out environments.
        settings_number: The number of the run's settings: their index in the list of all settings
            that a selection compares. Settings are hyper-parameters, and settings of the method
            that the grid varies. The list is sorted by ``hparams_seed``.
        records: One dictionary per evaluated step, with ``step``, ``env<i>_in_acc`` and
            ``env<i>_out_acc``.
    """

    test_envs: tuple[int, ...]
    settings_number: int
    records: Sequence[Record]


@dataclass(frozen=True)
class SelectedRecord:
    """The step and the run that a selection chose.

    Attributes:
        value: The accuracy that the selection maximises.
        record: The ``step`` and its accuracies, ``env<i>_in_acc`` and ``env<i>_out_acc``.
        settings_number: The number of the chosen run's settings, as in :class:`RunRecords`.
    """

    value: float
    record: Record
    settings_number: int

    def test_accuracy(self, env: int) -> float:
        """Return the accuracy on the *in* split of a held-out environment."""
        return float(self.record[f"env{env}_in_acc"])


def best_record(
    records: Sequence[Record], test_envs: Sequence[int], settings_number: int = 0
) -> SelectedRecord:
    """Choose the step of a run with the highest mean *out* accuracy of the training environments.

    The first step wins a tie.

    Args:
        records: The accuracies of the run at all evaluated steps.
        test_envs: The numbers of the held-out environments.
        settings_number: The number of the run's settings, copied to the result.
    """
    candidates = []
    for record in records:
        trained_envs = [env for env in _environments(record) if env not in test_envs]
        accuracies = [record[f"env{env}_out_acc"] for env in trained_envs]
        value = float(np.mean(accuracies))
        candidates.append(SelectedRecord(value, record, settings_number))
    return _first_best(candidates)


def training_domain_validation(runs: Sequence[RunRecords], env: int) -> SelectedRecord | None:
    """Choose the step and run with the highest mean *out* accuracy of the training environments.

    Args:
        runs: The runs of one set, method and trial, for all held-out environments.
        env: The number of the held-out environment.

    Returns:
        The chosen step and run; None if no run holds out ``env`` alone.
    """
    candidates = []
    for run in _runs_holding_out(runs, env):
        candidates.append(best_record(run.records, run.test_envs, run.settings_number))
    return _best(candidates)


def leave_one_domain_out(runs: Sequence[RunRecords], env: int) -> SelectedRecord | None:
    """Choose the step and run with the highest cross-validated accuracy.

    The cross-validated accuracy is a mean over the environments other than ``env``. The accuracy on
    another environment is from the run that holds out both this environment and ``env``. The
    arguments are those of :func:`training_domain_validation`.

    Returns:
        The chosen step and run; None if the needed runs are missing.
    """
    candidates = []
    for run in _runs_holding_out(runs, env):
        chosen = _cross_validate(run, runs, env)
        if chosen is not None:
            candidates.append(chosen)
    return _best(candidates)


def _cross_validate(run: RunRecords, runs: Sequence[RunRecords], env: int) -> SelectedRecord | None:
    """Choose the step of ``run`` with the highest cross-validated accuracy.

    ``run`` holds out ``env`` alone. Its accuracy on another environment comes from the run with the
    same settings that holds out both ``env`` and that environment. The result is None if no step
    has an accuracy for every other environment.
    """
    number = run.settings_number
    same_settings = [other_run for other_run in runs if other_run.settings_number == number]
    # by the other environment and the step
    accuracy_on = _accuracies_of_pairs(same_settings, env)
    candidates = []
    for record in run.records:
        step = record["step"]
        others = [other for other in _environments(record) if other != env]
        # a step counts only if all other environments have an accuracy
        if all((other, step) in accuracy_on for other in others):
            accuracies = [accuracy_on[other, step] for other in others]
            value = float(np.sum(accuracies) / len(others))
            candidates.append(SelectedRecord(value, record, run.settings_number))
    if not candidates:
        return None
    return _first_best(candidates)


def _accuracies_of_pairs(runs: Sequence[RunRecords], env: int) -> dict[tuple[int, int], float]:
    """Collect the accuracies of the runs that hold out ``env`` and one other environment.

    Returns the accuracy on the *in* split of the other environment, by its number and the step.
    """
    accuracies = {}
    for run in runs:
        if len(run.test_envs) == 2 and env in run.test_envs:
            (other,) = [number for number in run.test_envs if number != env]
            for record in run.records:
                accuracies[other, record["step"]] = record[f"env{other}_in_acc"]
    return accuracies


def oracle_validation(runs: Sequence[RunRecords], env: int) -> SelectedRecord | None:
    """Choose the run with the highest *out* accuracy of the held-out environment at its last step.

    This is an oracle, because it uses images of the held-out environment. The arguments are those
    of :func:`training_domain_validation`.

    Returns:
        The chosen run and its last step; None if no run holds out ``env`` alone.
    """
    candidates = []
    for run in _runs_holding_out(runs, env):
        last = max(run.records, key=lambda record: record["step"])
        accuracy = float(last[f"env{env}_out_acc"])
        candidates.append(SelectedRecord(accuracy, last, run.settings_number))
    return _best(candidates)


Selection = Callable[[Sequence[RunRecords], int], SelectedRecord | None]


class NamedSelection(NamedTuple):
    """A selection: its title in tables, and the function that chooses a step and a run."""

    title: str
    choose: Selection


SELECTIONS = {
    "training": NamedSelection("training-domain validation", training_domain_validation),
    "leave_one_out": NamedSelection("leave-one-domain-out", leave_one_domain_out),
    "oracle": NamedSelection("test-domain validation (oracle)", oracle_validation),
}


def _runs_holding_out(runs: Sequence[RunRecords], env: int) -> list[RunRecords]:
    """Return the runs that hold out this environment alone."""
    return [run for run in runs if tuple(run.test_envs) == (env,)]


def _best(candidates: Sequence[SelectedRecord]) -> SelectedRecord | None:
    """Return the candidate with the highest value; None without candidates.

    As in DomainBed, the highest ``settings_number`` wins a tie.
    """
    if not candidates:
        return None
    return max(candidates, key=lambda chosen: (chosen.value, chosen.settings_number))


def _first_best(candidates: Sequence[SelectedRecord]) -> SelectedRecord:
    """Return the candidate with the highest value. The first one wins a tie."""
    return max(candidates, key=lambda chosen: chosen.value)


def _environments(record: Record) -> list[int]:
    """Return the sorted numbers of the environments with an *out* accuracy in a record."""
    numbers = []
    for name in record:
        match = re.fullmatch(r"env(\d+)_out_acc", name)
        if match:
            numbers.append(int(match[1]))
    return sorted(numbers)
