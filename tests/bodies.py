"""FFNs with a body of somebody else's, by both backends, for tests of what other code does between and around their parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import emoe
from tests.plain_net import FFN, PlainNet

Body = Callable[[FFN, Tensor], Tensor]


class Written(FFN):
    """An FFN with a body of somebody else's."""

    def __init__(self, body: Body | None, *, gated: bool = False, bias: bool = True) -> None:
        super().__init__(16, 64, gated=gated)
        self.body = body
        if bias:
            self.outer = nn.Linear(64, 16)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.body is None else self.body(self, x)


def both(body: Body | None = None, *, gated: bool = False, **settings: Any) -> list[PlainNet]:
    """The same network by both backends, the masked one first."""
    found = []
    for backend in ("masked", "sparse"):
        torch.manual_seed(0)
        net = PlainNet(Written(body, gated=gated))
        config = {
            "num_experts": 8,
            "top_k": 2,
            "layers": [0],
            "partition": "contiguous",
            "backend": backend,
            **settings,
        }
        emoe.convert_(net, emoe.EMoEConfig(**config))
        found.append(net.eval())
    return found


def rows(count: int = 40) -> Tensor:
    return torch.randn(count, 16, generator=torch.Generator().manual_seed(0))


def agree(nets: list[PlainNet], x: Tensor) -> None:
    masked, sparse = (net(x) for net in nets)
    assert sparse.dtype == masked.dtype
    torch.testing.assert_close(sparse, masked, atol=1e-5, rtol=1e-4)
