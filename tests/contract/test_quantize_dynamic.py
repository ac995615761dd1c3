"""Convert, then quantise with ``quantize_dynamic``, which replaces the linear modules."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.ao.quantization import quantize_dynamic

import emoe
from emoe.architectures import find_ffns
from tests import converted, tiny_models
from tests.converted import BACKENDS, SETTINGS, Settings

pytestmark = pytest.mark.usefixtures("always_sparse")
NAMES = ["bert", "llama", "vit", "t5", "phi3", "TransformerDecoder"]


@pytest.mark.parametrize("settings", [{}, {"score_bias": True}, SETTINGS["output biases"]])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_all_experts_equal_the_quantised_dense_model(name: str, settings: Settings) -> None:
    values = tiny_models.inputs(name)
    dense = quantize_dynamic(tiny_models.build(name))
    experts = quantize_dynamic(converted.model(name, top_k=8, **settings))
    assert type(find_ffns(experts)[0].proj_in) is not nn.Linear
    expected = tiny_models.output(dense, values)
    torch.testing.assert_close(tiny_models.output(experts, values), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("settings", [*SETTINGS.values(), {"score": "gate"}])
@torch.no_grad()
def test_tokens_use_the_experts_of_the_float_model(settings: Settings, backend: str) -> None:
    network = converted.net(backend, **settings)
    quantised, x = quantize_dynamic(network), converted.inputs(40)
    with emoe.record_routing(network) as expected, emoe.record_routing(quantised) as record:
        error = quantised(x) - network(x)
    assert error.norm() < 0.2 * network(x).norm()
    different = (record.layers[0].loads - expected.layers[0].loads).abs().sum()
    assert record.layers[0].experts_per_token == 2
    assert different <= 0.1 * expected.layers[0].loads.sum()


def test_what_quantised_weights_cannot_do_is_refused() -> None:
    momentum, plain = converted.net(gate_momentum=0.5), converted.net()
    message = r"layers\.0\.inner\.weight is not an ordinary floating-point parameter"
    with pytest.raises(emoe.ConversionError, match=message):
        quantize_dynamic(momentum)(converted.inputs())
    for call in (emoe.to_dense_, lambda model: emoe.set_backend_(model, "sparse")):
        with pytest.raises(emoe.ConversionError, match="quantised"):
            call(quantize_dynamic(plain))


def test_one_quantised_projection_leaves_all_experts_in_the_model() -> None:
    network = converted.model("TransformerEncoder")
    last = network.layers[-1]
    last.linear2 = quantize_dynamic(nn.Sequential(last.linear2))[0]
    with emoe.record_routing(network) as before:
        pass
    with pytest.raises(emoe.ConversionError, match=r"linear2 is quantised"):
        emoe.to_dense_(network)
    with emoe.record_routing(network) as after:
        pass
    assert len(before.layers) > 1
    assert after.layers.keys() == before.layers.keys()
