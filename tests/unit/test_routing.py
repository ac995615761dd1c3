from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import emoe
from emoe.layer import routed_layers
from emoe.routing import (
    balance_loss,
    block_means,
    capacity_mask,
    expert_mask,
    expert_means,
    expert_weights,
    key_scores,
    neuron_means,
    select_experts,
)
from tests.plain_net import plain_net

sizes = st.tuples(st.integers(1, 8), st.integers(1, 6), st.integers(1, 5), st.integers(1, 9), st.integers(0, 99))


@settings(max_examples=50, deadline=None)
@given(sizes)
def test_mean_keys_score_the_mean_pre_activation_without_bias(size) -> None:
    experts, neurons, tokens, hidden, seed = size
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(experts * neurons, hidden, generator=generator)
    bias = torch.randn(experts * neurons, generator=generator)
    x = torch.randn(tokens, hidden, generator=generator)
    gate = expert_means(keys, experts)
    torch.testing.assert_close(key_scores(x, gate), block_means(x @ keys.t(), experts), atol=1e-5, rtol=1e-5)
    with_bias = key_scores(x, gate, expert_means(bias, experts))
    torch.testing.assert_close(with_bias, block_means(x @ keys.t() + bias, experts), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(64, 24, 576), (3, 700, 1024), (64, 88), (5, 1, 1), (0, 4, 4)])
def test_means_are_computed_in_float32(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    blocks = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    means = neuron_means(blocks)
    assert means.dtype == torch.float32
    assert torch.equal(means, blocks.float().mean(1))


def test_scores_stay_in_float32_under_autocast() -> None:
    x, gate = torch.randn(5, 16), torch.randn(4, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = key_scores(x, gate)
    assert scores.dtype == torch.float32
    assert torch.equal(scores, key_scores(x, gate))


SCORES = torch.tensor([[0.1, 0.4, 0.3, 0.2], [1.0, 1.0, 1.0, 0.0]])


@pytest.mark.parametrize(
    ("selection", "chosen"),
    [("top", [[1, 2], [0, 1]]), ("bottom", [[0, 3], [3, 0]]), ("not_top", [[3, 0], [2, 3]])],
)
def test_selection_and_ties(selection, chosen) -> None:
    assert select_experts(SCORES, 2, selection).tolist() == chosen


def test_random_selection_takes_k_and_varies() -> None:
    torch.manual_seed(0)
    mask = expert_mask(select_experts(torch.zeros(200, 6), 2, "random"), 6)
    assert mask.sum(-1).eq(2).all()
    assert mask.sum(0).gt(20).all()


def test_weights() -> None:
    mask = expert_mask(select_experts(SCORES, 2, "top"), 4)
    assert torch.equal(expert_weights(SCORES, mask, "binary", 2), mask.float())
    soft = expert_weights(SCORES, mask, "softmax", 2)
    torch.testing.assert_close(soft.sum(-1), torch.ones(2))
    assert soft[~mask].eq(0).all()
    torch.testing.assert_close(expert_weights(SCORES, mask, "softmax_times_k", 2), soft * 2)
    first = expert_mask(select_experts(SCORES, 1, "top"), 4)
    torch.testing.assert_close(expert_weights(SCORES, first, "softmax", 1), SCORES.softmax(-1) * first)


def fits_by_hand(scores, slots, factor: float, top_k: int, counted) -> torch.Tensor:
    """Apply the rule to one assignment at a time."""
    n = scores.shape[1]
    real = counted.tolist() if counted is not None else [True] * len(slots)
    capacity = top_k * int(factor * -(-sum(real) // n))
    order = sorted(range(len(slots)), key=lambda t: -float(scores[t].softmax(0).max()))
    room, fits = [capacity] * n, torch.ones_like(slots, dtype=torch.bool)
    for slot in range(slots.shape[1]):
        for token in filter(real.__getitem__, order):
            expert = int(slots[token, slot])
            fits[token, slot] = room[expert] > 0
            room[expert] -= 1
    return fits


@settings(max_examples=100, deadline=None)
@given(
    tokens=st.integers(1, 40),
    experts=st.integers(2, 8),
    data=st.data(),
    factor=st.sampled_from([0.3, 0.5, 1.0, 1.1, 1.5, 4.0]),
    padding=st.booleans(),
    seed=st.integers(0, 999),
)
def test_capacity_goes_by_order_of_choice_and_confidence(tokens, experts, data, factor, padding, seed) -> None:
    top_k = data.draw(st.integers(1, experts))
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(tokens, experts, generator=generator)
    slots = select_experts(scores, top_k, "top")
    counted = torch.rand(tokens, generator=generator) < 0.6 if padding else None
    fits = capacity_mask(scores, slots, factor, top_k, counted)
    assert torch.equal(fits, fits_by_hand(scores, slots, factor, top_k, counted))


def test_cosine_router_ignores_the_length_of_its_projection() -> None:
    torch.manual_seed(0)
    net = plain_net(8, 16)
    emoe.convert_(net, emoe.GMoEConfig(num_experts=4, layers=[0]))
    router = routed_layers(net)[0].router
    x = torch.randn(3, 8)
    scores = router(x)
    assert scores.abs().max() <= 2 + 1e-5
    with torch.no_grad():
        router.proj.weight *= 3
        router.proj.bias *= 3
    torch.testing.assert_close(router(x), scores)


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
