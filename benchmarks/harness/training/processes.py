"""Run one training on several processes, which torchrun starts."""

from __future__ import annotations

import os
import re
import sys
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from transformers import PreTrainedModel
from transformers.distributed.configuration_utils import DistributedConfig

from emoe.architectures import find_ffns

_PARALLEL = "EMOE_PARALLEL"
_TIMEOUT = timedelta(
    days=1
)  # other processes wait while the first one loads; torchrun ends all if one fails


def world_size() -> int:
    """Return the number of processes of this run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Return the number of this process."""
    return int(os.environ.get("RANK", "0"))


def is_main() -> bool:
    """Return True if this process writes the results."""
    return rank() == 0


def set_parallelism(parallel: str) -> None:
    """Set the parallelism of the processes: ``ddp`` or ``fsdp``."""
    os.environ[_PARALLEL] = parallel


def is_sharded() -> bool:
    """Return True if the processes of this run share one model (FSDP2)."""
    return world_size() > 1 and os.environ.get(_PARALLEL) == "fsdp"


def init_process_group() -> None:
    """Connect to the other processes, if there are any."""
    if world_size() > 1:
        PartialState(cpu=not torch.cuda.is_available(), timeout=_TIMEOUT)


def destroy_process_group() -> None:
    """Disconnect from the other processes."""
    if dist.is_initialized():
        dist.barrier()
        PartialState().destroy_process_group()
        PartialState._reset_state()


def exit_worker() -> None:
    """Exit at once if there are other processes.

    Threads of gloo may outlive its groups and abort an ordinary exit, which torchrun would report as a failure.
    """
    if world_size() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def broadcast(value: Any) -> Any:
    """Return the main process's plain value on all processes."""
    return value if world_size() == 1 else broadcast_object_list([value])[0]


def shard_(model: PreTrainedModel, precision: str) -> None:
    """Share one model among the processes (FSDP2): shard each transformer block, then the rest.

    The weights are those of the main process. Checkpoints hold whole tensors, so they fit any number of processes.

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
        if name in blocks
        or any(weight.dtype != model.dtype for weight in module.parameters(recurse=False))
    }
    requested = DistributedConfig(fsdp_size=world_size(), fsdp_mixed_precision=precision == "bf16")
    config, _, mesh = model.prepare_distribute_model(requested)
    model.maybe_distribute_model(model, config, mesh)
    set_model_state_dict(
        model, weights, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    )
    for buffer in model.buffers():
        dist.broadcast(buffer, src=0)
