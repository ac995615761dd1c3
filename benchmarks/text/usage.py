"""Measure the routing of rows, and the mutual information of experts with task and class.

``loads`` counts the choices of each expert by the tokens of each row, ``[rows, N]``. ``tasks`` are the task numbers of
the rows, from 0. ``classes`` are their class numbers, negative if a task has no classes.
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
    """Measure the mutual information of expert and task. For chance, shuffle rows over all tasks."""
    return MutualInformation.mean(
        shuffled_information(loads[:, None], tasks, np.zeros_like(tasks), seed)
    )


def class_information(
    loads: Loads, tasks: Loads, classes: Loads, seed: int
) -> MutualInformation | None:
    """Measure the mutual information of expert and class within a task, as the mean over tasks with classes."""
    bits = []
    for task in np.unique(tasks):
        rows = (tasks == task) & (classes >= 0)
        if len(np.unique(classes[rows])) > 1:
            bits.append(
                shuffled_information(
                    loads[rows][:, None], classes[rows], np.zeros_like(classes[rows]), seed
                )
            )
    return MutualInformation.mean(np.concatenate(bits, axis=1)) if bits else None


def mark_experts(loads: Loads, tasks: Loads, seed: int) -> Loads:
    """Mark experts that a task uses more (1) or less (-1) than by chance, else 0; return ``[tasks, N]``.

    Rows are shuffled over the tasks. A z-score against the shuffles is marked if it exceeds the 95 % quantile of the
    largest z-scores of the shuffles, so about one in twenty matrices has a mark by chance.
    """
    random = np.random.default_rng(seed)
    shares = shares_by_group(loads, tasks)
    shuffled = np.stack(
        [shares_by_group(loads, random.permutation(tasks)) for _ in range(PERMUTATIONS)]
    )
    mean, deviation = shuffled.mean(0), shuffled.std(0)

    def z_scores(uses: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.divide(uses - mean, deviation, out=np.zeros_like(uses), where=deviation > 0)

    limit = np.quantile(np.abs(z_scores(shuffled)).max((1, 2)), CONFIDENCE)
    return (np.sign(z_scores(shares)) * (np.abs(z_scores(shares)) > limit)).astype(np.int64)


def shares_by_group(loads: Loads, groups: Loads) -> NDArray[np.float64]:
    """Return each expert's share of the choices in each group, ``[groups, N]``; groups are numbered from 0."""
    counts = np.zeros((int(groups.max()) + 1, loads.shape[1]), dtype=np.int64)
    np.add.at(counts, groups, loads)
    return counts / np.maximum(counts.sum(1, keepdims=True), 1)


def shared_and_specialised(shares: NDArray[np.float64], marked: Loads) -> tuple[Loads, Loads]:
    """Return the shared experts (above 1/N in all tasks, no mark), and the specialised ones (a positive mark)."""
    shared = (shares > 1 / shares.shape[1]).all(0) & (marked == 0).all(0)
    return np.flatnonzero(shared), np.flatnonzero((marked > 0).any(0))


@dataclass(frozen=True)
class SetLoads:
    """Hold the expert loads ``[rows, N]`` and the classes ``[rows]`` of one set."""

    loads: Loads
    classes: Loads


def describe_usage(sets: Mapping[str, SetLoads]) -> tuple[dict[str, float], dict[str, Any]]:
    """Measure the mutual information of experts with sets and classes; needs at least two sets.

    Returns:
        The numbers by metric name, and the expert usage: by set, the shares of experts, marks (see
        :func:`mark_experts`) and shares by class; and the shared and the specialised experts.
    """
    rows = np.concatenate([routing.loads for routing in sets.values()])
    tasks = np.repeat(np.arange(len(sets)), [len(routing.loads) for routing in sets.values()])
    classes = np.concatenate([routing.classes for routing in sets.values()])
    seed = derive_seed("shuffles")
    of_tasks, of_classes = (
        task_information(rows, tasks, seed),
        class_information(rows, tasks, classes, seed),
    )
    marked, shares = mark_experts(rows, tasks, seed), shares_by_group(rows, tasks)
    shared, specialised = shared_and_specialised(shares, marked)
    by_set = {
        name: {
            "shares": shares[number].tolist(),
            "marks": marked[number].tolist(),
            "classes": _shares_by_class(routing),
        }
        for number, (name, routing) in enumerate(sets.items())
    }
    information = of_tasks.numbers("task") | (of_classes.numbers("class") if of_classes else {})
    return information, {
        "tasks": by_set,
        "shared": shared.tolist(),
        "specialised": specialised.tolist(),
    }


def _shares_by_class(routing: SetLoads) -> dict[str, list[float]]:
    """Return the shares of experts by class, for classes with rows; empty for a regression."""
    if (routing.classes < 0).any():
        return {}
    shares = shares_by_group(routing.loads, routing.classes)
    return {str(label): shares[label].tolist() for label in np.unique(routing.classes)}


_ROWS = 200  # sampled rows of each set


class RoutingRecorder:
    """Record expert use of sampled rows of each set in the last converted layer. No-op for dense models."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._sets: dict[str, SetLoads] = {}
        self._summaries: dict[str, dict[str, Any]] = {}

    @contextmanager
    def record_set(self, name: str, classes: Loads) -> Iterator[None]:
        """Record one evaluation of a set. The model must see each row once, in the order of ``classes``."""
        if not emoe.is_converted(self._model):
            yield
            return
        draw = np.random.default_rng(derive_seed("rows by their routing", name))
        chosen = np.sort(draw.permutation(len(classes))[:_ROWS])
        labels = torch.full((len(classes),), -1)
        labels[torch.from_numpy(chosen)] = torch.arange(len(chosen))
        seen = 0

        def name_rows(_module: nn.Module, _args: tuple[Any, ...], given: dict[str, Any]) -> None:
            nonlocal seen
            count = len(given["input_ids"])
            record.set_labels(labels[seen : seen + count])
            seen += count

        with emoe.record_routing(self._model) as record:
            hook = self._model.register_forward_pre_hook(name_rows, with_kwargs=True)
            try:
                yield
            finally:
                hook.remove()
        loads = loads_by_row(record.layers[max(record.layers)], len(chosen))
        self._sets[name] = SetLoads(loads, classes[chosen])
        self._summaries[name] = routing_summary(record)

    def set_routing(self, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return a set's routing summary, and all sets' usage.

        Returns:
            The set's :func:`~benchmarks.harness.training.routing.routing_summary` and, if there are several sets, the
            usage of :func:`describe_usage` (else empty), whose numbers are added to the summary.
        """
        if len(self._sets) < 2:
            return self._summaries.get(name, {}), {}
        information, usage = describe_usage(self._sets)
        return self._summaries[name] | information, usage
