"""Time and memory of one FFN of experts, forward and backward, beside the dense FFN."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from benchmarks.speed.definition import LayerSettings, RunModel
from benchmarks.speed.ffn import CANDIDATES, FFN
from benchmarks.speed.timing import ratios, side_by_side
from emoe.sparse.cost_model import predicted_time_ratio


def measure(model: RunModel, settings: LayerSettings) -> dict[str, dict[str, float]]:
    """Ratios by candidate: time, and what is kept for the backward pass.

    Args:
        model: ``hidden`` and ``neurons`` of the FFN, and whether it is ``gated``.
        settings: of the measure.
    """
    n, k, dtype = settings.num_experts, settings.top_k, getattr(torch, settings.dtype)
    hidden, neurons = cast(int, model.hidden), cast(int, model.neurons)
    ffn = FFN(hidden, neurons, gated=bool(model.gated))
    nets = {name: CANDIDATES[name](ffn, n, k).to(dtype) for name in ("dense", *settings.candidates)}
    x = torch.randn(settings.tokens, hidden, dtype=dtype)
    gradient = torch.randn_like(x)
    found = ratios(
        side_by_side({name: functools.partial(_pass, net, x, gradient) for name, net in nets.items()}, settings.rounds),
        "dense",
    )
    kept = {name: kept_bytes(net, functools.partial(net, x.requires_grad_())) for name, net in nets.items()}
    for name, row in found.items():
        row["memory_ratio"] = kept[name] / kept["dense"]
    expected = predicted_time_ratio(len(x), hidden, neurons // n, k / n, dtype, torch.get_num_threads())
    if "sparse" in found and expected is not None:
        found["sparse"]["expected_ratio"] = expected
    return found


def _pass(net: nn.Module, x: Tensor, gradient: Tensor) -> None:
    net.zero_grad()
    net(x.detach().requires_grad_()).backward(gradient)


def kept_bytes(net: nn.Module, forward: Callable[[], object]) -> int:
    """Bytes that a forward pass keeps for the backward pass, weights and buffers not counted."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*net.parameters(), *net.buffers())}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(size for pointer, size in sizes.items() if pointer not in own)
