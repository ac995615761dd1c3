"""Compute the experts of one FFN with other implementations: the authors' block mask, and transformers."""

from __future__ import annotations

import copy
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
    """Hold one FFN in a list of layers, which ``emoe.convert_`` needs."""

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


class BlockMask(nn.Module):
    """Compute all neurons, and mask blocks by their mean pre-activation, as the authors' Llama code does."""

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
    """Compute the FFN's blocks, chosen by mean keys, in an expert layer of transformers (without biases).

    Args:
        implementation: The implementation of transformers' experts, ``eager`` or ``grouped_mm``.
    """

    def __init__(self, ffn: FFN, num_experts: int, top_k: int, implementation: str) -> None:
        super().__init__()
        self.top_k = top_k
        hidden, size = ffn.inner.in_features, ffn.inner.out_features // num_experts
        shared = {"_experts_implementation": implementation, "hidden_size": hidden}
        inner = ffn.inner.weight.detach().unflatten(0, (num_experts, size))
        self.register_buffer("gate", inner.mean(1))
        if ffn.up is None:
            sizes = {"n_routed_experts": num_experts, "moe_intermediate_size": size, "moe_latent_size": None}
            config: Any = SimpleNamespace(**shared, **sizes, mlp_hidden_act="gelu")
            self.experts: nn.Module = NemotronHExperts(config)
            self.experts.up_proj = nn.Parameter(inner.clone())
        else:
            sizes = {"num_local_experts": num_experts, "intermediate_size": size}
            self.experts = MixtralExperts(cast(Any, SimpleNamespace(**shared, **sizes, hidden_act="silu")))
            up = ffn.up.weight.detach().unflatten(0, (num_experts, size))
            self.experts.gate_up_proj = nn.Parameter(torch.cat([inner, up], 1))
        values = ffn.outer.weight.detach().unflatten(1, (num_experts, size))
        self.experts.down_proj = nn.Parameter(values.transpose(0, 1).contiguous())

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            chosen = F.linear(x, cast(Tensor, self.gate)).topk(self.top_k, dim=-1).indices
        return cast(Tensor, self.experts(x, chosen, torch.ones_like(chosen, dtype=x.dtype)))
