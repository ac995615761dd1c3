"""Which experts a token uses and with what weight. Shapes: T tokens, h width, N experts, s neurons each, d = N·s.

``expert_indices`` ``[T, k]`` are a token's chosen experts, first choice first.
"""

from __future__ import annotations

import math
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.nn import functional as F

from emoe.config import BalanceLoss, Selection, Weighting

_COPIED_AT_ONCE = 1 << 19  # numbers


def expert_means(rows: Tensor, num_experts: int, value_norms: Tensor | None = None) -> Tensor:
    """Mean over each expert's neurons in float32, ``[d, ...]`` to ``[N, ...]``.

    Args:
        rows: one entry a neuron, expert e owning ``[e*s, (e+1)*s)``.
        num_experts: N.
        value_norms: ``[d]``; weight each neuron in proportion to it instead of equally.
    """
    blocks = rows.unflatten(0, (num_experts, -1))
    if value_norms is None:
        return neuron_means(blocks)
    norms = value_norms.float().unflatten(0, (num_experts, -1))
    return torch.einsum("ns,ns...->n...", norms / norms.sum(1, keepdim=True).clamp_min(1e-12), blocks.float())


def neuron_means(blocks: Tensor) -> Tensor:
    """Mean over the neurons of blocks in float32, ``[N, s, ...]`` to ``[N, ...]``."""
    if blocks.dtype == torch.float32 or blocks.device.type != "cpu" or torch.compiler.is_compiling():
        return blocks.float().mean(1)
    # a few experts at a time: a copy of a large layer in float32 is new memory in each pass, which takes longer to get than the means to compute
    at_once = max(_COPIED_AT_ONCE // max(blocks[:1].numel(), 1), 1)
    return torch.cat([part.float().mean(1) for part in blocks.split(at_once)])


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
    autocast = torch.is_autocast_enabled(x.device.type)
    with torch.autocast(x.device.type, enabled=False) if autocast else nullcontext():
        rows = F.normalize(x.float(), dim=-1) if unit_length else x.float()
        return F.linear(rows, gate, bias)


def block_means(values: Tensor, num_experts: int) -> Tensor:
    """Mean over each expert's neurons, ``[..., d]`` to ``[..., N]``, in float32."""
    return values.float().unflatten(-1, (num_experts, -1)).mean(-1)


def select_experts(scores: Tensor, top_k: int, selection: Selection) -> Tensor:
    """The experts to use, ``[T, k]``, first choice first. Equal scores go to the lower expert."""
    if selection == "random":
        scores = torch.rand_like(scores)
    order = _order(scores, descending=selection != "bottom")
    return order[:, top_k:] if selection == "not_top" else order[:, :top_k]


def _order(values: Tensor, *, descending: bool) -> Tensor:
    """Places of the values from first to last along the last dimension; equal ones stay in their order."""
    if torch.onnx.is_in_onnx_export():  # ONNX has no stable sort, but its TopK gives equal values in their order
        return values.topk(values.shape[-1], dim=-1, largest=descending).indices
    return torch.sort(values, dim=-1, descending=descending, stable=True).indices


def mask_above(scores: Tensor, expert_indices: Tensor, threshold: float) -> Tensor:
    """Which chosen experts ``[T, k]`` have a score of at least ``threshold``; the first choice always counts."""
    above = scores.gather(1, expert_indices) >= threshold
    above[:, 0] = True
    return above


def capacity_mask(
    scores: Tensor,
    expert_indices: Tensor,
    capacity_factor: float,
    top_k: int,
    token_mask: Tensor | None = None,
    used: Tensor | None = None,
) -> Tensor:
    """Which assignments find a place when every expert takes a limited number of them.

    Batch-prioritised: all first choices come before all second choices, and so on; within a choice
    the token with the highest softmax probability comes first, equal ones in their order.

    Args:
        scores: ``[T, N]``, those that chose the experts.
        expert_indices: ``[T, k]`` experts.
        capacity_factor: c; each expert takes ``top_k * int(c * ceil(T / N))`` assignments.
        top_k: experts that a token uses.
        token_mask: ``[T]`` bool; the other tokens (padding) are not in T and need no place.
        used: ``[T, k]`` bool; choices that are not in use need no place.

    Returns:
        ``[T, k]`` bool.
    """
    num_experts = scores.shape[1]
    waiting = torch.ones_like(expert_indices, dtype=torch.bool) if used is None else used.clone()
    tokens = expert_indices.new_tensor(expert_indices.shape[0])
    if token_mask is not None:
        waiting &= token_mask.unsqueeze(1)
        tokens = token_mask.sum()
    capacity = top_k * (capacity_factor * (tokens.double() / num_experts).ceil()).long()
    order = _order(scores.softmax(-1).amax(-1), descending=True)
    # all assignments in the order in which they get places; those that need none go to a queue of their own
    queue = torch.where(waiting, expert_indices, num_experts)[order].t().flatten()
    by_expert = _order(queue, descending=False)
    lengths = queue.new_zeros(num_experts + 1).scatter_add_(0, queue, torch.ones_like(queue))
    starts = lengths.cumsum(0) - lengths
    place = torch.empty_like(queue)
    place[by_expert] = torch.arange(queue.numel(), device=queue.device) - starts[queue[by_expert]]
    fits = torch.empty_like(waiting)
    fits[order] = (place < capacity).view(expert_indices.shape[1], -1).t()
    return fits | ~waiting


def expert_mask(expert_indices: Tensor, num_experts: int, used: Tensor | None = None) -> Tensor:
    """Boolean mask ``[T, N]`` of the experts in ``expert_indices``; ``used`` ``[T, k]`` leaves some out."""
    mask = torch.zeros(expert_indices.shape[0], num_experts, dtype=torch.bool, device=expert_indices.device)
    return mask.scatter(1, expert_indices, torch.ones_like(expert_indices, dtype=torch.bool) if used is None else used)


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
    token_mask: Tensor | None = None,
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
        token_mask: ``[T]`` bool, tokens that count; None for all.
    """
    share = torch.ones_like(clean[:, :1]) if token_mask is None else token_mask.unsqueeze(1).to(clean.dtype)
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
