"""A network of plain or gated FFNs, for tests that need their own shapes and weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import emoe

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "silu": nn.SiLU,
}
SPECS = (
    emoe.FFNSpec("layers", "inner", "act", "outer", proj_up="up"),
    emoe.FFNSpec("layers", "inner", "act", "outer"),
)


class FFN(nn.Module):
    def __init__(
        self, hidden: int, width: int, activation: str = "gelu", *, gated: bool = False
    ) -> None:
        super().__init__()
        self.inner = nn.Linear(hidden, width, bias=not gated)
        self.up = nn.Linear(hidden, width, bias=False) if gated else None
        self.act = ACTIVATIONS[activation]()
        self.outer = nn.Linear(width, hidden, bias=not gated)

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.inner(x))
        if self.up is not None:
            h = h * self.up(x)
        return self.outer(h)


class PlainNet(nn.Module):
    """Apply FFNs one after another."""

    def __init__(self, *ffns: FFN) -> None:
        super().__init__()
        self.layers = nn.ModuleList(ffns)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def plain_net(
    hidden: int, width: int, *, gated: bool = False, seed: int = 0, layers: int = 1
) -> PlainNet:
    """Build a net with random weights and biases in evaluation mode.

    Equal seeds give equal weights.
    """
    torch.manual_seed(seed)
    ffns = [FFN(hidden, width, gated=gated) for _layer in range(layers)]
    net = PlainNet(*ffns)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(0, 0.5)
    return net.eval()
