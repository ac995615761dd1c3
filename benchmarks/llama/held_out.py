"""The held-out loss while a model is trained, always on the same rows."""

from __future__ import annotations

from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState
from transformers import TrainingArguments as Arguments

from benchmarks.harness.training.callbacks import restore_rng_and_modes
from benchmarks.llama.encoding import EncodedRows
from benchmarks.llama.evaluation import held_out_loss

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
