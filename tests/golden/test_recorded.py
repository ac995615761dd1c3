"""Against outputs and gradients that were recorded from the authors' two implementations (float32, CPU).

The clean method equals their Llama block mask, and their Tutel layer without capacity limit and noise. Where their layer holds
one output bias per expert, ours holds the sum over the chosen ones.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import emoe
from emoe import architectures

DATA = Path(__file__).parent / "data"


class FFN(nn.Module):
    def __init__(self, hidden: int, width: int, *, gated: bool) -> None:
        super().__init__()
        self.inner = nn.Linear(hidden, width, bias=not gated)
        self.up = nn.Linear(hidden, width, bias=False) if gated else None
        self.act = nn.SiLU() if gated else nn.GELU()
        self.outer = nn.Linear(width, hidden, bias=not gated)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.act(self.inner(x))
        return self.outer(h * self.up(x) if self.up is not None else h)


class RecordedNet(nn.Module):
    def __init__(self, ffn: FFN) -> None:
        super().__init__()
        self.layers = nn.ModuleList([ffn])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers[0](x)


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(architectures, "_REGISTRY", dict(architectures._REGISTRY))

    def register(*, gated: bool) -> None:
        emoe.register_ffn(
            "RecordedNet", emoe.FFNSpec("layers", "inner", "act", "outer", proj_up="up" if gated else None)
        )

    return register


def load(name: str) -> tuple[dict, dict[str, torch.Tensor]]:
    arrays = np.load(DATA / f"{name}.npz")
    return json.loads(str(arrays["meta"])), {
        key: torch.from_numpy(arrays[key]) for key in arrays.files if key != "meta"
    }


def run(net: RecordedNet, meta: dict, data: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and input gradient. The recorded experts are contiguous blocks already."""
    config = emoe.EMoEConfig(num_experts=meta["num_experts"], top_k=meta["top_k"], layers=[0], partition="contiguous")
    emoe.convert_(net, config)
    x = data["x"].clone().requires_grad_()
    y = net(x)
    (y * data["grad_y"]).sum().backward()
    assert x.grad is not None
    return y, x.grad


def close(found: torch.Tensor | None, expected: torch.Tensor) -> None:
    assert found is not None
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_llama_block_mask(registered) -> None:
    registered(gated=True)
    meta, data = load("llama_mask_gate")
    ffn = FFN(meta["hidden"], meta["intermediate"], gated=True)
    ffn.load_state_dict(
        {
            "inner.weight": data["gate_proj_weight"],
            "up.weight": data["up_proj_weight"],
            "outer.weight": data["down_proj_weight"],
        }
    )
    y, grad_x = run(RecordedNet(ffn), meta, data)
    close(y, data["y"])
    close(grad_x, data["grad_x"])
    close(ffn.inner.weight.grad, data["grad_gate_proj_weight"])
    close(ffn.up.weight.grad, data["grad_up_proj_weight"])
    close(ffn.outer.weight.grad, data["grad_down_proj_weight"])


def test_tutel_layer_without_capacity_limit(registered) -> None:
    registered(gated=False)
    meta, data = load("emoe_eval_dropless")
    ffn = FFN(meta["hidden"], meta["num_experts"] * meta["expert_size"], gated=False)
    ffn.load_state_dict(
        {
            "inner.weight": data["fc1_weight"],
            "inner.bias": data["fc1_bias"],
            "outer.weight": data["fc2_weight"],
            "outer.bias": data["fc2_bias_per_expert"][0] * meta["top_k"],
        }
    )
    y, _ = run(
        RecordedNet(ffn), meta, data
    )  # their input gradient also has the balance loss of a gate that we do not have
    close(y, data["y"])
    close(ffn.inner.weight.grad, data["grad_fc1_weight"])
    close(ffn.inner.bias.grad, data["grad_fc1_bias"])
    close(ffn.outer.weight.grad, data["grad_fc2_weight"])
