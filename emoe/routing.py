"""Which experts a token uses and with what weight. Shapes: T tokens, h width, N experts."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from emoe.config import Selection, Weighting

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


def avg_k_scores(x: Tensor, keys: Tensor, num_experts: int, bias: Tensor | None = None) -> Tensor:
    """Mean pre-activation of each expert's neurons, through the mean keys (paper Eq. 4).

    Computed in float32 with autocast off: in bf16 several percent of tokens would change experts.

    Args:
        x: ``[T, h]``.
        keys: ``[d, h]``, expert e owning rows ``[e*s, (e+1)*s)``.
        num_experts: N.
        bias: ``[d]``; its block means are added when given (not in the paper's score).

    Returns:
        ``[T, N]`` float32.
    """
    with torch.autocast(x.device.type, enabled=False):
        mean_keys = keys.float().unflatten(0, (num_experts, -1)).mean(1)
        mean_bias = None if bias is None else bias.float().unflatten(0, (num_experts, -1)).mean(1)
        return F.linear(x.float(), mean_keys, mean_bias)


def select_experts(scores: Tensor, top_k: int, selection: Selection) -> Tensor:
    """Boolean mask ``[T, N]`` of the experts to use. Equal scores go to the lower expert."""
    if selection == "random":
        scores = torch.rand_like(scores)
    order = torch.sort(scores, dim=-1, descending=selection != "bottom", stable=True).indices
    mask = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order[..., :top_k], True)
    return ~mask if selection == "not_top" else mask


def expert_weights(scores: Tensor, mask: Tensor, weighting: Weighting) -> Tensor:
    """Weights ``[T, N]`` of the chosen experts, zero elsewhere.

    ``softmax`` normalises over the chosen experts; ``softmax_times_k`` multiplies that by their
    number, so that the mean weight is 1 as in ``binary``.
    """
    if weighting == "binary":
        return mask.to(scores.dtype)
    weights = scores.masked_fill(~mask, -math.inf).softmax(-1)
    if weighting == "softmax_times_k":
        weights = weights * mask.sum(-1, keepdim=True)
    return weights


def balance_loss(clean: Tensor, noisy: Tensor, mask: Tensor, noise_std: float) -> Tensor:
    """Squared coefficient of variation of the experts' importance and, with noise, of their load.

    Importance is the sum of softmax probabilities. Load is the expected number of tokens under the
    router's noise: the chance that a clean score passes the lowest chosen noisy score. (The
    authors' code compares probabilities with scores there.) Without noise the load has
    no gradient and importance stands alone.

    Args:
        clean: scores ``[T, N]`` before the noise.
        noisy: scores ``[T, N]`` that chose the experts.
        mask: chosen experts ``[T, N]``.
        noise_std: standard deviation of the noise; 0 for none.
    """
    importance = _squared_variation(clean.softmax(-1).sum(0))
    if noise_std == 0:
        return importance
    threshold = noisy.masked_fill(~mask, math.inf).amin(-1, keepdim=True)
    load = torch.special.ndtr((clean - threshold) / noise_std).sum(0)
    return (importance + _squared_variation(load)) / 2


def _squared_variation(values: Tensor) -> Tensor:
    if values.numel() == 1:
        return values.sum() * 0
    return values.var() / (values.mean().square() + 1e-10)
