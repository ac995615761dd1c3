"""Find the checkpoint from which a killed run resumes. A file of digests, written last, marks it as complete."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any, cast

from accelerate import PartialState
from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from benchmarks.harness.base import write_text
from benchmarks.harness.training.callbacks import SavedCallback
from benchmarks.harness.training.processes import broadcast, is_main

WEIGHTS, OPTIMIZER, SCHEDULER = "trained.safetensors", "optimizer.pt", "scheduler.pt"
DIGESTS = "complete.json"


class WriteDigests(TrainerCallback):
    """Write the digests of each new checkpoint's files after all processes have written them."""

    def on_save(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        PartialState().wait_for_everyone()
        if is_main():
            folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
            write_text(folder / DIGESTS, _digests(folder, flush=True))


def resume(folder: Path, *callbacks: SavedCallback) -> str | None:
    """Return the newest usable checkpoint for Trainer, and restore the callbacks' state from it; None if missing.

    Args:
        folder: The folder of a run's checkpoints.
        *callbacks: The callbacks to restore.
    """
    checkpoint = last_complete_checkpoint(folder)
    if checkpoint is None:
        return None
    state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    for callback in callbacks:
        callback.restore(state)
    return str(checkpoint)


def last_complete_checkpoint(folder: Path) -> Path | None:
    """Return the newest complete checkpoint whose best epoch's checkpoint is complete too; remove newer ones."""
    return cast("Path | None", broadcast(_last_complete(folder) if is_main() else None))


def _last_complete(folder: Path) -> Path | None:
    checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    complete = [checkpoint for checkpoint in checkpoints if _is_complete(checkpoint)]
    usable = [checkpoint for checkpoint in complete if _best(checkpoint) in (None, *complete)]
    for unusable in checkpoints[: checkpoints.index(usable[0]) if usable else None]:
        shutil.rmtree(unusable)
    return usable[0] if usable else None


def _best(checkpoint: Path) -> Path | None:
    """Return the checkpoint of the best epoch that a checkpoint records; None if it records none."""
    best = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME)).best_model_checkpoint
    return checkpoint.with_name(Path(best).name) if best else None


def _is_complete(checkpoint: Path) -> bool:
    try:
        return (checkpoint / DIGESTS).read_bytes() == _digests(checkpoint).encode()
    except OSError:  # missing, or a folder instead of a file
        return False


def _digests(folder: Path, *, flush: bool = False) -> str:
    """Return the sha256 of each file of a checkpoint as JSON; ``flush`` also writes the files to the disk."""
    digests = {}
    for path in sorted(folder.iterdir()):
        if path.name != DIGESTS:
            with path.open("rb") as file:
                if flush:
                    os.fsync(file.fileno())
                digests[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return json.dumps(digests, indent=1) + "\n"
