"""Which experts a token uses and with what weight. Shapes: T tokens, h width, N experts, s neurons each, d = N·s.

A *slot* is one of a token's chosen experts; slot 0 is the first choice.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from emoe.config import BalanceLoss, Selection, Weighting

_ROUTER_DIM = 256
_MAX_LOG_SCALE = math.log(100.0)


class CosineRouter(nn.Module):
    """Learned router of GMoE and EMoE-learn: scaled cosine of a projection with expert embeddings.

    Logits are ``exp(min(temperature, ln 100)) * cos(W x + b, s_i)``; the scale starts at 2 and the
    embeddings at N(0, 0.01²) (the authors' ``gates/cosine_top.py``).
    """

    def __init__(self, hidden_size: int, num_experts: int) -> None:
        super().__init__()
        self.proj = nn.Linear(hidden_size, _ROUTER_DIM)
        self.expert_embeddings = nn.Parameter(torch.randn(_ROUTER_DIM, num_experts) * 0.01)
        self.temperature = nn.Parameter(torch.tensor([math.log(1 / 0.5)]))

    def forward(self, x: Tensor) -> Tensor:
        """Scores ``[T, N]`` in float32 for inputs ``[T, h]``."""
        with torch.autocast(x.device.type, enabled=False):
            projected = F.linear(x.float(), self.proj.weight.float(), self.proj.bias.float())
            cosine = F.normalize(projected, dim=-1) @ F.normalize(self.expert_embeddings.float(), dim=0)
            return cosine * self.temperature.float().clamp(max=_MAX_LOG_SCALE).exp()


def expert_means(rows: Tensor, num_experts: int, value_norms: Tensor | None = None) -> Tensor:
    """Mean over each expert's neurons in float32, ``[d, ...]`` to ``[N, ...]``.

    Args:
        rows: one entry a neuron, expert e owning ``[e*s, (e+1)*s)``.
        num_experts: N.
        value_norms: ``[d]``; weight each neuron in proportion to it instead of equally.
    """
    blocks = rows.float().unflatten(0, (num_experts, -1))
    if value_norms is None:
        return blocks.mean(1)
    norms = value_norms.float().unflatten(0, (num_experts, -1))
    return torch.einsum("ns,ns...->n...", norms / norms.sum(1, keepdim=True).clamp_min(1e-12), blocks)


def key_scores(x: Tensor, gate: Tensor, bias: Tensor | None = None, *, unit_length: bool = False) -> Tensor:
    """Score of each expert by its mean key: the mean pre-activation of its neurons (paper Eq. 4).

    Computed in float32 with autocast off: in bf16 several percent of tokens would change experts.

    Args:
        x: ``[T, h]``.
        gate: ``[N, h]`` float32, the experts' mean keys (:func:`expert_means`).
        bias: ``[N]``, added when given (not in the paper's score).
        unit_length: L2-normalise the inputs.

    Returns:
        ``[T, N]`` float32.
    """
    with torch.autocast(x.device.type, enabled=False):
        rows = F.normalize(x.float(), dim=-1) if unit_length else x.float()
        return F.linear(rows, gate, bias)


def block_means(values: Tensor, num_experts: int) -> Tensor:
    """Mean over each expert's neurons, ``[..., d]`` to ``[..., N]``, in float32."""
    return values.float().unflatten(-1, (num_experts, -1)).mean(-1)


def select_experts(scores: Tensor, top_k: int, selection: Selection) -> Tensor:
    """The experts to use, ``[T, slots]``, first choice first. Equal scores go to the lower expert."""
    if selection == "random":
        scores = torch.rand_like(scores)
    order = torch.sort(scores, dim=-1, descending=selection != "bottom", stable=True).indices
    return order[:, top_k:] if selection == "not_top" else order[:, :top_k]


def slots_above(scores: Tensor, slots: Tensor, threshold: float) -> Tensor:
    """Which slots ``[T, slots]`` have a score of at least ``threshold``; the first choice always counts."""
    above = scores.gather(1, slots) >= threshold
    above[:, 0] = True
    return above


def places_within_capacity(
    scores: Tensor,
    slots: Tensor,
    capacity_factor: float,
    top_k: int,
    counted: Tensor | None = None,
    used: Tensor | None = None,
) -> Tensor:
    """Which assignments find a place when every expert takes a limited number of them.

    Batch-prioritised: all first choices come before all second choices, and so on; within a choice
    the token with the highest softmax probability comes first, equal ones in their order.

    Args:
        scores: ``[T, N]``, those that chose the experts.
        slots: ``[T, slots]`` experts.
        capacity_factor: c; each expert takes ``top_k * int(c * ceil(T / N))`` assignments.
        top_k: experts that a token uses.
        counted: ``[T]`` bool; the other tokens (padding) are not in T and need no place.
        used: ``[T, slots]`` bool; slots that are not in use need no place.

    Returns:
        ``[T, slots]`` bool.
    """
    num_experts = scores.shape[1]
    waiting = torch.ones_like(slots, dtype=torch.bool) if used is None else used.clone()
    tokens = slots.new_tensor(slots.shape[0])
    if counted is not None:
        waiting &= counted.unsqueeze(1)
        tokens = counted.sum()
    capacity = top_k * (capacity_factor * (tokens.double() / num_experts).ceil()).long()
    order = torch.sort(scores.softmax(-1).amax(-1), descending=True, stable=True).indices
    # all assignments in the order in which they get places; those that need none go to a queue of their own
    queue = torch.where(waiting, slots, num_experts)[order].t().flatten()
    by_expert = torch.sort(queue, stable=True).indices
    lengths = queue.new_zeros(num_experts + 1).scatter_add_(0, queue, torch.ones_like(queue))
    starts = lengths.cumsum(0) - lengths
    place = torch.empty_like(queue)
    place[by_expert] = torch.arange(queue.numel(), device=queue.device) - starts[queue[by_expert]]
    fits = torch.empty_like(waiting)
    fits[order] = (place < capacity).view(slots.shape[1], -1).t()
    return fits | ~waiting


def slot_mask(slots: Tensor, num_experts: int, used: Tensor | None = None) -> Tensor:
    """Boolean mask ``[T, N]`` of the experts in ``slots``; ``used`` ``[T, slots]`` leaves some out."""
    mask = torch.zeros(slots.shape[0], num_experts, dtype=torch.bool, device=slots.device)
    return mask.scatter(1, slots, True if used is None else used)


def expert_weights(scores: Tensor, mask: Tensor, weighting: Weighting, top_k: int) -> Tensor:
    """Weights ``[T, N]`` of the chosen experts, zero elsewhere.

    ``softmax`` normalises over the chosen experts, but with ``top_k = 1``, where that would be the
    constant 1, takes the probability among all experts. ``softmax_times_k`` normalises and multiplies by
    the number of chosen experts, so that the mean weight is 1 as in ``binary``.
    """
    if weighting == "binary":
        return mask.to(scores.dtype)
    if weighting == "softmax" and top_k == 1:
        return scores.softmax(-1) * mask
    weights = scores.masked_fill(~mask, -math.inf).softmax(-1)
    if weighting == "softmax_times_k":
        weights = weights * mask.sum(-1, keepdim=True)
    return weights


def balance_loss(
    clean: Tensor,
    noisy: Tensor,
    mask: Tensor,
    noise_std: float,
    formula: BalanceLoss = "corrected",
    counted: Tensor | None = None,
) -> Tensor:
    """Squared coefficient of variation of the experts' importance and, with noise, of their load.

    Importance is the sum of softmax probabilities. Load is the expected number of tokens under the
    router's noise: the chance that a clean score passes the lowest chosen noisy score. Without noise
    the load has no gradient, and importance stands alone.

    Args:
        clean: scores ``[T, N]`` before the noise.
        noisy: scores ``[T, N]`` that chose the experts.
        mask: chosen experts ``[T, N]``.
        noise_std: standard deviation of the noise; 0 for none.
        formula: ``published`` takes the clean *probability* in the load, as the authors' code does.
        counted: ``[T]`` bool, tokens that count; None for all.
    """
    share = torch.ones_like(clean[:, :1]) if counted is None else counted.unsqueeze(1).to(clean.dtype)
    probabilities = clean.softmax(-1)
    importance = _squared_variation((probabilities * share).sum(0))
    if noise_std == 0:
        return importance
    threshold = noisy.masked_fill(~mask, math.inf).amin(-1, keepdim=True)
    compared = probabilities if formula == "published" else clean
    load = (torch.special.ndtr((compared - threshold) / noise_std) * share).sum(0)
    return (importance + _squared_variation(load)) / 2


def _squared_variation(values: Tensor) -> Tensor:
    if values.numel() == 1:
        return values.sum() * 0
    return values.var() / (values.mean().square() + 1e-10)
