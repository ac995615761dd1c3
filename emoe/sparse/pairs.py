"""The chosen (token, expert) pairs of a forward pass, in the order in which the products take them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_TOKENS_PER_CHUNK = 2048


@dataclass(frozen=True)
class Pairs:
    """The chosen pairs, sorted by chunk of tokens, then expert, then token.

    Attributes:
        rows: ``[P]`` int64, the tokens.
        experts: ``[P]`` int64.
        starts: ``[chunks * N + 1]`` int64; the pairs of chunk c and expert e begin at ``starts[c * N + e]``.
        tokens: T.
    """

    rows: Tensor
    experts: Tensor
    starts: Tensor
    tokens: int

    @staticmethod
    def of(mask: Tensor, chunks: int = 1) -> Pairs:
        """The pairs of a boolean mask ``[T, N]``, with the tokens in so many chunks."""
        tokens, num_experts = mask.shape
        length = -(-tokens // chunks)
        padded = torch.nn.functional.pad(mask, (0, 0, 0, length * chunks - tokens))
        by_expert = padded.view(chunks, length, num_experts).transpose(1, 2)
        chunk, expert, row = by_expert.nonzero(as_tuple=True)
        counts = by_expert.sum(2).flatten()
        starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        return Pairs(chunk * length + row, expert, starts, tokens)


def chunks_for_threads(tokens: int) -> int:
    """As many for each thread, of about 2048 tokens (fewer, and the calls weigh more than the cache gains); the number shapes the order of sums, so it depends on nothing else."""
    threads = torch.get_num_threads()
    return threads * max(1, -(-tokens // (threads * _TOKENS_PER_CHUNK)))
