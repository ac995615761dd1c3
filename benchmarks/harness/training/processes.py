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

_PARALLEL = "EMOE_PARALLEL"  # variable with the parallelism: "ddp" or "fsdp"
# The time limit is long, because the other processes wait while the first one loads. If a process
# fails, torchrun ends all of them.
_TIMEOUT = timedelta(days=1)


def world_size() -> int:
    """Return the number of processes of this run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Return the number of this process among the processes of the run, counted from 0."""
    return int(os.environ.get("RANK", "0"))


def is_main() -> bool:
    """Return True in the first process, which writes the results."""
    return rank() == 0


def set_parallelism(parallel: str) -> None:
    """Set the parallelism of the processes: ``ddp`` or ``fsdp``."""
    os.environ[_PARALLEL] = parallel


def is_sharded() -> bool:
    """Return True if this run shards one model over several processes (FSDP2)."""
    return world_size() > 1 and os.environ.get(_PARALLEL) == "fsdp"


def init_process_group() -> None:
    """Connect to the other processes of this run, if there are any."""
    if world_size() > 1:
        PartialState(cpu=not torch.cuda.is_available(), timeout=_TIMEOUT)


def destroy_process_group() -> None:
    """Wait for the other processes of this run, and disconnect from them."""
    if dist.is_initialized():
        dist.barrier()
        PartialState().destroy_process_group()
        PartialState._reset_state()


def exit_worker() -> None:
    """Exit at once, with status 0, if there are other processes.

    Threads of gloo may outlive its groups and abort an ordinary exit. torchrun would report this as
    a failure.
    """
    if world_size() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def broadcast(value: Any) -> Any:
    """Send a value of the main process to all processes, and return it.

    The arguments of the other processes are ignored.
    """
    if world_size() == 1:
        return value
    (received,) = broadcast_object_list([value])
    return received


def shard_(model: PreTrainedModel, precision: str) -> None:
    """Shard a model over the processes with FSDP2: a unit for each block, and one for the rest.

    All processes get the weights of the main process.

    Args:
        model: The model, with equal modules on all processes. Only the main process needs its
            weights.
        precision: The precision of the forward pass.
    """
    # take the weights before the model is sharded; they are sent afterwards
    weights = model.state_dict() if is_main() else {}
    # transformers shards a model by the plan in this attribute
    cast(Any, model).fsdp_plan = _sharding_plan(model)
    requested = DistributedConfig(fsdp_size=world_size(), fsdp_mixed_precision=precision == "bf16")
    # makes the device mesh; the second result is a device map, which FSDP does not need
    config, _, mesh = model.prepare_distribute_model(requested)
    # "maybe", because this does nothing without a mesh
    model.maybe_distribute_model(model, config, mesh)
    # send the weights of the main process into the shards of all processes
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, weights, options=options)
    # some buffers are not in the state dict
    for buffer in model.buffers():
        dist.broadcast(buffer, src=0)


def _sharding_plan(model: PreTrainedModel) -> dict[str, str]:
    """Return transformers' plan for FSDP: a strategy for each module that is sharded by itself.

    The keys are module names with a wildcard in place of the layer number.
    """
    # the names of the layers that contain an FFN
    block_names = {ffn.name for ffn in find_ffns(model)}
    plan = {}
    for name, module in model.named_modules():
        # Parameters that are sharded together must have the same dtype. So modules with another
        # dtype than the model, such as trained adapters in float32, are sharded by themselves.
        parameters = module.parameters(recurse=False)
        has_other_dtype = any(parameter.dtype != model.dtype for parameter in parameters)
        if name in block_names or has_other_dtype:
            # replaces every number in the name: `model.layers.0` becomes `model.layers.*`
            pattern = re.sub(r"\.\d+(?=\.|$)", ".*", name)
            # the complete weights are gathered before use, and freed afterwards
            plan[pattern] = "free_full_weight"
    return plan
