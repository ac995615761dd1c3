"""Train an encoder-decoder on several tasks at once, epoch by epoch, and score it by what it finds most likely."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from torch.utils.data import ConcatDataset
from transformers import DataCollatorForSeq2Seq, PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.harness.models.build import Trainable
from benchmarks.harness.training.callbacks import Probe, RetieGates, Stopwatch, fixed_rows
from benchmarks.harness.training.checkpoints import resume
from benchmarks.harness.training.label_mapping import label_mapping
from benchmarks.harness.training.metrics import mean_loss, score
from benchmarks.harness.training.progress import Progress
from benchmarks.harness.training.trainer import RoutedTrainer, finite, precision_here
from benchmarks.multitask.definition import MultitaskSpec, OtherTask, WrittenTask
from benchmarks.multitask.mixing import MixedOrder
from benchmarks.multitask.ranking import rank
from benchmarks.multitask.rows import LearnedRows, answers, as_text
from benchmarks.text.datasets import TextSplit
from benchmarks.text.tokenization import TokenisedRows
from benchmarks.text.training import Epoch, epoch_arguments

_MEAN = "mean_score"  # over the tasks, on the rows that choose


class _ScoringTrainer(RoutedTrainer):
    """Evaluates by the scores of all tasks, and not by the loss of one set."""

    def __init__(self, scores: Callable[[], dict[str, float]], **kwargs: Any) -> None:
        self._scores = scores
        super().__init__(**kwargs)

    def evaluate(self, *_args: Any, metric_key_prefix: str = "eval", **_kwargs: Any) -> dict[str, float]:
        start = time.perf_counter()
        found = {f"{metric_key_prefix}_{name}": value for name, value in self._scores().items()}
        self.log(found)
        found[f"{metric_key_prefix}_runtime"] = time.perf_counter() - start
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, found)
        return found


class MultitaskTrainer:
    """Trains and evaluates one model as a run's spec says.

    Checkpoints are written every epoch below ``folder``; a run that was killed goes on from the last complete one and ends with the same numbers.

    Args:
        trainable: the model.
        tokenizer: its tokenizer.
        spec: the run's.
        train: rows to learn, by task.
        dev: rows to choose by, by task.
        folder: the run's.
        progress: where to say what is going on.
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
        self._model = cast(PreTrainedModel, trainable.model)
        self._checkpoints = folder / "checkpoints"
        self._stopwatch, self.probe = Stopwatch(), Probe()
        self._evaluation = 0.0
        self._precision = precision_here(self._training.precision)
        learned = [
            LearnedRows(self._rows(train[name], task), self._answers[name]) for name, task in self._tasks.items()
        ]
        rows: ConcatDataset[dict[str, Any]] = ConcatDataset(learned)
        self._collate = DataCollatorForSeq2Seq(tokenizer, model=self._model)
        self.probe.observe(self._model, self._plain_batch(fixed_rows(rows)))
        best = self._training.checkpoint_selection == "best"
        self._trainer = _ScoringTrainer(
            self._mean_and_tasks,
            args=epoch_arguments(
                self._checkpoints,
                self._precision,
                self._training,
                spec,
                _MEAN if best else None,
                remove_unused_columns=False,
            ),
            order=MixedOrder(
                [(name, found.lengths) for name, found in zip(self._tasks, learned, strict=True)],
                self._training.rows_per_epoch,
                self._training.batch_size,
                spec.seed,
                by_length=self._training.sampling == "group_by_length",
            ),
            trainable=trainable,
            probe=self.probe,
            train_dataset=rows,
            eval_dataset=rows,  # Trainer asks for one; the scores are of the rows that choose
            data_collator=self._collate,
            callbacks=[progress, self._stopwatch, RetieGates()],
        )

    @property
    def cost(self) -> dict[str, Any]:
        """What training and all evaluations so far took, for ``cost`` of ``metrics.json``."""
        took, evaluation = self._stopwatch.cost(self._trainer.state.global_step), self._stopwatch.evaluation
        return {**took, "evaluation_seconds": evaluation + self._evaluation, "precision": self._precision}

    def train(self) -> tuple[list[Epoch], Epoch]:
        """Train, from the last complete checkpoint where there is one; returns all epochs, and the one whose weights the model has."""
        self._trainer.train(resume_from_checkpoint=resume(self._checkpoints, self._stopwatch, self.probe))
        state = self._trainer.state
        names = (_MEAN, *self._tasks)
        epochs: list[Epoch] = [
            {"epoch": entry["epoch"], **{name: entry[f"eval_{name}"] for name in names}}
            for entry in state.log_history
            if f"eval_{_MEAN}" in entry
        ]
        best = self._training.checkpoint_selection == "best"
        kept = max(epochs, key=lambda entry: (entry[_MEAN], -entry["epoch"])) if best else epochs[-1]
        return epochs, kept

    def evaluate(self, split: TextSplit, task: WrittenTask | OtherTask) -> dict[str, float | None]:
        """Scores on a split of a task, or of another set as it is read out of domain; and the cross entropy among the answers, where these are its classes."""
        start = time.perf_counter()
        found = self._scored(split, task)
        self._evaluation += time.perf_counter() - start
        return found

    def dev_scores(self) -> dict[str, dict[str, float | None]]:
        """Scores of every task on the rows that choose."""
        return {name: self.evaluate(self._dev[name], task) for name, task in self._tasks.items()}

    def _mean_and_tasks(self) -> dict[str, float]:
        """What an epoch is chosen by, and each task's part in it."""
        scored = {name: self._scored(self._dev[name], task)[task.metric] for name, task in self._tasks.items()}
        found = cast(dict[str, float], scored)
        return {_MEAN: sum(found.values()) / len(found), **found}

    def _scored(self, split: TextSplit, task: WrittenTask | OtherTask) -> dict[str, float | None]:
        learned = self._tasks[task.read_as if isinstance(task, OtherTask) else task.name]
        rows = self._rows(split, learned, labelled=False)
        ranked = rank(
            self._model,
            rows,
            self._tokenizer,
            self._answers[learned.name],
            self._training.eval_batch_size,
            self._precision,
        )
        read = label_mapping(learned, task, task.name)
        metrics = task.ood_metrics if isinstance(task, OtherTask) else [task.metric]
        scores: dict[str, float | None] = {name: score(name, ranked, rows.labels, read) for name in metrics}
        return {**scores, "loss": finite(mean_loss(ranked, rows.labels))} if read.same else scores

    def _plain_batch(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Rows as the model is called with them without labels."""
        return {name: tensor for name, tensor in self._collate(rows).items() if name != "labels"}

    def _rows(self, split: TextSplit, task: WrittenTask, *, labelled: bool = True) -> TokenisedRows:
        return TokenisedRows(
            as_text(split, task), self._tokenizer, self._training.max_length, by_length=not labelled, labelled=labelled
        )
