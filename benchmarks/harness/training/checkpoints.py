"""Which checkpoint a run that was killed goes on from."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from transformers.trainer import TRAINER_STATE_NAME

from benchmarks.harness.training.callbacks import Stopwatch
from benchmarks.harness.training.distributed import SHARDS, is_complete
from benchmarks.harness.training.probe import Probe
from benchmarks.harness.training.processes import broadcast, is_main
from benchmarks.harness.training.routing_trace import RoutingTrace

WEIGHTS, OPTIMIZER, SCHEDULER = "trained.safetensors", "optimizer.pt", "scheduler.pt"


def resume(folder: Path, *kept: Stopwatch | Probe | RoutingTrace) -> str | None:
    """The last complete checkpoint, as Trainer takes it, from which those callbacks go on too; None where a run begins."""
    checkpoint = last_complete_checkpoint(folder, [callback.FILE for callback in kept])
    for callback in kept if checkpoint else ():
        callback.resume(cast(Path, checkpoint))
    return str(checkpoint) if checkpoint else None


def last_complete_checkpoint(folder: Path, beside: Sequence[str] = ()) -> Path | None:
    """The newest checkpoint that was written to its end, the same on all processes; half-written ones are removed.

    Args:
        folder: of a run's checkpoints.
        beside: files that callbacks write into each after Trainer has written its state: without them a run would go on with other counts.
    """
    return cast("Path | None", broadcast(_last_complete(folder, beside) if is_main() else None))


def _last_complete(folder: Path, beside: Sequence[str]) -> Path | None:
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    for checkpoint in found:
        if _is_complete(checkpoint) and all((checkpoint / name).exists() for name in beside):
            return checkpoint
        shutil.rmtree(checkpoint)
    return None


def _is_complete(checkpoint: Path) -> bool:
    # Trainer writes its state last, before its callbacks are told
    sharded = (checkpoint / SHARDS).is_dir()
    files = (SCHEDULER, TRAINER_STATE_NAME) if sharded else (WEIGHTS, OPTIMIZER, SCHEDULER, TRAINER_STATE_NAME)
    if not all((checkpoint / name).exists() for name in files) or (sharded and not is_complete(checkpoint / SHARDS)):
        return False
    # torch.save writes zip archives, whose directory comes last
    if not all(zipfile.is_zipfile(file) for file in checkpoint.glob("*.pt*")):
        return False
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text())
    except json.JSONDecodeError:
        return False
    return True
