"""Mark complete checkpoints with a file, and resume a killed run from the last one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, cast

from accelerate import PartialState
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState

from benchmarks.harness.base import TRAINED_FILE, DataError, check_is_file, read_json, write_json
from benchmarks.harness.results.code import code_digest
from benchmarks.harness.sources.packages import sha256
from benchmarks.harness.training.processes import broadcast, is_main

# What determines a training besides the run's settings: the digests of its rows, of the pre-trained
# weights and of the code, by the names that a warning prints. None is a part of the run's id.
Origin = Mapping[str, str]

# the file with the origin of all checkpoints, in their folder
ORIGIN = "origin.json"
# files in a checkpoint; `complete` has the sha256 of the other files by name
COMPLETE = "complete"
OPTIMIZER = "optimizer.pt"
SCHEDULER = "scheduler.pt"
_NEEDED = (TRAINED_FILE, OPTIMIZER, SCHEDULER, TRAINER_STATE_NAME)
# a single process saves `rng_state.pth`; several processes save `rng_state_0.pth` and so on
_RNG_STATE = "rng_state"


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
        """Set the saved attributes from the Trainer state of a checkpoint."""
        states = cast(Any, state.stateful_callbacks)
        own_state = states[type(self).__name__]
        for name, value in own_state["attributes"].items():
            setattr(self, name, value)


class MarkComplete(TrainerCallback):
    """A callback that marks each new checkpoint as complete.

    The main process waits until all processes have written their files. Then it flushes these files
    to the disk and marks the checkpoint.
    """

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any
    ) -> None:
        PartialState().wait_for_everyone()
        if is_main():
            _mark_complete(_checkpoint(args, state.global_step))


def _mark_complete(checkpoint: Path) -> None:
    """Flush the files of a checkpoint to the disk, and then write their digests to ``complete``."""
    files = list(checkpoint.iterdir())
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
    digests = {path.name: sha256(path) for path in files}
    write_json(checkpoint / COMPLETE, digests)


class UpdateBestPath(TrainerCallback):
    """A callback that updates the path of the best checkpoint when training starts.

    Trainer saves this path in each checkpoint. If the folder of the run was moved since,
    Trainer would not find the best weights. It would only warn, and keep the last weights.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any
    ) -> None:
        _update_best_path(args, state)


def resume(trainer: Trainer, origin: Origin, warn: Callable[[str], None]) -> str | None:
    """Restore the state and the callbacks of a trainer from its last complete checkpoint.

    A checkpoint of other rows, weights or code (another origin) is removed, because the training
    must not go on from it.

    Args:
        trainer: The trainer, before training.
        origin: The digests of the training's rows and weights. They are written beside the
            checkpoints, with the digest of this checkout's code.
        warn: The function that prints a warning. It is called if the origin has changed, and for
            each unusable checkpoint.

    Returns:
        The checkpoint, for ``trainer.train(resume_from_checkpoint=…)``; None if there is none.
    """
    folder = Path(str(trainer.args.output_dir))
    if is_main():
        _set_origin(folder, {**origin, "files of the code": code_digest()}, warn)
    # here, the other processes wait for the main one
    checkpoint = keep_complete_checkpoints(folder, warn)
    if checkpoint is None:
        return None
    trainer.state = _read_state(checkpoint)
    # A run that had already stopped does not train again, and finds its best weights by this path.
    # If the run does train, `train` reads the state again, and UpdateBestPath repeats this.
    _update_best_path(trainer.args, trainer.state)
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, SavedCallback):
            callback.restore(trainer.state)
    return str(checkpoint)


def _set_origin(folder: Path, origin: Origin, warn: Callable[[str], None]) -> None:
    """Remove the checkpoints of another origin, with a warning, and write this origin.

    Args:
        folder: The folder of the checkpoints.
        origin: The digests of the training's rows, weights and code.
        warn: The function that prints the warning.
    """
    checkpoints = list(folder.glob("checkpoint-*"))
    change = _find_change(folder / ORIGIN, origin)
    if checkpoints and change is not None:
        warn(f"{change}; the run starts again from the beginning")
        for checkpoint in checkpoints:
            shutil.rmtree(checkpoint)
    # written last: if this process is killed before, the next one removes the rest
    write_json(folder / ORIGIN, dict(origin))


def _find_change(file: Path, origin: Origin) -> str | None:
    """Describe how the training's origin differs from that of the checkpoints.

    None if it is the same. If the file cannot be read, the description says why.

    Args:
        file: The file with the origin of the checkpoints. Older versions wrote none.
        origin: The origin of the training.
    """
    try:
        saved = read_json(file, dict[str, str])
    except DataError as error:
        return str(error)  # a missing or damaged file counts as a change
    names = sorted({*saved, *origin})
    changed = [name for name in names if saved.get(name) != origin.get(name)]
    if not changed:
        return None
    return f"{' and '.join(changed)} have changed since {file} was written"


def keep_complete_checkpoints(folder: Path, warn: Callable[[str], None]) -> Path | None:
    """Remove the checkpoints that a run cannot resume from, and return the newest of the others.

    A checkpoint is removed if one of its files is missing or has changed, or if its best checkpoint
    is missing. A warning describes the fault of each removed checkpoint. The result is None if no
    checkpoint is left.

    Args:
        folder: The folder of the checkpoints.
        warn: The function that prints the warnings.
    """
    newest: Path | None = None
    # only one process removes checkpoints, and all resume from the one that it found
    if is_main():
        newest = _remove_faulty_checkpoints(folder, warn)
    return cast("Path | None", broadcast(newest))


def _remove_faulty_checkpoints(folder: Path, warn: Callable[[str], None]) -> Path | None:
    """Remove the checkpoints with a fault, and return the newest of the others, if there are any.

    A checkpoint has a fault if one of its files is missing or changed, or if its best checkpoint is
    missing. A warning describes each fault.
    """
    newest: Path | None = None
    faults: list[str] = []
    # the oldest first: a newer checkpoint is useless if the best one before it was removed
    for checkpoint in sorted(folder.glob("checkpoint-*"), key=_step):
        fault = _find_fault(checkpoint)
        if fault is None:
            newest = checkpoint
        else:
            faults.append(fault)
            shutil.rmtree(checkpoint)
    # the warnings come last, because they name the checkpoint from which the run goes on
    consequence = "the run starts again from the beginning"
    if newest is not None:
        consequence = f"the run goes on from {newest.name}"
    for fault in faults:
        warn(f"{fault}; {consequence}")
    return newest


def _find_fault(checkpoint: Path) -> str | None:
    """Describe why a run cannot resume from a checkpoint; None if it can.

    The reason is that a file is missing or changed, or that the best checkpoint so far is missing.
    """
    try:
        digests = read_json(checkpoint / COMPLETE, dict[str, str])
    except DataError as error:
        return str(error)
    missing = [name for name in _NEEDED if name not in digests]
    # Each process saved a file with its random state. The number of processes may have changed
    # since, so one such file is enough.
    if not any(name.startswith(_RNG_STATE) for name in digests):
        missing.append(_RNG_STATE)
    if missing:
        return f"{checkpoint / COMPLETE} is damaged: it does not list {', '.join(missing)}"
    for name, digest in digests.items():
        path = checkpoint / name
        try:
            check_is_file(path)
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


def _update_best_path(args: TrainingArguments, state: TrainerState) -> None:
    """Set the path of the best checkpoint to its place in the folder of this run.

    If the state has no best checkpoint, nothing changes.
    """
    if state.best_global_step is not None:
        state.best_model_checkpoint = str(_checkpoint(args, state.best_global_step))


def _checkpoint(args: TrainingArguments, step: int) -> Path:
    """Return the folder of the checkpoint that is saved after a step."""
    return Path(str(args.output_dir)) / f"checkpoint-{step}"


def _read_state(checkpoint: Path) -> TrainerState:
    """Read the Trainer state that is saved in a checkpoint."""
    return TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))


def _step(checkpoint: Path) -> int:
    """Return the step at which a checkpoint was saved, from its name."""
    _, _, step = checkpoint.name.rpartition("-")
    return int(step)
