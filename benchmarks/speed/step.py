"""Time of a whole training step: forward, backward, AdamW."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel

import emoe
from benchmarks.speed.definition import RunModel, StepSettings
from benchmarks.speed.timing import ratios, side_by_side


def measure(model: RunModel, settings: StepSettings) -> dict[str, dict[str, float]]:
    """Ratios of a converted model's step to the dense model's.

    Args:
        model: ``config`` of a transformers model, whose weights are random.
        settings: of the measure; candidates are backends.
    """
    dense = AutoModel.from_config(AutoConfig.for_model(**(model.config or {}))).train()
    nets: dict[str, nn.Module] = {"dense": dense}
    for backend in settings.candidates:
        nets[backend] = copy.deepcopy(dense)
        config = emoe.EMoEConfig(
            num_experts=settings.num_experts,
            top_k=settings.top_k,
            layers=settings.layers,
            partition="random",
        )
        emoe.convert_(nets[backend], config)
        emoe.set_backend_(nets[backend], backend)
    inputs = _inputs(dense, settings.batch_size, settings.length)
    steps = {
        name: functools.partial(_step, net, torch.optim.AdamW(net.parameters()), inputs) for name, net in nets.items()
    }
    return ratios(side_by_side(steps, settings.rounds), "dense")


def _inputs(model: Any, batch_size: int, length: int) -> dict[str, torch.Tensor]:
    config = model.config
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(batch_size, config.num_channels, config.image_size, config.image_size)}
    ids = torch.randint(config.vocab_size, (batch_size, length))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _step(net: nn.Module, optimizer: torch.optim.Optimizer, inputs: Mapping[str, torch.Tensor]) -> None:
    optimizer.zero_grad()
    net(**inputs).last_hidden_state.square().mean().backward()
    optimizer.step()
