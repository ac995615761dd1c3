"""The promises of the clean method, for random shapes."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import emoe
from emoe.layer import routed_layers
from emoe.routing import balance_loss, expert_mask
from tests.plain_net import PlainNet, plain_net

shapes = st.fixed_dictionaries(
    {
        "experts": st.integers(1, 8),
        "size": st.integers(1, 6),
        "hidden": st.integers(2, 9),
        "tokens": st.integers(1, 12),
        "gated": st.booleans(),
        "partition": st.sampled_from(["kmeans", "random", "contiguous"]),
        "seed": st.integers(0, 999),
    }
)


def net_of(shape: dict, data) -> tuple[PlainNet, Tensor, emoe.EMoEConfig]:
    net = plain_net(shape["hidden"], shape["experts"] * shape["size"], gated=shape["gated"], seed=shape["seed"])
    net.layers[0].act = nn.Sigmoid()  # never zero, so that zeros mark neurons of experts that were not chosen
    config = emoe.EMoEConfig(
        num_experts=shape["experts"],
        top_k=data.draw(st.integers(1, shape["experts"])),
        layers=[0],
        partition=shape["partition"],
    )
    return net, torch.randn(shape["tokens"], shape["hidden"]), config


def active_neurons(net: PlainNet, x: Tensor) -> Tensor:
    """Return the active neurons ``[T, N, s]``."""
    seen = []
    layer = routed_layers(net)[0]
    hook = layer.register_forward_hook(lambda module, args, result: seen.append(result.detach()))
    net(x)
    hook.remove()
    return seen[0].unflatten(-1, (layer.config.num_experts, -1)).ne(0)


@settings(max_examples=60, deadline=None)
@given(shapes, st.data())
def test_each_token_activates_k_times_d_over_n_neurons_of_the_best_experts(shape, data) -> None:
    net, x, config = net_of(shape, data)
    emoe.convert_(net, config)
    active = active_neurons(net, x)
    assert active.sum((-1, -2)).eq(config.top_k * shape["size"]).all()
    # the same as the best means of the pre-activations without bias
    means = (x @ net.layers[0].inner.weight.t()).unflatten(-1, (shape["experts"], -1)).mean(-1).detach()
    used = active.any(-1)
    lowest_used = means.masked_fill(~used, torch.inf).amin(-1)
    highest_unused = means.masked_fill(used, -torch.inf).amax(-1)
    assert (lowest_used >= highest_unused - 1e-5).all()


@settings(max_examples=40, deadline=None)
@given(shapes, st.data())
def test_lower_precision_chooses_the_same_experts(shape, data) -> None:
    net, x, config = net_of(shape, data)
    net.bfloat16()
    twin = copy.deepcopy(net).float()  # the same weights and inputs, exactly
    order = emoe.partition(net, config)
    for model in (net, twin):
        emoe.convert_(model, config, partition=order)
    x, loads = x.bfloat16(), []
    for model, inputs, autocast in ((net, x, False), (twin, x.float(), False), (twin, x.float(), True)):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), emoe.record_routing(model) as record:
            model(inputs)
        loads.append(record.layers[0].loads.tolist())
    assert loads[0] == loads[1] == loads[2]


def test_equal_scores_go_to_the_lower_expert_in_every_run() -> None:
    net = plain_net(4, 24)
    net.layers[0].inner.weight.data[:] = 1.0
    x = torch.randint(1, 9, (5, 4)).float()  # exact sums, so exact ties
    emoe.convert_(net, emoe.EMoEConfig(num_experts=6, top_k=2, layers=[0]), partition={0: torch.arange(24)})
    for _ in range(3):
        assert active_neurons(net, x).any(-1).nonzero()[:, 1].tolist() == [0, 1] * 5


def random_net(**values) -> PlainNet:
    net = plain_net(6, 32)
    emoe.convert_(net, emoe.EMoEConfig(num_experts=8, top_k=2, layers=[0], partition="random", **values))
    return net


MASK = (torch.arange(8) < 5).long().repeat(4, 1)


@pytest.mark.parametrize("count_padding", [False, True])
def test_padding_takes_no_places_unless_it_counts(count_padding: bool) -> None:
    net, x = random_net(capacity_factor=1.0, count_padding=count_padding), torch.randn(4, 8, 6)
    x[:, 5:] = 40 * x[:, 5:]  # the most confident tokens, which would come first
    padded = net(x, attention_mask=MASK)[:, :5]
    alone = net(x[:, :5], attention_mask=MASK[:, :5])
    assert torch.equal(padded, alone) != count_padding


@pytest.mark.parametrize(("formula", "noise"), [("corrected", 0.0), ("corrected", 0.5), ("published", 0.5)])
def test_padding_does_not_count_in_the_balance_loss(formula, noise: float) -> None:
    net = random_net(aux_loss_coefficient=1.0, balance_loss=formula, router_noise=noise).train()
    x, losses = torch.randn(4, 8, 6), []
    draws = torch.randn(32, 8)
    for length in (8, 5):
        rows = draws.view(4, 8, 8)[:, :length].reshape(-1, 8)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "randn_like", lambda _scores, rows=rows: rows)
            net(x[:, :length], attention_mask=MASK[:, :length])
        losses.append(emoe.aux_loss(net))
    torch.testing.assert_close(*losses)


def test_padding_that_is_unknown_is_an_error() -> None:
    net, x = random_net(aux_loss_coefficient=1.0), torch.randn(4, 8, 6)
    with pytest.raises(RuntimeError, match="PlainNet was not called as a module"):
        net.forward(x)
    with pytest.raises(RuntimeError, match="does not fit"):
        net(x, attention_mask=MASK[:, :5])


@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_the_corrected_balance_loss_prefers_balance(noise: float) -> None:
    balanced, skewed = torch.eye(4).repeat(8, 1) * 4, torch.tensor([[4.0, 0, 0, 0]]).repeat(32, 1)
    losses = [float(balance_loss(s, s, expert_mask(s.topk(1).indices, 4), noise)) for s in (balanced, skewed)]
    assert losses[0] < 1e-3 < losses[1]
    assert float(balance_loss(torch.ones(3, 1), torch.ones(3, 1), torch.ones(3, 1).bool(), noise)) == 0.0
