"""Mark complete checkpoints with a file, and resume a killed run from the last one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, cast

from accelerate import PartialState
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState

from benchmarks.harness.base import DataError, read_json, write_json
from benchmarks.harness.sources.packages import sha256
from benchmarks.harness.training.processes import broadcast, is_main

# a file in a checkpoint: the sha256 of the other files by name
COMPLETE = "complete"


class SavedCallback(TrainerCallback, ExportableState):
    """A callback whose attributes are saved in Trainer's ``trainer_state.json``.

    Attributes:
        SAVED: The names of the saved attributes.
    """

    SAVED: ClassVar[tuple[str, ...]]

    def state(self) -> dict[str, Any]:
        attributes = {name: getattr(self, name) for name in self.SAVED}
        return {"args": {}, "attributes": attributes}

    def restore(self, state: TrainerState) -> None:
        """Restore the attributes from a checkpoint's state."""
        states = cast(Any, state.stateful_callbacks)
        own_state = states[type(self).__name__]
        for name, value in own_state["attributes"].items():
            setattr(self, name, value)


class MarkComplete(TrainerCallback):
    """A callback that marks each new checkpoint as complete.

    It does so after all processes have written and flushed their files.
    """

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any
    ) -> None:
        PartialState().wait_for_everyone()
        if is_main():
            _mark_complete(_checkpoint(args, state.global_step))


def _mark_complete(checkpoint: Path) -> None:
    """Flush the files of a checkpoint to the disk, and write their digests."""
    files = list(checkpoint.iterdir())
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
    digests = {path.name: sha256(path) for path in files}
    write_json(checkpoint / COMPLETE, digests)


class FindBest(TrainerCallback):
    """A callback that finds the best checkpoint in the run's folder.

    Trainer saves its path. If the folder was moved since, Trainer would end with the last weights
    instead.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any
    ) -> None:
        _find_best(args, state)


def resume(trainer: Trainer, say: Callable[[str], None]) -> str | None:
    """Restore the state and the callbacks of a trainer from its last complete checkpoint.

    Args:
        trainer: The trainer, before training.
        say: The function that prints a warning for each checkpoint that is not complete.

    Returns:
        The checkpoint, for ``trainer.train(resume_from_checkpoint=…)``; None if there is none.
    """
    checkpoint = last_complete_checkpoint(Path(str(trainer.args.output_dir)), say)
    if checkpoint is None:
        return None
    trainer.state = _read_state(checkpoint)
    _find_best(trainer.args, trainer.state)
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, SavedCallback):
            callback.restore(trainer.state)
    return str(checkpoint)


def last_complete_checkpoint(folder: Path, say: Callable[[str], None]) -> Path | None:
    """Return the newest checkpoint whose files are unchanged; None if there is none.

    Other checkpoints are removed. A warning names the wrong file of each.
    """
    newest: Path | None = None
    if is_main():
        faults: list[str] = []
        # the oldest first, because a newer one may need its weights
        for checkpoint in sorted(folder.glob("checkpoint-*"), key=_step):
            fault = _find_fault(checkpoint)
            if fault is None:
                newest = checkpoint
            else:
                faults.append(fault)
                shutil.rmtree(checkpoint)
        consequence = "the run starts again from the beginning"
        if newest is not None:
            consequence = f"the run goes on from {newest.name}"
        for fault in faults:
            say(f"warning: {fault}; {consequence}")
    # all processes resume from the checkpoint that the main process found
    return cast("Path | None", broadcast(newest))


def _find_fault(checkpoint: Path) -> str | None:
    """Describe the first file of a checkpoint that is missing or changed; None if there is none."""
    try:
        digests = read_json(checkpoint / COMPLETE, dict[str, str])
    except DataError as error:
        return str(error)
    for name, digest in digests.items():
        path = checkpoint / name
        try:
            is_unchanged = sha256(path) == digest
        except OSError as error:
            return f"{path} cannot be read: {error.strerror}"
        if not is_unchanged:
            return f"{path} has changed since it was saved"

    # the run ends with the weights of its best checkpoint, which is this one or an older one
    best_step = _read_state(checkpoint).best_global_step
    if best_step is not None:
        best = checkpoint.with_name(f"checkpoint-{best_step}")
        if not best.exists():
            return f"{checkpoint} is of no use without {best.name}, which has the best weights"
    return None


def _find_best(args: TrainingArguments, state: TrainerState) -> None:
    """Set the path of the best checkpoint in a state, if a checkpoint is the best so far."""
    if state.best_global_step is not None:
        state.best_model_checkpoint = str(_checkpoint(args, state.best_global_step))


def _checkpoint(args: TrainingArguments, step: int) -> Path:
    return Path(str(args.output_dir)) / f"checkpoint-{step}"


def _read_state(checkpoint: Path) -> TrainerState:
    return TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))


def _step(checkpoint: Path) -> int:
    """Return the step at which a checkpoint was saved, from its name."""
    _, _, step = checkpoint.name.rpartition("-")
    return int(step)
