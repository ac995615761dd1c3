"""Measure the active neurons of an FFN: their concentration in blocks, and their use by chosen experts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness.base import derive_seed
from emoe.architectures import find_ffns
from emoe.calibration import record_activations
from emoe.config import EMoEConfig, Selection
from emoe.layer import routed_layers

Batches = Iterable[Mapping[str, Any]]


def dense_magnitudes(model: nn.Module, layer: int, batches: Batches) -> Tensor:
    """Record ``|activation|`` in a layer's FFN, ``[tokens, d]``; tokens are sampled with a fixed seed, without padding."""
    ffn = find_ffns(model)[layer]
    return record_activations(model, [ffn], batches, seed=derive_seed("tokens"))[layer].t()


def neurons_used(model: nn.Module, layer: int, batches: Batches, selection: Selection) -> Tensor:
    """Return the neurons that a selection of experts uses, ``[tokens, d]`` bool, for the same tokens as above.

    With an activation that always returns 1, the input of the out-projection is the mask. The model is restored.
    """
    (routed,) = routed_layers(model)
    config, activation = routed.config, routed.activation
    assert isinstance(config, EMoEConfig)  # noqa: S101 -- the grid sees to it
    routed.configure_(dataclasses.replace(config, selection=selection))
    routed.activation = _Ones()
    try:
        return dense_magnitudes(model, layer, batches) != 0
    finally:
        routed.activation = activation
        routed.configure_(config)


class _Ones(nn.Module):
    def forward(self, z: Tensor) -> Tensor:
        return torch.ones_like(z)


def active_mask(magnitudes: Tensor, share: float) -> Tensor:
    """Return a boolean mask of the largest entries, up to a share of all; ties at the threshold are excluded."""
    flat = magnitudes.flatten()
    kept = max(1, round(share * flat.numel()))
    threshold = flat.kthvalue(flat.numel() - kept).values if kept < flat.numel() else flat.min() - 1
    return magnitudes > threshold


def concentration(magnitudes: Tensor, active: Tensor, num_blocks: int) -> dict[str, float]:
    """Measure the concentration of activations in contiguous blocks of neurons.

    Args:
        magnitudes: The magnitudes ``[tokens, d]``.
        active: The active neurons ``[tokens, d]``, bool.
        num_blocks: The number of blocks of equal size, N.

    Returns:
        ``best_quarter``: the share of a token's active neurons in the quarter of the blocks with most of them, mean
        over tokens with any; ``best_quarter_mass``: the same of all magnitudes, without a threshold; ``usage_gini``:
        the Gini coefficient of the blocks' active neurons over all tokens; ``dead``: the share of neurons that are
        active for no token.
    """
    counts = active.unflatten(1, (num_blocks, -1)).sum(-1).double()
    mass = magnitudes.unflatten(1, (num_blocks, -1)).double().sum(-1)
    return {
        "best_quarter": _best_quarter(counts),
        "best_quarter_mass": _best_quarter(mass),
        "usage_gini": gini(counts.sum(0)),
        "dead": float((~active.any(0)).double().mean()),
    }


def _best_quarter(by_block: Tensor) -> float:
    blocks = max(by_block.shape[1] // 4, 1)
    total = by_block.sum(1)
    return float((by_block.topk(blocks, dim=1).values.sum(1)[total > 0] / total[total > 0]).mean())


def gini(values: Tensor) -> float:
    """Compute the Gini coefficient of non-negative values: 0 if all are equal, near 1 if one has everything.

    >>> round(gini(torch.tensor([1.0, 1.0])), 3), round(gini(torch.tensor([0.0, 0.0, 0.0, 8.0])), 3)
    (0.0, 0.75)
    """
    ordered = values.double().sort().values
    count, total = len(ordered), float(ordered.sum())
    ranks = torch.arange(1, count + 1, dtype=torch.float64)
    return float((2 * (ranks * ordered).sum()) / (count * total) - (count + 1) / count)


def selected(used: Tensor, magnitudes: Tensor, active: Tensor) -> dict[str, float]:
    """Measure the neurons that a selection of experts uses.

    Args:
        used: The neurons in use ``[tokens, d]``, bool.
        magnitudes: The magnitudes ``[tokens, d]`` of the dense model.
        active: The active neurons ``[tokens, d]``, bool.

    Returns:
        ``kept``: the share of all magnitudes in used neurons; ``active``: the share of used neurons that are active for
        the token; ``dead``: the share that is active for no token. The last two are means over tokens.
    """
    number = used.sum(1).double()
    return {
        "kept": float((magnitudes.double() * used).sum() / magnitudes.double().sum()),
        "active": float(((active & used).sum(1) / number).mean()),
        "dead": float(((~active.any(0) & used).sum(1) / number).mean()),
    }
