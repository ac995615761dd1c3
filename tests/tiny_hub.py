"""Model and data roots for the paper's runs.

The models have the real names and depths, but narrow layers.
"""

from __future__ import annotations

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

_SENTENCE = "a the he she it rain sun dog cat ran won fell train man film fine dull when where who"
WORDS = _SENTENCE.split()
LAYERS = {"bert-base-cased": 12, "gpt2": 12, "bert-large-cased": 24, "gpt2-xl": 48}
ANSWERS = ["entailment", "neutral", "contradiction", "not_entailment"]


def _word_tokenizer(words: list[str]) -> Tokenizer:
    """Make a tokenizer with a token for each word. Padding is 0, and the end of a text is 2."""
    tokens = ["[PAD]", "[UNK]", "[EOS]", *words]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def write_seq2seq(root: Path, name: str, layers: int) -> None:
    """Write an encoder-decoder and its tokenizer, which knows the answers of NLI.

    They are written into the folder ``name`` below a model root.
    """
    tokenizer = _word_tokenizer([*WORDS, *ANSWERS])
    config = T5Config(
        vocab_size=tokenizer.get_vocab_size(),
        d_model=16,
        d_kv=8,
        d_ff=64,
        num_layers=layers,
        num_heads=2,
        pad_token_id=0,
        eos_token_id=2,
        decoder_start_token_id=0,
    )
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(config)
    _save(root / name, model, tokenizer, pad_token="[PAD]", eos_token="[EOS]")


def write_models(root: Path, names: list[str]) -> None:
    """Write models and tokenizers below a model root."""
    tokenizer = _word_tokenizer(WORDS)
    for name in names:
        torch.manual_seed(0)
        if name.startswith("bert"):
            bert_config = BertConfig(
                vocab_size=tokenizer.get_vocab_size(),
                hidden_size=16,
                num_hidden_layers=LAYERS[name],
                num_attention_heads=2,
                intermediate_size=64,
            )
            _save(root / name, BertModel(bert_config), tokenizer, pad_token="[PAD]")
        else:
            gpt2_config = GPT2Config(
                vocab_size=tokenizer.get_vocab_size(),
                n_embd=16,
                n_layer=LAYERS[name],
                n_head=2,
                n_inner=64,
                bos_token_id=2,
                eos_token_id=2,
            )
            _save(root / name, GPT2Model(gpt2_config), tokenizer, eos_token="[EOS]")


def _save(folder: Path, model: PreTrainedModel, tokenizer: Tokenizer, **tokens: str) -> None:
    """Save a model and its tokenizer, whose special tokens are ``tokens``."""
    model.save_pretrained(folder)
    saved = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", **tokens)
    saved.save_pretrained(folder)


def write_data(root: Path) -> None:
    """Write the files of every GLUE task below a data root."""
    for name in GLUE:
        write_glue(root, name, train=True, copies=8)


def write_glue_x(root: Path) -> None:
    """Write every GLUE-X set below a data root, in its authors' or the hub's format."""
    for name in sorted(OWN_FILES):
        # both tasks of SICK have the same files
        if name != "sick_entailment":
            write_own(root, name)
    write_saved(root, "grammar_test", [0, 1, 1, 0])
    write_saved(root, "newsqa_qnli", ["entailment", "not_entailment", "entailment"])
