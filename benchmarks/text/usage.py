"""Measure which experts the rows of each task use: mutual information, and experts above chance.

In all functions, ``loads`` are ``[rows, N]``: how many tokens of a row chose each of N experts.
``tasks`` are the task numbers of the rows, from 0. ``classes`` are the class numbers of the rows,
negative if a task has no classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

import emoe
from benchmarks.harness.base import derive_seed
from benchmarks.harness.results.statistics import (
    CONFIDENCE,
    PERMUTATIONS,
    MutualInformation,
    shuffled_information,
)
from benchmarks.harness.training.routing import label_rows, loads_by_row, routing_summary

Integers = NDArray[np.int64]  # loads, marks, or the task and class numbers of rows


def task_information(loads: Integers, tasks: Integers, seed: int) -> MutualInformation:
    """Measure the mutual information of expert and task.

    For chance, rows are shuffled over all tasks.

    Args:
        loads: The choices of experts, ``[rows, N]``.
        tasks: The task numbers of the rows.
        seed: The seed of the shuffles.
    """
    strata = np.zeros_like(tasks)  # one stratum: rows are shuffled over all tasks
    one_layer = loads[:, None]  # [rows, 1, N]
    bits = shuffled_information(one_layer, tasks, strata, seed)
    return MutualInformation.averaged(bits)


def class_information(
    loads: Integers, tasks: Integers, classes: Integers, seed: int
) -> MutualInformation | None:
    """Measure the mutual information of expert and class within each task.

    For chance, rows are shuffled within each task.

    Args:
        loads: The choices of experts, ``[rows, N]``.
        tasks: The task numbers of the rows.
        classes: The class numbers of the rows, negative without classes.
        seed: The seed of the shuffles.

    Returns:
        The mean over the tasks with several classes; None if there is no such task.
    """
    bits = []  # for each task [1 + PERMUTATIONS, 1]: the measured bits, then those of the shuffles
    for task in np.unique(tasks):
        is_of_task = (tasks == task) & (classes >= 0)
        labels = classes[is_of_task]
        if len(np.unique(labels)) < 2:
            continue
        strata = np.zeros_like(labels)  # one stratum: all these rows are of one task
        one_layer = loads[is_of_task][:, None]  # [rows of the task, 1, N]
        bits.append(shuffled_information(one_layer, labels, strata, seed))
    if not bits:
        return None
    return MutualInformation.averaged(np.concatenate(bits, axis=1))


def mark_experts(loads: Integers, tasks: Integers, seed: int) -> Integers:
    """Mark the experts that a task uses more or less than by chance.

    Chance is estimated by shuffling rows over the tasks. Each shuffle has a largest absolute
    z-score, over all tasks and experts. An expert is marked if its absolute z-score exceeds the
    largest ones of 95 % of the shuffles. So if tasks do not differ, only about one in twenty
    results has any mark.

    Args:
        loads: The choices of experts, ``[rows, N]``.
        tasks: The task numbers of the rows.
        seed: The seed of the shuffles.

    Returns:
        The marks ``[tasks, N]``: 1 for more than by chance, -1 for less, else 0.
    """
    random = np.random.default_rng(seed)
    shares = shares_by_group(loads, tasks)  # [tasks, N]
    shares_by_chance = []
    for _ in range(PERMUTATIONS):
        shuffled_tasks = random.permutation(tasks)
        shares_by_chance.append(shares_by_group(loads, shuffled_tasks))
    shuffled = np.stack(shares_by_chance)  # [PERMUTATIONS, tasks, N]
    mean = shuffled.mean(0)
    deviation = shuffled.std(0)

    def z_scores(uses: NDArray[np.float64]) -> NDArray[np.float64]:
        # 0 where all shuffles are equal, instead of a division by 0
        return np.divide(uses - mean, deviation, out=np.zeros_like(uses), where=deviation > 0)

    # one limit for the whole matrix corrects for its many entries
    largest = np.abs(z_scores(shuffled)).max((1, 2))  # [PERMUTATIONS]
    limit = np.quantile(largest, CONFIDENCE)
    scores = z_scores(shares)
    is_marked = np.abs(scores) > limit
    marks = np.sign(scores) * is_marked
    return marks.astype(np.int64)


def shares_by_group(loads: Integers, groups: Integers) -> NDArray[np.float64]:
    """Return the share of each expert in the choices of each group, ``[groups, N]``.

    ``groups`` are the group numbers of the rows, from 0.
    """
    _, experts = loads.shape
    num_groups = int(groups.max()) + 1
    counts = np.zeros((num_groups, experts), dtype=np.int64)
    # add the loads of each row to its group; counts[groups] += loads would add only one row of each
    np.add.at(counts, groups, loads)
    totals = np.maximum(counts.sum(1, keepdims=True), 1)  # no division by 0
    return counts / totals


def shared_and_specialised(
    shares: NDArray[np.float64], marks: Integers
) -> tuple[Integers, Integers]:
    """Return the indices of the shared experts, and of the specialised experts.

    A shared expert gets more than 1/N of the choices of every task, and has no mark. A specialised
    expert has a positive mark in some task.

    Args:
        shares: The shares of the experts, ``[tasks, N]``.
        marks: The marks of the experts from :func:`mark_experts`, ``[tasks, N]``.
    """
    _, experts = shares.shape
    is_popular = (shares > 1 / experts).all(0)
    has_no_mark = (marks == 0).all(0)
    shared = np.flatnonzero(is_popular & has_no_mark)
    specialised = np.flatnonzero((marks > 0).any(0))
    return shared, specialised


@dataclass(frozen=True)
class SetLoads:
    """The expert choices and the classes of the rows of one data set."""

    loads: Integers  # [rows, N]: how many tokens of a row chose each expert
    classes: Integers  # [rows]: class numbers; -1 for a regression


def describe_usage(sets: Mapping[str, SetLoads]) -> tuple[dict[str, float], dict[str, Any]]:
    """Measure how data sets and their classes use experts. Needs at least two data sets.

    Returns:
        The mutual information by metric name, and the section ``usage`` of ``metrics.json``. This
        section has the keys:

        - ``tasks``: for each data set, the ``shares`` of the experts, their ``marks`` from
          :func:`mark_experts`, and in ``classes`` their shares within each class
        - ``shared``: the indices of the experts without a mark that get more than 1/N of the
          choices of every set
        - ``specialised``: the indices of the experts that some set uses more than by chance
    """
    # join the rows of all sets; `tasks` has the number of the set of each row
    loads = np.concatenate([set_loads.loads for set_loads in sets.values()])  # [rows, N]
    classes = np.concatenate([set_loads.classes for set_loads in sets.values()])  # [rows]
    row_counts = [len(set_loads.loads) for set_loads in sets.values()]
    tasks = np.repeat(np.arange(len(sets)), row_counts)  # [rows]
    seed = derive_seed("shuffles")

    information = task_information(loads, tasks, seed).numbers("task")
    of_classes = class_information(loads, tasks, classes, seed)
    if of_classes is not None:
        information.update(of_classes.numbers("class"))

    marks = mark_experts(loads, tasks, seed)  # [sets, N]
    shares = shares_by_group(loads, tasks)  # [sets, N]
    shared, specialised = shared_and_specialised(shares, marks)
    by_set = {}
    # `number` is the number of the set in `tasks`, and so its row in `shares` and `marks`
    for number, (name, set_loads) in enumerate(sets.items()):
        by_set[name] = {
            "shares": shares[number].tolist(),
            "marks": marks[number].tolist(),
            "classes": _shares_by_class(set_loads),
        }
    usage = {"tasks": by_set, "shared": shared.tolist(), "specialised": specialised.tolist()}
    return information, usage


def _shares_by_class(set_loads: SetLoads) -> dict[str, list[float]]:
    """Return the shares of experts for each class that has rows; empty for a regression."""
    classes = set_loads.classes
    # rows of a regression have the class -1
    if (classes < 0).any():
        return {}
    shares = shares_by_group(set_loads.loads, classes)  # [classes, N]
    return {str(label): shares[label].tolist() for label in np.unique(classes)}


_SAMPLED_ROWS = 200  # of each set


def _routing_labels(num_rows: int, sampled: NDArray[np.int64]) -> torch.Tensor:
    """Return the label of each row, under which a routing record counts its choices of experts.

    The label of a sampled row is its index among the sampled rows. Other rows have the label -1,
    and their choices are not counted.
    """
    labels = torch.full((num_rows,), -1)
    labels[torch.from_numpy(sampled)] = torch.arange(len(sampled))
    return labels


class SetRouting(NamedTuple):
    """What ``metrics.json`` has on the routing of evaluated data sets.

    Attributes:
        routing: The section ``routing``: a summary of the routing of one data set, and the mutual
            information of experts with sets and classes.
        usage: The section ``usage``: which experts each set uses, as in :func:`describe_usage`.
    """

    routing: dict[str, Any]
    usage: dict[str, Any]


class RoutingRecorder:
    """Records how a model routes the data sets that it is evaluated on.

    For each data set, it keeps a summary over all converted layers, and the expert choices of up to
    200 rows in the last converted layer. For a dense model, it records nothing.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._sets: dict[str, SetLoads] = {}
        self._summaries: dict[str, dict[str, Any]] = {}

    @contextmanager
    def record_set(self, name: str, classes: Integers) -> Iterator[None]:
        """Record an evaluation of the data set ``name``, which runs inside the ``with`` block.

        The model must see each row once, in the order of ``classes``, the class numbers of all
        rows.
        """
        if not emoe.is_converted(self._model):
            yield
            return
        # The sample depends only on the name and size of the set. Rows are sorted by length, so
        # runs with the same tokenizer and `max_length` have the same rows.
        random = np.random.default_rng(derive_seed("rows by their routing", name))
        shuffled = random.permutation(len(classes))
        sampled = np.sort(shuffled[:_SAMPLED_ROWS])
        # expert choices are counted separately for each sampled row
        labels = _routing_labels(len(classes), sampled)
        with (
            emoe.record_routing(self._model) as record,
            label_rows(self._model, record, labels),
        ):
            yield
        last_layer = max(record.layers)
        loads = loads_by_row(record.layers[last_layer], len(sampled))
        self._sets[name] = SetLoads(loads, classes[sampled])
        self._summaries[name] = routing_summary(record)

    def routing_of_set(self, name: str) -> SetRouting:
        """Return the routing of the data set ``name``, compared with that of the other sets.

        With fewer than two recorded sets, there is no mutual information, and ``usage`` is empty.
        """
        # a dense model has no recorded set and no summary
        if len(self._sets) < 2:
            return SetRouting(routing=self._summaries.get(name, {}), usage={})
        information, usage = describe_usage(self._sets)
        return SetRouting(routing={**self._summaries[name], **information}, usage=usage)
