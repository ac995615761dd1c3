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
from benchmarks.text.data import TextSplit, load_part
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
        The content of ``metrics.json`` without the harness's part.
    """
    load = partial(load_part, entries=load_benchmark(spec.benchmark).tasks, say=progress.say)
    splits = {task.name: _splits(task, spec.training, load) for task in spec.task.tasks}
    ood = {other.name: load(other, "test", spec.training.eval_rows) for other in spec.ood}

    tokenizer = load_tokenizer(spec.model)
    trainable = build_seq2seq(spec)
    trainer = MultitaskTrainer(trainable, tokenizer, spec, splits, folder, progress)
    epochs, kept = trainer.fit()
    progress.say("evaluating")
    tested, routing = evaluate_with_routing(trainable.model, partial(trainer.score_tasks, "test"))
    return {
        "scores": {
            "dev": trainer.score_tasks("dev"),
            "test": tested,
            "ood": {other.name: trainer.score(ood[other.name], other) for other in spec.ood},
        },
        "dev_curve": epochs,
        "kept_epoch": kept["epoch"],
        "routing": routing,
        "probe": trainer.probe.summary(),
        "model": trainable.summary,
        "cost": trainer.cost,
        "data": {
            f"{part}:{name}": split.summary()
            for name, parts in splits.items()
            for part, split in parts.items()
        }
        | {f"ood:{name}": split.summary() for name, split in ood.items()},
    }


def _splits(
    task: LearnedTask, training: MultitaskTraining, load: Callable[..., TextSplit]
) -> dict[str, TextSplit]:
    """Load the splits of a task: train, dev (for selection) and test (reported).

    A task without a test split reports the dev split, and selects with held-out training rows.
    """
    train, test = load(task, "train", None), load(task, "test", training.eval_rows)
    if task.splits.test:
        dev = load(task, "dev", training.dev_rows)
    else:
        train, dev = train.hold_out(training.validation_fraction, f"{task.name}/held out")
        dev = dev.sample(training.dev_rows, f"{task.name}/held out rows")
    return {"train": train, "dev": dev, "test": test}


def as_text(split: TextSplit, task: LearnedTask) -> TextSplit:
    """Format rows of a task, or of its OOD set, for T5: ``mnli premise: He ran. hypothesis: …``"""
    rows = [
        [f"{field}: {text}" for field, text in zip(task.fields, texts, strict=True)]
        for texts in split.texts
    ]
    return replace(split, texts=[(" ".join([task.prefix, *row]),) for row in rows])


def tokenise_answers(tokenizer: PreTrainedTokenizerBase, task: LearnedTask) -> Answers:
    """Tokenise the class names of a task, each with the end token; raise :class:`DataError` if two are equal."""
    end = cast(int, tokenizer.eos_token_id)
    answers = [
        [*tokenizer(name, add_special_tokens=False)["input_ids"], end] for name in task.labels
    ]
    if len(set(map(tuple, answers))) < len(answers):
        raise DataError(
            f"task '{task.name}': the tokenizer writes two of its classes {', '.join(task.labels)} alike"
        )
    return answers


class LearnedRows(TokenisedRows):
    """Hold a task's rows, with the tokens of their answers as labels."""

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
        return {**row, "labels": self._answers[row["labels"]]}


class MixedOrder(EpochOrder):
    """Order the concatenated rows of several tasks; the order depends only on seed and epoch.

    An epoch has at most ``most`` rows of a task, so tasks are mixed in proportion to their size up to a limit. A larger
    task uses all its rows, shuffled, before it repeats one. The rows of an epoch are shuffled together. ``tasks`` has
    the number of tokens of each row, by task; the other arguments are those of :class:`EpochOrder`.
    """

    def __init__(
        self,
        tasks: Mapping[str, list[int]],
        most: int | None,
        batch_size: int,
        seed: int,
        *,
        by_length: bool,
    ) -> None:
        super().__init__([], batch_size, seed, by_length=by_length)
        self._tasks = tasks
        self._shares = {
            name: min(len(lengths), most or len(lengths)) for name, lengths in tasks.items()
        }

    def __len__(self) -> int:
        return sum(self._shares.values())

    def __iter__(self) -> Iterator[int]:
        rows: list[int] = []
        self._lengths = []
        start = 0
        for name, lengths in self._tasks.items():
            chosen = self._rows_of_epoch(name)
            rows += [start + row for row in chosen]
            self._lengths += [lengths[row] for row in chosen]
            start += len(lengths)
        return (rows[index] for index in super().__iter__())

    def _rows_of_epoch(self, name: str) -> list[int]:
        """Return a task's rows of this epoch. Epochs continue passes over all rows; each pass is reshuffled."""
        rows, share = len(self._tasks[name]), self._shares[name]
        first, start = divmod(self._epoch * share, rows)
        shuffled: list[int] = []
        for number in (first, first + 1):  # an epoch spans at most two passes
            generator = torch.Generator().manual_seed(
                derive_seed("rows of", name, self._seed, number)
            )
            shuffled += torch.randperm(rows, generator=generator).tolist()
        return shuffled[start : start + share]


@torch.no_grad()
def log_likelihoods(
    model: PreTrainedModel, batch: Mapping[str, Tensor], answers: Answers
) -> Tensor:
    """Compute the log-likelihood of each answer, given the row, ``[rows, answers]``; rows are encoded once.

    ``batch`` has ``input_ids`` and ``attention_mask``, on the model's device.
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
    losses = F.cross_entropy(
        logits.flatten(0, 1).float(), labels.flatten(), ignore_index=_IGNORED, reduction="none"
    )
    return -losses.view(rows, count, longest).sum(-1)


class MultitaskTrainer(RoutedTrainer):
    """Train one model on several tasks according to a run's spec, and score it.

    ``splits`` are the train, dev and test splits of each task. Each epoch saves a checkpoint below ``folder``. A killed
    run resumes from the last complete one, with the same final numbers.
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
        training, self._tokenizer, self._splits = spec.training, tokenizer, splits
        self._max_length, self._eval_batch_size = training.max_length, training.eval_batch_size
        self._tasks = {task.name: task for task in spec.task.tasks}
        self._answers = {
            name: tokenise_answers(tokenizer, task) for name, task in self._tasks.items()
        }
        self._network = cast(PreTrainedModel, trainable.model)
        self._stopwatch, self.probe = Stopwatch(), Probe()
        self._say = progress.say
        self._precision = available_precision(training.precision)
        self._best = _MEAN if training.checkpoint_selection == "best" else None
        learned = {
            name: LearnedRows(
                as_text(splits[name]["train"], task),
                tokenizer,
                self._max_length,
                self._answers[name],
            )
            for name, task in self._tasks.items()
        }
        lengths, by_length = (
            {name: rows.lengths for name, rows in learned.items()},
            training.sampling != "random",
        )
        rows: ConcatDataset[dict[str, Any]] = ConcatDataset(learned.values())
        collate = DataCollatorForSeq2Seq(tokenizer, model=self._network)
        self.probe.observe(self._network, collate(fixed_rows(rows)))
        super().__init__(
            args=epoch_arguments(
                folder / "checkpoints", self._precision, training, spec, self._best
            ),
            order=MixedOrder(
                lengths,
                training.rows_per_epoch,
                training.batch_size,
                spec.seed,
                by_length=by_length,
            ),
            trainable=trainable,
            probe=self.probe,
            train_dataset=rows,
            eval_dataset=rows,  # Trainer requires one; scores use the dev rows
            data_collator=collate,
            callbacks=[progress, self._stopwatch],
        )

    @property
    def cost(self) -> dict[str, Any]:
        """Return the cost of training and all evaluations so far, for ``metrics.json``."""
        cost, evaluation = self._stopwatch.cost(self.state.global_step), self._stopwatch.evaluation
        return {**cost, "evaluation_seconds": evaluation, "precision": self._precision}

    def fit(self) -> tuple[list[Epoch], Epoch]:
        """Train from the last complete checkpoint, if any; return all epochs and the kept one."""
        self.train(resume_from_checkpoint=resume(self, self._say))
        epochs: list[Epoch] = [
            {
                "epoch": entry["epoch"],
                **{name: entry[f"eval_{name}"] for name in (_MEAN, *self._tasks)},
            }
            for entry in self.state.log_history
            if f"eval_{_MEAN}" in entry
        ]
        return epochs, kept_epoch(epochs, self._best)

    def evaluate(self, *_args: Any, **_kwargs: Any) -> dict[str, float]:
        """Return the dev scores of all tasks and their mean, which selects the epoch; log them."""
        by_task = self.score_tasks("dev")
        scores = {
            name: cast(float, by_task[name][task.metric]) for name, task in self._tasks.items()
        }
        scores[_MEAN] = sum(scores.values()) / len(scores)
        metrics = {f"eval_{name}": value for name, value in scores.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def score_tasks(self, part: str) -> dict[str, dict[str, float | None]]:
        """Score the ``dev`` or ``test`` split of every learned task, by task and metric."""
        return {
            name: self.score(self._splits[name][part], task) for name, task in self._tasks.items()
        }

    def score(self, split: TextSplit, task: LearnedTask | OtherTask) -> dict[str, float | None]:
        """Score a split of a task or an OOD set by its most likely answers; restore RNG state and train/eval mode."""
        start = time.perf_counter()
        name, metrics = (
            (task.read_as, task.ood_metrics)
            if isinstance(task, OtherTask)
            else (task.name, [task.metric])
        )
        learned = self._tasks[name]
        rows = TokenisedRows(
            as_text(split, learned),
            self._tokenizer,
            self._max_length,
            by_length=True,
            labelled=False,
        )
        collate, likelihoods = DataCollatorWithPadding(self._tokenizer), []
        with restore_rng_and_modes(self._network), self.compute_loss_context_manager():
            self._network.eval()
            for batch in batches(rows, collate, self._eval_batch_size):
                inputs = {key: tensor.to(self._network.device) for key, tensor in batch.items()}
                likelihoods.append(
                    log_likelihoods(self._network, inputs, self._answers[name]).cpu().numpy()
                )
        scores = score_and_loss(np.concatenate(likelihoods), rows.labels, learned, task, metrics)
        self._stopwatch.evaluation += time.perf_counter() - start
        return scores
