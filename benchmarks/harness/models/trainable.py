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
    """A model that is ready for training: converted, with adapters, and with frozen parameters.

    Attributes:
        model: The model; called with ``labels`` it also returns the loss.
        summary: The ``model`` section of ``metrics.json``.
        slow: The names of the trained parameters that get a lower learning rate.
        adapters: The added adapters, which peft can merge; None if none were added.
        prefix: The frozen embeddings and first layers; None if none are frozen.
    """

    model: nn.Module
    summary: dict[str, Any]
    slow: frozenset[str]
    adapters: LoraModel | None
    prefix: Prefix | None = None

    @property
    def weights_id(self) -> str:
        """Return the digest of the pre-trained weights, or their source if they have no digest."""
        source: dict[str, str] = self.summary["source"]
        # weights in 4 bits have no digest
        return source["weights"] or source["from"]

    def prefix_cost(self) -> dict[str, float]:
        """Return ``prefix_seconds``, the time spent computing the output of the frozen layers.

        Empty if no layers are frozen.
        """
        if self.prefix is None:
            return {}
        return {"prefix_seconds": self.prefix.seconds}


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors that training changes, by name, on the CPU.

    These are trained parameters, and buffers such as running gates. They may share memory with the
    model. If the model is sharded, all processes must call this function, and only the main process
    gets the whole tensors.
    """
    state = model.state_dict()
    is_sharded = any(isinstance(tensor, DTensor) for tensor in state.values())
    if is_sharded:
        # gathers the shards of all processes in the main process
        options = StateDictOptions(
            full_state_dict=True, cpu_offload=True, ignore_frozen_params=True
        )
        state = get_model_state_dict(model, options=options)
    # A state dict has more tensors: frozen parameters, tied weights under a second name, and the
    # states of quantised weights. These are left out.
    names = _trained_names(model)
    trained = {}
    for name, tensor in state.items():
        if name in names:
            trained[name] = tensor.detach().cpu().contiguous()
    return trained


def _trained_names(model: nn.Module) -> set[str]:
    """Return the names of trained parameters and of buffers."""
    parameters = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    buffers = {name for name, _ in model.named_buffers()}
    return parameters | buffers


def load_trained_(model: nn.Module, file: Path) -> None:
    """Load trained tensors from a file into a model that is built like the trained one.

    Args:
        model: The model; it may be sharded.
        file: The file with the result of :func:`trained_state`.

    Raises:
        DataError: The file belongs to another model.
        CheckpointError: The file is missing or damaged.
    """
    load_trained_state_(model, read_tensors(file), source=str(file))


def load_trained_state_(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Load trained tensors into a model that is built in the same way as the trained one.

    Args:
        model: The model; it may be sharded.
        state: The trained tensors: the result of :func:`trained_state`.
        source: The origin of the tensors, for the message.

    Raises:
        DataError: The tensors belong to another model.
    """
    names = _trained_names(model)
    expected_shapes = {}
    for name, tensor in model.state_dict().items():
        if name in names:
            expected_shapes[name] = tensor.shape
    shapes = {name: tensor.shape for name, tensor in state.items()}
    for name in sorted(shapes.keys() | expected_shapes.keys()):
        # a tensor that one side lacks has no shape there
        if shapes.get(name) != expected_shapes.get(name):
            raise DataError(f"{source} belongs to another model: they differ in '{name}'")
    # Each process of a sharded model takes its shard of the whole tensors. The state has only the
    # trained tensors, so the load is not strict.
    options = StateDictOptions(full_state_dict=True, strict=False)
    set_model_state_dict(model, dict(state), options=options)
