"""Tiny random models: at least one for each registered architecture."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import timm
import torch
import transformers as hf
from safetensors.torch import load_file
from torch import nn

HIDDEN, WIDTH, LAYERS, VOCABULARY = 32, 64, 4, 60
_HF: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "intermediate_size": WIDTH,
}
_TEXT = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_GROUPED = {**_TEXT, **_HF, "num_key_value_heads": 2, "head_dim": 8}
_IMAGE = {"image_size": 32, "patch_size": 8}
_T5 = {
    **_TEXT,
    "d_model": HIDDEN,
    "d_ff": WIDTH,
    "d_kv": 8,
    "num_layers": LAYERS // 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
# what timm needs to build them again
TIMM: dict[str, dict[str, Any]] = {
    "VisionTransformer": {"model_name": "test_vit"},
    "Beit": {
        "model_name": "beit_base_patch16_224",
        "img_size": 32,
        "patch_size": 8,
        "embed_dim": HIDDEN,
        "depth": LAYERS,
        "num_heads": 4,
        "mlp_ratio": 2,
    },
    "SwinTransformer": {
        "model_name": "swin_tiny_patch4_window7_224",
        "img_size": 32,
        "window_size": 4,
        "embed_dim": 16,
        "depths": (2, 2),
        "num_heads": (2, 2),
    },
}


def _torch_layer(kind: type[nn.Module]) -> nn.Module:
    return kind(HIDDEN, 4, WIDTH, dropout=0.1, activation=nn.functional.gelu, batch_first=True)


BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "bert": lambda: hf.BertModel(hf.BertConfig(**_TEXT, **_HF)),
    "roberta": lambda: hf.RobertaModel(hf.RobertaConfig(**_TEXT, **_HF)),
    "xlm-roberta": lambda: hf.XLMRobertaModel(hf.XLMRobertaConfig(**_TEXT, **_HF)),
    "electra": lambda: hf.ElectraModel(hf.ElectraConfig(**_TEXT, **_HF, embedding_size=HIDDEN)),
    "deberta-v2": lambda: hf.DebertaV2Model(hf.DebertaV2Config(**_TEXT, **_HF)),
    "distilbert": lambda: hf.DistilBertModel(
        hf.DistilBertConfig(**_TEXT, dim=HIDDEN, n_layers=LAYERS, n_heads=4, hidden_dim=WIDTH)
    ),
    "modernbert": lambda: hf.ModernBertModel(
        hf.ModernBertConfig(**_TEXT, **_HF, cls_token_id=1, sep_token_id=2, mlp_bias=True)
    ),
    "gpt2": lambda: hf.GPT2Model(hf.GPT2Config(**_TEXT, n_embd=HIDDEN, n_layer=LAYERS, n_head=4, n_inner=WIDTH)),
    "gpt_neox": lambda: hf.GPTNeoXModel(hf.GPTNeoXConfig(**_TEXT, **_HF)),
    "opt": lambda: hf.OPTModel(
        hf.OPTConfig(
            **_TEXT,
            hidden_size=HIDDEN,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            ffn_dim=WIDTH,
            word_embed_proj_dim=HIDDEN,
        )
    ),
    "t5": lambda: hf.T5Model(hf.T5Config(**_T5)),
    "t5 v1.1": lambda: hf.T5Model(hf.T5Config(**_T5, feed_forward_proj="gated-gelu")),
    "llama": lambda: hf.LlamaModel(hf.LlamaConfig(**_GROUPED)),
    "mistral": lambda: hf.MistralModel(hf.MistralConfig(**_GROUPED)),
    "qwen2": lambda: hf.Qwen2Model(hf.Qwen2Config(**_GROUPED)),
    "qwen3": lambda: hf.Qwen3Model(hf.Qwen3Config(**_GROUPED)),
    "gemma": lambda: hf.GemmaModel(hf.GemmaConfig(**_GROUPED)),
    "gemma2": lambda: hf.Gemma2Model(hf.Gemma2Config(**_GROUPED)),
    "gemma3_text": lambda: hf.Gemma3TextModel(hf.Gemma3TextConfig(**_GROUPED)),
    "phi": lambda: hf.PhiModel(hf.PhiConfig(**_TEXT, **_HF)),
    "phi3": lambda: hf.Phi3Model(hf.Phi3Config(**_TEXT, **_HF)),
    "vit": lambda: hf.ViTModel(hf.ViTConfig(**_HF, **_IMAGE)),
    "deit": lambda: hf.DeiTModel(hf.DeiTConfig(**_HF, **_IMAGE)),
    "dinov2": lambda: hf.Dinov2Model(
        hf.Dinov2Config(hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=4, mlp_ratio=2, **_IMAGE)
    ),
    "clip_vision_model": lambda: hf.CLIPVisionModel(hf.CLIPVisionConfig(**_HF, **_IMAGE)),
    "TransformerEncoder": lambda: nn.TransformerEncoder(_torch_layer(nn.TransformerEncoderLayer), LAYERS),
    "TransformerDecoder": lambda: nn.TransformerDecoder(_torch_layer(nn.TransformerDecoderLayer), LAYERS),
    **{name: (lambda options=options: timm.create_model(**options)) for name, options in TIMM.items()},
}
# the decoders, which generate, stand together
_NAMES = list(BUILDERS)
DECODERS = _NAMES[_NAMES.index("gpt2") : _NAMES.index("phi3") + 1]


def build(name: str, seed: int = 0) -> nn.Module:
    """Build a tiny random model in eval mode; equal seeds give equal weights."""
    torch.manual_seed(seed)
    return _settled(BUILDERS[name]())


def build_generator(name: str, seed: int = 0) -> Any:
    """Build the model of ``build(name)`` with a language-modelling head."""
    config = BUILDERS[name]().config
    auto = hf.AutoModelForSeq2SeqLM if config.is_encoder_decoder else hf.AutoModelForCausalLM
    torch.manual_seed(seed)
    return _settled(auto.from_config(config))


def _settled(model: nn.Module) -> nn.Module:
    with torch.no_grad():  # fresh biases are zero and fresh weights small, which would hide mistakes with them
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias") or parameter.ndim == 2:
                parameter.normal_(0, 0.1)
    return model.eval()


def inputs(name: str, rows: int = 3, seed: int = 0) -> dict[str, torch.Tensor]:
    """Draw the keyword arguments of a forward pass of ``build(name)``."""
    generator = torch.Generator().manual_seed(seed)
    if name in TIMM:
        size = TIMM[name].get("img_size", 160)
        return {"x": torch.randn(rows, 3, size, size, generator=generator)}
    if name.startswith("Transformer"):
        x = torch.randn(rows, 9, HIDDEN, generator=generator)
        return {"src": x} if name == "TransformerEncoder" else {"tgt": x, "memory": x.flip(1)}
    if name in ("vit", "deit", "dinov2", "clip_vision_model"):
        return {"pixel_values": torch.randn(rows, 3, 32, 32, generator=generator)}
    tokens = {"input_ids": torch.randint(3, VOCABULARY, (rows, 11), generator=generator)}
    if name.startswith("t5"):
        tokens["decoder_input_ids"] = torch.randint(3, VOCABULARY, (rows, 7), generator=generator)
    return tokens


def output(model: nn.Module, values: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the main output of a forward pass: last hidden states, or timm's logits."""
    result = model(**values)
    return result if isinstance(result, torch.Tensor) else result[0]


def stock(name: str, folder: Any) -> nn.Module:
    """Load the dense model from a folder with its own library."""
    if name in TIMM:
        return timm.create_model(f"local-dir:{folder}", pretrained=True, **load_options(name)).eval()
    if name.startswith("Transformer"):
        model = BUILDERS[name]()
        model.load_state_dict(load_file(f"{folder}/model.safetensors"))
        return model.eval()
    return type(BUILDERS[name]()).from_pretrained(folder).eval()


def loader(name: str) -> Any:
    """Return the loader that :func:`emoe.from_pretrained` takes for this model."""
    if name in TIMM:
        return timm.create_model
    return BUILDERS[name] if name.startswith("Transformer") else type(BUILDERS[name]())


def load_options(name: str) -> dict[str, Any]:
    """Return the options that :func:`emoe.from_pretrained` needs for this model."""
    return {key: value for key, value in TIMM.get(name, {}).items() if key != "model_name"}
