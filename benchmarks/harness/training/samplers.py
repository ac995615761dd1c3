"""Order the training rows."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices

from benchmarks.harness.base import derive_seed


class EpochOrder(Sampler[int]):
    """A random order of the training rows that depends only on the rows, the seed and the epoch.

    So all methods have the same order, and a resumed run has the order of an uninterrupted one.

    Args:
        lengths: The number of tokens of each row.
        batch_size: The number of rows of a batch, if rows of similar length are batched.
        seed: The seed of the run.
        by_length: True to batch rows of similar length.
    """

    def __init__(self, lengths: list[int], batch_size: int, seed: int, *, by_length: bool) -> None:
        self._lengths = lengths
        self._batch_size = batch_size
        self._seed = seed
        self._by_length = by_length
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration. The data loader calls this before each epoch."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        return iter(self._random_order(self._lengths))

    def _random_order(self, lengths: list[int]) -> list[int]:
        """Return the indices of rows with these numbers of tokens, in the order of the epoch."""
        generator = torch.Generator().manual_seed(derive_seed("order", self._seed, self._epoch))
        if self._by_length:
            return list(get_length_grouped_indices(lengths, self._batch_size, generator=generator))
        return list(torch.randperm(len(lengths), generator=generator).tolist())
