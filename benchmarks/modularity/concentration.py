"""How far a token's activations are concentrated in few blocks of neurons."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_QUARTER = 4


@dataclass(frozen=True)
class Concentration:
    """Shares of activations in a token's best blocks, and how unevenly the blocks are used.

    Attributes:
        best_quarter: share of a token's active neurons that are in the quarter of the blocks with most of them, mean over tokens with any.
        best_quarter_mass: the same of the sum of all its activations' magnitudes, which needs no threshold.
        usage_gini: Gini coefficient of the blocks' active neurons over all tokens: 0 where every block has as many.
    """

    best_quarter: float
    best_quarter_mass: float
    usage_gini: float

    @classmethod
    def of(cls, magnitudes: Tensor, active: Tensor, num_blocks: int) -> Concentration:
        """Measure activations whose blocks are contiguous.

        Args:
            magnitudes: ``[tokens, d]``, ``|activation|``.
            active: ``[tokens, d]`` bool.
            num_blocks: blocks of equal size, N.
        """
        counts = active.unflatten(1, (num_blocks, -1)).sum(-1).double()
        mass = magnitudes.unflatten(1, (num_blocks, -1)).double().sum(-1)
        return cls(_best_quarter(counts), _best_quarter(mass), gini(counts.sum(0)))


def _best_quarter(by_block: Tensor) -> float:
    blocks = max(by_block.shape[1] // _QUARTER, 1)
    total = by_block.sum(1)
    shares = by_block.topk(blocks, dim=1).values.sum(1)[total > 0] / total[total > 0]
    return float(shares.mean()) if len(shares) else 0.0


def gini(values: Tensor) -> float:
    """Gini coefficient of non-negative values: 0 where all are equal, near 1 where one has everything.

    >>> round(gini(torch.tensor([1.0, 1.0])), 3), round(gini(torch.tensor([0.0, 0.0, 0.0, 8.0])), 3)
    (0.0, 0.75)
    """
    ordered = values.double().sort().values
    count, total = len(ordered), float(ordered.sum())
    if total == 0:
        return 0.0
    places = torch.arange(1, count + 1, dtype=torch.float64)
    return float((2 * (places * ordered).sum()) / (count * total) - (count + 1) / count)


def is_active(magnitudes: Tensor, share: float) -> Tensor:
    """Which entries are among a share of the largest ones, ties with the smallest of them left out."""
    flat = magnitudes.flatten()
    kept = max(1, round(share * flat.numel()))
    threshold = flat.kthvalue(flat.numel() - kept).values if kept < flat.numel() else flat.min() - 1
    return magnitudes > threshold
