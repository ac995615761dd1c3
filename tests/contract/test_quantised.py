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
from tests import converted
from tests.converted import SETTINGS, Settings

pytest.importorskip("bitsandbytes")
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
QUANTIZATIONS: dict[str, Callable[[], Any]] = {
    "nf4": lambda: BitsAndBytesConfig(**NF4),
    "int8": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "torchao": lambda: TorchAoConfig(
        pytest.importorskip("torchao.quantization").Int8WeightOnlyConfig()
    ),
}


def effective_weight(module: nn.Module) -> Tensor:
    """Return the weight that a quantized projection multiplies with."""
    return module(torch.eye(module.in_features)).detach().as_subclass(Tensor).t().float()


@pytest.mark.parametrize("settings", [{}, SETTINGS["learned"]])
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@torch.no_grad()
def test_a_converted_checkpoint_loads_quantized(
    quantization: str, settings: Settings, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=60, num_attention_heads=4, num_key_value_heads=2, **sizes)
    ).eval()
    emoe.convert_(model, emoe.EMoEConfig(num_experts=8, top_k=2, layers="all", **settings))
    emoe.save_pretrained(model, tmp_path)
    quantized = emoe.from_pretrained(
        LlamaForCausalLM, tmp_path, quantization_config=QUANTIZATIONS[quantization]()
    )
    with pytest.raises(emoe.ConversionError, match="quanti"):
        emoe.set_backend_(quantized, "sparse")
    ids = torch.arange(3, 20)[None]
    with emoe.record_routing(quantized) as record:
        logits = quantized(ids).logits.float()
    assert record.layers[0].experts_per_token == 2
    for (
        name,
        module,
    ) in quantized.named_modules():  # give the model the quantized weights in full precision
        if name.endswith("_proj"):
            model.get_submodule(name).weight.copy_(effective_weight(module))
    expected = model(ids).logits
    assert (logits - expected).norm() < 0.05 * expected.norm()


def test_an_ffn_that_loses_a_projection_is_an_error_that_names_it() -> None:
    learned, biases = (converted.net(**SETTINGS[name]) for name in ("learned", "output biases"))
    learned.layers[0].inner, biases.layers[0].outer = nn.Linear(16, 64), nn.Linear(64, 16)
    for network in (learned, biases):
        with pytest.raises(RuntimeError, match=r"layers\.0.*replaced"):
            network(converted.inputs())
