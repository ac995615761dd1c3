"""The model of a run, and the tensors that its training changes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import LoraModel
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.tensor import DTensor

from benchmarks.harness.base import DataError
from benchmarks.harness.models.prefix import Prefix
from emoe.files import read_tensors


@dataclass(frozen=True)
class Trainable:
    """Hold a converted and adapted model.

    Attributes:
        model: The model; called with ``labels`` it also returns the loss.
        summary: The ``model`` part of ``metrics.json``.
        slow: The names of the trained parameters with a lower learning rate.
        adapters: The added adapters, which peft can merge.
        prefix: The frozen embeddings and first layers; None if none are frozen.
    """

    model: nn.Module
    summary: dict[str, Any]
    slow: frozenset[str]
    adapters: LoraModel | None
    prefix: Prefix | None = None

    def prefix_cost(self) -> dict[str, float]:
        """Return this process's seconds in frozen layers as a dictionary; empty without frozen layers."""
        return {"prefix_seconds": self.prefix.seconds} if self.prefix else {}


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors that training changes on the CPU: trained parameters, and buffers such as running gates.

    If the model is sharded, all processes call this, and only the main one gets the whole tensors.
    """
    state = model.state_dict()
    if any(isinstance(tensor, DTensor) for tensor in state.values()):
        options = StateDictOptions(
            full_state_dict=True, cpu_offload=True, ignore_frozen_params=True
        )
        state = get_model_state_dict(model, options=options)
    names = _trained_names(model)
    return {
        name: tensor.detach().cpu().contiguous() for name, tensor in state.items() if name in names
    }


def _trained_names(model: nn.Module) -> set[str]:
    # without a second name of tied weights, and without the states of quantised weights
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return trained | {name for name, _ in model.named_buffers()}


def load_trained_(model: nn.Module, file: Path) -> None:
    """Load a file with a :func:`trained_state` into a model that was built the same way.

    Raises:
        DataError: The file belongs to another model.
        CheckpointError: The file is missing or damaged.
    """
    load_trained_state_(model, read_tensors(file), str(file))


def load_trained_state_(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Load a :func:`trained_state` into a model that was built the same way.

    Raise :class:`DataError` with their ``source`` if they belong to another model.
    """
    shapes = {name: tensor.shape for name, tensor in state.items()}
    names = _trained_names(model)
    expected = {name: tensor.shape for name, tensor in model.state_dict().items() if name in names}
    if shapes != expected:
        wrong = min(name for name, _ in shapes.items() ^ expected.items())
        raise DataError(f"{source} belongs to another model: they differ in '{wrong}'")
    # a sharded model takes its part of each tensor
    set_model_state_dict(
        model, dict(state), options=StateDictOptions(full_state_dict=True, strict=False)
    )
