"""Convert, then quantise, then run: the experts of a quantised model are chosen by what its keys do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, TorchAoConfig

import emoe
from tests.plain_net import plain_net

bitsandbytes = pytest.importorskip("bitsandbytes")


def net(**settings: Any) -> nn.Module:
    found = plain_net(64, 128, gated=True)
    emoe.convert_(found, emoe.EMoEConfig(num_experts=8, top_k=2, layers=[0], **settings))
    return found


def x() -> Tensor:
    return torch.randn(40, 64, generator=torch.Generator().manual_seed(0))


def by_hand(found: nn.Module) -> None:
    """Swap the projections for four-bit ones, as people do by hand."""
    for name in ("inner", "up", "outer"):
        old = getattr(found.layers[0], name)
        new = bitsandbytes.nn.Linear4bit(
            old.in_features, old.out_features, bias=False, quant_type="nf4", compute_dtype=torch.float32
        )
        new.weight = bitsandbytes.nn.Params4bit(old.weight.data, requires_grad=False, quant_type="nf4")
        setattr(found.layers[0], name, new)
    found.to("cpu")


def int8(found: nn.Module) -> None:
    torchao = pytest.importorskip("torchao.quantization")
    torchao.quantize_(found, torchao.Int8WeightOnlyConfig())


def effective(module: nn.Module) -> Tensor:
    """A projection's weight, by what it does."""
    return module(torch.eye(module.in_features)).detach().as_subclass(Tensor).t()


@pytest.mark.parametrize("quantise", [by_hand, int8])
@pytest.mark.parametrize("backend", ["auto", "sparse"])
def test_the_output_is_that_of_the_quantised_weights(quantise: Callable[[nn.Module], None], backend: str) -> None:
    quantised, twin = net(backend=backend), net(backend="masked")
    quantise(quantised)
    with torch.no_grad():
        for name in ("inner", "up"):
            getattr(twin.layers[0], name).weight.copy_(effective(getattr(quantised.layers[0], name)))
        twin.layers[0].outer.weight.copy_(effective_out(quantised.layers[0].outer))
        torch.testing.assert_close(quantised(x()), twin(x()), atol=2e-2, rtol=1e-3)


def effective_out(module: nn.Module) -> Tensor:
    found = type(module).forward(module, torch.eye(128)) if not hasattr(module, "_emoe_handler") else None
    if found is None:
        found = nn.functional.linear(torch.eye(128), module.weight.dequantize())
    return found.detach().t()


def test_a_learned_router_cannot_lose_its_input() -> None:
    found = net(router="cosine", weighting="softmax")
    by_hand(found)
    with pytest.raises(
        RuntimeError, match=r"layers\.0: the activation ran without its in-projection, or that was replaced"
    ):
        found(x())


def test_own_biases_cannot_lose_their_out_projection() -> None:
    found = plain_net(64, 128)
    emoe.convert_(found, emoe.EMoEConfig(num_experts=8, top_k=2, layers=[0], output_bias="per_expert"))
    found.layers[0].outer = nn.Linear(128, 64)
    with pytest.raises(RuntimeError, match=r"layers\.0\.outer was replaced after the conversion"):
        found(x())


def nf4() -> BitsAndBytesConfig:
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)


def bitsandbytes_int8() -> BitsAndBytesConfig:
    return BitsAndBytesConfig(load_in_8bit=True)


def torchao_int8() -> TorchAoConfig:
    return TorchAoConfig(pytest.importorskip("torchao.quantization").Int8WeightOnlyConfig())


@pytest.mark.parametrize("settings", [{}, {"router": "cosine", "weighting": "softmax_times_k"}])
@pytest.mark.parametrize("quantisation", [nf4, bitsandbytes_int8, torchao_int8])
def test_a_converted_checkpoint_loads_quantised(
    quantisation: Callable[[], Any], settings: dict[str, Any], tmp_path
) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=60, num_attention_heads=4, num_key_value_heads=2, **sizes)).eval()
    emoe.convert_(model, emoe.EMoEConfig(num_experts=8, top_k=2, layers="all", **settings))
    emoe.save_pretrained(model, tmp_path)
    quantised = emoe.from_pretrained(LlamaForCausalLM, tmp_path, quantization_config=quantisation())
    ids = torch.arange(3, 20)[None]
    with torch.no_grad(), emoe.record_routing(quantised) as record:
        found, expected = quantised(ids).logits.float(), model(ids).logits
    assert (found - expected).norm() < 0.3 * expected.norm()
    assert record.layers[0].experts_per_token == 2


def test_torchs_dynamic_quantisation_leaves_converted_ffns_in_float() -> None:
    found = nn.Sequential(net(), nn.Linear(64, 64))
    quantised = torch.ao.quantization.quantize_dynamic(found, {nn.Linear}, dtype=torch.qint8)
    assert torch.equal(quantised[0](x()), found[0](x()))
    assert not isinstance(quantised[1], nn.Linear)


def test_quantised_weights_cannot_be_converted() -> None:
    found = plain_net(64, 128, gated=True)
    by_hand(found)
    with pytest.raises(emoe.ConversionError, match="convert before quantising"):
        emoe.convert_(found, emoe.EMoEConfig(num_experts=8, top_k=2, layers=[0]))
