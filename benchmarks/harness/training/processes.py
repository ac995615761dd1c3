"""The processes of one run: started by torchrun, each with its number; what one of them tells the others."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState

_PARALLEL = "EMOE_PARALLEL"
_PATIENCE = timedelta(days=1)  # while the first process loads, or waits for a lock; torchrun ends all when one fails


def world_size() -> int:
    """Processes that torchrun started for this run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """This process's number among them."""
    return int(os.environ.get("RANK", "0"))


def is_main() -> bool:
    """Whether this process writes what there is one of."""
    return rank() == 0


def local_size() -> int:
    """Processes of this run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", str(world_size())))


def local_rank() -> int:
    """This process's number on this machine, which is that of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def share_by(parallel: str) -> None:
    """Say how the processes share the work: ``ddp`` or ``fsdp``."""
    os.environ[_PARALLEL] = parallel


def is_sharded() -> bool:
    """Whether the processes of this run share one model (FSDP2)."""
    return world_size() > 1 and os.environ.get(_PARALLEL) == "fsdp"


def init_process_group() -> None:
    """Find the other processes; nothing in a run of one."""
    if world_size() > 1:
        PartialState(cpu=not torch.cuda.is_available(), timeout=_PATIENCE)


def destroy_process_group() -> None:
    """Part from the other processes; what follows is this process's own work."""
    if dist.is_initialized():
        dist.barrier()
        PartialState().destroy_process_group()
        PartialState._reset_state()


def exit_worker() -> None:
    """End a process that worked with others, at once; nothing in a run of one.

    Threads of gloo may outlive its groups, and an ordinary exit that meets them aborts, which torchrun takes for a failure.
    """
    if world_size() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def torchrun_command(processes: int, command: Sequence[str]) -> list[str]:
    """How a Python module is started several times on this machine.

    Args:
        processes: how often.
        command: module and arguments.
    """
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    launcher.append(f"--nproc-per-node={processes}")
    # without the dashes torchrun takes options of the module for its own
    return [*launcher, "-m", "--", *command]


def broadcast(value: Any) -> Any:
    """A plain value of the main process, on all of them."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]
