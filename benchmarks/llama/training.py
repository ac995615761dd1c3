"""Train a language model on instructions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

from torch import nn
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState
from transformers import TrainingArguments as Arguments

from benchmarks.harness.base import derive_seed
from benchmarks.harness.models.trainable import Trainable
from benchmarks.harness.training.callbacks import Probe, Stopwatch, restore_rng_and_modes
from benchmarks.harness.training.checkpoints import resume
from benchmarks.harness.training.processes import world_size
from benchmarks.harness.training.progress import Progress
from benchmarks.harness.training.samplers import EpochOrder
from benchmarks.harness.training.trainer import (
    RoutedTrainer,
    available_precision,
    finite_or_none,
    trainer_arguments,
)
from benchmarks.llama.definition import InstructionSpec, RunInstructionTraining, accumulation
from benchmarks.llama.encoding import EncodedRows, collator, without_prompt_logits
from benchmarks.llama.evaluation import held_out_loss

_HELD_OUT_LOSS = "held_out_loss"  # the key in Trainer's log


class Trained(NamedTuple):
    """What a training records.

    Attributes:
        curve: The loss of every step, which is a mean over the step's response tokens.
        cost: The number of steps, and their times.
        held_out_curve: The ``step`` and ``loss`` of evaluations on held-out rows; empty without
            ``eval_every``.
    """

    curve: list[float | None]
    cost: dict[str, Any]
    held_out_curve: Sequence[dict[str, Any]] = ()


def train(
    trainable: Trainable,
    tokenizer: PreTrainedTokenizerBase,
    spec: InstructionSpec,
    training: RunInstructionTraining,
    rows: EncodedRows,
    held_out: EncodedRows,
    folder: Path,
    progress: Progress,
    probe: Probe,
) -> Trained:
    """Train a language model, from the last complete checkpoint if there is one.

    The rows and the loss of a step depend neither on the number of processes nor on the size of
    micro-batches.

    Args:
        trainable: The model, which is trained in place.
        tokenizer: The model's tokenizer.
        spec: The settings of the run.
        training: The training settings of the run.
        rows: The training rows.
        held_out: The rows of the held-out loss.
        folder: The run's folder, for checkpoints.
        progress: The progress line.
        probe: The recorder of the first losses.
    """
    stopwatch = Stopwatch()
    precision = available_precision(training.precision)
    collate = collator(tokenizer, packing=training.packing)
    trainer = RoutedTrainer(
        args=_trainer_arguments(spec, training, folder, precision),
        order=EpochOrder(
            rows.lengths, training.per_device_train_batch_size, spec.seed, by_length=False
        ),
        trainable=trainable,
        lora=training.lora,
        probe=probe,
        by_token=True,
        train_dataset=rows,
        data_collator=without_prompt_logits(collate, trainable.model),
        callbacks=[progress, stopwatch],
    )
    if training.eval_every:
        compute_loss = partial(
            held_out_loss,
            rows=held_out,
            tokenizer=tokenizer,
            batch_size=spec.evaluation.batch_size,
            precision=precision,
        )
        # added after the stopwatch, so that the stopwatch does not time it
        trainer.add_callback(HeldOutCurve(compute_loss, training.eval_every))
    # a checkpoint is used only if it comes from the same rows and pre-trained weights
    origin = {
        "training rows": rows.digest,
        "held-out rows": held_out.digest,
        "weights": trainable.weights_id,
    }
    # also restores the state and the callbacks of the trainer
    checkpoint = resume(trainer, origin, progress.warn)
    trainer.train(resume_from_checkpoint=checkpoint)

    # Trainer's log also has the losses from before a resume
    curve = []
    held_out_curve = []
    for entry in trainer.state.log_history:
        if "loss" in entry:
            curve.append(finite_or_none(entry["loss"]))
        if _HELD_OUT_LOSS in entry:
            held_out_curve.append({"step": entry["step"], "loss": entry[_HELD_OUT_LOSS]})
    return Trained(
        curve=curve,
        cost=stopwatch.cost(trainer.state.global_step),
        held_out_curve=held_out_curve,
    )


def _trainer_arguments(
    spec: InstructionSpec, training: RunInstructionTraining, folder: Path, precision: str
) -> Arguments:
    """Translate the training settings of a run into Trainer's arguments."""
    return trainer_arguments(
        folder / "checkpoints",
        precision,
        num_train_epochs=training.epochs,
        max_steps=training.steps or -1,  # -1: the epochs decide
        per_device_train_batch_size=training.per_device_train_batch_size,
        gradient_accumulation_steps=accumulation(training, world_size()),
        learning_rate=spec.learning_rate,
        lr_scheduler_type=training.schedule,
        # Trainer takes a number below 1 as a share of the steps, which `warmup` is
        warmup_steps=training.warmup,
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        activation_checkpointing=training.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False},
        seed=derive_seed("dropout", spec.seed),
        save_strategy="steps",
        save_steps=training.save_steps,
        # the curve is read from the log, so each step needs an entry
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,  # a diverged loss must not look like a finite one
    )


class HeldOutCurve(TrainerCallback):
    """A callback that computes the held-out loss before training and every few steps.

    It does not change the training. After the last step, it computes nothing, because the final
    evaluation follows. Losses are stored in Trainer's log, which checkpoints keep.

    Args:
        compute_loss: A function that computes the held-out loss of a model.
        every: The number of steps between two losses.
    """

    def __init__(self, compute_loss: Callable[[Any], float | None], every: int) -> None:
        self._compute_loss = compute_loss
        self._every = every

    def on_train_begin(
        self, args: Arguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step == 0:  # not after a resume
            self._add_point(state, kwargs["model"])

    def on_step_end(
        self, args: Arguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        is_due = state.global_step % self._every == 0
        is_last = state.global_step >= state.max_steps
        if is_due and not is_last:
            self._add_point(state, kwargs["model"])

    def _add_point(self, state: TrainerState, model: nn.Module) -> None:
        """Compute the held-out loss, and add it to Trainer's log."""
        with restore_rng_and_modes(model):
            loss = cast(Any, self._compute_loss(model))
        state.log_history.append({_HELD_OUT_LOSS: loss, "step": state.global_step})
