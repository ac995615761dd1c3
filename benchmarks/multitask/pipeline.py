"""Train an encoder-decoder on several tasks at once, and evaluate it on them and on OOD sets."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import ConcatDataset
from transformers import (
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from benchmarks.harness.base import DataError, derive_seed
from benchmarks.harness.config.benchmark import load_benchmark
from benchmarks.harness.models.build import build_seq2seq
from benchmarks.harness.models.loading import load_tokenizer
from benchmarks.harness.models.trainable import Trainable
from benchmarks.harness.training.callbacks import (
    Probe,
    Stopwatch,
    fixed_rows,
    restore_rng_and_modes,
)
from benchmarks.harness.training.checkpoints import resume
from benchmarks.harness.training.progress import Progress
from benchmarks.harness.training.routing import evaluate_with_routing
from benchmarks.harness.training.samplers import EpochOrder
from benchmarks.harness.training.trainer import RoutedTrainer, available_precision
from benchmarks.multitask.definition import LearnedTask, MultitaskSpec, MultitaskTraining, OtherTask
from benchmarks.text.data import TextSplit, load_part, load_splits, summarise_splits
from benchmarks.text.tokenization import TokenisedRows, batches
from benchmarks.text.training import Epoch, epoch_arguments, kept_epoch, score_and_loss

_MEAN = "mean_score"  # mean of the tasks' dev scores
_IGNORED = -100
Answers = list[list[int]]  # tokens of each class name of a task, with the end token


def run(spec: MultitaskSpec, folder: Path, progress: Progress) -> dict[str, Any]:
    """Train and evaluate the model of one spec.

    Args:
        spec: The settings of the run.
        folder: The folder of the run, for checkpoints.
        progress: The progress line.

    Returns:
        The content of ``metrics.json``, without the sections that the harness adds.

    Raises:
        DataError: Data or the model are missing, or two classes of a task have the same tokens.
    """
    task_entries = load_benchmark(spec.benchmark).tasks
    load = partial(load_part, entries=task_entries, warn=progress.warn)
    splits = {}
    for task in spec.task.tasks:
        splits[task.name] = _load_splits_of_task(task, spec.training, load)
    ood = {}
    for other in spec.ood:
        ood[other.name] = load(other, "test", spec.training.eval_rows)

    tokenizer = load_tokenizer(spec.model)
    trainable = build_seq2seq(spec)
    trainer = MultitaskTrainer(
        trainable=trainable,
        tokenizer=tokenizer,
        spec=spec,
        splits=splits,
        folder=folder,
        progress=progress,
    )
    epochs, kept = trainer.fit()
    progress.say("evaluating")
    test_scores, routing = evaluate_with_routing(
        trainable.model, partial(trainer.score_tasks, "test")
    )
    # all sets are scored before `trainer.cost` is read, because the cost includes evaluations
    scores = {
        "dev": trainer.score_tasks("dev"),
        "test": test_scores,
        "ood": {other.name: trainer.score(ood[other.name], other) for other in spec.ood},
    }
    return {
        "scores": scores,
        "dev_curve": epochs,
        "kept_epoch": kept["epoch"],
        "routing": routing,
        "probe": trainer.probe.summary(),
        "model": trainable.summary,
        "cost": trainer.cost,
        "data": _summarise_data(splits, ood),
    }


def _load_splits_of_task(
    task: LearnedTask, training: MultitaskTraining, load: Callable[..., TextSplit]
) -> dict[str, TextSplit]:
    """Load the splits of a task: ``train``, ``dev`` (selects epoch and settings) and ``test``.

    Args:
        task: The task.
        training: The training settings of the run, with the limits of the splits.
        load: The function that loads one part of a data set.
    """
    splits = load_splits(
        task,
        load,
        held_out_share=training.validation_fraction,
        dev_rows=training.dev_rows,
        test_rows=training.eval_rows,
    )
    return splits._asdict()


def _summarise_data(
    splits: Mapping[str, Mapping[str, TextSplit]], ood: Mapping[str, TextSplit]
) -> dict[str, Any]:
    """Summarise all data for ``metrics.json``, by names such as ``train:mnli`` and ``ood:hans``."""
    splits_by_name = {}
    for name, parts in splits.items():
        for part, split in parts.items():
            splits_by_name[f"{part}:{name}"] = split
    return summarise_splits(splits_by_name, ood)


def as_text(split: TextSplit, task: LearnedTask) -> TextSplit:
    """Format the rows of a task, or of an OOD set of the task, as texts for T5.

    A text has the task's prefix and the named fields: ``mnli premise: He ran. hypothesis: …``
    """
    rows_of_one_text: list[tuple[str, ...]] = []
    for row in split.texts:
        words = [task.prefix]
        for field, text in zip(task.fields, row, strict=True):
            words.append(f"{field}: {text}")
        formatted = " ".join(words)
        rows_of_one_text.append((formatted,))
    return replace(split, texts=rows_of_one_text)


def tokenise_answers(tokenizer: PreTrainedTokenizerBase, task: LearnedTask) -> Answers:
    """Tokenise the class names of a task, each with the end token.

    Raises:
        DataError: Two classes have the same tokens.
    """
    end = cast(int, tokenizer.eos_token_id)
    answers = []
    for name in task.labels:
        tokens = tokenizer(name, add_special_tokens=False)["input_ids"]
        answers.append([*tokens, end])
    distinct = {tuple(answer) for answer in answers}
    if len(distinct) < len(answers):
        raise DataError(
            f"task '{task.name}': the tokenizer writes two of its classes "
            f"{', '.join(task.labels)} alike"
        )
    return answers


class LearnedRows(TokenisedRows):
    """The rows of a task, with the tokens of their answers as labels."""

    def __init__(
        self,
        split: TextSplit,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        answers: Answers,
    ) -> None:
        super().__init__(split, tokenizer, max_length, by_length=False)
        self._answers = answers

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = super().__getitem__(index)
        answer = self._answers[row["labels"]]
        return {**row, "labels": answer}


class MixedOrder(EpochOrder):
    """The order of the concatenated rows of several tasks, which depends only on seed and epoch.

    An epoch has at most ``max_rows`` rows of a task. The next epoch continues with the rows of the
    task that were not used yet. The rows of all tasks in an epoch are shuffled together.

    Args:
        lengths_by_task: The number of tokens of each row, by task.
        max_rows: The maximum number of rows of a task in an epoch; None for all rows.
        batch_size: The number of rows of a batch.
        seed: The seed of the run.
        by_length: True to batch rows of similar length.
    """

    def __init__(
        self,
        lengths_by_task: Mapping[str, list[int]],
        max_rows: int | None,
        batch_size: int,
        seed: int,
        *,
        by_length: bool,
    ) -> None:
        # The parent gets no lengths of rows, because each epoch has other rows. `__iter__` collects
        # the lengths of its epoch.
        super().__init__([], batch_size, seed, by_length=by_length)
        self._lengths_by_task = lengths_by_task
        self._rows_per_epoch = {}
        for name, lengths in lengths_by_task.items():
            rows_per_epoch = len(lengths)
            if max_rows is not None:
                rows_per_epoch = min(rows_per_epoch, max_rows)
            self._rows_per_epoch[name] = rows_per_epoch

    def __len__(self) -> int:
        return sum(self._rows_per_epoch.values())

    def __iter__(self) -> Iterator[int]:
        # the rows of this epoch, by index in the concatenated tasks, and their numbers of tokens
        rows: list[int] = []
        lengths_of_rows: list[int] = []
        first_row = 0  # the index of the task's first row
        for name, lengths in self._lengths_by_task.items():
            for row in self._rows_of_epoch(name):
                rows.append(first_row + row)
                lengths_of_rows.append(lengths[row])
            first_row += len(lengths)
        order = self._random_order(lengths_of_rows)  # indices of the list `rows`
        return iter([rows[index] for index in order])

    def _rows_of_epoch(self, name: str) -> list[int]:
        """Return the rows of a task in this epoch.

        The task's rows form an endless sequence of passes. Each pass has all rows once, in a new
        random order. An epoch takes the next rows of this sequence.
        """
        num_rows = len(self._lengths_by_task[name])
        rows_per_epoch = self._rows_per_epoch[name]
        # the earlier epochs used `first_pass` complete passes, and `start` rows of the next pass
        first_pass, start = divmod(self._epoch * rows_per_epoch, num_rows)
        # an epoch spans at most two passes
        sequence: list[int] = []
        for number in (first_pass, first_pass + 1):
            seed = derive_seed("rows of", name, self._seed, number)
            generator = torch.Generator().manual_seed(seed)
            sequence.extend(torch.randperm(num_rows, generator=generator).tolist())
        return sequence[start : start + rows_per_epoch]


@torch.no_grad()
def log_likelihoods(
    model: PreTrainedModel, batch: Mapping[str, Tensor], answers: Answers
) -> Tensor:
    """Compute the log-likelihood of every answer for every row.

    The encoder reads each row only once. The decoder then reads every pair of a row and an answer.

    Args:
        model: The encoder-decoder.
        batch: The ``input_ids`` and the ``attention_mask`` of the rows, on the model's device.
        answers: The tokens of each answer.

    Returns:
        The log-likelihoods ``[rows, answers]``.
    """
    encoder_decoder = cast(Any, model)
    num_rows = len(batch["input_ids"])
    num_answers = len(answers)
    longest = max(len(answer) for answer in answers)
    # pad shorter answers with labels that add nothing to the loss
    padded = []
    for answer in answers:
        padding = [_IGNORED] * (longest - len(answer))
        padded.append([*answer, *padding])
    answer_labels = torch.tensor(padded, device=batch["input_ids"].device)  # [answers, longest]
    encoder = encoder_decoder.get_encoder()
    encoded = encoder(**batch).last_hidden_state  # [rows, tokens, width]

    # The pairs are all answers of the first row, then all answers of the second row, and so on. So
    # the answers are repeated as a whole, and each encoded row is repeated in its place.
    labels = answer_labels.repeat(num_rows, 1)  # [pairs, longest]
    encoded_of_pairs = encoded.repeat_interleave(num_answers, 0)
    mask_of_pairs = batch["attention_mask"].repeat_interleave(num_answers, 0)
    logits = encoder_decoder(
        encoder_outputs=(encoded_of_pairs,),
        attention_mask=mask_of_pairs,
        decoder_input_ids=encoder_decoder.prepare_decoder_input_ids_from_labels(labels),
    ).logits  # [pairs, longest, vocabulary]

    # the loss of a token is its negative log-likelihood
    token_losses = F.cross_entropy(
        logits.flatten(0, 1).float(), labels.flatten(), ignore_index=_IGNORED, reduction="none"
    )
    answer_losses = token_losses.view(num_rows, num_answers, longest).sum(-1)
    return -answer_losses


class MultitaskTrainer(RoutedTrainer):
    """A trainer of one model on several tasks, which also scores the model.

    Each epoch saves a checkpoint. A killed run resumes from the last complete one, with the same
    final numbers.

    Args:
        trainable: The model.
        tokenizer: The tokenizer of the model.
        spec: The settings of the run.
        splits: The train, dev and test splits of each task.
        folder: The folder of the run, for checkpoints.
        progress: The progress line.

    Attributes:
        probe: The recorder of the first losses, and of the logits and expert loads of a fixed
            batch.
    """

    def __init__(
        self,
        trainable: Trainable,
        tokenizer: PreTrainedTokenizerBase,
        spec: MultitaskSpec,
        splits: Mapping[str, Mapping[str, TextSplit]],
        folder: Path,
        progress: Progress,
    ) -> None:
        # Trainer's initialiser is called last, because it needs model, rows and their order
        training = spec.training
        self._tokenizer = tokenizer
        self._splits = splits
        self._max_length = training.max_length
        self._eval_batch_size = training.eval_batch_size
        self._tasks = {task.name: task for task in spec.task.tasks}
        self._answers = {
            name: tokenise_answers(tokenizer, task) for name, task in self._tasks.items()
        }
        network = cast(PreTrainedModel, trainable.model)
        self._stopwatch = Stopwatch()
        probe = Probe()
        self._warn = progress.warn
        self._precision = available_precision(training.precision)
        # the metric that chooses the epoch; None keeps the last epoch
        self._selection_metric: str | None = None
        if training.checkpoint_selection == "best":
            self._selection_metric = _MEAN

        learned_rows = self._learned_rows()
        lengths = {name: task_rows.lengths for name, task_rows in learned_rows.items()}
        # the tasks are concatenated in the order in which MixedOrder counts their rows
        rows: ConcatDataset[dict[str, Any]] = ConcatDataset(learned_rows.values())
        self._origin = self._find_origin(trainable, learned_rows)
        collate = DataCollatorForSeq2Seq(tokenizer, model=network)
        # observe the model before training, on the same rows in every run
        probe.observe(network, collate(fixed_rows(rows)))
        super().__init__(
            args=epoch_arguments(
                folder=folder / "checkpoints",
                precision=self._precision,
                training=training,
                spec=spec,
                best=self._selection_metric,
            ),
            order=MixedOrder(
                lengths_by_task=lengths,
                max_rows=training.rows_per_epoch,
                batch_size=training.batch_size,
                seed=spec.seed,
                by_length=training.sampling != "random",
            ),
            trainable=trainable,
            probe=probe,
            train_dataset=rows,
            eval_dataset=rows,  # Trainer requires one; scores use the dev rows
            data_collator=collate,
            callbacks=[progress, self._stopwatch],
        )

    def _find_origin(
        self, trainable: Trainable, learned_rows: Mapping[str, LearnedRows]
    ) -> dict[str, str]:
        """Return the digests of the weights and rows that determine the checkpoints of this run.

        A checkpoint of other weights or rows is not resumed.

        Args:
            trainable: The model.
            learned_rows: The training rows of each task.
        """
        origin = {"weights": trainable.weights_id}
        for name, task_rows in learned_rows.items():
            origin[f"training rows of {name}"] = task_rows.digest
            # their scores select the epoch
            origin[f"dev rows of {name}"] = self._splits[name]["dev"].digest
        return origin

    def _learned_rows(self) -> dict[str, LearnedRows]:
        """Format and tokenise the training rows of each task."""
        learned_rows = {}
        for name, task in self._tasks.items():
            texts = as_text(self._splits[name]["train"], task)
            learned_rows[name] = LearnedRows(
                texts, self._tokenizer, self._max_length, self._answers[name]
            )
        return learned_rows

    @property
    def cost(self) -> dict[str, Any]:
        """Return the cost of training and all evaluations so far, for ``metrics.json``."""
        return {
            **self._stopwatch.cost(self.state.global_step),
            "evaluation_seconds": self._stopwatch.evaluation,
            "precision": self._precision,
        }

    def fit(self) -> tuple[list[Epoch], Epoch]:
        """Train, from the last complete checkpoint if there is one.

        Returns:
            All epochs (the number, the dev score of each task, and ``mean_score``), and the epoch
            whose weights are kept.
        """
        checkpoint = resume(self, self._origin, self._warn)
        self.train(resume_from_checkpoint=checkpoint)
        epochs: list[Epoch] = []
        for entry in self.state.log_history:
            # Trainer also logs other entries, such as the losses of training steps
            if f"eval_{_MEAN}" not in entry:
                continue
            scores = {name: entry[f"eval_{name}"] for name in (_MEAN, *self._tasks)}
            epochs.append({"epoch": entry["epoch"], **scores})
        return epochs, kept_epoch(epochs, best=self._selection_metric)

    def evaluate(self, *_args: Any, **_kwargs: Any) -> dict[str, float]:
        """Log and return the dev scores of all tasks and their mean, which selects the epoch.

        Trainer calls this after each epoch.
        """
        all_scores = self.score_tasks("dev")
        scores = {}
        for name, task in self._tasks.items():
            scores[name] = cast(float, all_scores[name][task.metric])
        mean = sum(scores.values()) / len(scores)
        metrics = {f"eval_{name}": value for name, value in scores.items()}
        metrics[f"eval_{_MEAN}"] = mean
        self.log(metrics)
        # Trainer's own method also calls the callbacks at its end
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def score_tasks(self, part: str) -> dict[str, dict[str, float | None]]:
        """Score the ``dev`` or ``test`` split of every learned task, by task and metric."""
        scores = {}
        for name, task in self._tasks.items():
            split = self._splits[name][part]
            scores[name] = self.score(split, task)
        return scores

    def score(self, split: TextSplit, task: LearnedTask | OtherTask) -> dict[str, float | None]:
        """Score a split of a learned task, or an OOD set.

        The prediction for a row is its most likely answer. The time is added to the seconds of
        evaluation in :attr:`cost`.

        Args:
            split: The rows.
            task: The learned task or the OOD set that the rows belong to.

        Returns:
            The scores by metric, and losses if the rows have as many classes as the learned task.
        """
        start = time.perf_counter()
        # the rows of an OOD set get the prefix, field names and answers of a learned task
        if isinstance(task, OtherTask):
            learned_task = self._tasks[task.read_as]
            metrics = task.ood_metrics
        else:
            learned_task = task
            metrics = [task.metric]
        rows = TokenisedRows(
            as_text(split, learned_task),
            self._tokenizer,
            self._max_length,
            by_length=True,
            labelled=False,
        )
        answers = self._answers[learned_task.name]
        likelihoods = self._answer_likelihoods(rows, answers)  # [rows, answers]
        scores = score_and_loss(
            likelihoods, rows.labels, trained=learned_task, evaluated=task, metrics=metrics
        )
        self._stopwatch.evaluation += time.perf_counter() - start
        return scores

    def _answer_likelihoods(self, rows: TokenisedRows, answers: Answers) -> NDArray[np.float32]:
        """Compute :func:`log_likelihoods` for all rows, in batches: ``[rows, answers]``.

        RNG state and train/eval mode are restored afterwards, so that training is not disturbed.
        """
        collate = DataCollatorWithPadding(self._tokenizer)
        network = cast(PreTrainedModel, self.model)
        likelihoods = []
        # accelerate wraps only the model's `forward` in autocast, and the encoder is called alone
        with restore_rng_and_modes(network), self.accelerator.autocast():
            network.eval()
            for batch in batches(rows, collate, self._eval_batch_size):
                inputs = {key: tensor.to(network.device) for key, tensor in batch.items()}
                predicted = log_likelihoods(network, inputs, answers)
                likelihoods.append(predicted.cpu().numpy())
        return np.concatenate(likelihoods)
