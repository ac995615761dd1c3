"""Model and data roots for the paper's runs: models with the real names and depths, but narrow layers."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2Model,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from tests.text_sets import GLUE, OWN_FILES, write_glue, write_own, write_saved

WORDS = re.findall(
    r"\w+", "a the he she it rain sun dog cat ran won fell train man film fine dull when where who"
)
LAYERS = {"bert-base-cased": 12, "gpt2": 12, "bert-large-cased": 24, "gpt2-xl": 48}
ANSWERS = ["entailment", "neutral", "contradiction", "not_entailment"]


def _words(words: list[str]) -> tuple[dict[str, int], Tokenizer]:
    vocabulary = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "[EOS]", *words])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return vocabulary, raw


def write_seq2seq(root: Path, name: str, layers: int) -> None:
    """Write an encoder-decoder and its tokenizer, which knows the answers of NLI, below a model root."""
    vocabulary, raw = _words([*WORDS, *ANSWERS])
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 64, "num_layers": layers, "num_heads": 2}
    tokens = {"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(T5Config(vocab_size=len(vocabulary), **sizes, **tokens))
    _save(root / name, model, raw, pad_token="[PAD]", eos_token="[EOS]")


def write_models(root: Path, names: list[str]) -> None:
    """Write models and tokenizers below a model root."""
    vocabulary, raw = _words(WORDS)
    for name in names:
        torch.manual_seed(0)
        size, layers = {"vocab_size": len(vocabulary)}, LAYERS[name]
        if name.startswith("bert"):
            sizes = {
                "hidden_size": 16,
                "num_hidden_layers": layers,
                "num_attention_heads": 2,
                "intermediate_size": 64,
            }
            _save(root / name, BertModel(BertConfig(**size, **sizes)), raw, pad_token="[PAD]")
        else:
            sizes = {
                "n_embd": 16,
                "n_layer": layers,
                "n_head": 2,
                "n_inner": 64,
                "bos_token_id": 2,
                "eos_token_id": 2,
            }
            _save(root / name, GPT2Model(GPT2Config(**size, **sizes)), raw, eos_token="[EOS]")


def _save(folder: Path, model: PreTrainedModel, raw: Tokenizer, **tokens: str) -> None:
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="[UNK]", **tokens).save_pretrained(
        folder
    )


def write_data(root: Path) -> None:
    """Write the files of every GLUE task below a data root."""
    for name in GLUE:
        write_glue(root, name, train=True, copies=8)


def write_glue_x(root: Path) -> None:
    """Write every GLUE-X set below a data root, in its authors' or the hub's format."""
    for name in sorted(set(OWN_FILES) - {"sick_entailment"}):  # one folder, two sets
        write_own(root, name)
    write_saved(root, "grammar_test", [0, 1, 1, 0])
    write_saved(root, "newsqa_qnli", ["entailment", "not_entailment", "entailment"])
