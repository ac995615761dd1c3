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
from emoe.routing import (
    balance_loss,
    expert_mask,
    expert_weights,
    key_scores,
    select_experts,
)
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


def test_scores_stay_in_float32_under_autocast() -> None:
    x, gate = torch.randn(5, 16), torch.randn(4, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = key_scores(x, gate)
    assert scores.dtype == torch.float32
    assert torch.equal(scores, key_scores(x, gate))


SCORES = torch.tensor([[0.1, 0.4, 0.3, 0.2], [1.0, 1.0, 1.0, 0.0]])


def test_selection_ties_and_weights() -> None:
    for selection, chosen in {"top": [[1, 2], [0, 1]], "bottom": [[0, 3], [3, 0]], "not_top": [[3, 0], [2, 3]]}.items():
        assert select_experts(SCORES, 2, selection).tolist() == chosen
    mask = expert_mask(select_experts(SCORES, 2, "top"), 4)
    assert torch.equal(expert_weights(SCORES, mask, "binary", 2), mask.float())
    soft = expert_weights(SCORES, mask, "softmax", 2)
    torch.testing.assert_close(soft.sum(-1), torch.ones(2))
    assert soft[~mask].eq(0).all()
    torch.testing.assert_close(expert_weights(SCORES, mask, "softmax_times_k", 2), soft * 2)
    first = expert_mask(select_experts(SCORES, 1, "top"), 4)
    torch.testing.assert_close(expert_weights(SCORES, first, "softmax", 1), SCORES.softmax(-1) * first)


def test_balance_loss_prefers_balance() -> None:
    torch.manual_seed(0)
    balanced = torch.eye(4).repeat(8, 1) * 4
    skewed = torch.tensor([[4.0, 0, 0, 0]]).repeat(32, 1)
    for noise in (0.0, 0.5):
        losses = [float(balance_loss(s, s, expert_mask(s.topk(1).indices, 4), noise)) for s in (balanced, skewed)]
        assert losses[0] < 1e-3 < losses[1]
    assert float(balance_loss(torch.ones(3, 1), torch.ones(3, 1), torch.ones(3, 1, dtype=torch.bool), 0.0)) == 0.0


@pytest.mark.parametrize("formula", ["corrected", "published"])
@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_tokens_that_do_not_count_do_not_change_the_balance_loss(formula, noise: float) -> None:
    scores = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    mask = expert_mask(scores.topk(2).indices, 4)
    counted = torch.arange(20) < 12
    some = balance_loss(scores, scores, mask, noise, formula, counted)
    torch.testing.assert_close(some, balance_loss(scores[:12], scores[:12], mask[:12], noise, formula))
