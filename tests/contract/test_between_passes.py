"""A model at rest decodes, something changes, and the next pass is the masked path's: what was seen in one pass is not taken for granted in the next."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import emoe
from emoe.routers import AvgKRouter
from emoe.sparse import decode, path
from emoe.sparse.build import compiled_kernels
from emoe.sparse.decode import decode_ffn
from tests.converted import BACKENDS, net
from tests.plain_net import plain_net

Patch = pytest.MonkeyPatch
PARTS = ("inner", "up", "outer", "act")


def twice(_: nn.Module, args: Any, output: Any = None) -> Any:
    """A hook after or before a forward pass."""
    return (args[0] * 2,) if output is None else output * 2


class Twice(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def hook_after(part: str) -> Callable[[Any, Patch], None]:
    return lambda ffn, _: getattr(ffn, part).register_forward_hook(twice)


def hook_before(part: str) -> Callable[[Any, Patch], None]:
    return lambda ffn, _: getattr(ffn, part).register_forward_pre_hook(twice)


def other_hooks(ffn: Any, _: Patch) -> None:
    ffn.up._forward_hooks = OrderedDict({0: twice})


def hook_in_the_place_of_ours(ffn: Any, _: Patch) -> None:
    hooks = ffn.act._forward_pre_hooks
    (key,) = hooks
    hooks[key] = twice


def hook_of_the_activation_itself(ffn: Any, _: Patch) -> None:
    ffn.act.activation.register_forward_hook(twice)


def hook_of_all(ffn: Any, patch: Patch) -> None:
    hooks = nn.modules.module._global_forward_hooks
    patch.setitem(hooks, id(ffn), lambda module, args, output: output * 2 if module is ffn.up else None)  # type: ignore[attr-defined]


def forward_of_one(ffn: Any, _: Patch) -> None:
    ffn.up.forward = lambda x: F.linear(x, ffn.up.weight) * 2


def class_of_one(ffn: Any, _: Patch) -> None:
    ffn.up.__class__ = Twice


def forward_of_all(_: Any, patch: Patch) -> None:
    patch.setattr(nn.Linear, "forward", lambda self, x: 2 * F.linear(x, self.weight, self.bias))


def product_of_all(_: Any, patch: Patch) -> None:
    linear = F.linear
    patch.setattr(F, "linear", lambda *args: 2 * linear(*args))


def call_of_all(ffn: Any, patch: Patch) -> None:
    call = nn.Module.__call__
    patch.setattr(
        nn.Module, "__call__", lambda self, *args, **kwargs: call(self, *args, **kwargs) * (2 if self is ffn.up else 1)
    )


def call_inside_of_all(ffn: Any, patch: Patch) -> None:
    call = nn.Module._call_impl
    patch.setattr(
        nn.Module,
        "_call_impl",
        lambda self, *args, **kwargs: call(self, *args, **kwargs) * (2 if self is ffn.up else 1),
    )


def activation_of_all(_: Any, patch: Patch) -> None:
    patch.setattr(nn.GELU, "forward", lambda self, z: 2 * F.gelu(z))


def gelu_of_all(_: Any, patch: Patch) -> None:
    gelu = F.gelu
    patch.setattr(F, "gelu", lambda *args, **kwargs: 2 * gelu(*args, **kwargs))


def another_projection(ffn: Any, _: Patch) -> None:
    ffn.up = copy.deepcopy(ffn.up)
    ffn.up.weight.data.neg_()


def projection_around_it(ffn: Any, _: Patch) -> None:
    ffn.up = nn.Sequential(ffn.up, nn.Tanh())


def another_weight(part: str) -> Callable[[Any, Patch], None]:
    def change(ffn: Any, _: Patch) -> None:
        getattr(ffn, part).weight = nn.Parameter(-getattr(ffn, part).weight.detach())

    return change


def other_numbers(part: str) -> Callable[[Any, Patch], None]:
    def change(ffn: Any, _: Patch) -> None:
        getattr(ffn, part).weight.data = -getattr(ffn, part).weight.data

    return change


def transposed(part: str) -> Callable[[Any, Patch], None]:
    def change(ffn: Any, _: Patch) -> None:
        getattr(ffn, part).weight.data = getattr(ffn, part).weight.data.t()  # the same place, the same shape

    return change


def other_parameters(ffn: Any, _: Patch) -> None:
    ffn.up._parameters = {**ffn.up._parameters, "weight": nn.Parameter(-ffn.up.weight.detach())}


def other_children(ffn: Any, _: Patch) -> None:
    other = nn.Linear(16, 16, bias=False)
    other.weight.data = -ffn.up.weight.data
    ffn._modules = {**ffn._modules, "up": other}


def other_attributes(ffn: Any, _: Patch) -> None:
    ffn.up.__dict__ = {**ffn.up.__dict__, "_forward_hooks": OrderedDict({0: twice})}


def exchanged(ffn: Any, _: Patch) -> None:
    torch.utils.swap_tensors(ffn.up.weight, nn.Parameter(-ffn.up.weight.detach()))


def with_a_bias(ffn: Any, _: Patch) -> None:
    ffn.up.bias = nn.Parameter(torch.ones(16))


def another_activation(ffn: Any, _: Patch) -> None:
    ffn.act.activation = nn.ReLU()


def random_activation(ffn: Any, _: Patch) -> None:
    ffn.act.activation = nn.RReLU(0.1, 0.1)


def class_of_the_activation(ffn: Any, _: Patch) -> None:
    ffn.act.activation.__class__ = nn.Softmax
    ffn.act.activation.dim = -1


def fewer_experts(ffn: Any, _: Patch) -> None:
    emoe.set_top_k_(ffn, 1)


def compiled(part: str) -> Callable[[Any, Patch], None]:
    """As ``module.compile()`` does it."""

    def change(ffn: Any, _: Patch) -> None:
        module = getattr(ffn, part)
        module._compiled_call_impl = lambda *args, **kwargs: 2 * module._call_impl(*args, **kwargs)

    return change


def of_our_own_class(name: str) -> Callable[[Any, Patch], None]:
    """A method of the class that our own projections have."""

    def change(ffn: Any, patch: Patch) -> None:
        method = getattr(type(ffn.up), name)
        if method.__name__ != "<lambda>":  # of the other model
            twice = lambda self, *args, **kwargs: 2 * method(self, *args, **kwargs)  # noqa: E731
            patch.setattr(type(ffn.up), name, twice, raising=False)

    change.__name__ = "of_all"
    return change


def code_of_all(_: Any, patch: Patch) -> None:
    def forward(self: Any, input: Tensor) -> Tensor:  # noqa: A002  as PyTorch calls it
        return 2 * F.linear(input, self.weight, self.bias)

    patch.setattr(nn.Linear.forward, "__code__", forward.__code__)


def softmax_of_all(_: Any, patch: Patch) -> None:
    patch.setattr(nn.GELU, "forward", lambda self, z: z.softmax(-1))


def function_of_all(_: Any, patch: Patch) -> None:
    patch.setattr(F, "gelu", lambda z, **_: z.softmax(-1))


def slopes(ffn: Any, _: Patch) -> None:
    ffn.act.activation = nn.PReLU(16)


def in_front_of_a_part(ffn: Any, _: Patch) -> None:
    other = copy.deepcopy(ffn.up)
    other.weight.data.neg_()
    ffn.__dict__["up"] = other


def in_front_of_a_weight(ffn: Any, _: Patch) -> None:
    ffn.up.__dict__["weight"] = -ffn.up.weight.detach()


def running_gate(ffn: Any, _: Patch) -> None:
    ffn.act.router.gate = -ffn.act.current_gate()


class Opposite(AvgKRouter):
    def linear_scores(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        return -super().linear_scores(x, gate)


def class_of_the_router(ffn: Any, _: Patch) -> None:
    ffn.act.router.__class__ = Opposite


def scores_of_one(ffn: Any, patch: Patch) -> None:
    scores = ffn.act.router.linear_scores
    ffn.act.router.linear_scores = lambda *args: -scores(*args)


def scores_of_all(ffn: Any, patch: Patch) -> None:
    patch.setattr(AvgKRouter, "scores", lambda self, x, z: -self.linear_scores(x))


CHANGES: dict[str, Callable[[Any, Patch], None]] = {
    **{f"hook after {part}": hook_after(part) for part in PARTS},
    **{f"hook before {part}": hook_before(part) for part in PARTS},
    **{f"another weight of {part}": another_weight(part) for part in PARTS[:3]},
    **{f"other numbers of {part}": other_numbers(part) for part in PARTS[:3]},
    **{f"{part} transposed": transposed(part) for part in PARTS[:3]},
    **{f"{part} compiled": compiled(part) for part in PARTS[:3]},
    **{f"{name} of our own class": of_our_own_class(name) for name in ("forward", "_call_impl")},
    **{
        change.__name__.replace("_", " "): change
        for change in (
            *(other_hooks, hook_in_the_place_of_ours, hook_of_the_activation_itself, hook_of_all, forward_of_one),
            *(
                class_of_one,
                other_parameters,
                other_children,
                other_attributes,
                forward_of_all,
                call_of_all,
                call_inside_of_all,
                product_of_all,
                activation_of_all,
                gelu_of_all,
                another_projection,
                projection_around_it,
                exchanged,
            ),
            *(with_a_bias, another_activation, random_activation, class_of_the_activation, fewer_experts),
            *(class_of_the_router, scores_of_one, scores_of_all, running_gate),
            *(code_of_all, softmax_of_all, function_of_all, slopes, in_front_of_a_part, in_front_of_a_weight),
        )
    },
}


@pytest.mark.parametrize("compared_by", ["kernels", "Python"])
@pytest.mark.parametrize("name", CHANGES)
def test_a_change_between_two_passes_is_seen(name: str, compared_by: str, monkeypatch: Patch) -> None:
    if compared_by == "Python":
        monkeypatch.setattr(decode, "compiled_kernels", lambda: None)
    elif compiled_kernels() is None:
        pytest.skip("no compiler on this machine")
    x, models = torch.randn(1, 16, generator=torch.Generator().manual_seed(1)), []
    for backend in ("masked", "sparse"):
        net = plain_net(16, 16, gated=True)
        emoe.convert_(net, emoe.EMoEConfig(num_experts=8, top_k=2, layers=[0], backend=backend, partition="contiguous"))
        models.append(net.requires_grad_(False))
    masked, sparse = models
    with torch.no_grad(), mock.patch.object(path, "decode_ffn", side_effect=decode_ffn) as spy:
        before = [sparse(x) for _ in range(3)][-1]
        assert spy.call_count == 3
    with monkeypatch.context() as patch, torch.no_grad():
        for model in models:
            CHANGES[name](model.layers[0], patch)
        expected, found = masked(x), sparse(x)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
        assert not torch.allclose(expected, before, atol=1e-3)
        torch.testing.assert_close(sparse(x), expected, atol=1e-5, rtol=1e-4)
    if "of_all" in CHANGES[name].__name__:  # and that it is gone again
        with torch.no_grad():
            torch.testing.assert_close(sparse(x), before, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("part", PARTS)
def test_a_backward_hook_counts_where_there_are_gradients(part: str) -> None:
    x, seen = torch.randn(1, 16), {}
    for backend in BACKENDS:
        model = net(backend)
        with torch.no_grad():
            before = model(x)
        calls: list[Tensor] = []
        getattr(model.layers[0], part).register_full_backward_hook(
            lambda _module, _inputs, outputs, calls=calls: calls.append(outputs[0])
        )
        with torch.no_grad(), mock.patch.object(path, "decode_ffn", side_effect=decode_ffn) as spy:
            assert torch.equal(model(x), before)
        assert spy.called == (backend == "sparse")
        assert not calls
        model(x.clone().requires_grad_()).sum().backward()
        (seen[backend],) = calls
    torch.testing.assert_close(seen["sparse"], seen["masked"], atol=1e-5, rtol=1e-4)


def test_inputs_of_other_shapes_and_types_between() -> None:
    masked, sparse = (net(backend) for backend in BACKENDS)
    with torch.no_grad():
        for shape in ((1, 16), (1, 1, 16), (16,), (3, 16), (1, 16), (40, 16), (1, 16)):
            x = torch.randn(shape)
            torch.testing.assert_close(sparse(x), masked(x), atol=1e-5, rtol=1e-4)
        with pytest.raises(RuntimeError, match="dtype"):
            sparse(torch.randn(1, 16).double())
        x = torch.randn(1, 16).double()
        torch.testing.assert_close(sparse.double()(x), masked.double()(x))
