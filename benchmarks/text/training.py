"""Train a text classifier epoch by epoch, and score it on splits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from transformers import (
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from benchmarks.harness.base import derive_seed
from benchmarks.harness.config.runs import RunSpec
from benchmarks.harness.models.prefix import Prefix, collate_states
from benchmarks.harness.models.trainable import Trainable
from benchmarks.harness.training.callbacks import Probe, Stopwatch, fixed_rows
from benchmarks.harness.training.checkpoints import resume
from benchmarks.harness.training.metrics import mean_loss, score
from benchmarks.harness.training.progress import Progress
from benchmarks.harness.training.routing import RoutingTrace
from benchmarks.harness.training.samplers import EpochOrder
from benchmarks.harness.training.trainer import (
    RoutedTrainer,
    available_precision,
    extract_logits,
    finite_or_none,
    trainer_arguments,
)
from benchmarks.text.data import TextSplit
from benchmarks.text.definition import RunTask, TextSpec, merged_classes
from benchmarks.text.tokenization import TokenisedRows
from benchmarks.text.usage import RoutingRecorder

_LOSS = "mean_loss"

Epoch = dict[str, Any]  # its number, and the dev scores after it


def padding_collator(
    tokenizer: PreTrainedTokenizerBase, precision: str
) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
    """Return a collator that pads to the longest row, for fp16 to a multiple of 8 (as the authors do)."""
    return collate_states(
        DataCollatorWithPadding(tokenizer, pad_to_multiple_of=8 if precision == "fp16" else None)
    )


def score_and_loss(
    logits: NDArray[np.float32],
    labels: NDArray[Any],
    trained: RunTask,
    evaluated: RunTask,
    metrics: Sequence[str],
) -> dict[str, float | None]:
    """Compute the metrics of a set, and ``loss`` if the set has the same classes as the training task.

    Equal numbers of classes correspond by their order. If they differ, the head's predictions or the set's labels are
    merged by :func:`merged_classes` (three-way NLI on HANS: neutral and contradiction are no entailment).

    Args:
        logits: The logits or log-likelihoods ``[rows, classes of the training task]``.
        labels: The class numbers (or scores) of the rows, as in the set.
        trained: The training task.
        evaluated: The task of the set.
        metrics: The names of the metrics.
    """
    head, classes = len(trained.labels), len(evaluated.labels)
    if head < classes:
        labels = np.asarray(merged_classes(evaluated, trained))[labels]
    merged = merged_classes(trained, evaluated) if head > classes else None
    scores: dict[str, float | None] = {
        name: score(name, logits, labels, merged) for name in metrics
    }
    return (
        {**scores, "loss": finite_or_none(mean_loss(logits, labels))} if head == classes else scores
    )


@dataclass
class SplitEvaluator:
    """Score splits with the classifier of a trainer; rows are cut to ``max_length`` tokens."""

    trainer: Trainer
    prefix: Prefix | None
    tokenizer: PreTrainedTokenizerBase
    task: RunTask
    max_length: int

    def evaluate(
        self, split: TextSplit, task: RunTask | None = None, routing: RoutingRecorder | None = None
    ) -> dict[str, float | None]:
        """Score a split of the training task, or of another ``task``; record routing if ``routing`` is given.

        Batches have rows of similar length. Return scores by metric; ``loss`` only if the set has the head's classes.
        """
        rows = TokenisedRows(
            split,
            self.tokenizer,
            self.max_length,
            by_length=True,
            labelled=False,
            prefix=self.prefix,
        )
        evaluated = task or self.task
        with (
            routing.record_set(evaluated.name, split.class_numbers[rows.order])
            if routing
            else nullcontext()
        ):
            logits = extract_logits(
                self.trainer.predict(cast(Any, rows), metric_key_prefix="eval").predictions
            )
        metrics = task.ood_metrics if task else [self.task.metric]
        return score_and_loss(logits, rows.labels, self.task, evaluated, metrics)


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
            args=trainer_arguments(
                folder / "checkpoints", self._precision, per_device_eval_batch_size=batch_size
            ),
            data_collator=self._collate,
            callbacks=[self._stopwatch],
        )
        super().__init__(trainer, classifier.prefix, tokenizer, task, max_length)

    @property
    def cost(self) -> dict[str, Any]:
        """Return the seconds of all evaluations and the precision, for ``cost`` of ``metrics.json``."""
        return {"evaluation_seconds": self._stopwatch.evaluation, "precision": self._precision}

    def first_batch(self, split: TextSplit) -> dict[str, Any]:
        """Return the first rows of a split as inputs of the model."""
        rows = TokenisedRows(
            split, self.tokenizer, self.max_length, by_length=False, labelled=False
        )
        return dict(self._collate(fixed_rows(rows)))


def epoch_arguments(
    folder: Path, precision: str, training: Any, spec: RunSpec, best: str | None, **options: Any
) -> TrainingArguments:
    """Return Trainer's arguments for a run that evaluates and saves a checkpoint after every epoch.

    Args:
        folder: The folder of the checkpoints.
        precision: The precision, such as ``bf16``.
        training: The section ``training`` of the spec.
        spec: The spec of the run, with learning rate and seed.
        best: The metric that chooses the epoch; None keeps the last epoch.
        **options: Other arguments of Trainer.
    """
    return trainer_arguments(
        folder,
        precision,
        num_train_epochs=training.epochs,
        per_device_train_batch_size=training.batch_size,
        per_device_eval_batch_size=training.eval_batch_size,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        learning_rate=spec.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=training.warmup,
        weight_decay=training.weight_decay,
        max_grad_norm=0.0,
        seed=derive_seed("dropout", spec.seed),
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=best is not None,
        metric_for_best_model=best,
        greater_is_better=None if best is None else True,
        logging_strategy="epoch",
        **options,
    )


def kept_epoch(epochs: list[Epoch], best: str | None) -> Epoch:
    """Return the epoch with the kept weights: the first one with the best score, or the last if ``best`` is None."""
    return max(epochs, key=lambda epoch: epoch[best]) if best else epochs[-1]


class Patience(TrainerCallback):
    """Stop after a number of epochs without a new best dev score above 0, as in the authors' code.

    A resumed run stops at the same epoch, because the count uses Trainer's log, which checkpoints keep.
    """

    def __init__(self, metric: str, epochs: int) -> None:
        self._metric, self._epochs = f"eval_{metric}", epochs

    def is_over(self, log: list[dict[str, float]]) -> bool:
        """Return True if the last ``epochs`` evaluations in a log have no new best score."""
        scores = [0.0, *(entry[self._metric] for entry in log if self._metric in entry)]
        return len(scores) - 1 - scores.index(max(scores)) >= self._epochs

    def on_evaluate(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.is_over(state.log_history):
            control.should_training_stop = True


class TextTrainer(SplitEvaluator):
    """Train and evaluate one text classifier according to a run's spec.

    Each epoch saves a checkpoint below ``folder``. A killed run resumes from the last complete one, with the same final
    numbers.
    """

    def __init__(
        self,
        classifier: Trainable,
        tokenizer: PreTrainedTokenizerBase,
        spec: TextSpec,
        train: TextSplit,
        dev: TextSplit,
        folder: Path,
        progress: Progress,
    ) -> None:
        training, self._metric = spec.training, spec.task.metric
        self._say = progress.say
        self._stopwatch, self.probe, self.routing_trace = Stopwatch(), Probe(), RoutingTrace()
        self._precision = available_precision(training.precision)
        self._best = self._metric if training.checkpoint_selection == "best" else None
        self._patience = (
            None if training.patience is None else Patience(self._metric, training.patience)
        )
        read = partial(
            TokenisedRows,
            tokenizer=tokenizer,
            max_length=training.max_length,
            prefix=classifier.prefix,
        )
        rows, self._dev = read(train, by_length=False), read(dev, by_length=True)
        collate = padding_collator(tokenizer, self._precision)
        self.probe.observe(classifier.model, collate(fixed_rows(rows)))
        callbacks = [progress, self._stopwatch, self.routing_trace, self._patience]
        trainer = RoutedTrainer(
            args=epoch_arguments(
                folder / "checkpoints", self._precision, training, spec, self._best
            ),
            order=EpochOrder(
                rows.lengths,
                training.batch_size,
                spec.seed,
                by_length=training.sampling == "group_by_length",
            ),
            trainable=classifier,
            base_lr_ratio=training.lora.base_lr_ratio if training.lora else 1.0,
            probe=self.probe,
            train_dataset=rows,
            eval_dataset=self._dev,
            data_collator=collate,
            compute_metrics=self._scores,
            callbacks=[callback for callback in callbacks if callback],
        )
        super().__init__(trainer, classifier.prefix, tokenizer, spec.task, training.max_length)

    @property
    def cost(self) -> dict[str, Any]:
        """Return the times of training and evaluation so far, for ``cost`` of ``metrics.json``."""
        times = self._stopwatch.cost(self.trainer.state.global_step)
        return {
            **times,
            "evaluation_seconds": self._stopwatch.evaluation,
            "precision": self._precision,
        }

    def _scores(self, prediction: EvalPrediction) -> dict[str, float]:
        # Trainer rounds labels to float32, and weights an incomplete last batch like a full one
        logits, labels = extract_logits(prediction.predictions), self._dev.labels
        return {self._metric: score(self._metric, logits, labels), _LOSS: mean_loss(logits, labels)}

    def train(self) -> tuple[list[Epoch], Epoch]:
        """Train from the last complete checkpoint, if any; return all epochs and the kept one."""
        checkpoint = resume(self.trainer, self._say)
        if self._patience and self._patience.is_over(self.trainer.state.log_history):
            self.trainer._load_best_model()  # training had stopped early
        else:
            self.trainer.train(resume_from_checkpoint=checkpoint)
        epochs: list[Epoch] = [
            {
                "epoch": log["epoch"],
                self._metric: log[f"eval_{self._metric}"],
                "loss": finite_or_none(log[f"eval_{_LOSS}"]),
            }
            for log in self.trainer.state.log_history
            if f"eval_{_LOSS}" in log
        ]
        return epochs, kept_epoch(epochs, self._best)
