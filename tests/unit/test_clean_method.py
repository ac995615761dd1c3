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
from tests.plain_net import PlainNet, plain_net

PARTITIONS = ["kmeans", "random", "contiguous"]
shapes = st.fixed_dictionaries(
    {
        "experts": st.integers(1, 8),
        "size": st.integers(1, 6),
        "hidden": st.integers(2, 9),
        "tokens": st.integers(1, 12),
        "gated": st.booleans(),
        "partition": st.sampled_from(PARTITIONS),
        "seed": st.integers(0, 999),
    }
)


def net_of(shape: dict) -> tuple[PlainNet, Tensor]:
    net = plain_net(shape["hidden"], shape["experts"] * shape["size"], gated=shape["gated"], seed=shape["seed"])
    net.layers[0].act = nn.Sigmoid()  # never zero, so that zeros mark neurons of experts that were not chosen
    return net, torch.randn(shape["tokens"], shape["hidden"])


def config_of(shape: dict, top_k: int, **values) -> emoe.EMoEConfig:
    return emoe.EMoEConfig(
        num_experts=shape["experts"], top_k=top_k, layers=[0], partition=shape["partition"], **values
    )


def chosen_by(net: PlainNet, x: Tensor) -> Tensor:
    """Return the active neurons ``[T, N, s]``."""
    seen = []
    layer = routed_layers(net)[0]
    hook = layer.register_forward_hook(lambda module, args, result: seen.append(result.detach()))
    net(x)
    hook.remove()
    return seen[0].unflatten(-1, (layer.config.num_experts, -1)).ne(0)


@settings(max_examples=60, deadline=None)
@given(shapes)
def test_all_experts_are_the_dense_layer(shape) -> None:
    net, x = net_of(shape)
    dense = net(x)
    emoe.convert_(net, config_of(shape, shape["experts"]))
    torch.testing.assert_close(net(x), dense, atol=1e-5, rtol=1e-5)


@settings(max_examples=60, deadline=None)
@given(shapes, st.data())
def test_folding_back_is_the_identity(shape, data) -> None:
    net, x = net_of(shape)
    dense, before = net(x), copy.deepcopy(net.state_dict())
    emoe.convert_(net, config_of(shape, data.draw(st.integers(1, shape["experts"]))))
    assert net.state_dict().keys() == before.keys()
    assert [p.shape for p in net.state_dict().values()] == [p.shape for p in before.values()]
    emoe.to_dense_(net, restore_order=True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert torch.equal(net(x), dense)


@settings(max_examples=60, deadline=None)
@given(shapes, st.data())
def test_each_token_activates_k_times_d_over_n_neurons_of_the_best_experts(shape, data) -> None:
    net, x = net_of(shape)
    top_k = data.draw(st.integers(1, shape["experts"]))
    emoe.convert_(net, config_of(shape, top_k))
    active = chosen_by(net, x)
    assert active.sum((-1, -2)).eq(top_k * shape["size"]).all()
    # the same as the best means of the pre-activations without bias
    ffn = net.layers[0]
    means = (x @ ffn.inner.weight.t()).unflatten(-1, (shape["experts"], -1)).mean(-1).detach()
    used = active.any(-1)
    lowest_used = means.masked_fill(~used, torch.inf).amin(-1)
    highest_unused = means.masked_fill(used, -torch.inf).amax(-1)
    assert (lowest_used >= highest_unused - 1e-5).all()


@settings(max_examples=40, deadline=None)
@given(shapes, st.data())
def test_neurons_that_are_not_selected_get_no_gradient(shape, data) -> None:
    net, x = net_of(shape)
    emoe.convert_(net, config_of(shape, data.draw(st.integers(1, shape["experts"]))))
    used = chosen_by(net, x).any(-1).any(0)
    net(x).sum().backward()
    ffn = net.layers[0]
    grads = [ffn.inner.weight.grad, ffn.outer.weight.grad.t()] + ([ffn.up.weight.grad] if shape["gated"] else [])
    for grad in grads:
        assert grad.unflatten(0, (shape["experts"], -1))[~used].eq(0).all()


@settings(max_examples=40, deadline=None)
@given(shapes, st.data())
def test_bf16_and_fp32_choose_the_same_experts(shape, data) -> None:
    net, x = net_of(shape)
    top_k = data.draw(st.integers(1, shape["experts"]))
    net.bfloat16()
    twin = copy.deepcopy(net).float()  # the same weights and inputs, exactly
    order = emoe.partition(net, config_of(shape, top_k))
    emoe.convert_(net, config_of(shape, top_k), partition=order)
    emoe.convert_(twin, config_of(shape, top_k), partition=order)
    x = x.bfloat16()
    with emoe.record_routing(net) as low, emoe.record_routing(twin) as high:
        net(x)
        twin(x.float())
    assert torch.equal(low.layers[0].loads, high.layers[0].loads)


def test_equal_scores_go_to_the_lower_expert_in_every_run() -> None:
    net = plain_net(4, 24)
    net.layers[0].inner.weight.data[:] = 1.0
    x = torch.randint(1, 9, (5, 4)).float()  # exact sums, so exact ties
    emoe.convert_(net, emoe.EMoEConfig(num_experts=6, top_k=2, layers=[0]), partition={0: torch.arange(24)})
    for _ in range(3):
        assert chosen_by(net, x).any(-1).nonzero()[:, 1].tolist() == [0, 1] * 5


def mask_net(**values) -> PlainNet:
    net = plain_net(6, 32)
    emoe.convert_(net, emoe.EMoEConfig(num_experts=8, top_k=2, layers=[0], partition="random", **values))
    return net


@pytest.mark.parametrize("count_padding", [False, True])
def test_padding_takes_no_places_unless_it_counts(count_padding: bool) -> None:
    net = mask_net(capacity_factor=1.0, count_padding=count_padding)
    x = torch.randn(4, 8, 6)
    mask = (torch.arange(8) < 5).long().repeat(4, 1)
    x[:, 5:] = 40 * x[:, 5:]  # the most confident tokens, which would come first
    padded = net(x, attention_mask=mask)[:, :5]
    alone = net(x[:, :5], attention_mask=mask[:, :5])
    assert torch.equal(padded, alone) != count_padding


def test_padding_does_not_count_in_the_balance_loss() -> None:
    net = mask_net(aux_loss_coefficient=1.0)
    x = torch.randn(4, 8, 6)
    mask = (torch.arange(8) < 5).long().repeat(4, 1)
    net(x, attention_mask=mask)
    padded = emoe.aux_loss(net)
    net(x[:, :5], attention_mask=mask[:, :5])
    torch.testing.assert_close(padded, emoe.aux_loss(net))
    with pytest.raises(RuntimeError, match="does not fit"):
        net(x, attention_mask=mask[:, :5])
    net = mask_net(aux_loss_coefficient=1.0)
    with pytest.raises(RuntimeError, match="PlainNet was not called as a module"):
        net.forward(x)
