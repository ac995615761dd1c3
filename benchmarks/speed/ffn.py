"""Compute the experts of one FFN with transformers."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import MixtralConfig, NemotronHConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

from emoe.architectures import FFN


class TransformersExperts(nn.Module):
    """Compute the FFN's blocks, chosen by mean keys, in an expert layer of transformers (without biases).

    Args:
        implementation: The implementation of transformers' experts, ``eager`` or ``grouped_mm``.
    """

    def __init__(self, ffn: FFN, num_experts: int, top_k: int, implementation: str) -> None:
        super().__init__()
        self.top_k = top_k
        keys, outer = ffn.keys().detach().unflatten(0, (num_experts, -1)), cast(Tensor, ffn.proj_out.weight).detach()
        self.register_buffer("gate", keys.mean(1))
        sizes = {"hidden_size": keys.shape[2], "experts_implementation": implementation}
        if ffn.proj_up is None:
            sizes |= {"n_routed_experts": num_experts, "moe_intermediate_size": keys.shape[1]}
            self.experts: Any = NemotronHExperts(NemotronHConfig(**sizes, mlp_hidden_act="gelu"))
            self.experts.up_proj = nn.Parameter(keys.clone())
        else:
            sizes |= {"num_local_experts": num_experts, "intermediate_size": keys.shape[1]}
            self.experts = MixtralExperts(MixtralConfig(**sizes, hidden_act="silu"))
            up = cast(Tensor, ffn.proj_up.weight).detach().unflatten(0, (num_experts, -1))
            self.experts.gate_up_proj = nn.Parameter(torch.cat([keys, up], 1))
        self.experts.down_proj = nn.Parameter(outer.unflatten(1, (num_experts, -1)).transpose(0, 1).contiguous())

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            chosen = F.linear(x, cast(Tensor, self.gate)).topk(self.top_k, dim=-1).indices
        return cast(Tensor, self.experts(x, chosen, torch.ones_like(chosen, dtype=x.dtype)))
