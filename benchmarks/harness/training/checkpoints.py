"""Mark complete checkpoints with a file, and resume a killed run from the last one."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any, ClassVar, cast

from accelerate import PartialState
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState

from benchmarks.harness.base import write_text
from benchmarks.harness.training.processes import broadcast, is_main

COMPLETE = "complete"


class SavedCallback(TrainerCallback, ExportableState):
    """Save its attributes in Trainer's ``trainer_state.json``."""

    SAVED: ClassVar[tuple[str, ...]]

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {name: getattr(self, name) for name in self.SAVED}}

    def restore(self, state: TrainerState) -> None:
        """Restore the attributes from a checkpoint's state."""
        for name, value in cast(Any, state.stateful_callbacks)[type(self).__name__]["attributes"].items():
            setattr(self, name, value)


class MarkComplete(TrainerCallback):
    """Mark each new checkpoint as complete after all processes have written and flushed their files."""

    def on_save(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        PartialState().wait_for_everyone()
        if is_main():
            folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
            for path in folder.iterdir():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
            write_text(folder / COMPLETE, "")


def resume(trainer: Trainer) -> str | None:
    """Restore the state and the callbacks of a trainer from its last complete checkpoint.

    Returns:
        The checkpoint, for ``trainer.train(resume_from_checkpoint=…)``; None if there is none.
    """
    checkpoint = last_complete_checkpoint(Path(str(trainer.args.output_dir)))
    if checkpoint is None:
        return None
    trainer.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, SavedCallback):
            callback.restore(trainer.state)
    return str(checkpoint)


def last_complete_checkpoint(folder: Path) -> Path | None:
    """Return the last complete checkpoint of a run, and remove incomplete ones; None if there is none."""
    complete: list[Path] = []
    if is_main():
        for checkpoint in folder.glob("checkpoint-*"):
            if (checkpoint / COMPLETE).exists():
                complete.append(checkpoint)
            else:
                shutil.rmtree(checkpoint)
    newest = max(complete, key=lambda path: int(path.name.rpartition("-")[2]), default=None)
    return cast("Path | None", broadcast(newest))
