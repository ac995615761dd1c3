"""Looking inside: which experts were used, by how many tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from emoe.errors import ConversionError
from emoe.layer import routed_layers


@dataclass
class LayerRecord:
    """Counts of one routed FFN.

    Attributes:
        num_experts: N.
        loads: ``[N]``, how often each expert was chosen.
        tokens: number of tokens seen.
        by_label: label to loads ``[N]``, when labels were set.
    """

    num_experts: int
    loads: Tensor
    tokens: int = 0
    by_label: dict[int, Tensor] = field(default_factory=dict)
    context: TokenContext | None = None

    def update(self, mask: Tensor) -> None:
        """Add the choices ``[T, N]`` of one forward pass; padding tokens are left out."""
        mask = mask.detach()
        context = self.context
        keep = context.keep if context is not None else None
        labels = context.labels if context is not None else None
        if keep is not None and keep.numel() == mask.shape[0]:
            keep = keep.flatten().to(mask.device)
        else:
            keep = torch.ones(mask.shape[0], dtype=torch.bool, device=mask.device)
        self.loads += mask[keep].sum(0).cpu()
        self.tokens += int(keep.sum())
        if labels is not None:
            per_token = labels.to(mask.device).repeat_interleave(mask.shape[0] // labels.numel())
            for label in labels.unique().tolist():
                chosen = mask[keep & (per_token == label)].sum(0).cpu()
                self.by_label[label] = self.by_label.get(label, torch.zeros_like(chosen)) + chosen

    @property
    def shares(self) -> Tensor:
        """``[N]`` float64, share of all choices that went to each expert; sums to 1."""
        return self.loads.double() / max(int(self.loads.sum()), 1)

    @property
    def experts_per_token(self) -> float:
        return int(self.loads.sum()) / max(self.tokens, 1)

    @property
    def entropy(self) -> float:
        """Entropy of :attr:`shares` divided by ln N: 1 is a perfectly balanced load."""
        if self.num_experts == 1:
            return 1.0
        return float(torch.special.entr(self.shares).sum() / math.log(self.num_experts))

    @property
    def max_over_mean(self) -> float:
        """Load of the busiest expert over the mean load; 1 is balanced."""
        return float(self.shares.max() * self.num_experts)


@dataclass
class TokenContext:
    """What the root model was called with: which tokens are no padding, and the rows' labels."""

    keep: Tensor | None = None
    labels: Tensor | None = None


@dataclass(frozen=True)
class RoutingRecord:
    """What :func:`record_routing` collected, by layer number."""

    layers: dict[int, LayerRecord]

    def summary(self) -> dict[str, float]:
        """Means over layers: ``load_entropy``, ``load_max_over_mean``, ``experts_per_token``."""
        records = list(self.layers.values())
        if not records:
            return {}
        return {
            "load_entropy": sum(r.entropy for r in records) / len(records),
            "load_max_over_mean": sum(r.max_over_mean for r in records) / len(records),
            "experts_per_token": sum(r.experts_per_token for r in records) / len(records),
        }


@contextmanager
def record_routing(model: nn.Module) -> Iterator[RoutingRecord]:
    """Count the experts' loads during the forward passes inside the ``with`` block.

    Padding is left out when the model is called with a two-dimensional ``attention_mask``, and
    loads are also kept by label when it is called with one integer label a row.

    Raises:
        ConversionError: the model has no routed FFN, or is being recorded already.
    """
    layers = routed_layers(model)
    if not layers:
        raise ConversionError("record_routing: the model has no routed FFN; convert it first")
    if any(layer.record is not None for layer in layers):
        raise ConversionError("record_routing: the model is being recorded already")
    context = TokenContext()

    def remember(_module: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mask, labels = kwargs.get("attention_mask"), kwargs.get("labels")
        context.keep = mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None
        context.labels = (
            labels if isinstance(labels, Tensor) and labels.ndim == 1 and not labels.is_floating_point() else None
        )

    hook = model.register_forward_pre_hook(remember, with_kwargs=True)
    try:
        for layer in layers:
            n = layer.config.num_experts
            layer.record = LayerRecord(n, torch.zeros(n, dtype=torch.int64), context=context)
        yield RoutingRecord({layer.ffn_index: layer.record for layer in layers if layer.record is not None})
    finally:
        hook.remove()
        for layer in layers:
            layer.record = None
