"""Train a language model on instructions."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState
from transformers import TrainingArguments as Arguments

from benchmarks.harness.base.seeds import derive_seed
from benchmarks.harness.models.build import Trainable
from benchmarks.harness.training.callbacks import Probe, RetieGates, Stopwatch, restore_rng_and_modes
from benchmarks.harness.training.checkpoints import resume
from benchmarks.harness.training.processes import world_size
from benchmarks.harness.training.progress import Progress
from benchmarks.harness.training.samplers import EpochOrder
from benchmarks.harness.training.trainer import RoutedTrainer, finite, precision_here, quiet_arguments
from benchmarks.llama.definition import InstructionSpec, RunInstructionTraining
from benchmarks.llama.encoding import EncodedRows, collator, without_prompt_logits
from benchmarks.llama.evaluation import held_out_loss
from benchmarks.llama.grid import accumulation


@dataclass(frozen=True)
class Trained:
    """What training gives back beside the model's new weights.

    Attributes:
        curve: the loss of every step: the mean over its learned tokens.
        cost: what it took: ``steps``, ``step_seconds``, ``train_seconds``.
        held_out: step and loss on the held-out rows, where the settings ask for it.
    """

    curve: list[float | None]
    cost: dict[str, float]
    held_out: list[dict[str, Any]] = field(default_factory=list)


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
    """Train, from the last complete checkpoint where there is one.

    The rows of a step, and its loss, are the same for any number of processes and for any micro-batch.

    Args:
        trainable: the model; sharded where several processes share it.
        tokenizer: the model's.
        spec: the run's.
        training: its settings.
        rows: to learn.
        held_out: to take the loss on every ``eval_every`` steps.
        folder: the run's folder; checkpoints are written below it.
        progress: where to say what is going on.
        probe: takes the first losses.

    Raises:
        DataError: a checkpoint that is damaged or of another model.
    """
    checkpoints, stopwatch = folder / "checkpoints", Stopwatch()
    arguments = quiet_arguments(
        checkpoints,
        precision_here(training.precision),
        num_train_epochs=training.epochs,
        max_steps=training.steps or -1,
        per_device_train_batch_size=training.per_device_train_batch_size,
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
        remove_unused_columns=False,
    )
    trainer = RoutedTrainer(
        args=arguments,
        order=EpochOrder(
            [len(row.tokens) for row in rows.rows],
            training.per_device_train_batch_size,
            spec.seed,
            by_length=False,
        ),
        trainable=trainable,
        base_lr_ratio=training.lora.base_lr_ratio if training.lora else 1.0,
        probe=probe,
        by_token=True,
        train_dataset=rows,
        data_collator=without_prompt_logits(collator(tokenizer, packing=training.packing), trainable.model),
        callbacks=[progress, stopwatch, RetieGates()],
    )
    if every := training.eval_every:
        at_once, precision = spec.evaluation.batch_size, precision_here(training.precision)
        # after the stopwatch, which shall not count it
        trainer.add_callback(HeldOutCurve(held_out, tokenizer, every, at_once, precision))
    trainer.train(resume_from_checkpoint=resume(checkpoints, stopwatch, probe))
    curve = [finite(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    return Trained(curve, stopwatch.cost(trainer.state.global_step), HeldOutCurve.points(trainer.state))


_KEY = "held_out_loss"


class HeldOutCurve(TrainerCallback):
    """Takes the held-out loss before training and every few steps, but not after the last, when the model is evaluated anyway; training goes on as if it had not.

    The points stand in the trainer's own history, which its checkpoints keep.

    Args:
        rows: held-out rows, the same each time.
        tokenizer: the model's.
        every: steps.
        batch_size: rows at once.
        precision: in which an accelerator computes.
    """

    def __init__(
        self, rows: EncodedRows, tokenizer: PreTrainedTokenizerBase, every: int, batch_size: int, precision: str
    ) -> None:
        self._rows, self._tokenizer, self._every = rows, tokenizer, every
        self._batch_size, self._precision = batch_size, precision

    def on_train_begin(
        self, args: Arguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        if state.global_step == 0:
            self._take(state, model)

    def on_step_end(
        self, args: Arguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        if state.global_step % self._every == 0 and state.global_step < state.max_steps:
            self._take(state, model)

    def _take(self, state: TrainerState, model: nn.Module) -> None:
        with restore_rng_and_modes(model):
            loss = held_out_loss(
                cast(PreTrainedModel, model), self._rows, self._tokenizer, self._batch_size, self._precision
            )
        state.log_history.append({_KEY: cast(Any, loss), "step": state.global_step})

    @staticmethod
    def points(state: TrainerState) -> list[dict[str, Any]]:
        """What was taken: ``step`` and ``loss``; None of a model that diverged."""
        return [{"step": entry["step"], "loss": entry[_KEY]} for entry in state.log_history if _KEY in entry]
