"""Time of decoding: a prompt, and one token after another, through a language model in evaluation mode."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import emoe
from benchmarks.speed.definition import DecodeSettings, GenerateSettings, PromptSettings, RunModel
from benchmarks.speed.timing import ratios, side_by_side

_PROMPT = 16


def measure_ffns(model: RunModel, settings: DecodeSettings) -> dict[str, dict[str, float]]:
    """Ratios of the time that one token takes in all converted FFNs, one after the other, so that no weight is still in a cache.

    Args:
        model: ``config`` of a transformers language model with ``mlp`` in its layers, whose weights are random.
        settings: of the measure.
    """
    return _through_all(model, settings, 1)


def measure_prompt(model: RunModel, settings: PromptSettings) -> dict[str, dict[str, float]]:
    """Ratios of the time that ``tokens`` tokens, all in one pass, take in all converted FFNs.

    Args:
        model: as above.
        settings: of the measure.
    """
    return _through_all(model, settings, settings.tokens)


def measure_generate(model: RunModel, settings: GenerateSettings) -> dict[str, dict[str, float]]:
    """Ratios of the time of a greedy answer of ``tokens`` tokens to a prompt of 16, with a key-value cache.

    Args:
        model: as above.
        settings: of the measure.
    """
    nets = _models(model, settings)
    prompt = torch.randint(3, nets["dense"].config.vocab_size, (1, _PROMPT))
    calls = {name: functools.partial(_answer, net, prompt, settings.tokens) for name, net in nets.items()}
    return ratios(side_by_side(calls, settings.rounds), "dense")


def _through_all(model: RunModel, settings: DecodeSettings, tokens: int) -> dict[str, dict[str, float]]:
    nets = _models(model, settings)
    x = torch.randn(1, tokens, nets["dense"].config.hidden_size).to(getattr(torch, settings.dtype))
    calls = {name: functools.partial(_through_ffns, net, x) for name, net in nets.items()}
    return ratios(side_by_side(calls, settings.rounds), "dense")


def _models(model: RunModel, settings: DecodeSettings) -> dict[str, Any]:
    dense = AutoModelForCausalLM.from_config(AutoConfig.for_model(**(model.config or {})))
    nets: dict[str, Any] = {"dense": dense.to(getattr(torch, settings.dtype)).eval()}
    for name in settings.candidates:
        nets[name] = copy.deepcopy(nets["dense"])
        config = emoe.EMoEConfig(
            num_experts=settings.num_experts,
            top_k=settings.top_k,
            layers="all",
            partition="contiguous",
        )
        emoe.convert_(nets[name], config)
        if name == "inference":
            emoe.for_inference_(nets[name])
        else:
            emoe.set_backend_(nets[name], name)
    return nets


@torch.inference_mode()
def _through_ffns(net: Any, x: torch.Tensor) -> None:
    for layer in net.model.layers:
        layer.mlp(x)


@torch.inference_mode()
def _answer(net: nn.Module, prompt: torch.Tensor, tokens: int) -> None:
    net.generate(  # type: ignore[operator]
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        pad_token_id=0,
    )
