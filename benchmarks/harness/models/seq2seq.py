"""Encoder-decoder models by name, and their tokenizers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForSeq2SeqLM, PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.harness.base.seeds import derive_seed
from benchmarks.harness.models.loading import load_tokenizer, load_whole


def load_seq2seq(model: Mapping[str, Any]) -> PreTrainedModel:
    """A pre-trained encoder-decoder model with its language-modelling head, in float32.

    Args:
        model: a resolved entry of ``models.yaml``. Random weights are the same each time.

    Raises:
        DataError: it is not there, or lacks weights of its layers.
    """
    if "config" in model:
        torch.manual_seed(derive_seed("random weights", model["name"]))
        built: PreTrainedModel = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(**model["config"]))
        return built
    return load_whole(AutoModelForSeq2SeqLM, model, dtype=torch.float32, use_safetensors=True)


def load_seq2seq_tokenizer(model: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    """The model's tokenizer; one that is lent by a model of another kind gives what an encoder-decoder takes."""
    tokenizer = load_tokenizer(model)
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    return tokenizer
