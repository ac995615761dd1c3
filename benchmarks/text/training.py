"""Train a text classifier epoch by epoch, and score it on splits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
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
from benchmarks.harness.training.metrics import calibrated_loss, mean_loss, score
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

Epoch = dict[str, Any]  # the number of an epoch, and the dev scores after it


def padding_collator(
    tokenizer: PreTrainedTokenizerBase, precision: str
) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
    """Return a collator that pads each batch to its longest row.

    For fp16, the padded length is a multiple of 8. The collator also joins the outputs of frozen
    layers, if the rows have any.
    """
    multiple = 8 if precision == "fp16" else None  # as in the authors' code
    return collate_states(DataCollatorWithPadding(tokenizer, pad_to_multiple_of=multiple))


def score_and_loss(
    logits: NDArray[np.float32],
    labels: NDArray[Any],
    trained: RunTask,
    evaluated: RunTask,
    metrics: Sequence[str],
) -> dict[str, float | None]:
    """Compute the metrics of a data set, and its losses if no classes have to be merged.

    The losses are ``loss`` and, for classes, ``loss_calibrated``, see :func:`.calibrated_loss`.

    If the data set has as many classes as the training task, class i of one is class i of the
    other. Otherwise the classes of the side with more classes are merged: those of the predictions
    or of the labels. :func:`.definition.merged_classes` says how. For example, HANS has two
    classes. So the predictions "neutral" and "contradiction" of a three-way NLI model become "no
    entailment".

    Args:
        logits: The logits or log-likelihoods ``[rows, classes of the training task]``.
        labels: The class numbers (or scores) of the rows, as in the data set.
        trained: The training task.
        evaluated: The task of the data set.
        metrics: The names of the metrics.
    """
    head_classes = len(trained.labels)
    set_classes = len(evaluated.labels)
    # merge the side with more classes: the labels of the data set, or the predictions
    merged_labels = labels
    class_by_prediction = None  # None leaves the predictions as they are
    if set_classes > head_classes:
        class_by_label = np.asarray(merged_classes(evaluated, trained))
        merged_labels = class_by_label[labels]
    elif set_classes < head_classes:
        class_by_prediction = merged_classes(trained, evaluated)

    scores: dict[str, float | None] = {}
    for name in metrics:
        scores[name] = score(name, logits, merged_labels, class_by_prediction)
    has_same_classes = head_classes == set_classes
    if has_same_classes:
        scores["loss"] = finite_or_none(mean_loss(logits, labels))
        # a regression has no classes, and its predictions have no temperature
        if head_classes > 0:
            scores["loss_calibrated"] = finite_or_none(calibrated_loss(logits, labels))
    return scores


@dataclass
class SplitEvaluator:
    """Scores splits with a trained classifier. Rows are cut to ``max_length`` tokens.

    Attributes:
        trainer: The trainer with the classifier.
        prefix: The frozen first layers of the classifier, or None.
        tokenizer: The tokenizer.
        task: The training task.
        max_length: The maximum number of tokens of a row.
    """

    trainer: Trainer
    prefix: Prefix | None
    tokenizer: PreTrainedTokenizerBase
    task: RunTask
    max_length: int

    def evaluate(
        self,
        split: TextSplit,
        task: RunTask | None = None,
        recorder: RoutingRecorder | None = None,
    ) -> dict[str, float | None]:
        """Score a split, and record routing if ``recorder`` is given.

        Args:
            split: The rows.
            task: The task of the rows, for an OOD set; None for the training task.
            recorder: The recorder of routing, or None.

        Returns:
            The scores by metric, with losses only if the task has as many classes as the head.
        """
        rows = TokenisedRows(
            split,
            self.tokenizer,
            self.max_length,
            by_length=True,
            labelled=False,
            prefix=self.prefix,
        )
        if task is None:
            evaluated = self.task
            metrics = [self.task.metric]
        else:
            evaluated = task
            metrics = task.ood_metrics
        recording: AbstractContextManager[None] = nullcontext()
        if recorder:
            # the model sees the rows sorted by length, so their classes are put in this order
            classes = split.class_numbers[rows.order]
            recording = recorder.record_set(evaluated.name, classes)
        with recording:
            output = self.trainer.predict(cast(Any, rows), metric_key_prefix="eval")
        logits = extract_logits(output.predictions)
        return score_and_loss(
            logits, rows.labels, trained=self.task, evaluated=evaluated, metrics=metrics
        )


class TextEvaluator(SplitEvaluator):
    """Scores splits with a classifier that was trained before, in batches of ``batch_size`` rows.

    The classifier computes in ``precision`` on an accelerator, and in float32 on a CPU. ``folder``
    is the run's folder.
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
        self._precision = available_precision(precision)
        self._stopwatch = Stopwatch()
        self._collate = padding_collator(tokenizer, self._precision)
        arguments = trainer_arguments(
            folder / "checkpoints", self._precision, per_device_eval_batch_size=batch_size
        )
        trainer = Trainer(
            model=classifier.model,
            args=arguments,
            data_collator=self._collate,
            callbacks=[self._stopwatch],
        )
        super().__init__(
            trainer=trainer,
            prefix=classifier.prefix,
            tokenizer=tokenizer,
            task=task,
            max_length=max_length,
        )

    @property
    def cost(self) -> dict[str, Any]:
        """Return ``cost`` of ``metrics.json``: seconds of all evaluations, and the precision."""
        return {"evaluation_seconds": self._stopwatch.evaluation, "precision": self._precision}

    def first_batch(self, split: TextSplit) -> dict[str, Any]:
        """Return the first few rows of a split as one batch of model inputs."""
        rows = TokenisedRows(
            split, self.tokenizer, self.max_length, by_length=False, labelled=False
        )
        return dict(self._collate(fixed_rows(rows)))


def epoch_arguments(
    folder: Path, precision: str, training: Any, spec: RunSpec, best: str | None, **options: Any
) -> TrainingArguments:
    """Return arguments with which Trainer evaluates and saves a checkpoint after every epoch.

    Args:
        folder: The folder of the checkpoints.
        precision: The precision, such as ``bf16``.
        training: The training settings of the spec.
        spec: The spec of the run, with learning rate and seed.
        best: The metric that chooses the epoch; None keeps the last epoch.
        **options: Other arguments of Trainer.
    """
    # the best epoch has the greatest score; without a metric, Trainer must get None
    greater_is_better = None if best is None else True
    return trainer_arguments(
        folder,
        precision,
        num_train_epochs=training.epochs,
        per_device_train_batch_size=training.batch_size,
        per_device_eval_batch_size=training.eval_batch_size,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        learning_rate=spec.learning_rate,
        lr_scheduler_type="linear",
        # Trainer takes a number below 1 as a share of the steps, which `warmup` is
        warmup_steps=training.warmup,
        weight_decay=training.weight_decay,
        max_grad_norm=0.0,  # no clipping
        seed=derive_seed("dropout", spec.seed),
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=best is not None,
        metric_for_best_model=best,
        greater_is_better=greater_is_better,
        logging_strategy="epoch",
        **options,
    )


def kept_epoch(epochs: list[Epoch], best: str | None) -> Epoch:
    """Return the epoch whose weights are kept.

    That is the first epoch with the highest score in the metric ``best``. If ``best`` is None, it
    is the last epoch.
    """
    if best is None:
        return epochs[-1]
    return max(epochs, key=lambda epoch: epoch[best])


class Patience(TrainerCallback):
    """Stops training after a number of epochs without a new best dev score above 0.

    The authors' code does the same. A resumed run stops at the same epoch, because epochs are
    counted in Trainer's log, which checkpoints contain.

    Args:
        metric: The metric of the dev score.
        epochs: The number of epochs.
    """

    def __init__(self, metric: str, epochs: int) -> None:
        self._metric = f"eval_{metric}"
        self._epochs = epochs

    def is_over(self, log: list[dict[str, float]]) -> bool:
        """Return True if the last ``epochs`` evaluations in a log have no new best score."""
        evaluations = [entry[self._metric] for entry in log if self._metric in entry]
        # the list begins with the score 0 before training, so the index of a score is its epoch
        scores = [0.0, *evaluations]
        best_epoch = scores.index(max(scores))  # the first of equal scores
        epochs_since_best = len(evaluations) - best_epoch
        return epochs_since_best >= self._epochs

    def on_evaluate(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ask Trainer to stop if patience is over."""
        if self.is_over(state.log_history):
            control.should_training_stop = True


class TextTrainer(SplitEvaluator):
    """Trains and evaluates one text classifier according to the spec of a run.

    Each epoch saves a checkpoint below ``folder``. If a run was killed, training resumes from the
    last complete checkpoint, and ends with the same numbers.
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
        # The parent's initialiser is called last, because it gets the trainer. The trainer needs
        # the rows, their order, and `_scores`, which reads attributes that are set here.
        training = spec.training
        self._metric = spec.task.metric
        self._warn = progress.warn
        self._stopwatch = Stopwatch()
        self.probe = Probe()
        self.routing_trace = RoutingTrace()
        self._precision = available_precision(training.precision)
        # the metric that chooses the epoch; None keeps the last epoch
        self._selection_metric: str | None = None
        if training.checkpoint_selection == "best":
            self._selection_metric = self._metric
        self._patience: Patience | None = None
        if training.patience is not None:
            self._patience = Patience(self._metric, training.patience)

        tokenise = partial(
            TokenisedRows,
            tokenizer=tokenizer,
            max_length=training.max_length,
            prefix=classifier.prefix,
        )
        rows = tokenise(train, by_length=False)
        self._dev = tokenise(dev, by_length=True)  # `_scores` needs its labels, too
        collate = padding_collator(tokenizer, self._precision)
        # a checkpoint is resumed only if it was made with the same rows and weights
        self._origin = {
            "training rows": rows.digest,
            "dev rows": self._dev.digest,
            "weights": classifier.weights_id,
        }
        # observe the model before training, on the same rows in every run
        self.probe.observe(classifier.model, collate(fixed_rows(rows)))

        groups_lengths = training.sampling == "group_by_length"
        order = EpochOrder(rows.lengths, training.batch_size, spec.seed, by_length=groups_lengths)
        callbacks: list[TrainerCallback] = [progress, self._stopwatch, self.routing_trace]
        if self._patience is not None:
            callbacks.append(self._patience)
        trainer = RoutedTrainer(
            args=epoch_arguments(
                folder=folder / "checkpoints",
                precision=self._precision,
                training=training,
                spec=spec,
                best=self._selection_metric,
            ),
            order=order,
            trainable=classifier,
            lora=training.lora,
            probe=self.probe,
            train_dataset=rows,
            eval_dataset=self._dev,
            data_collator=collate,
            compute_metrics=self._scores,
            callbacks=callbacks,
        )
        super().__init__(
            trainer=trainer,
            prefix=classifier.prefix,
            tokenizer=tokenizer,
            task=spec.task,
            max_length=training.max_length,
        )

    @property
    def cost(self) -> dict[str, Any]:
        """Return ``cost`` of ``metrics.json``: times of training and evaluation, and precision."""
        return {
            **self._stopwatch.cost(self.trainer.state.global_step),
            "evaluation_seconds": self._stopwatch.evaluation,
            "precision": self._precision,
        }

    def _scores(self, prediction: EvalPrediction) -> dict[str, float]:
        """Return the score and the mean loss on the dev split, for Trainer.

        The labels are taken from the split, because Trainer rounds its labels to float32. The loss
        is computed here, because Trainer gives an incomplete last batch the weight of a full one.
        """
        logits = extract_logits(prediction.predictions)
        labels = self._dev.labels
        return {self._metric: score(self._metric, logits, labels), _LOSS: mean_loss(logits, labels)}

    def train(self) -> tuple[list[Epoch], Epoch]:
        """Train, from the last complete checkpoint if there is one.

        Returns:
            All epochs with their dev scores, and the epoch whose weights are kept.
        """
        # this also restores the trainer's state, whose log is read below
        checkpoint = resume(self.trainer, self._origin, self._warn)
        if self._patience and self._patience.is_over(self.trainer.state.log_history):
            # training had already stopped early when the run was killed
            self.trainer._load_best_model()  # as Trainer does at the end of training
        else:
            self.trainer.train(resume_from_checkpoint=checkpoint)

        epochs: list[Epoch] = []
        for entry in self.trainer.state.log_history:
            # skip entries with the training loss
            if f"eval_{_LOSS}" not in entry:
                continue
            epochs.append(
                {
                    "epoch": entry["epoch"],
                    self._metric: entry[f"eval_{self._metric}"],
                    "loss": finite_or_none(entry[f"eval_{_LOSS}"]),
                }
            )
        return epochs, kept_epoch(epochs, best=self._selection_metric)
