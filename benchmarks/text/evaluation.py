"""Predict and score a split with a classifier."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase, Trainer

from benchmarks.harness.models.build import Trainable
from benchmarks.harness.models.prefix import Prefix, with_states
from benchmarks.harness.training.callbacks import Stopwatch, fixed_rows
from benchmarks.harness.training.label_mapping import label_mapping
from benchmarks.harness.training.metrics import mean_loss, score
from benchmarks.harness.training.trainer import (
    PrefixTrainer,
    finite,
    plain_logits,
    precision_here,
    quiet_arguments,
)
from benchmarks.text.data import TextSplit
from benchmarks.text.definition import RunTask
from benchmarks.text.tokenization import TokenisedRows
from benchmarks.text.usage import RowRouting


def padding_collator(
    tokenizer: PreTrainedTokenizerBase, precision: str
) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
    """Return a collator that pads to the longest row; for fp16 to a multiple of 8, as the authors do."""
    return with_states(DataCollatorWithPadding(tokenizer, pad_to_multiple_of=8 if precision == "fp16" else None))


class TextEvaluator:
    """Evaluates a trained classifier.

    Args:
        classifier: The classifier.
        tokenizer: The classifier's tokenizer.
        task: The training task (``task`` of a spec).
        batch_size: The number of rows at once.
        max_length: The tokens kept of a row.
        precision: The arithmetic of the training.
        folder: The folder of the run.
    """

    def __init__(
        self,
        classifier: Trainable,
        tokenizer: PreTrainedTokenizerBase,
        task: RunTask,
        batch_size: int,
        max_length: int,
        precision: str,
        folder: Path,
    ) -> None:
        self._tokenizer, self._task, self._max_length = tokenizer, task, max_length
        self._prefix = classifier.prefix
        self.precision = precision_here(precision)
        arguments = quiet_arguments(folder / "checkpoints", self.precision, per_device_eval_batch_size=batch_size)
        self._stopwatch = Stopwatch()
        self._collate = padding_collator(tokenizer, self.precision)
        self._trainer = PrefixTrainer(
            model=classifier.model,
            args=arguments,
            data_collator=self._collate,
            callbacks=[self._stopwatch],
        )

    @property
    def evaluation_seconds(self) -> float:
        """Return the time of evaluations so far."""
        return self._stopwatch.evaluation

    def first_batch(self, split: TextSplit) -> dict[str, Any]:
        """Return a split's first rows as inputs of the model."""
        rows = TokenisedRows(split, self._tokenizer, self._max_length, by_length=False, labelled=False)
        return dict(self._collate(fixed_rows(rows)))

    def evaluate(
        self, split: TextSplit, task: RunTask | None = None, routing: RowRouting | None = None
    ) -> dict[str, float | None]:
        """Score a split of the task, or of another one, and record how its rows are routed."""
        return evaluate_split(
            self._trainer, self._tokenizer, self._max_length, split, self._task, task, self._prefix, routing
        )


def evaluate_split(
    trainer: Trainer,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    split: TextSplit,
    trained: RunTask,
    other: RunTask | None,
    prefix: Prefix | None = None,
    routing: RowRouting | None = None,
) -> dict[str, float | None]:
    """Predict a split in batches of similar length, and score it by the metrics of the task.

    There is no loss if the set has other classes than the head.
    """
    rows = TokenisedRows(split, tokenizer, max_length, by_length=True, labelled=False, prefix=prefix)
    name = (other or trained).name
    with routing.watching(name, split.class_numbers[rows.order]) if routing else nullcontext():
        logits = plain_logits(trainer.predict(cast(Any, rows), metric_key_prefix="eval").predictions)
    read = label_mapping(trained, other or trained, name)
    metrics = [trained.metric] if other is None else other.ood_metrics
    scores: dict[str, float | None] = {name: score(name, logits, rows.labels, read) for name in metrics}
    return {**scores, "loss": finite(mean_loss(logits, rows.labels))} if read.same else scores
