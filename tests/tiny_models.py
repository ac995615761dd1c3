"""One tiny random model per registered architecture."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import timm
import torch
import transformers as hf
from torch import nn

HIDDEN, WIDTH, LAYERS, VOCABULARY = 32, 64, 4, 60
_HF: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "intermediate_size": WIDTH,
}
_TEXT = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_IMAGE = {"image_size": 32, "patch_size": 8}


def _vit(cls: type, config: type, **extra: Any) -> nn.Module:
    return cls(config(**_HF, **_IMAGE, **extra))


BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "bert": lambda: hf.BertModel(hf.BertConfig(**_TEXT, **_HF)),
    "roberta": lambda: hf.RobertaModel(hf.RobertaConfig(**_TEXT, **_HF)),
    "distilbert": lambda: hf.DistilBertModel(
        hf.DistilBertConfig(**_TEXT, dim=HIDDEN, n_layers=LAYERS, n_heads=4, hidden_dim=WIDTH)
    ),
    "gpt2": lambda: hf.GPT2Model(hf.GPT2Config(**_TEXT, n_embd=HIDDEN, n_layer=LAYERS, n_head=4, n_inner=WIDTH)),
    "llama": lambda: hf.LlamaModel(hf.LlamaConfig(**_TEXT, **_HF, num_key_value_heads=2)),
    "vit": lambda: _vit(hf.ViTModel, hf.ViTConfig),
    "deit": lambda: _vit(hf.DeiTModel, hf.DeiTConfig),
    "dinov2": lambda: hf.Dinov2Model(
        hf.Dinov2Config(hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=4, mlp_ratio=2, **_IMAGE)
    ),
    "VisionTransformer": lambda: timm.create_model("test_vit"),
}


def build(name: str, seed: int = 0) -> nn.Module:
    """A tiny random model in eval mode; the same weights for the same seed."""
    torch.manual_seed(seed)
    model = BUILDERS[name]().eval()
    with torch.no_grad():  # fresh biases are zero, which would hide mistakes with them
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias"):
                parameter.normal_(0, 0.1)
    return model


def inputs(name: str, rows: int = 3, seed: int = 0) -> dict[str, torch.Tensor]:
    """Keyword arguments for a forward pass of ``build(name)``."""
    generator = torch.Generator().manual_seed(seed)
    if name == "VisionTransformer":
        return {"x": torch.randn(rows, 3, 160, 160, generator=generator)}
    if name in ("vit", "deit", "dinov2"):
        return {"pixel_values": torch.randn(rows, 3, 32, 32, generator=generator)}
    return {"input_ids": torch.randint(3, VOCABULARY, (rows, 11), generator=generator)}


def output(model: nn.Module, values: dict[str, torch.Tensor]) -> torch.Tensor:
    """The main output: last hidden states, or timm's logits."""
    result = model(**values)
    return result if isinstance(result, torch.Tensor) else result[0]


def width(model: nn.Module) -> int:
    """Neurons of one FFN."""
    from emoe.architectures import find_ffns

    return find_ffns(model)[0].keys().shape[0]
