"""One model that several processes share (FSDP2), with checkpoints that fit any number of them.

These are safetensors, one file a process, written and read by torch's distributed checkpoints; nothing is unpickled.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from transformers import PreTrainedModel
from transformers.distributed.configuration_utils import DistributedConfig

from benchmarks.harness.base.errors import DataError, first_line
from benchmarks.harness.training.processes import is_main, world_size
from emoe.architectures import find_ffns

SHARDS = "shards"
_MODEL = "model"
_FLAT = StateDictOptions(flatten_optimizer_state_dict=True, ignore_frozen_params=True)


def shard_(model: PreTrainedModel, precision: str) -> None:
    """Divide a model among the processes: each transformer block, then the rest.

    All processes get the weights of the main one; those of the others may be empty.

    Args:
        model: built alike on all processes.
        precision: in which it computes.
    """
    full = model.state_dict() if is_main() else {}
    blocks = {ffn.name for ffn in find_ffns(model)}
    # a plan names the layers by stars
    cast(Any, model).fsdp_plan = {
        re.sub(r"\.\d+(?=\.|$)", ".*", name): "free_full_weight"
        for name, module in model.named_modules()
        # the rest of a block must be of one type, and trained adapters are float32
        if name in blocks or any(own.dtype != model.dtype for own in module.parameters(recurse=False))
    }
    asked = DistributedConfig(fsdp_size=world_size(), fsdp_mixed_precision=precision == "bf16")
    config, _, mesh = model.prepare_distribute_model(asked)
    model.maybe_distribute_model(model, config, mesh)
    set_model_state_dict(model, full, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    for buffer in model.buffers():
        dist.broadcast(buffer, src=0)


def gather_trained(model: nn.Module) -> dict[str, Tensor]:
    """The whole trained tensors of a sharded model, on the CPU of the main process; empty on the others."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    return _without_twins(model, cast(dict[str, Tensor], get_model_state_dict(model, options=options)))


def _without_twins(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tied weights under their first name only."""
    once = dict(model.named_parameters())
    twins = dict(model.named_parameters(remove_duplicate=False)).keys() - once.keys()
    return {name: tensor for name, tensor in state.items() if name not in twins}


def save_shards(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Write trained tensors and the optimiser's state, each process its own part."""
    state = _tensors(model, optimizer)
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    save(state, storage_writer=writer)


def load_shards_(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Read what :func:`save_shards` wrote, with as many processes as there are now.

    Args:
        model: built and divided as the one that was saved; or whole.
        optimizer: its own.

    Raises:
        DataError: it is missing, damaged, or of another model.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} does not exist: the checkpoint was not written by sharded processes")
    state = _tensors(model, optimizer)
    try:
        load(state, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=not dist.is_initialized())
    except (CheckpointException, OSError, ValueError, KeyError, RuntimeError) as error:
        raise DataError(f"{folder} is damaged or belongs to another model: {first_line(error)}") from error
    prefix = f"{_MODEL}."
    weights: dict[str, Any] = {
        name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)
    }
    set_model_state_dict(model, weights, options=StateDictOptions(strict=False, ignore_frozen_params=True))
    found: dict[str, Any] = get_optimizer_state_dict(model, optimizer, options=_FLAT)
    found |= {name: tensor for name, tensor in state.items() if not name.startswith(prefix)}
    set_optimizer_state_dict(model, optimizer, found, options=_FLAT)


def _tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What a checkpoint holds, by name; tensors only."""
    found = get_model_state_dict(model, options=StateDictOptions(ignore_frozen_params=True))
    weights = _without_twins(model, cast(dict[str, Tensor], found))
    state: dict[str, Any] = {f"{_MODEL}.{name}": tensor for name, tensor in weights.items()}
    flat = get_optimizer_state_dict(model, optimizer, options=_FLAT)
    state |= {name: value for name, value in flat.items() if isinstance(value, Tensor)}
    return cast(dict[str, Tensor], state)


def is_complete(folder: Path) -> bool:
    """Whether every file of a sharded checkpoint is there to its end."""
    files = sorted(folder.glob("*.safetensors"))
    try:
        for file in files:
            with safe_open(file, framework="pt"):  # looks at its length
                pass
    except SafetensorError:
        return False
    return bool(files)
