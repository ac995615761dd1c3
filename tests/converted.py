"""Small converted models by every backend, for tests of one behaviour in all settings."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import emoe
from tests import tiny_models
from tests.plain_net import plain_net

Settings = dict[str, Any]
SETTINGS: dict[str, Settings] = {
    "plain": {},
    "learned": {"router": "cosine", "weighting": "softmax_times_k"},
    "own biases": {"output_bias": "per_expert"},
}
BACKENDS = ("masked", "sparse")
LLAMA = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}


def net(backend: str = "auto", gated: bool = True, **settings: Any) -> nn.Module:
    """One gated FFN of 64 neurons and width 16, converted."""
    found = plain_net(16, 64, gated=gated)
    torch.manual_seed(0)
    emoe.convert_(found, emoe.EMoEConfig(num_experts=8, top_k=2, layers=[0], backend=backend, **settings))
    return found


def model(name: str, backend: str = "auto", **settings: Any) -> Any:
    """One of the tiny models, two of eight experts in each of its FFNs unless told otherwise."""
    found = tiny_models.build(name)
    torch.manual_seed(0)
    usual = {"num_experts": 8, "top_k": 2, "layers": "all", "backend": backend}
    emoe.convert_(found, emoe.EMoEConfig(**{**usual, **settings}))
    return found.eval()


def inputs(rows: int = 5, seed: int = 0) -> Tensor:
    return torch.randn(rows, 16, generator=torch.Generator().manual_seed(seed))
