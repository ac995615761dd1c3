"""What an outsider found where the sparse path, or decoding, was not as the masked one: other code between the projections, other inputs, weights and machines."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import emoe
from emoe.sparse import build
from tests.bodies import Body, Written, agree, both, rows
from tests.plain_net import FFN, PlainNet, plain_net


@pytest.fixture
def no_kernels_yet() -> Iterator[None]:
    build.compiled_kernels.cache_clear()
    yield
    build.compiled_kernels.cache_clear()


def unreadable(*_: object) -> bool:
    raise PermissionError(13, "Permission denied")


def homeless() -> Path:
    raise RuntimeError("Could not determine home directory.")


@pytest.mark.parametrize(("what", "instead"), [("exists", unreadable), ("home", homeless), ("read_bytes", unreadable)])
def test_where_kernels_cannot_be_looked_for_pytorch_computes(
    what: str, instead: Callable[..., Any], no_kernels_yet: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = plain_net(16, 64)
    emoe.convert_(net, emoe.EMoEConfig(num_experts=8, top_k=2, layers=[0], partition="contiguous"))
    expected = net(rows(200))
    build.compiled_kernels.cache_clear()
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    with monkeypatch.context() as patch:
        patch.setattr(Path, what, instead)
        assert build.compiled_kernels() is None
        found = net(rows(200))
    torch.testing.assert_close(found, expected)


def test_an_empty_name_of_the_cache_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert Path.home() / ".cache" in build.library_file().parents


@pytest.mark.parametrize("why", ["dropout", "a hook"])
def test_a_gated_ffn_with_a_bias_for_each_expert_takes_the_mask(why: str) -> None:
    nets = both(gated=True, output_bias="per_expert", expert_dropout=0.1 if why == "dropout" else 0.0)
    results = []
    for net in nets:
        if why == "a hook":
            net.layers[0].inner.register_forward_hook(lambda *_: None)
        torch.manual_seed(3)
        results.append(net.train(why == "dropout")(rows()))
    torch.testing.assert_close(*results)


def transposed(net: PlainNet) -> None:
    up = net.layers[0].up
    up.weight = nn.Parameter(up.weight.detach().t().contiguous().t())


def attribute(net: PlainNet) -> None:
    up = net.layers[0].up
    weight = up.weight.detach().clone()
    del up.weight
    up.weight = weight


@pytest.mark.parametrize("lie", [transposed, attribute])
def test_decoding_sees_every_weight_change_however_it_lies(lie: Callable[[PlainNet], None]) -> None:
    nets = both(gated=True)
    with torch.no_grad():
        for net in nets:
            lie(net)
        agree(nets, rows(1))
        for net in nets:
            net.layers[0].up.weight = net.layers[0].up.weight if lie is transposed else net.layers[0].up.weight * 2
            net.layers[0].up.weight.mul_(2)
        agree(nets, rows(1))


@pytest.mark.parametrize("part", ["columns", "rows", "an expert's"])
def test_decoding_sees_most_numbers_change_behind_pytorchs_back(part: str) -> None:
    nets = both()
    place = {
        "columns": (slice(None), slice(16, None)),
        "rows": (slice(4), slice(None)),
        "an expert's": (slice(None), slice(8, 16)),
    }
    with torch.no_grad():
        agree(nets, rows(1))
        for net in nets:
            net.layers[0].outer.weight.data[place[part]] *= 2
        agree(nets, rows(1))


def test_inputs_of_another_width_are_the_projections_error() -> None:
    for net in both():
        emoe.fix_experts_(net, {0: torch.arange(8)})
        for width in (8, 32, 2048):
            with torch.no_grad(), pytest.raises(RuntimeError, match="cannot be multiplied"):
                net(torch.randn(1, width))


class Wide(emoe.Router):
    learned = False

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :16].float()


def test_a_router_that_scores_other_experts_is_an_error_also_in_decoding() -> None:
    emoe.register_router("wide", Wide)
    for net in both(router="wide"):
        with torch.no_grad(), pytest.raises((RuntimeError, IndexError)):
            net(rows(1))


def test_autocast_leaves_double_precision_as_it_is() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        agree([net.double() for net in both()], rows().double())


def test_a_model_without_weights_has_shapes() -> None:
    for net in both():
        with torch.no_grad():
            assert net.to("meta")(torch.empty(1, 16, device="meta")).shape == (1, 16)


def under_autocast(ffn: FFN, x: Tensor) -> Tensor:
    hidden = ffn.act(ffn.inner(x))
    with torch.autocast("cpu", torch.bfloat16):
        return ffn.outer(hidden)


def hooked_where_there_are_gradients(ffn: FFN, x: Tensor) -> Tensor:
    hidden = ffn.act(ffn.inner(x))
    if hidden.requires_grad:
        hidden.register_hook(lambda grad: grad)
    return ffn.outer(hidden)


def wiped_afterwards(ffn: FFN, x: Tensor) -> Tensor:
    before = ffn.inner(x) * 1 if x.requires_grad else ffn.inner(x)
    hidden = ffn.act(before)
    before.zero_()
    return ffn.outer(hidden)


def both_outputs(ffn: FFN, x: Tensor) -> Tensor:
    hidden = ffn.act(ffn.inner(x))
    first = ffn.outer(hidden) * 1
    second = ffn.outer(hidden)
    return first + 2 * second


def one_output_changed(ffn: FFN, x: Tensor) -> Tensor:
    hidden = ffn.act(ffn.inner(x))
    with torch.no_grad():
        first = ffn.outer(hidden)
        first.mul_(2)
    return first + ffn.outer(hidden)


BODIES: dict[str, Body] = {
    "pre-activations that are wiped": wiped_afterwards,
    "two outputs": both_outputs,
    "an output that is changed and taken again": one_output_changed,
    "the activation twice": lambda ffn, x: ffn.outer(ffn.act(ffn.act(ffn.inner(x)))),
    "mul, by name": lambda ffn, x: ffn.outer(torch.mul(ffn.act(ffn.inner(x)), other=2.0)),
    "method, by name": lambda ffn, x: ffn.outer(ffn.act(ffn.inner(x)).mul(other=2.0)),
    "chunk, by name": lambda ffn, x: ffn.outer(
        torch.cat(torch.chunk(input=ffn.act(ffn.inner(x)), chunks=2, dim=-1), -1)
    ),
    "dropout, by name": lambda ffn, x: ffn.outer(F.dropout(input=ffn.act(ffn.inner(x)), p=0.5, training=False)),
    "autocast in the middle": under_autocast,
    "a hook where there are gradients": hooked_where_there_are_gradients,
}


@pytest.mark.parametrize("body", BODIES)
def test_code_between_the_projections(body: str) -> None:
    nets = both(BODIES[body])
    for net in nets:
        net.requires_grad_(False)
    agree(nets, rows())
    agree(nets, rows().requires_grad_())


def test_an_input_that_changes_before_somebody_looks_is_an_error() -> None:
    def body(ffn: FFN, x: Tensor) -> Tensor:
        hidden = ffn.act(ffn.inner(x))
        x.add_(1)
        return ffn.outer(hidden + 0)

    masked, sparse = both(body)
    with torch.no_grad():
        masked(rows())
        with pytest.raises(RuntimeError, match=r"call emoe.set_backend_\(model, 'masked'\) first"):
            sparse(rows())


class Thrice(nn.Linear):
    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x) * 3


class Stored(nn.Module):
    """A projection without a weight of that name."""

    def __init__(self, like: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features, self.stored = like.in_features, like.out_features, [like]

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.stored[0].weight, self.stored[0].bias)


def test_projections_that_are_not_what_they_seem() -> None:
    for net in both():
        net.layers[0].inner = Stored(net.layers[0].inner)
        emoe.set_top_k_(net, 3)
        assert net(rows()).shape == (40, 16)
    nets = both()
    for net in nets:
        net.layers[0].inner.weight = nn.Parameter(rows(64)[:, :1].clone().expand(64, 16))
    agree(nets, rows())
    with torch.no_grad():
        agree(nets, rows(1))
    networks = []
    for backend in ("masked", "sparse"):
        torch.manual_seed(0)
        net = PlainNet(Written(None))
        net.layers[0].inner.__class__ = Thrice
        config = emoe.EMoEConfig(num_experts=8, top_k=2, layers=[0], partition="contiguous", backend=backend)
        emoe.convert_(net, config)
        networks.append(net.eval())
    agree(networks, rows())


def test_hooks_of_an_activation_that_was_replaced_see_what_they_would() -> None:
    for net in both():
        seen: list[torch.Size] = []
        act = net.layers[0].act
        act.activation = nn.ReLU()
        act.activation.register_forward_hook(lambda _module, _args, y, seen=seen: seen.append(y.shape))
        net(rows())
        assert seen == [(40, 64)]


def test_an_output_without_gradients_can_be_changed_in_place_with_some() -> None:
    for net in both():
        with torch.no_grad():
            y = net(rows())
        y += nn.Parameter(torch.ones(16))
        assert y.requires_grad


@pytest.mark.parametrize("score", ["gate", "up"])
def test_in_half_precision_scores_of_neurons_choose_the_same_experts(score: str) -> None:
    used = []
    for net in both(gated=True, score=score):
        net.bfloat16()
        with torch.no_grad(), emoe.record_routing(net) as record:
            net(torch.randn(2048, 16, generator=torch.Generator().manual_seed(0)).bfloat16())
        used.append(record.layers[0].loads)
    assert torch.equal(*(torch.as_tensor(loads) for loads in used))
