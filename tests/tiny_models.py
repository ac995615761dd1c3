"""Tiny random models: at least one for each registered architecture."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import timm
import torch
import transformers as hf
from safetensors.torch import load_file
from torch import nn

HIDDEN, WIDTH, LAYERS, VOCABULARY = 32, 64, 4, 60
_BODY = {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
_HF = {**_BODY, "intermediate_size": WIDTH}
_TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_TEXT = {**_TOKENS, **_HF}
_GROUPED = {**_TEXT, "num_key_value_heads": 2, "head_dim": 8}
_IMAGE = {"image_size": 32, "patch_size": 8}
_T5_SIZES = {"d_model": HIDDEN, "d_ff": WIDTH, "d_kv": 8, "num_layers": LAYERS // 2, "num_heads": 4}
_T5 = {**_TOKENS, **_T5_SIZES, "decoder_start_token_id": 0}
# models of transformers: their class names without "Model", and the options of their configurations
_ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("Bert", _TEXT),
    "roberta": ("Roberta", _TEXT),
    "xlm-roberta": ("XLMRoberta", _TEXT),
    "electra": ("Electra", {**_TEXT, "embedding_size": HIDDEN}),
    "deberta-v2": ("DebertaV2", _TEXT),
    "distilbert": (
        "DistilBert",
        {**_TOKENS, "dim": HIDDEN, "n_layers": LAYERS, "n_heads": 4, "hidden_dim": WIDTH},
    ),
    "modernbert": ("ModernBert", {**_TEXT, "cls_token_id": 1, "sep_token_id": 2, "mlp_bias": True}),
}
_GENERATORS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": (
        "GPT2",
        {**_TOKENS, "n_embd": HIDDEN, "n_layer": LAYERS, "n_head": 4, "n_inner": WIDTH},
    ),
    "gpt_neox": ("GPTNeoX", _TEXT),
    "opt": ("OPT", {**_TOKENS, **_BODY, "ffn_dim": WIDTH, "word_embed_proj_dim": HIDDEN}),
    "t5": ("T5", _T5),
    "t5 v1.1": ("T5", {**_T5, "feed_forward_proj": "gated-gelu"}),
    "llama": ("Llama", _GROUPED),
    "mistral": ("Mistral", _GROUPED),
    "qwen2": ("Qwen2", _GROUPED),
    "qwen3": ("Qwen3", _GROUPED),
    "gemma": ("Gemma", _GROUPED),
    "gemma2": ("Gemma2", _GROUPED),
    "gemma3_text": ("Gemma3Text", _GROUPED),
    "phi": ("Phi", _TEXT),
    "phi3": ("Phi3", _TEXT),
}
_IMAGE_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("ViT", {**_HF, **_IMAGE}),
    "deit": ("DeiT", {**_HF, **_IMAGE}),
    "dinov2": ("Dinov2", {**_BODY, "mlp_ratio": 2, **_IMAGE}),
    "clip_vision_model": ("CLIPVision", {**_HF, **_IMAGE}),
}
_TRANSFORMERS = {**_ENCODERS, **_GENERATORS, **_IMAGE_MODELS}
DECODERS = list(_GENERATORS)
# timm's arguments to rebuild them
_BEIT = {
    "embed_dim": HIDDEN,
    "depth": LAYERS,
    "num_heads": 4,
    "mlp_ratio": 2,
    "img_size": 32,
    "patch_size": 8,
}
_SWIN = {"embed_dim": 16, "depths": (2, 2), "num_heads": (2, 2), "img_size": 32, "window_size": 4}
TIMM: dict[str, dict[str, Any]] = {
    "VisionTransformer": {"model_name": "test_vit"},
    "Beit": {"model_name": "beit_base_patch16_224", **_BEIT},
    "SwinTransformer": {"model_name": "swin_tiny_patch4_window7_224", **_SWIN},
}


def _from_transformers(name: str) -> nn.Module:
    kind, options = _TRANSFORMERS[name]
    config_class = getattr(hf, f"{kind}Config")
    model_class = getattr(hf, f"{kind}Model")
    return model_class(config_class(**options))


def _torch_stack(kind: str) -> nn.Module:
    layer_class = getattr(nn, f"{kind}Layer")
    stack_class = getattr(nn, kind)
    layer = layer_class(
        HIDDEN, 4, WIDTH, dropout=0.1, activation=nn.functional.gelu, batch_first=True
    )
    return stack_class(layer, LAYERS)


BUILDERS: dict[str, Callable[[], nn.Module]] = {
    **{name: partial(_from_transformers, name) for name in _TRANSFORMERS},
    **{name: partial(_torch_stack, name) for name in ("TransformerEncoder", "TransformerDecoder")},
    **{name: partial(timm.create_model, **options) for name, options in TIMM.items()},
}


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
    """Draw biases and weights again, and switch to eval mode.

    Fresh biases are zero and fresh weights are small, which would hide mistakes with them.
    """
    with torch.no_grad():
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
        if name == "TransformerEncoder":
            return {"src": x}
        return {"tgt": x, "memory": x.flip(1)}
    if name in _IMAGE_MODELS:
        return {"pixel_values": torch.randn(rows, 3, 32, 32, generator=generator)}
    tokens = {"input_ids": torch.randint(3, VOCABULARY, (rows, 11), generator=generator)}
    if name.startswith("t5"):
        tokens["decoder_input_ids"] = torch.randint(3, VOCABULARY, (rows, 7), generator=generator)
    return tokens


def output(model: nn.Module, values: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the main output of a forward pass: last hidden states, or timm's logits."""
    result = model(**values)
    if isinstance(result, torch.Tensor):
        return result
    return result[0]


def stock(name: str, folder: Any) -> nn.Module:
    """Load the dense model from a folder with its own library."""
    if name in TIMM:
        options = load_options(name)
        return timm.create_model(f"local-dir:{folder}", pretrained=True, **options).eval()
    if name.startswith("Transformer"):
        model = BUILDERS[name]()
        model.load_state_dict(load_file(f"{folder}/model.safetensors"))
        return model.eval()
    model_class: Any = type(BUILDERS[name]())
    return model_class.from_pretrained(folder).eval()


def loader(name: str) -> Any:
    """Return the loader that :func:`emoe.from_pretrained` takes for this model."""
    if name in TIMM:
        return timm.create_model
    if name.startswith("Transformer"):
        return BUILDERS[name]
    return type(BUILDERS[name]())


def load_options(name: str) -> dict[str, Any]:
    """Return the options that :func:`emoe.from_pretrained` needs for this model."""
    options = dict(TIMM.get(name, {}))
    options.pop("model_name", None)
    return options
