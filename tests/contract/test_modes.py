"""Modes of PyTorch's around a model: the sparse path and decoding give what the masked path gives in them."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from emoe.sparse import path
from emoe.sparse.decode import decode_ffn
from tests.converted import BACKENDS, net


@pytest.mark.parametrize("mode", ["autocast", "func", "gradients", "training"])
def test_another_mode_of_pytorch_is_seen(mode: str) -> None:
    masked, sparse = (net(backend) for backend in BACKENDS)
    x = torch.randn(1, 16)
    for model in (sparse, masked):
        with torch.no_grad():
            model(x)
    if mode == "autocast":
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            assert sparse(x).dtype == masked(x).dtype == torch.bfloat16
    elif mode == "func":
        ours, theirs = (torch.func.jacrev(lambda x, model=model: model(x).sum())(x) for model in (sparse, masked))
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    elif mode == "gradients":
        ours, theirs = (torch.autograd.grad(model(x).sum(), model.layers[0].up.weight)[0] for model in (sparse, masked))
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    else:
        with torch.no_grad(), mock.patch.object(path, "decode_ffn", side_effect=decode_ffn) as spy:
            sparse.train()(x)
        assert not spy.called


class _Doubles(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        return 2 * found if function is F.linear else found


class _Counts(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.products = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.products += function in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("tokens", [1, 100])
@pytest.mark.parametrize("gradients", [False, True])
def test_a_mode_that_sees_each_operation_sees_those_of_the_mask(tokens: int, gradients: bool) -> None:
    x, found = torch.randn(tokens, 16), {}
    for backend in BACKENDS:
        model = net(backend)
        with torch.set_grad_enabled(gradients):
            before = model(x)
            with _Doubles():
                changed = model(x)
            with _Counts() as counts:
                model(x)
            torch.testing.assert_close(model(x), before)
        assert not torch.allclose(changed, before)
        found[backend] = (changed.detach(), counts.products)
    assert found["sparse"][1] == found["masked"][1] > 0
    torch.testing.assert_close(found["sparse"][0], found["masked"][0], atol=1e-4, rtol=1e-4)


def test_a_default_device_is_no_reason_for_the_mask() -> None:
    model, x = net("sparse"), torch.randn(1, 16)
    with torch.no_grad(), torch.device("cpu"), mock.patch.object(path, "decode_ffn", side_effect=decode_ffn) as spy:
        model(x)
    assert spy.called
