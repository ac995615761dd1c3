"""Selection and weighting of experts.

Shapes: T tokens, N experts, k chosen experts per token. ``expert_indices`` ``[T, k]`` are the
chosen experts of each token, first choice first. With ``selection="not_top"``, N - k experts are
chosen.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from emoe.compiled.build import kernels_for
from emoe.config import BalanceLoss, Selection, Weighting


def choose_indices(scores: Tensor, top_k: int, selection: Selection) -> Tensor:
    """Return the indices of each token's experts, first choice first.

    Ties go to the lower expert index.

    Args:
        scores: scores ``[T, N]``. Random selection uses only their shape.
        top_k: number of experts k. ``not_top`` chooses the ``N - top_k`` other experts instead.
        selection: experts that are chosen: the ``top`` k by score, the ``bottom`` k, ``random`` k,
            or all but the top k (``not_top``).

    Returns:
        Expert indices ``[T, k]``. With ``not_top``, ``[T, N - k]``.
    """
    if selection == "random":
        scores = torch.rand_like(scores)
    is_descending = selection != "bottom"
    order = _stable_order(scores, descending=is_descending)
    if selection == "not_top":
        return order[:, top_k:]
    return order[:, :top_k]


def choose_mask(scores: Tensor, top_k: int, selection: Selection) -> Tensor:
    """Return the mask ``[T, N]`` of the experts that :func:`choose_indices` chooses.

    The mask does not show their order. So the compiled kernels, which are used if they were built,
    need no sort.
    """
    if selection in ("top", "bottom") and scores.dtype == torch.float32:
        kernels = kernels_for(scores)
        if kernels is not None:
            takes_highest = selection == "top"
            return kernels.choose(scores, top_k, takes_highest)
    expert_indices = choose_indices(scores, top_k, selection)
    num_experts = scores.shape[-1]
    return expert_mask(expert_indices, num_experts)


def _stable_order(values: Tensor, *, descending: bool) -> Tensor:
    """Return the indices that sort the last dimension; equal values keep their order."""
    # ONNX has no stable sort, but its TopK keeps the order of equal values
    if torch.onnx.is_in_onnx_export():
        return values.topk(values.shape[-1], dim=-1, largest=descending).indices
    return torch.sort(values, dim=-1, descending=descending, stable=True).indices


def capacity_mask(
    scores: Tensor,
    expert_indices: Tensor,
    capacity_factor: float,
    num_active_experts: int,
    token_mask: Tensor | None = None,
) -> Tensor:
    """Return the mask ``[T, k]`` bool of the choices that fit into the experts' capacity.

    Routing is batch-prioritised: the first choices of all tokens come before all second choices,
    and so on. Within each of these groups, tokens are ordered by their highest softmax probability.
    The mask is always true for padding tokens.

    Args:
        scores: scores ``[T, N]`` that chose the experts.
        expert_indices: chosen experts ``[T, k]``.
        capacity_factor: factor c. Each expert takes ``num_active_experts * int(c * ceil(T / N))``
            choices.
        num_active_experts: number of experts that a token uses.
        token_mask: real tokens ``[T]`` bool; padding tokens do not count in T and take no capacity.
    """
    num_experts = scores.shape[1]
    if token_mask is None:
        is_real = torch.ones_like(expert_indices, dtype=torch.bool)  # [T, k]
        num_tokens = expert_indices.new_tensor(expert_indices.shape[0])
    else:
        is_real = token_mask.unsqueeze(1).expand_as(expert_indices)  # [T, k]
        num_tokens = token_mask.sum()

    # float64 like the authors' Python numbers; on the CPU, because MPS has no float64
    exact_num_tokens = num_tokens.cpu().double()
    tokens_per_expert = (exact_num_tokens / num_experts).ceil()
    # More places than tokens have no effect. Without this limit, a very large factor would give a
    # number that no integer can hold, and all choices would be dropped.
    places_per_choice = torch.minimum(capacity_factor * tokens_per_expert, exact_num_tokens)
    capacity = num_active_experts * places_per_choice.long().to(scores.device)

    # tokens with the most confident choice come first
    confidence = scores.softmax(-1).amax(-1)
    order = _stable_order(confidence, descending=True)
    # Padding tokens queue for an extra expert, number N. So they take no capacity of real experts.
    experts = torch.where(is_real, expert_indices, num_experts)
    experts_by_confidence = experts[order]  # [T, k], tokens in the order of priority
    # the first choices of all tokens, then the second ones, and so on [k * T]
    queue = experts_by_confidence.t().flatten()

    # a choice fits if fewer choices than the capacity are before it in its expert's queue
    num_before = _rank_in_group(queue, num_experts + 1)
    fits_in_queue = num_before < capacity

    # back to [T, k], then to the original order of the tokens
    num_choices = expert_indices.shape[1]
    fits_by_confidence = fits_in_queue.view(num_choices, -1).t()
    fits = torch.empty_like(fits_by_confidence)
    fits[order] = fits_by_confidence
    return fits | ~is_real


def _rank_in_group(groups: Tensor, num_groups: int) -> Tensor:
    """Count for each element of ``groups`` ``[n]`` the earlier elements with the same group.

    For the groups ``[1, 0, 1, 1, 0]`` the counts are ``[0, 0, 1, 2, 1]``.
    """
    # number of elements of each group, and of the elements of all groups before it
    sizes = groups.new_zeros(num_groups).scatter_add_(0, groups, torch.ones_like(groups))
    starts = sizes.cumsum(0) - sizes
    # Sorted by group, a group's elements are adjacent and keep their order. So an element's rank is
    # its distance from the start of its group.
    by_group = _stable_order(groups, descending=False)
    sorted_groups = groups[by_group]
    positions = torch.arange(groups.numel(), device=groups.device)
    sorted_ranks = positions - starts[sorted_groups]
    # back to the original order
    ranks = torch.empty_like(groups)
    ranks[by_group] = sorted_ranks
    return ranks


def expert_mask(expert_indices: Tensor, num_experts: int, kept: Tensor | None = None) -> Tensor:
    """Return the mask ``[T, N]`` of the chosen experts.

    Args:
        expert_indices: chosen experts ``[T, k]``.
        num_experts: number of experts N.
        kept: choices ``[T, k]`` bool to put into the mask, None for all.
    """
    if kept is None:
        kept = torch.ones_like(expert_indices, dtype=torch.bool)
    num_tokens = expert_indices.shape[0]
    mask = torch.zeros(num_tokens, num_experts, dtype=torch.bool, device=expert_indices.device)
    return mask.scatter(1, expert_indices, kept)


def expert_weights(
    scores: Tensor, mask: Tensor, weighting: Weighting, num_active_experts: int
) -> Tensor:
    """Compute the weights ``[T, N]`` of the chosen experts; the others have weight zero.

    ``binary`` gives every chosen expert weight 1. ``softmax`` normalises over the chosen experts.
    With one active expert, it normalises over all, because a single weight would be constant.
    ``softmax_times_k`` multiplies by the number of chosen experts, so their mean weight is 1, as
    with ``binary``.
    """
    if weighting == "binary":
        return mask.to(scores.dtype)
    if weighting == "softmax" and num_active_experts == 1:
        return scores.softmax(-1) * mask
    # experts that were not chosen get the probability 0
    chosen_scores = scores.masked_fill(~mask, -math.inf)
    weights = chosen_scores.softmax(-1)
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
    """Compute how unevenly the experts are used, as a squared coefficient of variation.

    Without noise, it is the squared coefficient of variation of the experts' importance. With
    noise, it is the mean of two such numbers, of the experts' importance and of their load.

    Importance is the softmax probability of an expert, summed over tokens. Load is the expected
    number of tokens of an expert under the router's noise: each token adds the probability that the
    expert's clean score exceeds the lowest noisy score among the token's chosen experts.

    Args:
        clean: scores ``[T, N]`` before the noise.
        noisy: scores ``[T, N]`` that chose the experts.
        mask: chosen experts ``[T, N]``.
        noise_std: standard deviation of the noise, 0 for none.
        formula: ``published`` uses the clean *probability* in the load, as the authors' code does.
        token_mask: tokens ``[T]`` bool that count, None for all.
    """
    # factor of each token in the sums over tokens [T, 1]: 1, or 0 for padding
    if token_mask is None:
        token_factor = torch.ones_like(clean[:, :1])
    else:
        token_factor = token_mask.unsqueeze(1).to(clean.dtype)
    probabilities = clean.softmax(-1)
    importance = (probabilities * token_factor).sum(0)
    importance_loss = _squared_variation(importance)
    if noise_std == 0:
        return importance_loss

    # the lowest noisy score of a token's chosen experts [T, 1]
    threshold = noisy.masked_fill(~mask, math.inf).amin(-1, keepdim=True)
    compared = probabilities if formula == "published" else clean
    # under normal noise, the chance that a score exceeds the threshold
    chance = torch.special.ndtr((compared - threshold) / noise_std)
    load = (chance * token_factor).sum(0)
    return (importance_loss + _squared_variation(load)) / 2


def _squared_variation(values: Tensor) -> Tensor:
    """Compute the squared coefficient of variation of values ``[N]``; 0 for a single value."""
    # A single value has no variance. The result is 0, but still has a gradient.
    if values.numel() == 1:
        return values.sum() * 0
    # the constant prevents a division by zero
    return values.var() / (values.mean().square() + 1e-10)
