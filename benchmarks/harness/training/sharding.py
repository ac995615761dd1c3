"""Share one model among processes (FSDP2). Checkpoints hold whole tensors, so they fit any number of processes."""

from __future__ import annotations

import re
from typing import Any, cast

import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from transformers import PreTrainedModel
from transformers.distributed.configuration_utils import DistributedConfig

from benchmarks.harness.training.processes import is_main, world_size
from emoe.architectures import find_ffns


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
