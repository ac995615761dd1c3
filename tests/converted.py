"""Small converted models, and the comparison of a training step of two of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import emoe
from emoe.layer import routed_layers
from tests import tiny_models
from tests.plain_net import PlainNet, plain_net

Config = emoe.EMoEConfig | emoe.GMoEConfig
Settings = dict[str, Any]
SETTINGS: dict[str, Settings] = {
    "plain": {},
    "learned": {"router": "cosine", "weighting": "softmax_times_k"},
    "output biases": {"output_bias": "per_expert"},
}
USUAL: Settings = {"num_experts": 8, "top_k": 2, "layers": "all"}
PUBLISHED: dict[str, Config] = {
    "emoe": emoe.EMoEConfig.as_published("tutel", **USUAL),
    "emoe_learn": emoe.EMoEConfig.as_published("tutel", **USUAL, router="cosine"),
    "gmoe": emoe.GMoEConfig.as_published("tutel", num_experts=4, layers="all", count_padding=False),
}
VARIANTS: dict[str, Config] = {
    "plain": emoe.EMoEConfig(**USUAL, **SETTINGS["plain"]),
    "learned": emoe.EMoEConfig(**USUAL, **SETTINGS["learned"]),
    "output biases": emoe.EMoEConfig(**USUAL, **SETTINGS["output biases"]),
    "emoe": dataclasses.replace(PUBLISHED["emoe"], expert_dropout=0.0),
    "emoe_learn": dataclasses.replace(PUBLISHED["emoe_learn"], expert_dropout=0.0),
    "clean gmoe": emoe.GMoEConfig(num_experts=4, top_k=2, layers="all"),
    "score bias": emoe.EMoEConfig(**USUAL, score_bias=True, expert_dropout=0.3),
    "not_top": emoe.EMoEConfig(**USUAL, selection="not_top"),
    "gate": emoe.EMoEConfig(**USUAL, score="gate", weighting="softmax_times_k"),
    "up": emoe.EMoEConfig(**USUAL, score="up", weighting="softmax_times_k"),
    "momentum": emoe.EMoEConfig(**USUAL, gate_momentum=0.5, weighting="softmax"),
}
BACKENDS = ("masked", "sparse")


def net(
    backend: str = "masked",
    gated: bool | None = None,
    config: Config | None = None,
    **settings: Any,
) -> PlainNet:
    """Convert one FFN with 64 neurons, inputs of 16 numbers, and two of eight experts in use.

    By default it is gated, unless experts have output biases: the gated FFN has no biases.
    """
    if config is None:
        config = emoe.EMoEConfig(**{**USUAL, **settings})
    if gated is None:
        gated = config.output_bias == "shared"
    network = plain_net(16, 64, gated=gated)
    torch.manual_seed(0)
    emoe.convert_(network, config)
    emoe.set_backend_(network, backend)
    return network


def model(name: str, backend: str = "masked", config: Config | None = None, **settings: Any) -> Any:
    """Convert a tiny model. By default every FFN uses two of eight experts."""
    if config is None:
        config = emoe.EMoEConfig(**{**USUAL, **settings})
    converted = tiny_models.build(name)
    torch.manual_seed(0)
    emoe.convert_(converted, config)
    emoe.set_backend_(converted, backend)
    return converted.eval()


def inputs(rows: int = 5, seed: int = 0) -> Tensor:
    """Draw inputs of :func:`net`."""
    return torch.randn(rows, 16, generator=torch.Generator().manual_seed(seed))


def active_neurons(network: PlainNet, x: Tensor) -> Tensor:
    """Return the neurons that a net of one FFN activates, ``[tokens, experts, neurons]``.

    Those of other experts are zero, so no activation may be zero.
    """
    layer = routed_layers(network)[0]
    outputs: list[Tensor] = []
    hook = layer.register_forward_hook(lambda module, args, y: outputs.append(y.detach()))
    network(x)
    hook.remove()
    activations = outputs[0].unflatten(-1, (layer.config.num_experts, -1))
    return activations.ne(0)


def without_dropout(model: nn.Module) -> nn.Module:
    """Switch to training mode with dropout modules that drop nothing."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.train()


def step(model: nn.Module, values: Tensor | dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the ``output`` and all gradients of one step, by parameter name.

    Each call has the same seed.
    """
    torch.manual_seed(1)
    model.zero_grad()
    arguments = {"x": values} if isinstance(values, Tensor) else values
    y = tiny_models.output(model, arguments)
    # with a different factor for each number of the output, so that all gradients differ
    factors = torch.linspace(-1, 1, y.numel(), device=y.device).view_as(y)
    loss = (y.float() * factors).sum() + emoe.aux_loss(model)
    loss.backward()

    result = {"output": y.detach()}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            result[name] = parameter.grad
    return result


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Compare two steps.

    Some gradients are zero except for rounding, so the largest number of the step sets the scale.
    """
    assert actual.keys() == expected.keys()
    torch.testing.assert_close(actual["output"], expected["output"], atol=1e-4, rtol=1e-4)
    scale = max(float(tensor.abs().max()) for tensor in expected.values())
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, atol=1e-5 * scale, rtol=1e-3, msg=name)


@contextmanager
def process_group(folder: Path, backend: str = "gloo") -> Iterator[None]:
    """Join a process group of one process."""
    dist.init_process_group(backend, init_method=f"file://{folder}/meeting", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()
