"""Predict and score a split with a classifier that is trained, or in training."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from numpy.typing import NDArray
from transformers import (
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from benchmarks.harness.classes import reading
from benchmarks.harness.classifier import Classifier
from benchmarks.harness.files import write_json
from benchmarks.harness.scores import mean_loss, score
from benchmarks.harness.text import TextSplit
from benchmarks.harness.tokenised import TokenisedRows


class Stopwatch(TrainerCallback):
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

    on_predict = on_evaluate

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._start = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.seconds += time.perf_counter() - self._start
        self.steps += 1


def precision_here(asked: str) -> str:
    """The arithmetic that this machine computes in: mixed only on an accelerator."""
    return asked if torch.cuda.is_available() else "fp32"


def padding_collator(tokenizer: PreTrainedTokenizerBase, precision: str) -> DataCollatorWithPadding:
    """Pads a batch to its longest row; for fp16 to a multiple of 8, as the authors do."""
    return DataCollatorWithPadding(tokenizer, pad_to_multiple_of=8 if precision == "fp16" else None)


def quiet_arguments(folder: Path, precision: str, **options: Any) -> TrainingArguments:
    """Trainer's arguments for one quiet run on one device."""
    found = TrainingArguments(
        output_dir=str(folder),
        report_to=[],
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        fp16=precision == "fp16",
        bf16=precision == "bf16",
        **options,
    )
    if found.n_gpu > 1:
        found._n_gpu = 1  # Trainer's DataParallel would multiply the batch size; one run takes one GPU
    return found


class TextEvaluator:
    """Evaluates a classifier that is trained already.

    Args:
        classifier: the classifier.
        tokenizer: its tokenizer.
        task: what it was trained on (``task`` of a spec).
        settings: ``batch_size`` and ``max_length``.
        precision: what it was trained in.
        folder: the run's.
    """

    def __init__(
        self,
        classifier: Classifier,
        tokenizer: PreTrainedTokenizerBase,
        task: Mapping[str, Any],
        settings: Mapping[str, Any],
        precision: str,
        folder: Path,
    ) -> None:
        self._tokenizer, self._task, self._max_length = tokenizer, task, settings["max_length"]
        self.precision = precision_here(precision)
        arguments = quiet_arguments(
            folder / "checkpoints", self.precision, per_device_eval_batch_size=settings["batch_size"]
        )
        self._stopwatch = Stopwatch()
        self._trainer = Trainer(
            model=classifier.model,
            args=arguments,
            data_collator=padding_collator(tokenizer, self.precision),
            callbacks=[self._stopwatch],
        )

    @property
    def evaluation_seconds(self) -> float:
        """Time spent in evaluations so far."""
        return self._stopwatch.evaluation

    def evaluate(self, split: TextSplit, task: Mapping[str, Any]) -> dict[str, float | None]:
        """Scores and loss on another task's split."""
        return evaluate_split(self._trainer, self._tokenizer, self._max_length, split, self._task, task)


def evaluate_split(
    trainer: Trainer,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    split: TextSplit,
    trained: Mapping[str, Any],
    other: Mapping[str, Any] | None,
) -> dict[str, float | None]:
    """Predict a split in batches of like length and score it by what the task reports.

    The loss is left out where the set has other classes than the head.
    """
    rows = TokenisedRows(split, tokenizer, max_length, by_length=True, labelled=False)
    logits = plain_logits(trainer.predict(cast(Any, rows), metric_key_prefix="eval").predictions)
    read = reading(trained, other or trained, (other or trained)["name"])
    metrics = [trained["metric"]] if other is None else other["ood_metrics"]
    scores: dict[str, float | None] = {name: score(name, logits, rows.labels, read) for name in metrics}
    return {**scores, "loss": finite(mean_loss(logits, rows.labels))} if read.same else scores


def plain_logits(predictions: Any) -> NDArray[Any]:
    """The logits of what a model gave back."""
    return cast(NDArray[Any], predictions[0] if isinstance(predictions, tuple) else predictions)


def finite(loss: float) -> float | None:
    """A loss, or None for that of a model that diverged: JSON knows no other numbers, and means shall not."""
    return loss if math.isfinite(loss) else None
