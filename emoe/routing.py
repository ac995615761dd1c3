"""Selection and weighting of experts. Shapes: T tokens, h width, N experts of s neurons, d = N·s neurons.

``expert_indices`` ``[T, k]`` are a token's chosen experts, first choice first.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from emoe.compiled.build import kernels_for
from emoe.config import BalanceLoss, Selection, Weighting


def select_experts(scores: Tensor, top_k: int, selection: Selection) -> Tensor:
    """Choose experts ``[T, k]``, first choice first. Ties go to the lower expert index."""
    if selection == "random":
        scores = torch.rand_like(scores)
    order = _stable_order(scores, descending=selection != "bottom")
    return order[:, top_k:] if selection == "not_top" else order[:, :top_k]


def choose_experts(scores: Tensor, top_k: int, selection: Selection) -> Tensor:
    """Mask the experts ``[T, N]`` that :func:`select_experts` chooses, without their order.

    The compiled kernels, if they were built, need no sort.
    """
    kernels = kernels_for(scores) if selection in ("top", "bottom") else None
    if kernels is not None and scores.dtype == torch.float32:
        return kernels.choose(scores, top_k, selection == "top")
    return expert_mask(select_experts(scores, top_k, selection), scores.shape[-1])


def _stable_order(values: Tensor, *, descending: bool) -> Tensor:
    """Return the indices that sort the last dimension; equal values keep their order."""
    if (
        torch.onnx.is_in_onnx_export()
    ):  # ONNX has no stable sort, but its TopK keeps the order of equal values
        return values.topk(values.shape[-1], dim=-1, largest=descending).indices
    return torch.sort(values, dim=-1, descending=descending, stable=True).indices


def capacity_mask(
    scores: Tensor,
    expert_indices: Tensor,
    capacity_factor: float,
    top_k: int,
    token_mask: Tensor | None = None,
) -> Tensor:
    """Mask the assignments ``[T, k]`` bool that fit into the experts' capacity.

    Routing is batch-prioritised: all first choices come before all second choices, and so on. Within a choice, tokens
    are ordered by their highest softmax probability.

    Args:
        scores: scores ``[T, N]`` that chose the experts.
        expert_indices: chosen experts ``[T, k]``.
        capacity_factor: factor c; each expert takes ``top_k * int(c * ceil(T / N))`` assignments.
        top_k: number of experts that a token uses.
        token_mask: real tokens ``[T]`` bool; padding tokens do not count in T and take no capacity.
    """
    num_experts = scores.shape[1]
    waiting = torch.ones_like(expert_indices, dtype=torch.bool)
    tokens = expert_indices.new_tensor(expert_indices.shape[0])
    if token_mask is not None:
        waiting &= token_mask.unsqueeze(1)
        tokens = token_mask.sum()
    # float64 like the authors' Python numbers; on the CPU, because MPS has no float64
    capacity = top_k * (capacity_factor * (tokens.cpu().double() / num_experts).ceil()).long().to(
        scores.device
    )
    order = _stable_order(scores.softmax(-1).amax(-1), descending=True)
    # all assignments in order of priority; padding has a separate queue
    queue = torch.where(waiting, expert_indices, num_experts)[order].t().flatten()
    by_expert = _stable_order(queue, descending=False)
    lengths = queue.new_zeros(num_experts + 1).scatter_add_(0, queue, torch.ones_like(queue))
    starts = lengths.cumsum(0) - lengths
    rank = torch.empty_like(queue)
    rank[by_expert] = torch.arange(queue.numel(), device=queue.device) - starts[queue[by_expert]]
    fits = torch.empty_like(waiting)
    fits[order] = (rank < capacity).view(expert_indices.shape[1], -1).t()
    return fits | ~waiting


def expert_mask(expert_indices: Tensor, num_experts: int, kept: Tensor | None = None) -> Tensor:
    """Return the mask ``[T, N]`` of experts ``[T, k]``, except those where ``kept`` ``[T, k]`` is False."""
    mask = torch.zeros(
        expert_indices.shape[0], num_experts, dtype=torch.bool, device=expert_indices.device
    )
    marks = torch.ones_like(expert_indices, dtype=torch.bool) if kept is None else kept
    return mask.scatter(1, expert_indices, marks)


def expert_weights(scores: Tensor, mask: Tensor, weighting: Weighting, top_k: int) -> Tensor:
    """Compute the weights ``[T, N]`` of the chosen experts; the others have weight zero.

    ``softmax`` normalises over the chosen experts, or over all experts if ``top_k`` is 1, because the weight would
    be constant. ``softmax_times_k`` multiplies by the number of chosen experts: the mean is 1, as with ``binary``.
    """
    if weighting == "binary":
        return mask.to(scores.dtype)
    if weighting == "softmax" and top_k == 1:
        return scores.softmax(-1) * mask
    weights = scores.masked_fill(~mask, -math.inf).softmax(-1)
    return weights * mask.sum(-1, keepdim=True) if weighting == "softmax_times_k" else weights


def balance_loss(
    clean: Tensor,
    noisy: Tensor,
    mask: Tensor,
    noise_std: float,
    formula: BalanceLoss = "corrected",
    token_mask: Tensor | None = None,
) -> Tensor:
    """Compute the squared coefficient of variation of the experts' importance and, with noise, of their load.

    Importance is the sum of softmax probabilities. Load is the expected number of tokens under the router's noise: the
    probability that a clean score exceeds the lowest chosen noisy score. Without noise, the importance is the loss.

    Args:
        clean: scores ``[T, N]`` before the noise.
        noisy: scores ``[T, N]`` that chose the experts.
        mask: chosen experts ``[T, N]``.
        noise_std: standard deviation of the noise, 0 for none.
        formula: ``published`` uses the clean *probability* in the load, as the authors' code does.
        token_mask: tokens ``[T]`` bool that count, None for all.
    """
    share = (
        torch.ones_like(clean[:, :1])
        if token_mask is None
        else token_mask.unsqueeze(1).to(clean.dtype)
    )
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
