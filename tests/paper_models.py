"""Write the paper's models in their published shapes, with random weights, as the hub stores them.

Llamas have two layers instead of 32 or 60. Tokenizers have the published kind but few tokens.
"""

from __future__ import annotations

import json
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor
from transformers import (
    BertConfig,
    BertForPreTraining,
    BertTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Tokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    T5Tokenizer,
)

from benchmarks.harness.config.catalogue import load_models
from emoe.files import save_weights, write_tensors
from tests.instruction_runs import ROWS
from tests.text_sets import TASKS, TSV

State = dict[str, Tensor]


class Shape(NamedTuple):
    """A published model of transformers.

    Attributes:
        config: Its configuration.
        model: The class that the hub's weights are of.
        tokenizer: The class of its tokenizer.
        stored: Returns the tensors of the hub's files, by their names there, from the model's own.
        dtype: The type of the hub's weights.
    """

    config: PreTrainedConfig
    model: type[PreTrainedModel]
    tokenizer: Any
    stored: Callable[[State], State]
    dtype: torch.dtype = torch.float32


def _bert(state: State) -> State:
    """Give norms the names of TensorFlow, which BERT's files have."""
    stored = {}
    for name, tensor in state.items():
        older = name.replace("LayerNorm.weight", "LayerNorm.gamma")
        stored[older.replace("LayerNorm.bias", "LayerNorm.beta")] = tensor
    return stored


def _gpt2(state: State) -> State:
    """Take the prefix off, leave the tied head out, and add the causal masks of older releases."""
    stored = {}
    for name, tensor in state.items():
        if name.startswith("transformer."):
            stored[name.removeprefix("transformer.")] = tensor
    positions = len(stored["wpe.weight"])
    mask = torch.ones(1, 1, positions, positions).tril()
    for name in list(stored):
        if name.endswith("attn.c_attn.weight"):
            stored[name.replace("c_attn.weight", "bias")] = mask.clone()
    return stored


def _t5(state: State) -> State:
    """Keep one name of the shared embeddings, and add a bias that T5's first code did not use."""
    stored = {}
    for name, tensor in state.items():
        if not name.endswith("embed_tokens.weight") and name != "lm_head.weight":
            stored[name] = tensor
    used = stored["decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
    unused = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    stored[unused] = torch.zeros_like(used)
    return stored


def _llama(state: State) -> State:
    """Add the rotary frequencies that older releases stored."""
    stored = dict(state)
    for name, tensor in state.items():
        if name.endswith("q_proj.weight"):
            frequencies = torch.ones(64, dtype=tensor.dtype)
            stored[name.replace("q_proj.weight", "rotary_emb.inv_freq")] = frequencies
    return stored


def _bert_shape(width: int, layers: int, heads: int) -> Shape:
    config = BertConfig(
        vocab_size=28996,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * width,
    )
    return Shape(config, BertForPreTraining, BertTokenizer, _bert)


def _gpt2_shape(width: int, layers: int, heads: int) -> Shape:
    config = GPT2Config(n_embd=width, n_layer=layers, n_head=heads)
    return Shape(config, GPT2LMHeadModel, GPT2Tokenizer, _gpt2)


def _t5_shape() -> Shape:
    config = T5Config(
        vocab_size=32128,
        d_model=768,
        d_ff=3072,
        num_layers=12,
        num_heads=12,
        decoder_start_token_id=0,
    )
    return Shape(config, T5ForConditionalGeneration, T5Tokenizer, _t5)


def _llama_shape(width: int, neurons: int, heads: int) -> Shape:
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=width,
        num_hidden_layers=2,
        num_attention_heads=heads,
        intermediate_size=neurons,
        max_position_embeddings=2048,
    )
    return Shape(config, LlamaForCausalLM, LlamaTokenizer, _llama, torch.float16)


SHAPES: dict[str, Callable[[], Shape]] = {
    "bert-base-cased": lambda: _bert_shape(768, 12, 12),
    "bert-large-cased": lambda: _bert_shape(1024, 24, 16),
    "gpt2": lambda: _gpt2_shape(768, 12, 12),
    "gpt2-xl": lambda: _gpt2_shape(1600, 48, 25),
    "t5-base": _t5_shape,
    "llama2-7b": lambda: _llama_shape(4096, 11008, 32),
    "llama-30b": lambda: _llama_shape(6656, 17920, 52),
}


def write_model(root: Path, name: str) -> Path:
    """Write a model of ``models.yaml`` below a model root, and return its folder.

    timm's models have one file of weights. The other models also have settings and a tokenizer.
    """
    folder = root / name
    torch.manual_seed(0)
    entry = load_models()[name]
    if entry.timm is not None:
        save_weights(timm.create_model(entry.timm, pretrained=False), folder)
        return folder
    shape = SHAPES[name]()
    folder.mkdir(parents=True)
    _write_weights(folder, shape)
    tokenizer = shape.tokenizer().train_new_from_iterator(_texts(), 2000)
    tokenizer.save_pretrained(folder)
    return folder


def _write_weights(folder: Path, shape: Shape) -> None:
    """Write the configuration and the weights: those of a Llama in two files, others in one."""
    model = shape.model._from_config(shape.config, dtype=shape.dtype)
    shape.config.architectures = [shape.model.__name__]
    shape.config.dtype = shape.dtype
    shape.config.save_pretrained(folder)
    # tied tensors are stored once
    tensors: State = {}
    for name, tensor in model.state_dict().items():
        if name not in model.all_tied_weights_keys:
            tensors[name] = tensor
    stored = shape.stored(tensors)
    metadata = {"format": "pt"}
    if not isinstance(shape.config, LlamaConfig):
        write_tensors(stored, folder / "model.safetensors", metadata)
        return

    names = list(stored)
    middle = len(names) // 2
    names_by_file = {
        "model-00001-of-00002.safetensors": names[:middle],
        "model-00002-of-00002.safetensors": names[middle:],
    }
    file_of_tensor = {}
    for file, names_of_file in names_by_file.items():
        half = {name: stored[name] for name in names_of_file}
        write_tensors(half, folder / file, metadata)
        for name in names_of_file:
            file_of_tensor[name] = file
    index = {"metadata": {}, "weight_map": file_of_tensor}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _texts() -> list[str]:
    """Return the texts that tokenizers are trained on.

    They are made-up rows, the names of classes, and all letters that a keyboard has. Without these,
    Llama's tokenizer would join the letter of an answer with the unknown letters before it.
    """
    texts = []
    for _file, lines in TSV.values():
        texts += lines
    for task in TASKS.values():
        texts.append(" ".join(task["labels"]))
    for row in ROWS:
        texts.append(f"{row['instruction']} {row['input']} {row['output']}")
    letters = string.ascii_letters + string.digits + string.punctuation
    texts.append(" ".join(letters))
    return texts
