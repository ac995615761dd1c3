"""Find the checkpoint from which a killed run resumes. A file of sizes, written last, says that it is complete."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any, cast

from accelerate import PartialState
from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from benchmarks.harness.base import write_json
from benchmarks.harness.training.callbacks import SavedCallback
from benchmarks.harness.training.processes import broadcast, is_main

WEIGHTS, OPTIMIZER, SCHEDULER = "trained.safetensors", "optimizer.pt", "scheduler.pt"
SIZES = "complete.json"


class CompleteCheckpoints(TrainerCallback):
    """Writes the sizes of each new checkpoint's files after all processes have written them."""

    def on_save(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        PartialState().wait_for_everyone()
        if is_main():
            folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
            for path in folder.iterdir():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
            write_json(folder / SIZES, _sizes(folder))


def resume(folder: Path, *callbacks: SavedCallback) -> str | None:
    """Return the newest usable checkpoint for Trainer, and restore the callbacks' state from it; None if a run begins.

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
    """Return the newest checkpoint that is complete, with that of its best epoch; remove newer ones."""
    return cast("Path | None", broadcast(_last_complete(folder) if is_main() else None))


def _last_complete(folder: Path) -> Path | None:
    checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    while checkpoints and not _is_usable(checkpoints[-1]):
        shutil.rmtree(checkpoints.pop())
    return checkpoints[-1] if checkpoints else None


def _is_usable(checkpoint: Path) -> bool:
    """Return True if a checkpoint is complete, and that of the best epoch so far, if one is chosen."""
    if not _is_complete(checkpoint):
        return False
    best = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME)).best_model_checkpoint
    return best is None or _is_complete(checkpoint.with_name(Path(best).name))


def _is_complete(checkpoint: Path) -> bool:
    try:
        return bool(json.loads((checkpoint / SIZES).read_text()) == _sizes(checkpoint))
    except (OSError, ValueError):
        return False


def _sizes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in folder.iterdir() if path.name != SIZES}
