"""Other code between and around the parts of one FFN: what it changes there counts, as on the masked path."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from emoe.sparse import path
from tests.bodies import Body, agree, both, rows
from tests.plain_net import FFN, PlainNet


def other_values(ffn: FFN, x: Tensor) -> Tensor:
    h = ffn.act(ffn.inner(x)) * ffn.up(x)
    with torch.no_grad():
        ffn.outer.weight.mul_(2)
    y = ffn.outer(h.clone() if ffn.outer.weight.requires_grad else h)
    with torch.no_grad():
        ffn.outer.weight.div_(2)
    return y


def other_ups(ffn: FFN, x: Tensor) -> Tensor:
    h = ffn.act(ffn.inner(x))
    with torch.no_grad():
        ffn.up.weight.mul_(2)
    y = ffn.outer(h * ffn.up(x))
    with torch.no_grad():
        ffn.up.weight.div_(2)
    return y


def hooked(ffn: FFN, x: Tensor) -> Tensor:
    h = ffn.act(ffn.inner(x)) * ffn.up(x)
    hook = ffn.outer.register_forward_hook(lambda _module, _args, y: y * 2)
    y = ffn.outer(h)
    hook.remove()
    return y


def crosswise(ffn: FFN, x: Tensor) -> Tensor:
    return ffn.outer(ffn.act(ffn.up(x)) * ffn.inner(x))


def by_itself(ffn: FFN, x: Tensor) -> Tensor:
    z = ffn.inner(x)
    return ffn.outer(ffn.act(z) * z)


@pytest.mark.parametrize("tokens", [1, 100])
@pytest.mark.parametrize("body", [other_values, other_ups, hooked, crosswise, by_itself])
def test_what_changes_between_two_parts_counts(body: Body, tokens: int) -> None:
    with torch.no_grad():
        agree(both(body, gated=True), rows(tokens))


def up_without_gradient(ffn: FFN, x: Tensor) -> Tensor:
    with torch.no_grad():
        up = ffn.up(x)
    return ffn.outer(ffn.act(ffn.inner(x)) * up)


def in_again(ffn: FFN, x: Tensor) -> Tensor:
    """As reentrant checkpointing calls a part: without gradients, and once more for them."""
    return ffn.outer(ffn.act(checkpoint(ffn.inner, x, use_reentrant=True)) * ffn.up(x))


def up_again(ffn: FFN, x: Tensor) -> Tensor:
    return ffn.outer(ffn.act(ffn.inner(x)) * checkpoint(ffn.up, x, use_reentrant=True))


def clamped_again(ffn: FFN, x: Tensor) -> Tensor:
    def whole(x: Tensor) -> Tensor:
        return ffn.outer((ffn.act(ffn.inner(x)) * ffn.up(x)).clamp(max=0.5))

    return checkpoint(whole, x, use_reentrant=False)


@pytest.mark.parametrize("body", [up_without_gradient, in_again, up_again, clamped_again])
def test_gradients_are_the_masked_ones_whatever_is_around_a_part(body: Body) -> None:
    nets, x = both(body, gated=True), rows(100)
    for _ in range(2):
        found = []
        for net in nets:
            net.train().zero_grad()
            leaf = x.clone().requires_grad_()
            net(leaf).square().sum().backward()
            found.append([leaf.grad, *(parameter.grad for parameter in net.parameters())])
            torch.optim.SGD(net.parameters(), 0.0).step()
        for masked, sparse in zip(*found, strict=True):
            assert (masked is None) == (sparse is None)
            if masked is not None:
                torch.testing.assert_close(sparse, masked, atol=1e-3, rtol=1e-3)


def out_again(ffn: FFN, x: Tensor) -> Tensor:
    return checkpoint(ffn.outer, ffn.act(ffn.inner(x)) * ffn.up(x), use_reentrant=True)


def test_a_gradient_of_neurons_that_were_not_computed_is_an_error_once() -> None:
    masked, sparse = both(out_again, gated=True)
    x = rows(100).requires_grad_()
    with pytest.raises(RuntimeError, match=r"an autograd\.Function"):
        torch.autograd.backward(sparse(x).square().sum())
    found = []
    for net in (masked, sparse):
        net.zero_grad()
        net(x).square().sum().backward()
        found.append(net.layers[0].inner.weight.grad)
    torch.testing.assert_close(found[1], found[0], atol=1e-3, rtol=1e-3)


def test_an_input_with_a_gradient_that_nobody_wants_is_no_reason_for_the_mask_later() -> None:
    _, sparse = both(gated=True)
    x = rows(100).requires_grad_()
    with torch.no_grad():
        sparse(x)
    with mock.patch.object(path, "sparse_ffn", side_effect=path.sparse_ffn) as spy:
        sparse(x).sum().backward()
    assert spy.called


def hook_in_front(net: PlainNet) -> list[str]:
    calls: list[str] = []
    for name in ("up", "inner", "act", "outer"):
        getattr(net.layers[0], name).register_forward_hook(lambda *_, name=name: calls.append(name))
    net(rows(100))
    return calls


def test_hooks_are_called_in_the_order_of_the_code() -> None:
    def up_first(ffn: FFN, x: Tensor) -> Tensor:
        up = ffn.up(x)
        return ffn.outer(ffn.act(ffn.inner(x)) * up)

    assert [hook_in_front(net) for net in both(up_first, gated=True)] == [["up", "inner", "act", "outer"]] * 2


def input_changed(ffn: FFN, x: Tensor) -> Tensor:
    h = ffn.act(ffn.inner(x))
    x.mul_(2)
    return ffn.outer(h * ffn.up(x))


@pytest.mark.parametrize("tokens", [1, 100])
def test_an_input_that_changes_between_two_parts_is_an_error_once(tokens: int) -> None:
    masked, sparse = both(input_changed, gated=True)
    with torch.no_grad():
        with pytest.raises(RuntimeError, match="changed the FFN's input"):
            sparse(rows(tokens))
        torch.testing.assert_close(sparse(rows(tokens)), masked(rows(tokens)), atol=1e-5, rtol=1e-4)


def frozen(net: PlainNet) -> Tensor:
    net.requires_grad_(False)
    x = rows(100).requires_grad_()
    h = x * 1.0
    h += net(h)
    h.square().sum().backward()
    return x.grad


def changed(part: str, name: str, *, frozen_part: str | None = None) -> Callable[[PlainNet], Tensor]:
    """The gradient of a part's weight, where something was added to one of its parameters between the forward and the backward pass."""

    def change(net: PlainNet) -> Tensor:
        ffn = net.layers[0]
        if frozen_part is not None:
            getattr(ffn, frozen_part).requires_grad_(False)
        y = net(rows(100))
        with torch.no_grad():
            getattr(getattr(ffn, part), name).add_(1)
        y.square().sum().backward()
        return getattr(ffn, part).weight.grad

    return change


@pytest.mark.parametrize(
    "change",
    [frozen, changed("inner", "bias"), changed("inner", "weight"), changed("outer", "weight", frozen_part="inner")],
    ids=["frozen", "other bias", "other weight in front", "values alone"],
)
def test_what_no_gradient_needs_may_change_before_it(change: Callable[[PlainNet], Tensor]) -> None:
    masked, sparse = (change(net) for net in both())
    torch.testing.assert_close(sparse, masked, atol=1e-3, rtol=1e-3)


def test_an_input_of_a_frozen_ffn_lives_no_longer_than_its_graph_needs() -> None:
    _, sparse = both()
    sparse.requires_grad_(False)
    h = rows(100).requires_grad_() * 1.0
    alive, y = weakref.ref(h), sparse(h)
    del h
    y.square().sum().backward()
    gc.collect()
    assert alive() is None


def test_a_gradients_gradient_says_so_where_what_it_needs_has_changed() -> None:
    _, sparse = both()
    sparse.requires_grad_(False)
    x = rows(100).requires_grad_()
    h = x * 1.0
    y = sparse(h)
    h += 1
    with pytest.raises(RuntimeError, match=r"shape \[100, 16\].*inplace"):
        torch.autograd.grad(y.square().sum(), x, create_graph=True)


@pytest.mark.parametrize("tokens", [1, 100])
def test_numbers_that_are_others_negatives(tokens: int) -> None:
    nets, x = both(gated=True), rows(tokens)
    with torch.no_grad():
        agree(nets, x)
        agree(nets, torch._neg_view(-x))
        for net in nets:
            net.layers[0].up.weight.data = torch._neg_view(net.layers[0].up.weight.data)
        agree(nets, x)
    found = []
    for net in both(gated=True):
        y = net(x)
        found.append(torch.autograd.grad(y, [*net.parameters()], torch._neg_view(torch.ones_like(y))))
    for masked, sparse in zip(*found, strict=True):
        torch.testing.assert_close(sparse, masked, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("tokens", [1, 100])
def test_a_weight_that_became_sparse(tokens: int) -> None:
    nets = both(gated=True)
    with torch.no_grad():
        agree(nets, rows(tokens))
        for net in nets:
            weight = net.layers[0].outer.weight.detach().to_sparse_csr()
            net.layers[0].outer.weight = nn.Parameter(weight, requires_grad=False)
        agree(nets, rows(tokens))


@pytest.mark.parametrize("tokens", [1, 100])
def test_torch_functions_may_be_switched_off(tokens: int) -> None:
    with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
        agree(both(gated=True), rows(tokens))
