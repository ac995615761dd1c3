"""Share one model among processes (FSDP2). Checkpoints hold whole tensors, so they fit any number of processes."""

from __future__ import annotations

import re
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from transformers import PreTrainedModel
from transformers.distributed.configuration_utils import DistributedConfig

from benchmarks.harness.training.processes import is_main, world_size
from emoe.architectures import find_ffns

_GATHER = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)


def shard_(model: PreTrainedModel, precision: str) -> None:
    """Shard each transformer block, then the rest, with the weights of the main process.

    Args:
        model: The model, with equal modules on all processes; only the main process needs its weights.
        precision: The precision of the forward pass.
    """
    weights = model.state_dict() if is_main() else {}
    blocks = {ffn.name for ffn in find_ffns(model)}
    cast(Any, model).fsdp_plan = {
        re.sub(r"\.\d+(?=\.|$)", ".*", name): "free_full_weight"
        for name, module in model.named_modules()
        # the rest of a block must have one type, and trained adapters are float32
        if name in blocks or any(weight.dtype != model.dtype for weight in module.parameters(recurse=False))
    }
    requested = DistributedConfig(fsdp_size=world_size(), fsdp_mixed_precision=precision == "bf16")
    config, _, mesh = model.prepare_distribute_model(requested)
    model.maybe_distribute_model(model, config, mesh)
    set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    for buffer in model.buffers():
        dist.broadcast(buffer, src=0)


def gather_trained(model: nn.Module) -> dict[str, Tensor]:
    """Gather the trained tensors of a sharded model on the CPU of the main process; empty on the others."""
    state = cast(dict[str, Tensor], get_model_state_dict(model, options=_GATHER))
    names = dict(model.named_parameters()).keys()
    tied = dict(model.named_parameters(remove_duplicate=False)).keys() - names
    return {name: tensor for name, tensor in state.items() if name not in tied}


def gather_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Gather the optimizer's state by the names of the parameters, on the CPU of the main process."""
    return get_optimizer_state_dict(model, optimizer, options=_GATHER)


def distribute_optimizer_(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Give every process its part of the optimizer's state."""
    set_optimizer_state_dict(model, optimizer, state, options=StateDictOptions(full_state_dict=True))
