"""What the neurons of the experts that a selection uses are like: whether they fire, and whether they ever do."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness.base.seeds import derive_seed
from emoe.architectures import find_ffns
from emoe.calibration import record_activations
from emoe.config import EMoEConfig, Selection
from emoe.layer import routed_layers

Batches = Iterable[Mapping[str, Any]]


@dataclass(frozen=True)
class Selected:
    """The neurons of the experts in use, means over tokens.

    Attributes:
        kept: share of the magnitude of all activations that is theirs.
        active: share of them that are active for the token.
        dead: share of them that are active for no token at all.
    """

    kept: float
    active: float
    dead: float

    @classmethod
    def of(cls, used: Tensor, magnitudes: Tensor, active: Tensor) -> Selected:
        """Measure what a selection uses.

        Args:
            used: ``[tokens, d]`` bool, the neurons in use.
            magnitudes: ``[tokens, d]``, ``|activation|`` of the dense model.
            active: ``[tokens, d]`` bool.
        """
        number = used.sum(1).double()
        kept = float((magnitudes.double() * used).sum() / magnitudes.double().sum())
        return cls(
            kept,
            float(((active & used).sum(1) / number).mean()),
            float(((is_dead(active) & used).sum(1) / number).mean()),
        )


def is_dead(active: Tensor) -> Tensor:
    """``[d]`` bool, which neurons are active for none of the tokens ``[tokens, d]``."""
    return ~active.any(0)


def dense_magnitudes(model: nn.Module, layer: int, batches: Batches) -> Tensor:
    """``[tokens, d]``, ``|activation|`` in a layer's FFN, of the same tokens each time, without padding."""
    ffn = find_ffns(model)[layer]
    return record_activations(model, [ffn], batches, seed=derive_seed("tokens"))[layer].t()


def neurons_used(model: nn.Module, layer: int, batches: Batches, selection: Selection) -> Tensor:
    """``[tokens, d]`` bool, which neurons of the one converted layer a selection uses, of the tokens of :func:`dense_magnitudes`.

    In the place of the activation stands one that gives 1 for every neuron, so that what reaches the out-projection is the mask itself; the model is left as it was.
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
