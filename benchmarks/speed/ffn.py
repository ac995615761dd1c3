"""One FFN, dense and as experts: ours, the authors' block mask, and the expert layers of transformers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

import emoe


class FFN(nn.Module):
    """Compute a plain (GELU, with biases) or gated (SiLU, without) FFN with random weights."""

    def __init__(self, hidden: int, neurons: int, *, gated: bool) -> None:
        super().__init__()
        self.inner = nn.Linear(hidden, neurons, bias=not gated)
        self.up = nn.Linear(hidden, neurons, bias=False) if gated else None
        self.act = nn.SiLU() if gated else nn.GELU()
        self.outer = nn.Linear(neurons, hidden, bias=not gated)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.act(self.inner(x))
        return cast(Tensor, self.outer(hidden if self.up is None else hidden * self.up(x)))


class SpeedNet(nn.Module):
    """Hold one FFN in a list, as ``emoe.convert_`` reads it."""

    def __init__(self, ffn: FFN) -> None:
        super().__init__()
        self.layers = nn.ModuleList([ffn])

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.layers[0](x))


emoe.register_ffn(
    "SpeedNet",
    emoe.FFNSpec("layers", "inner", "act", "outer", proj_up="up"),
    emoe.FFNSpec("layers", "inner", "act", "outer"),
)


def convert_copy(ffn: FFN, num_experts: int, top_k: int, backend: str) -> nn.Module:
    """Convert a copy of the FFN, by a random partition, which takes no time to compute."""
    net = SpeedNet(copy.deepcopy(ffn))
    emoe.convert_(net, emoe.EMoEConfig(num_experts=num_experts, top_k=top_k, layers=[0], partition="random"))
    emoe.set_backend_(net, backend)
    return net


class BlockMask(nn.Module):
    """Compute every neuron, then a mask by the mean pre-activation of each block, as the authors' Llama code does."""

    def __init__(self, ffn: FFN, num_experts: int, top_k: int) -> None:
        super().__init__()
        self.ffn, self.num_experts, self.top_k = copy.deepcopy(ffn), num_experts, top_k

    def forward(self, x: Tensor) -> Tensor:
        ffn = self.ffn
        pre = ffn.inner(x)
        scores = pre.unflatten(-1, (self.num_experts, -1)).mean(-1)
        chosen = torch.zeros_like(scores).scatter(-1, scores.topk(self.top_k, dim=-1).indices, 1.0)
        mask = chosen.repeat_interleave(pre.shape[-1] // self.num_experts, dim=-1)
        hidden = ffn.act(pre) if ffn.up is None else ffn.act(pre) * ffn.up(x)
        return cast(Tensor, ffn.outer(hidden * mask))


class TransformersExperts(nn.Module):
    """Compute the FFN's blocks in an expert layer of transformers (without biases), chosen by mean keys.

    Args:
        ffn: The weights.
        num_experts: N.
        top_k: k.
        implementation: The implementation of transformers' experts, ``eager`` or ``grouped_mm``.
    """

    def __init__(self, ffn: FFN, num_experts: int, top_k: int, implementation: str) -> None:
        super().__init__()
        self.top_k = top_k
        hidden, size = ffn.inner.in_features, ffn.inner.out_features // num_experts
        config: Any = SimpleNamespace(
            _experts_implementation=implementation,
            num_local_experts=num_experts,
            n_routed_experts=num_experts,
            hidden_size=hidden,
            intermediate_size=size,
            moe_intermediate_size=size,
            moe_latent_size=None,
            hidden_act="silu",
            mlp_hidden_act="gelu",
        )
        inner = ffn.inner.weight.detach().unflatten(0, (num_experts, size))
        self.register_buffer("gate", inner.mean(1))
        if ffn.up is None:
            self.experts: nn.Module = NemotronHExperts(config)
            self.experts.up_proj = nn.Parameter(inner.clone())
        else:
            up = ffn.up.weight.detach().unflatten(0, (num_experts, size))
            self.experts = MixtralExperts(config)
            self.experts.gate_up_proj = nn.Parameter(torch.cat([inner, up], 1))
        values = ffn.outer.weight.detach().unflatten(1, (num_experts, size))
        self.experts.down_proj = nn.Parameter(values.transpose(0, 1).contiguous())

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            chosen = F.linear(x, cast(Tensor, self.gate)).topk(self.top_k, dim=-1).indices
        return cast(Tensor, self.experts(x, chosen, torch.ones_like(chosen, dtype=x.dtype)))


CANDIDATES: dict[str, Callable[[FFN, int, int], nn.Module]] = {
    "dense": lambda ffn, *_: SpeedNet(ffn),
    "sparse": lambda ffn, n, k: convert_copy(ffn, n, k, "sparse"),
    "masked": lambda ffn, n, k: convert_copy(ffn, n, k, "masked"),
    "block_mask": BlockMask,
    "transformers_eager": lambda ffn, n, k: TransformersExperts(ffn, n, k, "eager"),
    "transformers_grouped": lambda ffn, n, k: TransformersExperts(ffn, n, k, "grouped_mm"),
}
