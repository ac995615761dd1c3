"""Convert, then quantize, then run: the experts of a quantized model are chosen by the quantized keys."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, TorchAoConfig

import emoe
from tests.converted import SETTINGS, Settings
from tests.plain_net import PlainNet, plain_net

bitsandbytes = pytest.importorskip("bitsandbytes")
Quantize = Callable[[PlainNet], None]


def net(gated: bool = True, **settings: Any) -> PlainNet:
    network = plain_net(64, 128, gated=gated)
    emoe.convert_(network, emoe.EMoEConfig(num_experts=8, top_k=2, layers=[0], **settings))
    return network


def x() -> Tensor:
    return torch.randn(40, 64, generator=torch.Generator().manual_seed(0))


def by_hand(network: PlainNet, names: tuple[str, ...] = ("inner", "up", "outer")) -> None:
    """Replace the projections with four-bit ones, as users do."""
    for name in names:
        old = getattr(network.layers[0], name)
        new = bitsandbytes.nn.Linear4bit(
            old.in_features, old.out_features, bias=False, quant_type="nf4", compute_dtype=torch.float32
        )
        new.weight = bitsandbytes.nn.Params4bit(old.weight.data, requires_grad=False, quant_type="nf4")
        setattr(network.layers[0], name, new)
    network.to("cpu")


def int8(network: PlainNet) -> None:
    torchao = pytest.importorskip("torchao.quantization")
    torchao.quantize_(network, torchao.Int8WeightOnlyConfig())


def effective_weight(module: nn.Module) -> Tensor:
    """Return the weight that a quantized projection multiplies with."""
    return type(module).forward(module, torch.eye(module.in_features)).detach().as_subclass(Tensor).t()


@pytest.mark.parametrize("quantize", [by_hand, int8])
def test_the_output_is_that_of_the_quantized_weights(quantize: Quantize) -> None:
    quantized, twin = net(), net()
    quantize(quantized)
    with torch.no_grad():
        for name in ("inner", "up", "outer"):
            twin.layers[0].get_submodule(name).weight.copy_(effective_weight(quantized.layers[0].get_submodule(name)))
        torch.testing.assert_close(quantized(x()), twin(x()), atol=2e-2, rtol=1e-3)
    with pytest.raises(emoe.ConversionError, match="quanti"):
        emoe.set_backend_(quantized, "sparse")


def test_what_loses_its_projection_is_an_error_that_names_it() -> None:
    learned, biases = net(**SETTINGS["learned"]), net(gated=False, **SETTINGS["output biases"])
    by_hand(learned)
    biases.layers[0].outer = nn.Linear(128, 64)
    for network in (learned, biases):
        with pytest.raises(RuntimeError, match=r"layers\.0.*replaced"):
            network(x())


NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
QUANTIZATIONS: dict[str, Callable[[], Any]] = {
    "nf4": lambda: BitsAndBytesConfig(**NF4),
    "int8": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "torchao": lambda: TorchAoConfig(pytest.importorskip("torchao.quantization").Int8WeightOnlyConfig()),
}


@pytest.mark.parametrize("settings", [{}, SETTINGS["learned"]])
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_a_converted_checkpoint_loads_quantized(quantization: str, settings: Settings, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=60, num_attention_heads=4, num_key_value_heads=2, **sizes)).eval()
    emoe.convert_(model, emoe.EMoEConfig(num_experts=8, top_k=2, layers="all", **settings))
    emoe.save_pretrained(model, tmp_path)
    quantized = emoe.from_pretrained(LlamaForCausalLM, tmp_path, quantization_config=QUANTIZATIONS[quantization]())
    ids = torch.arange(3, 20)[None]
    with torch.no_grad(), emoe.record_routing(quantized) as record:
        logits, expected = quantized(ids).logits.float(), model(ids).logits
    assert (logits - expected).norm() < 0.3 * expected.norm()
    assert record.layers[0].experts_per_token == 2
