"""The one training loop: transformers' Trainer, with what routed models add to it."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import (
    DataCollatorWithPadding,
    EarlyStoppingCallback,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

import emoe
from benchmarks.harness.progress import Progress
from benchmarks.harness.scores import score
from benchmarks.harness.seeds import derive_seed
from benchmarks.harness.text import TextSplit

_CHECKPOINT_FILES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json")


class TokenisedRows(Dataset[dict[str, Any]]):
    """A split as the model reads it.

    Args:
        split: the rows.
        tokenizer: the model's.
        max_length: tokens kept.
        by_length: sort by length, so that evaluation batches need little padding.
    """

    def __init__(
        self, split: TextSplit, tokenizer: PreTrainedTokenizerBase, max_length: int, *, by_length: bool
    ) -> None:
        columns = [list(column) for column in zip(*split.texts, strict=True)]
        encoded = tokenizer(*columns, truncation=True, max_length=max_length)
        rows = [{name: encoded[name][i] for name in encoded} for i in range(len(split))]
        self._rows = [{**row, "labels": label} for row, label in zip(rows, split.labels, strict=True)]
        if by_length:
            self._rows.sort(key=lambda row: len(row["input_ids"]))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._rows[index]


@dataclass(frozen=True)
class TrainingResult:
    """What training gives back beside the model's new weights.

    ``epochs`` has the dev scores after every epoch; ``kept`` is the one whose weights the model has; ``step_seconds`` is measured over the steps of this process.
    """

    epochs: list[dict[str, float]]
    kept: dict[str, float]
    steps: int
    step_seconds: float


class _RoutedTrainer(Trainer):
    """Adds the balance loss of routed models to the task's."""

    def compute_loss(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        result = super().compute_loss(model, *args, **kwargs)
        extra = emoe.aux_loss(model) if model.training else 0.0
        if not isinstance(extra, Tensor):
            return result
        return (result[0] + extra, *result[1:]) if isinstance(result, tuple) else result + extra


class _Stopwatch(TrainerCallback):
    """Time spent in steps, without evaluation and checkpoints."""

    def __init__(self) -> None:
        self.seconds, self.steps, self._start = 0.0, 0, 0.0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._start = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.seconds += time.perf_counter() - self._start
        self.steps += 1


class TextTrainer:
    """Trains and evaluates one text classifier as a run's spec says.

    Checkpoints are written every epoch below ``folder``; a run that was killed goes on from the last
    complete one and ends with the same numbers.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        spec: Mapping[str, Any],
        train: TextSplit,
        dev: TextSplit,
        folder: Path,
        progress: Progress,
    ) -> None:
        self._tokenizer, self._training, self._metric = tokenizer, spec["training"], spec["task"]["metric"]
        self._checkpoints = folder / "checkpoints"
        self._stopwatch = _Stopwatch()
        best = self._training["keep"] == "best"
        arguments = TrainingArguments(
            output_dir=str(self._checkpoints),
            num_train_epochs=self._training["epochs"],
            per_device_train_batch_size=self._training["batch_size"],
            per_device_eval_batch_size=self._training["eval_batch_size"],
            learning_rate=spec["learning_rate"],
            lr_scheduler_type="linear",
            warmup_steps=self._training["warmup"],
            weight_decay=self._training["weight_decay"],
            max_grad_norm=0.0,
            seed=derive_seed("dropout", spec["seed"]),
            data_seed=derive_seed("order", spec["seed"]),
            eval_strategy="epoch",
            save_strategy="epoch",
            save_total_limit=1,
            load_best_model_at_end=best,
            metric_for_best_model=self._metric if best else None,
            greater_is_better=True if best else None,
            train_sampling_strategy=self._training["sampling"],
            logging_strategy="epoch",
            report_to=[],
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
        )
        callbacks: list[TrainerCallback] = [progress, self._stopwatch]
        if best and self._training["patience"] is not None:
            callbacks.append(EarlyStoppingCallback(self._training["patience"]))
        self._trainer = _RoutedTrainer(
            model=model,
            args=arguments,
            train_dataset=self._rows(train, by_length=False),
            eval_dataset=self._rows(dev, by_length=True),
            data_collator=DataCollatorWithPadding(tokenizer),
            compute_metrics=self._scores,
            callbacks=callbacks,
        )

    def _rows(self, split: TextSplit, *, by_length: bool) -> TokenisedRows:
        return TokenisedRows(split, self._tokenizer, self._training["max_length"], by_length=by_length)

    def _scores(self, prediction: EvalPrediction) -> dict[str, float]:
        predictions, labels = cast(Any, prediction.predictions), cast(Any, prediction.label_ids)
        logits = predictions[0] if isinstance(predictions, tuple) else predictions
        return {self._metric: score(self._metric, logits, labels)}

    def train(self) -> TrainingResult:
        """Train, from the last complete checkpoint where there is one."""
        self._trainer.train(resume_from_checkpoint=last_complete_checkpoint(self._checkpoints))
        state = self._trainer.state
        epochs = [
            {"epoch": entry["epoch"], self._metric: entry[f"eval_{self._metric}"], "loss": entry["eval_loss"]}
            for entry in state.log_history
            if "eval_loss" in entry
        ]
        kept = (
            max(epochs, key=lambda entry: (entry[self._metric], -entry["epoch"]))
            if self._training["keep"] == "best"
            else epochs[-1]
        )
        return TrainingResult(epochs, kept, state.global_step, self._stopwatch.seconds / max(self._stopwatch.steps, 1))

    def evaluate(self, split: TextSplit) -> dict[str, float]:
        """Score and loss on a split."""
        result = self._trainer.evaluate(self._rows(split, by_length=True))
        return {self._metric: result[f"eval_{self._metric}"], "loss": result["eval_loss"]}

    def clean_up(self) -> None:
        """Delete the checkpoints of a finished run."""
        shutil.rmtree(self._checkpoints, ignore_errors=True)


def last_complete_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that was written to its end; half-written ones are removed."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    for checkpoint in found:
        if _is_complete(checkpoint):
            return str(checkpoint)
        shutil.rmtree(checkpoint)
    return None


def _is_complete(checkpoint: Path) -> bool:
    # Trainer writes trainer_state.json last
    if not all((checkpoint / name).exists() for name in _CHECKPOINT_FILES):
        return False
    try:
        json.loads((checkpoint / "trainer_state.json").read_text())
    except json.JSONDecodeError:
        return False
    return True
