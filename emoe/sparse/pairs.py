"""The chosen (token, expert) pairs of a forward pass, in the order of the sparse products."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_TOKENS_PER_CHUNK = 2048  # smaller chunks cost more calls than the cache saves


@dataclass(frozen=True)
class Pairs:
    """Hold the chosen pairs, sorted by chunk of tokens, then expert, then token.

    Attributes:
        rows: tokens ``[P]`` int64.
        experts: experts ``[P]`` int64.
        starts: ``[chunks * N + 1]`` int64; the pairs of chunk c and expert e start at ``starts[c * N + e]``.
        tokens: number of tokens T.
    """

    rows: Tensor
    experts: Tensor
    starts: Tensor
    tokens: int

    @staticmethod
    def of(mask: Tensor, chunks: int = 1) -> Pairs:
        """List the pairs of a boolean mask ``[T, N]`` by chunk of tokens."""
        tokens, num_experts = mask.shape
        length = -(-tokens // chunks)
        padded = torch.nn.functional.pad(mask, (0, 0, 0, length * chunks - tokens))
        by_expert = padded.view(chunks, length, num_experts).transpose(1, 2)
        chunk, expert, row = by_expert.nonzero(as_tuple=True)
        counts = by_expert.sum(2).flatten()
        starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        return Pairs(chunk * length + row, expert, starts, tokens)


def chunks_for_threads(tokens: int) -> int:
    """Return the number of chunks, the same for each thread; it determines the order of sums."""
    threads = torch.get_num_threads()
    return threads * max(1, -(-tokens // (threads * _TOKENS_PER_CHUNK)))
