"""Predict and score a split with a classifier."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase, Trainer

from benchmarks.harness.models.prefix import Prefix, collate_states
from benchmarks.harness.models.trainable import Trainable
from benchmarks.harness.training.callbacks import Stopwatch, fixed_rows
from benchmarks.harness.training.label_mapping import label_mapping
from benchmarks.harness.training.metrics import mean_loss, score
from benchmarks.harness.training.trainer import (
    available_precision,
    extract_logits,
    finite_or_none,
    trainer_arguments,
)
from benchmarks.text.data import TextSplit
from benchmarks.text.definition import RunTask
from benchmarks.text.tokenization import TokenisedRows
from benchmarks.text.usage import RoutingRecorder


def padding_collator(
    tokenizer: PreTrainedTokenizerBase, precision: str
) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
    """Return a collator that pads to the longest row, for fp16 to a multiple of 8 (as the authors do)."""
    return collate_states(DataCollatorWithPadding(tokenizer, pad_to_multiple_of=8 if precision == "fp16" else None))


def score_and_loss(
    logits: NDArray[np.float32], labels: NDArray[Any], trained: RunTask, evaluated: RunTask, metrics: Sequence[str]
) -> dict[str, float | None]:
    """Compute the metrics of a set, and ``loss`` if the set has the same classes as the training task.

    Args:
        logits: The logits or log-likelihoods ``[rows, classes of the training task]``.
        labels: The labels of the rows, in the set's own numbering.
        trained: The training task.
        evaluated: The task of the set.
        metrics: The names of the metrics.
    """
    mapping = label_mapping(trained, evaluated, evaluated.name)
    scores: dict[str, float | None] = {name: score(name, logits, labels, mapping) for name in metrics}
    return {**scores, "loss": finite_or_none(mean_loss(logits, labels))} if mapping.same else scores


class SplitEvaluator:
    """Score splits with the classifier of a trainer; rows are cut to ``max_length`` tokens."""

    def __init__(
        self,
        trainer: Trainer,
        prefix: Prefix | None,
        tokenizer: PreTrainedTokenizerBase,
        task: RunTask,
        max_length: int,
    ) -> None:
        self._trainer, self._prefix, self._tokenizer = trainer, prefix, tokenizer
        self._task, self._max_length = task, max_length

    def evaluate(
        self, split: TextSplit, task: RunTask | None = None, routing: RoutingRecorder | None = None
    ) -> dict[str, float | None]:
        """Score a split of the training task, or of another ``task``; record routing if ``routing`` is given.

        Batches have rows of similar length. Return scores by metric; ``loss`` only if the set has the head's classes.
        """
        rows = TokenisedRows(
            split, self._tokenizer, self._max_length, by_length=True, labelled=False, prefix=self._prefix
        )
        evaluated = task or self._task
        with routing.record_set(evaluated.name, split.class_numbers[rows.order]) if routing else nullcontext():
            logits = extract_logits(self._trainer.predict(cast(Any, rows), metric_key_prefix="eval").predictions)
        metrics = task.ood_metrics if task else [self._task.metric]
        return score_and_loss(logits, rows.labels, self._task, evaluated, metrics)


class TextEvaluator(SplitEvaluator):
    """Evaluate a trained classifier in its training precision, ``batch_size`` rows at once."""

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
        self._precision, self._stopwatch = available_precision(precision), Stopwatch()
        self._collate = padding_collator(tokenizer, self._precision)
        trainer = Trainer(
            model=classifier.model,
            args=trainer_arguments(folder / "checkpoints", self._precision, per_device_eval_batch_size=batch_size),
            data_collator=self._collate,
            callbacks=[self._stopwatch],
        )
        super().__init__(trainer, classifier.prefix, tokenizer, task, max_length)

    @property
    def cost(self) -> dict[str, Any]:
        """Return the time of evaluations so far, for ``cost`` of ``metrics.json``."""
        return {"evaluation_seconds": self._stopwatch.evaluation, "precision": self._precision}

    def first_batch(self, split: TextSplit) -> dict[str, Any]:
        """Return the first rows of a split as inputs of the model."""
        rows = TokenisedRows(split, self._tokenizer, self._max_length, by_length=False, labelled=False)
        return dict(self._collate(fixed_rows(rows)))
