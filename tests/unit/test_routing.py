from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emoe.routing import CosineRouter, avg_k_scores, balance_loss, expert_weights, select_experts

sizes = st.tuples(st.integers(1, 8), st.integers(1, 6), st.integers(1, 5), st.integers(1, 9), st.integers(0, 99))


@settings(max_examples=50, deadline=None)
@given(sizes)
def test_mean_keys_score_the_mean_pre_activation_without_bias(size) -> None:
    experts, neurons, tokens, hidden, seed = size
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(experts * neurons, hidden, generator=generator)
    bias = torch.randn(experts * neurons, generator=generator)
    x = torch.randn(tokens, hidden, generator=generator)
    plain = (x @ keys.t()).unflatten(-1, (experts, neurons)).mean(-1)
    torch.testing.assert_close(avg_k_scores(x, keys, experts), plain, atol=1e-5, rtol=1e-5)
    with_bias = (x @ keys.t() + bias).unflatten(-1, (experts, neurons)).mean(-1)
    torch.testing.assert_close(avg_k_scores(x, keys, experts, bias), with_bias, atol=1e-5, rtol=1e-5)


def test_scores_stay_in_float32_under_autocast() -> None:
    x, keys = torch.randn(5, 16), torch.randn(24, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = avg_k_scores(x, keys, 4)
    assert scores.dtype == torch.float32
    assert torch.equal(scores, avg_k_scores(x, keys, 4))


SCORES = torch.tensor([[0.1, 0.4, 0.3, 0.2], [1.0, 1.0, 1.0, 0.0]])


@pytest.mark.parametrize(
    ("selection", "chosen"),
    [("top", [[1, 2], [0, 1]]), ("bottom", [[0, 3], [0, 3]]), ("not_top", [[0, 3], [2, 3]])],
)
def test_selection_and_ties(selection, chosen) -> None:
    mask = select_experts(SCORES, 2, selection)
    assert [row.nonzero().flatten().tolist() for row in mask] == chosen


def test_random_selection_takes_k_and_varies() -> None:
    torch.manual_seed(0)
    mask = select_experts(torch.zeros(200, 6), 2, "random")
    assert mask.sum(-1).eq(2).all()
    assert mask.sum(0).gt(20).all()


def test_weights() -> None:
    mask = select_experts(SCORES, 2, "top")
    assert torch.equal(expert_weights(SCORES, mask, "binary"), mask.float())
    soft = expert_weights(SCORES, mask, "softmax")
    torch.testing.assert_close(soft.sum(-1), torch.ones(2))
    assert soft[~mask].eq(0).all()
    torch.testing.assert_close(expert_weights(SCORES, mask, "softmax_times_k"), soft * 2)


def test_cosine_router_ignores_the_length_of_its_projection() -> None:
    torch.manual_seed(0)
    router = CosineRouter(8, 4)
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
        losses = [float(balance_loss(s, s, select_experts(s, 1, "top"), noise)) for s in (balanced, skewed)]
        assert losses[0] < 1e-3 < losses[1]
    assert float(balance_loss(torch.ones(3, 1), torch.ones(3, 1), torch.ones(3, 1, dtype=torch.bool), 0.0)) == 0.0
