"""Small converted models, and the comparison of a training step of two of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import emoe
from tests import tiny_models
from tests.plain_net import PlainNet, plain_net

Config = emoe.EMoEConfig | emoe.GMoEConfig
Settings = dict[str, Any]
SETTINGS: dict[str, Settings] = {
    "plain": {},
    "learned": {"router": "cosine", "weighting": "softmax_times_k"},
    "output biases": {"output_bias": "per_expert"},
}
PUBLISHED: dict[str, Config] = {
    "emoe": emoe.EMoEConfig.as_published("tutel", num_experts=8, top_k=2, layers="all"),
    "emoe_learn": emoe.EMoEConfig.as_published("tutel", num_experts=8, top_k=2, layers="all", router="cosine"),
    "gmoe": emoe.GMoEConfig.as_published("tutel", num_experts=4, layers="all", count_padding=False),
}
BACKENDS = ("masked", "sparse")


def net(backend: str = "masked", gated: bool | None = None, config: Config | None = None, **settings: Any) -> PlainNet:
    """Convert one FFN of 64 neurons and width 16, two of eight experts; gated unless experts have output biases."""
    network = plain_net(16, 64, gated="output_bias" not in settings if gated is None else gated)
    torch.manual_seed(0)
    emoe.convert_(network, config or emoe.EMoEConfig(**{"num_experts": 8, "top_k": 2, "layers": [0], **settings}))
    emoe.set_backend_(network, backend)
    return network


def model(name: str, backend: str = "masked", config: Config | None = None, **settings: Any) -> Any:
    """Convert a tiny model; two of eight experts in every FFN unless a configuration or settings differ."""
    converted = tiny_models.build(name)
    torch.manual_seed(0)
    emoe.convert_(converted, config or emoe.EMoEConfig(**{"num_experts": 8, "top_k": 2, "layers": "all", **settings}))
    emoe.set_backend_(converted, backend)
    return converted.eval()


def inputs(rows: int = 5, seed: int = 0) -> Tensor:
    """Draw inputs of :func:`net`."""
    return torch.randn(rows, 16, generator=torch.Generator().manual_seed(seed))


def without_dropout(model: nn.Module) -> nn.Module:
    """Switch to training mode with dropout modules that drop nothing."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.train()


def step(model: nn.Module, values: Tensor | dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the output and all gradients of one step, by parameter name; the same seed for each call."""
    torch.manual_seed(1)
    model.zero_grad()
    y = tiny_models.output(model, {"x": values} if isinstance(values, Tensor) else values)
    loss = (y.float() * torch.linspace(-1, 1, y.numel(), device=y.device).view_as(y)).sum() + emoe.aux_loss(model)
    loss.backward()
    return {"output": y.detach()} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Compare two steps. Some gradients are zero except for rounding, so the largest gradient sets the scale."""
    assert actual.keys() == expected.keys()
    torch.testing.assert_close(actual["output"], expected["output"], atol=1e-4, rtol=1e-4)
    scale = max(float(tensor.abs().max()) for tensor in expected.values())
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, atol=1e-5 * scale, rtol=1e-3, msg=name)
