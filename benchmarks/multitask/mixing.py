"""How the rows of several tasks are mixed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

from benchmarks.harness.base.seeds import derive_seed
from benchmarks.harness.training.samplers import EpochOrder


class MixedOrder(Sampler[int]):
    """Order of the rows of several tasks that stand end to end: a function of seed and epoch, and of nothing else.

    An epoch has ``most`` rows of a task, or all where it has no more, so that tasks are mixed in proportion to their size up to a limit. A larger
    task goes through all of its rows, shuffled, before any comes again. What an epoch has of all tasks is shuffled together.

    Args:
        tasks: name of each task, and the tokens of each of its rows.
        most: rows of a task in an epoch; None for all.
        batch_size: rows of a step.
        seed: the run's seed.
        by_length: put rows of like length into one batch.
    """

    def __init__(
        self, tasks: Sequence[tuple[str, list[int]]], most: int | None, batch_size: int, seed: int, *, by_length: bool
    ) -> None:
        self._tasks, self._most, self._seed = tasks, most, seed
        self._batch_size, self._by_length = batch_size, by_length
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called before every epoch."""
        self._epoch = epoch

    def __len__(self) -> int:
        return sum(self._share(len(lengths)) for _, lengths in self._tasks)

    def __iter__(self) -> Iterator[int]:
        places: list[int] = []
        tokens: list[int] = []
        start = 0
        for name, lengths in self._tasks:
            chosen = self._chosen(name, len(lengths))
            places += [start + row for row in chosen]
            tokens += [lengths[row] for row in chosen]
            start += len(lengths)
        order = EpochOrder(tokens, self._batch_size, self._seed, by_length=self._by_length)
        order.set_epoch(self._epoch)
        return (places[place] for place in order)

    def _share(self, rows: int) -> int:
        return rows if self._most is None else min(rows, self._most)

    def _chosen(self, name: str, rows: int) -> list[int]:
        """The task's rows of this epoch: the next ones in passes over all of its rows, each pass in an order of its own."""
        share = self._share(rows)
        first = self._epoch * share
        passes = range(first // rows, (first + share - 1) // rows + 1)
        shuffled = [row for number in passes for row in self._pass(name, number, rows)]
        begin = first - passes[0] * rows
        return shuffled[begin : begin + share]

    def _pass(self, name: str, number: int, rows: int) -> list[int]:
        generator = torch.Generator().manual_seed(derive_seed("rows of", name, self._seed, number))
        found: list[int] = torch.randperm(rows, generator=generator).tolist()
        return found
