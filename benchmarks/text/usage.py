"""Measure the routing of rows, and the mutual information of experts with task and class.

``loads`` counts the choices of each expert by the tokens of each row, ``[rows, N]``. ``tasks`` are
the task numbers of the rows, from 0. ``classes`` are their class numbers, negative if a task has no
classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

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
from benchmarks.harness.training.routing import loads_by_row, routing_summary

Loads = NDArray[np.int64]


def task_information(loads: Loads, tasks: Loads, seed: int) -> MutualInformation:
    """Measure the mutual information of expert and task; for chance, shuffle rows over tasks."""
    all_rows = np.zeros_like(tasks)  # one stratum
    one_layer = loads[:, None]  # [rows, 1, N]
    return MutualInformation.mean(shuffled_information(one_layer, tasks, all_rows, seed))


def class_information(
    loads: Loads, tasks: Loads, classes: Loads, seed: int
) -> MutualInformation | None:
    """Measure the mutual information of expert and class within a task.

    For chance, shuffle rows within each task. Returns the mean over the tasks with several classes,
    or None without such a task.
    """
    bits = []  # [1 + PERMUTATIONS, 1] by task
    for task in np.unique(tasks):
        rows = (tasks == task) & (classes >= 0)
        labels = classes[rows]
        if len(np.unique(labels)) < 2:
            continue
        all_rows = np.zeros_like(labels)  # one stratum
        one_layer = loads[rows][:, None]  # [rows, 1, N]
        bits.append(shuffled_information(one_layer, labels, all_rows, seed))
    if not bits:
        return None
    return MutualInformation.mean(np.concatenate(bits, axis=1))


def mark_experts(loads: Loads, tasks: Loads, seed: int) -> Loads:
    """Mark each expert that a task uses more (1) or less (-1) than by chance; others are 0.

    Returns the marks ``[tasks, N]``. Rows are shuffled over the tasks. A z-score against the
    shuffles is marked if it exceeds the 95 % quantile of the largest z-scores of the shuffles. So
    about one in twenty matrices has a mark by chance.
    """
    random = np.random.default_rng(seed)
    shares = shares_by_group(loads, tasks)
    draws = [shares_by_group(loads, random.permutation(tasks)) for _ in range(PERMUTATIONS)]
    shuffled = np.stack(draws)  # [PERMUTATIONS, tasks, N]
    mean = shuffled.mean(0)
    deviation = shuffled.std(0)

    def z_scores(uses: NDArray[np.float64]) -> NDArray[np.float64]:
        # 0 if all shuffles are equal
        return np.divide(uses - mean, deviation, out=np.zeros_like(uses), where=deviation > 0)

    # one limit for the whole matrix corrects for its many entries
    largest = np.abs(z_scores(shuffled)).max((1, 2))  # [PERMUTATIONS]
    limit = np.quantile(largest, CONFIDENCE)
    scores = z_scores(shares)
    marks = np.sign(scores) * (np.abs(scores) > limit)
    return marks.astype(np.int64)


def shares_by_group(loads: Loads, groups: Loads) -> NDArray[np.float64]:
    """Return the share of each expert in the choices of each group, ``[groups, N]``.

    ``groups`` are the group numbers of the rows, from 0.
    """
    _, experts = loads.shape
    counts = np.zeros((int(groups.max()) + 1, experts), dtype=np.int64)
    np.add.at(counts, groups, loads)
    totals = np.maximum(counts.sum(1, keepdims=True), 1)  # no division by 0
    return counts / totals


def shared_and_specialised(shares: NDArray[np.float64], marked: Loads) -> tuple[Loads, Loads]:
    """Return the numbers of the shared experts, and of the specialised ones.

    A shared expert has a share above 1/N in all tasks, and no mark. A specialised one has a
    positive mark.

    Args:
        shares: The shares of the experts, ``[tasks, N]``.
        marked: Their marks from :func:`mark_experts`, ``[tasks, N]``.
    """
    _, experts = shares.shape
    is_popular = (shares > 1 / experts).all(0)
    has_no_mark = (marked == 0).all(0)
    shared = np.flatnonzero(is_popular & has_no_mark)
    specialised = np.flatnonzero((marked > 0).any(0))
    return shared, specialised


@dataclass(frozen=True)
class SetLoads:
    """The routing of the rows of one set."""

    loads: Loads  # [rows, N]
    classes: Loads  # [rows]


def describe_usage(sets: Mapping[str, SetLoads]) -> tuple[dict[str, float], dict[str, Any]]:
    """Measure how experts are used by sets and classes; needs at least two sets.

    Returns:
        The mutual information by metric name, and the use of experts. Its ``tasks`` are by set the
        shares of experts, their marks (see :func:`mark_experts`) and their shares by class. It also
        has the numbers of the ``shared`` and the ``specialised`` experts.
    """
    loads = np.concatenate([routing.loads for routing in sets.values()])  # [rows, N]
    classes = np.concatenate([routing.classes for routing in sets.values()])
    row_counts = [len(routing.loads) for routing in sets.values()]
    tasks = np.repeat(np.arange(len(sets)), row_counts)
    seed = derive_seed("shuffles")

    information = task_information(loads, tasks, seed).numbers("task")
    of_classes = class_information(loads, tasks, classes, seed)
    if of_classes is not None:
        information.update(of_classes.numbers("class"))

    marked = mark_experts(loads, tasks, seed)  # [sets, N]
    shares = shares_by_group(loads, tasks)  # [sets, N]
    shared, specialised = shared_and_specialised(shares, marked)
    by_set = {}
    for number, (name, routing) in enumerate(sets.items()):
        by_set[name] = {
            "shares": shares[number].tolist(),
            "marks": marked[number].tolist(),
            "classes": _shares_by_class(routing),
        }
    usage = {"tasks": by_set, "shared": shared.tolist(), "specialised": specialised.tolist()}
    return information, usage


def _shares_by_class(routing: SetLoads) -> dict[str, list[float]]:
    """Return the shares of experts by class, for classes with rows; empty for a regression."""
    if (routing.classes < 0).any():
        return {}
    shares = shares_by_group(routing.loads, routing.classes)
    return {str(label): shares[label].tolist() for label in np.unique(routing.classes)}


_ROWS = 200  # sampled rows of each set


class RoutingRecorder:
    """A recorder of routing: a summary of each set, and the expert choices of some of its rows.

    The summary covers all converted layers, the choices only the last one. A dense model records
    nothing.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._sets: dict[str, SetLoads] = {}
        self._summaries: dict[str, dict[str, Any]] = {}

    @contextmanager
    def record_set(self, name: str, classes: Loads) -> Iterator[None]:
        """Record one evaluation of a set.

        The model must see each row once, in the order of ``classes``.
        """
        if not emoe.is_converted(self._model):
            yield
            return
        draw = np.random.default_rng(derive_seed("rows by their routing", name))
        chosen = np.sort(draw.permutation(len(classes))[:_ROWS])
        # the label of a chosen row is its place among the chosen ones; other rows have -1
        labels = torch.full((len(classes),), -1)
        labels[torch.from_numpy(chosen)] = torch.arange(len(chosen))
        seen = 0  # rows of the batches so far

        def label_rows(_module: nn.Module, _args: tuple[Any, ...], given: dict[str, Any]) -> None:
            nonlocal seen
            count = len(given["input_ids"])
            record.set_labels(labels[seen : seen + count])
            seen += count

        with emoe.record_routing(self._model) as record:
            hook = self._model.register_forward_pre_hook(label_rows, with_kwargs=True)
            try:
                yield
            finally:
                hook.remove()
        last_layer = record.layers[max(record.layers)]
        loads = loads_by_row(last_layer, len(chosen))
        self._sets[name] = SetLoads(loads, classes[chosen])
        self._summaries[name] = routing_summary(record)

    def routing_of_set(self, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the routing summary of a set, and the use of experts by all sets.

        The summary is that of :func:`~benchmarks.harness.training.routing.routing_summary`. With
        several sets, the mutual information of :func:`describe_usage` is added. With fewer, the use
        of experts is empty.
        """
        if len(self._sets) < 2:
            return self._summaries.get(name, {}), {}
        information, usage = describe_usage(self._sets)
        return {**self._summaries[name], **information}, usage
