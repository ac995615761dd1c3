"""``for_inference_`` gives the masked results from a frozen layout, and reads only the chosen experts' weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import emoe
from emoe.layer import routed_layers
from tests import converted, tiny_models
from tests.converted import assert_same, inputs, net, step

pytestmark = pytest.mark.usefixtures("always_sparse")
LEARNED = converted.SETTINGS["learned"]
VARIANTS: dict[str, dict[str, Any]] = {
    **converted.SETTINGS,
    "plain FFN": {"gated": False},
    "score bias": {"gated": False, "score_bias": True},
    "not_top": {"selection": "not_top"},
    "softmax": {"weighting": "softmax", "score": "gate"},
    "capacity": {"capacity_factor": 1.0},
    "momentum": {"gate_momentum": 0.5},
    "gmoe": {"config": emoe.GMoEConfig(num_experts=4, top_k=2, layers=[0])},
    "published": {"output_bias": "per_expert", "capacity_factor": 1.5, "router_noise": 1.0},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_outputs_are_the_masked_ones(variant: str, dtype: torch.dtype) -> None:
    masked, frozen = (net(**VARIANTS[variant]).to(dtype) for _ in range(2))
    emoe.for_inference_(frozen)
    for tokens in (1, 2, 8, 9, 40):
        x = inputs(tokens, seed=tokens).to(dtype)
        expected = masked(x)
        tolerance = 1e-4 if dtype == torch.float32 else 0.05 * float(expected.abs().max())
        torch.testing.assert_close(frozen(x), expected, atol=tolerance, rtol=1e-4)
        torch.testing.assert_close(frozen(x.unsqueeze(0)), expected.unsqueeze(0), atol=tolerance, rtol=1e-4)


@pytest.mark.parametrize("name", tiny_models.DECODERS)
def test_answers_are_the_masked_ones(name: str) -> None:
    ids = torch.randint(3, tiny_models.VOCABULARY, (2, 5), generator=torch.Generator().manual_seed(0))
    answers = []
    for freeze in (False, True):
        model = tiny_models.build_generator(name)
        emoe.convert_(model, emoe.EMoEConfig(num_experts=8, top_k=2, layers="all"))
        if freeze:
            emoe.for_inference_(model)
        answers.append(model.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False))
    assert torch.equal(*answers)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("tokens", [1, 9])
@torch.no_grad()
def test_only_the_chosen_experts_are_read(gated: bool, tokens: int) -> None:
    model = net(gated=gated, **LEARNED)  # whose scores do not depend on the experts' weights
    x = inputs(1).expand(tokens, 16)
    with emoe.record_routing(model) as record:
        expected = model(x)
    emoe.set_backend_(model, "sparse")
    unused = (record.layers[0].loads == 0).repeat_interleave(8)
    ffn = model.layers[0]
    for module in filter(None, (ffn.inner, ffn.up)):
        for parameter in module.parameters():
            parameter[unused] = torch.nan
    ffn.outer.weight[:, unused] = torch.nan
    emoe.for_inference_(model)
    torch.testing.assert_close(model(x), expected)
    emoe.set_backend_(model, "masked")
    assert model(x).isnan().all()


def test_it_is_frozen_until_it_trains() -> None:
    model, x = net().train(), inputs(1)
    keys = list(model.state_dict())
    emoe.for_inference_(model)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any(module.training for module in model.modules())
    assert [layer.backend for layer in routed_layers(model)] == ["sparse"]
    assert list(model.state_dict()) == keys
    frozen = model(x)
    # training discards the layout: from then on the weights are those of the modules
    model.train().requires_grad_(True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.2)
    masked = net()
    masked.load_state_dict(model.state_dict())
    assert_same(step(model.eval(), x), step(masked, x))
    emoe.for_inference_(model)
    with torch.no_grad():
        torch.testing.assert_close(model(x), masked(x))
        assert not torch.allclose(model(x), frozen)


def test_settings_of_a_frozen_model_can_change() -> None:
    model, masked, x = net(), net(), inputs(1)
    emoe.for_inference_(model)
    for change in (lambda m: emoe.set_top_k_(m, 3), lambda m: emoe.fix_experts_(m, {0: torch.arange(8)})):
        for network in (model, masked):
            change(network)
        with torch.no_grad(), emoe.record_routing(model) as record:
            torch.testing.assert_close(model(x), masked(x))
        assert record.layers[0].tokens == 1
