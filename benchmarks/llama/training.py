"""Train a language model on instructions."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

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
) -> dict[str, Any]:
    """Train from the last complete checkpoint, if any.

    The rows and the loss of a step do not depend on the number of processes or the micro-batch size.

    Returns:
        ``curve``, the loss of every step (the mean over its response tokens), and ``cost``, the number of steps and
        their times. With ``eval_every`` also ``held_out_curve``: ``step`` and ``loss`` of evaluations on ``held_out``.
    """
    stopwatch = Stopwatch()
    precision, size = available_precision(training.precision), training.per_device_train_batch_size
    arguments = trainer_arguments(
        folder / "checkpoints",
        precision,
        num_train_epochs=training.epochs,
        max_steps=training.steps or -1,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=accumulation(training, world_size()),
        learning_rate=spec.learning_rate,
        lr_scheduler_type=training.schedule,
        warmup_steps=training.warmup,
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        activation_checkpointing=training.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False},
        seed=derive_seed("dropout", spec.seed),
        save_strategy="steps",
        save_steps=training.save_steps,
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,
    )
    trainer = RoutedTrainer(
        args=arguments,
        order=EpochOrder([len(row.tokens) for row in rows.rows], size, spec.seed, by_length=False),
        trainable=trainable,
        base_lr_ratio=training.lora.base_lr_ratio if training.lora else 1.0,
        probe=probe,
        by_token=True,
        train_dataset=rows,
        data_collator=without_prompt_logits(
            collator(tokenizer, packing=training.packing), trainable.model
        ),
        callbacks=[progress, stopwatch],
    )
    if every := training.eval_every:
        evaluate = partial(
            held_out_loss, tokenizer=tokenizer, batch_size=spec.evaluation.batch_size
        )
        loss = partial(evaluate, rows=held_out, precision=precision)
        trainer.add_callback(
            HeldOutCurve(loss, every)
        )  # after the stopwatch, so that it is not timed
    trainer.train(resume_from_checkpoint=resume(trainer, progress.say))
    log = trainer.state.log_history
    trained: dict[str, Any] = {
        "curve": [finite_or_none(entry["loss"]) for entry in log if "loss" in entry],
        "cost": stopwatch.cost(trainer.state.global_step),
    }
    if training.eval_every:
        trained["held_out_curve"] = [
            {"step": entry["step"], "loss": entry[_KEY]} for entry in log if _KEY in entry
        ]
    return trained


_KEY = "held_out_loss"


class HeldOutCurve(TrainerCallback):
    """Compute the held-out loss before training and every few steps, without changing the training.

    The last step is omitted, because the final evaluation follows. Losses are stored in Trainer's log, which
    checkpoints keep.
    """

    def __init__(self, loss: Callable[[Any], float | None], every: int) -> None:
        self._loss, self._every = loss, every

    def on_train_begin(
        self, args: Arguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step == 0:
            self._add_point(state, kwargs["model"])

    def on_step_end(
        self, args: Arguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step % self._every == 0 and state.global_step < state.max_steps:
            self._add_point(state, kwargs["model"])

    def _add_point(self, state: TrainerState, model: nn.Module) -> None:
        with restore_rng_and_modes(model):
            state.log_history.append(
                {_KEY: cast(Any, self._loss(model)), "step": state.global_step}
            )
