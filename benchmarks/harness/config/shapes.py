"""The sizes of a transformer, from which its parameters follow: of models that are not on this machine, too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from benchmarks.harness.config.schema import Count, Strict, Whole

_IMAGES = ("vit", "deit", "dinov2")
_GATED = ("llama", "mistral", "qwen2", "qwen3", "gemma")  # by `model_type`: three matrices in an FFN


class Shape(Strict):
    """The sizes of a transformer. Parameters that follow from them leave out biases, norms, pooler and classifier: about 1 %."""

    width: Count
    """Of the residual stream: `hidden_size` of transformers."""
    layers: Count
    """Transformer blocks."""
    neurons: Count
    """Of one FFN: `intermediate_size`."""
    gated: bool = False
    """Whether an FFN has three matrices (SwiGLU) instead of two."""
    key_width: Count | None = None
    """Of all keys, and of all values, where several heads share them: `num_key_value_heads` times the width of a head. null: as wide as the stream."""
    vocab: Whole = 0
    """Tokens that have an embedding; 0 for images."""
    positions: Whole = 0
    """Positions that have an embedding; 0 where they are rotary."""
    patch: Whole = 0
    """Pixels of a patch along each side; 0 for texts."""
    tied: bool = True
    """Whether a language model's head is its embedding."""
    stored: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Type of the numbers in the files that are downloaded."""

    @property
    def ffn(self) -> int:
        """Parameters of one FFN."""
        return (3 if self.gated else 2) * self.width * self.neurons

    @property
    def block(self) -> int:
        """Parameters of one block."""
        return 2 * self.width * (self.width + (self.key_width or self.width)) + self.ffn

    @property
    def embedding(self) -> int:
        """Parameters before the blocks, a language model's head included where it is not tied."""
        tables = (1 if self.tied else 2) * self.vocab + self.positions + 3 * self.patch**2
        return tables * self.width

    @property
    def parameters(self) -> int:
        """Parameters of the model.

        >>> round(Shape(width=4096, layers=32, neurons=11008, gated=True, vocab=32000, tied=False).parameters / 1e9, 2)
        6.74
        """
        return self.embedding + self.layers * self.block

    def image_tokens(self, pixels: int) -> int:
        """Tokens of a square image, with the one that is classified.

        Args:
            pixels: along each side.
        """
        return (pixels // self.patch) ** 2 + 1


def shape_of_config(config: Mapping[str, Any]) -> Shape:
    """The shape of a transformers configuration; what it leaves out is as in BERT-base and GPT-2.

    >>> shape_of_config({"model_type": "bert", "vocab_size": 100, "hidden_size": 8, "num_hidden_layers": 2, "intermediate_size": 16}).block
    512
    """

    def of(*names: str, default: int) -> int:
        return next((int(config[name]) for name in names if config.get(name) is not None), default)

    width = of("hidden_size", "n_embd", default=768)
    heads = of("num_attention_heads", "n_head", default=12)
    gated, sees = config.get("model_type") in _GATED, config.get("model_type") in _IMAGES
    return Shape(
        width=width,
        layers=of("num_hidden_layers", "n_layer", default=12),
        neurons=of("intermediate_size", "n_inner", default=4 * width),
        gated=gated,
        key_width=width // heads * of("num_key_value_heads", default=heads),
        vocab=0 if sees else of("vocab_size", default=30522),
        positions=0 if gated else of("max_position_embeddings", "n_positions", default=0),
        patch=of("patch_size", default=16) if sees else 0,
        tied=bool(config.get("tie_word_embeddings", not gated)),
    )
