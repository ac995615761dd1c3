"""Train an encoder-decoder on several tasks at once, and score its most likely answers."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import ConcatDataset
from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding, PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.harness.models.build import Trainable
from benchmarks.harness.training.callbacks import Probe, Stopwatch, UpdateGates, fixed_rows, restore_rng_and_modes
from benchmarks.harness.training.checkpoints import resume
from benchmarks.harness.training.progress import Progress
from benchmarks.harness.training.trainer import RoutedTrainer, available_precision
from benchmarks.multitask.definition import LearnedTask, MultitaskSpec, OtherTask
from benchmarks.multitask.rows import LearnedRows, MixedOrder, answers, as_text
from benchmarks.text.data import TextSplit
from benchmarks.text.tokenization import TokenisedRows, batches
from benchmarks.text.training import Epoch, epoch_arguments, kept_epoch, score_and_loss

_MEAN = "mean_score"  # mean of the tasks' dev scores
_IGNORED = -100


@torch.no_grad()
def log_likelihoods(model: PreTrainedModel, batch: dict[str, Tensor], answers: Sequence[Sequence[int]]) -> Tensor:
    """Compute the log-likelihood of each answer with its end token, given the row; rows are encoded once.

    Args:
        model: The encoder-decoder.
        batch: The ``input_ids`` and ``attention_mask``, on the model's device.
        answers: The token ids of each answer, with the token that ends it.

    Returns:
        ``[rows, answers]``, float32.
    """
    count, longest = len(answers), max(map(len, answers))
    padded = [[*answer, *[_IGNORED] * (longest - len(answer))] for answer in answers]
    rows = len(batch["input_ids"])
    labels = torch.tensor(padded, device=batch["input_ids"].device).repeat(rows, 1)
    states = cast(Any, model).get_encoder()(**batch).last_hidden_state.repeat_interleave(count, 0)
    logits = model(
        encoder_outputs=(states,),
        attention_mask=batch["attention_mask"].repeat_interleave(count, 0),
        decoder_input_ids=cast(Any, model).prepare_decoder_input_ids_from_labels(labels),
    ).logits
    losses = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=_IGNORED, reduction="none")
    return -losses.view(rows, count, longest).sum(-1)


class MultitaskTrainer(RoutedTrainer):
    """Train one model according to a run's spec, and evaluate it on all tasks.

    Each epoch saves a checkpoint below ``folder``. A killed run resumes from the last complete one, with the same final
    numbers.

    Args:
        trainable: The model.
        tokenizer: The tokenizer of the model.
        spec: The spec of the run.
        train: The training rows by task.
        dev: The dev rows by task.
        folder: The folder of the run.
        progress: The log.
    """

    def __init__(
        self,
        trainable: Trainable,
        tokenizer: PreTrainedTokenizerBase,
        spec: MultitaskSpec,
        train: Mapping[str, TextSplit],
        dev: Mapping[str, TextSplit],
        folder: Path,
        progress: Progress,
    ) -> None:
        self._tokenizer, self._training, self._dev = tokenizer, spec.training, dev
        self._tasks = {task.name: task for task in spec.task.tasks}
        self._answers = {name: answers(tokenizer, task) for name, task in self._tasks.items()}
        self._network = cast(PreTrainedModel, trainable.model)
        self._checkpoints = folder / "checkpoints"
        self._stopwatch, self.probe = Stopwatch(), Probe()
        self._precision = available_precision(self._training.precision)
        self._best = _MEAN if self._training.checkpoint_selection == "best" else None
        tasks = [LearnedRows(self._rows(train[name], task), self._answers[name]) for name, task in self._tasks.items()]
        rows: ConcatDataset[dict[str, Any]] = ConcatDataset(tasks)
        collate = DataCollatorForSeq2Seq(tokenizer, model=self._network)
        self.probe.observe(self._network, collate(fixed_rows(rows)))
        super().__init__(
            args=epoch_arguments(
                self._checkpoints, self._precision, self._training, spec, self._best, remove_unused_columns=False
            ),
            order=MixedOrder(
                {name: task.lengths for name, task in zip(self._tasks, tasks, strict=True)},
                self._training.rows_per_epoch,
                self._training.batch_size,
                spec.seed,
                by_length=self._training.sampling == "group_by_length",
            ),
            trainable=trainable,
            probe=self.probe,
            train_dataset=rows,
            eval_dataset=rows,  # Trainer requires one; scores use the dev rows
            data_collator=collate,
            callbacks=[progress, self._stopwatch, UpdateGates()],
        )

    @property
    def cost(self) -> dict[str, Any]:
        """Return the cost of training and all evaluations so far, for ``metrics.json``."""
        cost, evaluation = self._stopwatch.cost(self.state.global_step), self._stopwatch.evaluation
        return {**cost, "evaluation_seconds": evaluation, "precision": self._precision}

    def fit(self) -> tuple[list[Epoch], Epoch]:
        """Train from the last complete checkpoint, if any.

        Returns:
            All epochs, and the one whose weights are kept.
        """
        self.train(resume_from_checkpoint=resume(self._checkpoints, self._stopwatch, self.probe))
        epochs: list[Epoch] = [
            {"epoch": entry["epoch"], **{name: entry[f"eval_{name}"] for name in (_MEAN, *self._tasks)}}
            for entry in self.state.log_history
            if f"eval_{_MEAN}" in entry
        ]
        return epochs, kept_epoch(epochs, self._best)

    def evaluate(self, *_args: Any, metric_key_prefix: str = "eval", **_kwargs: Any) -> dict[str, float]:
        """Return the dev scores of all tasks and their mean, which selects the epoch; log them."""
        scores = {name: cast(float, scored[self._tasks[name].metric]) for name, scored in self.dev_scores().items()}
        scores = {_MEAN: sum(scores.values()) / len(scores), **scores}
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in scores.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def dev_scores(self) -> dict[str, dict[str, float | None]]:
        """Return the dev scores of every task by metric."""
        return {name: self.score(self._dev[name], task) for name, task in self._tasks.items()}

    def score(self, split: TextSplit, task: LearnedTask | OtherTask) -> dict[str, float | None]:
        """Score a split of a task or an OOD set; ``loss`` only if the set has the task's classes."""
        start = time.perf_counter()
        learned = self._tasks[task.read_as if isinstance(task, OtherTask) else task.name]
        rows = self._rows(split, learned, labelled=False)
        metrics = task.ood_metrics if isinstance(task, OtherTask) else [task.metric]
        scores = score_and_loss(
            self._score_answers(rows, self._answers[learned.name]), rows.labels, learned, task, metrics
        )
        self._stopwatch.evaluation += time.perf_counter() - start
        return scores

    def _score_answers(self, rows: TokenisedRows, answers: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """Compute the log-likelihood of every answer, ``[rows, answers]``; restore RNG state and train/eval mode."""
        collate, ranked = DataCollatorWithPadding(self._tokenizer), []
        with restore_rng_and_modes(self._network), self.compute_loss_context_manager():
            self._network.eval()
            for batch in batches(rows, collate, self._training.eval_batch_size):
                inputs = {name: tensor.to(self._network.device) for name, tensor in batch.items()}
                ranked.append(log_likelihoods(self._network, inputs, answers).cpu().numpy())
        return np.concatenate(ranked)

    def _rows(self, split: TextSplit, task: LearnedTask, *, labelled: bool = True) -> TokenisedRows:
        return TokenisedRows(
            as_text(split, task), self._tokenizer, self._training.max_length, by_length=not labelled, labelled=labelled
        )
