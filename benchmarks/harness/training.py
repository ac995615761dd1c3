"""The one training loop: transformers' Trainer, with what routed models add to it."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler
from transformers import (
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_pt_utils import get_length_grouped_indices

import emoe
from benchmarks.harness.files import write_json
from benchmarks.harness.progress import Progress
from benchmarks.harness.scores import score
from benchmarks.harness.seeds import derive_seed
from benchmarks.harness.text import TextSplit

_CHECKPOINT_FILES = ("model.safetensors", "optimizer.pt", "scheduler.pt", TRAINER_STATE_NAME)


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

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        return [len(row["input_ids"]) for row in self._rows]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._rows[index]


def calibration_batches(
    split: TextSplit, tokenizer: PreTrainedTokenizerBase, training: Mapping[str, Any], rows: int = 256
) -> Iterator[dict[str, Any]]:
    """The first ``rows`` rows of a split as batches to call a model with, without labels."""
    encoded = TokenisedRows(
        split.head(min(rows, len(split)), "calibration"), tokenizer, training["max_length"], by_length=True
    )
    collate = DataCollatorWithPadding(tokenizer)
    for start in range(0, len(encoded), training["eval_batch_size"]):
        chosen = [encoded[i] for i in range(start, min(start + training["eval_batch_size"], len(encoded)))]
        yield {name: value for name, value in collate(chosen).items() if name != "labels"}


@dataclass(frozen=True)
class TrainingResult:
    """What training gives back beside the model's new weights.

    ``epochs`` has the dev scores after every epoch; ``kept`` is the one whose weights the model has; ``step_seconds`` is the mean over its steps.
    """

    epochs: list[dict[str, Any]]
    kept: dict[str, Any]
    steps: int
    step_seconds: float


class EpochOrder(Sampler[int]):
    """Order of the training rows: a function of the seed and the epoch, and of nothing else.

    So all methods see the same rows in the same order, however much randomness they use up themselves,
    and a run that goes on sees the order that it would have seen.

    Args:
        lengths: tokens of each row.
        batch_size: rows of a step.
        seed: the run's seed.
        by_length: put rows of like length into one batch.
    """

    def __init__(self, lengths: list[int], batch_size: int, seed: int, *, by_length: bool) -> None:
        self._lengths, self._batch_size, self._seed, self._by_length = lengths, batch_size, seed, by_length
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the data loader before every epoch."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(derive_seed("order", self._seed, self._epoch))
        if self._by_length:
            return iter(get_length_grouped_indices(self._lengths, self._batch_size, generator=generator))
        return iter(torch.randperm(len(self), generator=generator).tolist())


class _RoutedTrainer(Trainer):
    """Adds the balance loss of routed models to the task's, and orders the rows by seed and epoch."""

    def __init__(self, *args: Any, order: EpochOrder, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._order = order

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochOrder:
        return self._order

    def compute_loss(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        result = super().compute_loss(model, *args, **kwargs)
        extra = emoe.aux_loss(model) if model.training else 0.0
        if not isinstance(extra, Tensor):
            return result
        return (result[0] + extra, *result[1:]) if isinstance(result, tuple) else result + extra


class Patience(TrainerCallback):
    """Stops after a number of epochs without a new best dev score.

    Counts in the log, which checkpoints keep, so that a run that goes on stops where it would have stopped.
    """

    def __init__(self, metric: str, epochs: int) -> None:
        self._metric, self._epochs = f"eval_{metric}", epochs

    def is_over(self, log: list[dict[str, float]]) -> bool:
        """Whether the last evaluations of a log are that many without a new best."""
        scores = [entry[self._metric] for entry in log if self._metric in entry]
        return bool(scores) and len(scores) - 1 - scores.index(max(scores)) >= self._epochs

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.is_over(state.log_history):
            control.should_training_stop = True


class _RetieGates(TrainerCallback):
    """Lets running gates follow the keys after each optimiser step."""

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        if model is not None:
            emoe.retie_gates_(model)


class _Stopwatch(TrainerCallback):
    """Time spent in steps, without evaluation and checkpoints, and in evaluation; kept beside every checkpoint."""

    _FILE = "stopwatch.json"

    def __init__(self) -> None:
        self.seconds, self.steps, self.evaluation, self._start = 0.0, 0, 0.0, 0.0

    def resume(self, checkpoint: Path) -> None:
        """Go on from a checkpoint's count."""
        if (checkpoint / self._FILE).exists():
            saved = json.loads((checkpoint / self._FILE).read_text())
            self.seconds, self.steps, self.evaluation = saved["seconds"], saved["steps"], saved["evaluation"]

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        content = {"seconds": self.seconds, "steps": self.steps, "evaluation": self.evaluation}
        write_json(folder / self._FILE, content)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        self.evaluation += (metrics or {}).get("eval_runtime", 0.0)

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
            eval_strategy="epoch",
            save_strategy="epoch",
            save_total_limit=1,
            load_best_model_at_end=best,
            metric_for_best_model=self._metric if best else None,
            greater_is_better=True if best else None,
            logging_strategy="epoch",
            report_to=[],
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
        )
        if arguments.n_gpu > 1:
            arguments._n_gpu = 1  # Trainer's DataParallel would multiply the batch size; one run takes one GPU
        patience = self._training["patience"]
        self._patience = None if patience is None else Patience(self._metric, patience)
        rows = self._rows(train, by_length=False)
        by_length = self._training["sampling"] == "group_by_length"
        self._trainer = _RoutedTrainer(
            model=model,
            args=arguments,
            order=EpochOrder(rows.lengths, self._training["batch_size"], spec["seed"], by_length=by_length),
            train_dataset=rows,
            eval_dataset=self._rows(dev, by_length=True),
            data_collator=DataCollatorWithPadding(tokenizer),
            compute_metrics=self._scores,
            callbacks=[progress, self._stopwatch, _RetieGates(), *([self._patience] if self._patience else [])],
        )

    @property
    def evaluation_seconds(self) -> float:
        """Time spent in evaluations so far, those during training included."""
        return self._stopwatch.evaluation

    def _rows(self, split: TextSplit, *, by_length: bool) -> TokenisedRows:
        return TokenisedRows(split, self._tokenizer, self._training["max_length"], by_length=by_length)

    def _scores(self, prediction: EvalPrediction) -> dict[str, float]:
        predictions, labels = cast(Any, prediction.predictions), cast(Any, prediction.label_ids)
        logits = predictions[0] if isinstance(predictions, tuple) else predictions
        return {self._metric: score(self._metric, logits, labels)}

    def train(self) -> TrainingResult:
        """Train, from the last complete checkpoint where there is one."""
        checkpoint = last_complete_checkpoint(self._checkpoints)
        if checkpoint:
            self._stopwatch.resume(checkpoint)
        saved = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME)) if checkpoint else None
        if saved and self._patience and self._patience.is_over(saved.log_history):
            self._trainer.state = saved  # it had stopped already: only the best weights are missing
            self._trainer._load_best_model()
        else:
            self._trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        state = self._trainer.state
        epochs: list[dict[str, Any]] = [
            {"epoch": entry["epoch"], self._metric: entry[f"eval_{self._metric}"], "loss": _finite(entry["eval_loss"])}
            for entry in state.log_history
            if "eval_loss" in entry
        ]
        kept = (
            max(epochs, key=lambda entry: (entry[self._metric], -entry["epoch"]))
            if self._training["keep"] == "best"
            else epochs[-1]
        )
        return TrainingResult(epochs, kept, state.global_step, self._stopwatch.seconds / max(self._stopwatch.steps, 1))

    def evaluate(self, split: TextSplit) -> dict[str, float | None]:
        """Score and loss on a split."""
        result = self._trainer.evaluate(self._rows(split, by_length=True))
        return {self._metric: result[f"eval_{self._metric}"], "loss": _finite(result["eval_loss"])}


def _finite(loss: float) -> float | None:
    """A loss, or None for that of a model that diverged: JSON knows no other numbers, and means shall not."""
    return loss if math.isfinite(loss) else None


def last_complete_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end; half-written ones are removed."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    for checkpoint in found:
        if _is_complete(checkpoint):
            return checkpoint
        shutil.rmtree(checkpoint)
    return None


def _is_complete(checkpoint: Path) -> bool:
    # Trainer writes its state last
    if not all((checkpoint / name).exists() for name in _CHECKPOINT_FILES):
        return False
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text())
    except json.JSONDecodeError:
        return False
    return True
