"""Train on some environments and evaluate on all of them, in the suite's one training loop."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.metrics import mutual_info_score
from torch import nn
from torch.utils.data import DataLoader
from transformers import EvalPrediction, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

import emoe
from benchmarks.domainbed.batches import EnvironmentBatches, EvaluationRows, TrainingRows
from benchmarks.harness.progress import Progress
from benchmarks.harness.scores import score
from benchmarks.harness.seeds import derive_seed
from benchmarks.harness.trainable import Trainable
from benchmarks.harness.training import (
    RetieGates,
    RoutedTrainer,
    Stopwatch,
    finite,
    last_complete_checkpoint,
    plain_logits,
    precision_here,
    quiet_arguments,
)
from emoe.layer import routed_layers

ACCURACY = "accuracy"


class _DomainLoop(RoutedTrainer):
    """With Adam's L2 penalty on every parameter, as in DomainBed; and evaluations, however many, leave training's randomness alone."""

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        return [name for name, _ in model.named_parameters()]

    def evaluation_loop(self, dataloader: DataLoader[Any], *args: Any, **kwargs: Any) -> Any:
        rows: Any = dataloader.dataset
        rows.step = self.state.global_step
        with torch.random.fork_rng(devices=[]):  # a data loader takes a seed from the global generator
            return super().evaluation_loop(dataloader, *args, **kwargs)


class EvaluationSteps(TrainerCallback):
    """Evaluates, logs and saves where DomainBed does: at steps 0, ``every``, 2 · ``every``, … and at the last one.

    DomainBed numbers a step before its update is counted: its step 0 is the state after one update.
    """

    def __init__(self, every: int) -> None:
        self._every = every

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        step = state.global_step - 1
        if step % self._every == 0 or state.global_step == state.max_steps:
            control.should_log = control.should_evaluate = True
            control.should_save = step > 0  # the first step is sooner done again than saved


@dataclass(frozen=True)
class Predictions:
    """What a trained model says, and how it routes.

    Attributes:
        confusion: ``[environments, classes, classes]`` images by true and predicted class.
        loads: layer to ``[environments, classes, experts]``, how often each expert was chosen; empty for a dense model.
        summary: of the routing, over all.
    """

    confusion: NDArray[np.int64]
    loads: dict[int, NDArray[np.int64]]
    summary: dict[str, float]


class DomainTrainer:
    """Trains one image classifier as a run's spec says.

    A checkpoint is written at every evaluation below ``folder``; a run that was killed goes on from the last complete
    one and ends with the same numbers.

    Args:
        classifier: the classifier.
        spec: of the run.
        train: rows of the training environments.
        draws: which of them make a step.
        splits: what is evaluated, by name (``env0_in``, ``env0_out``, …).
        folder: the run's.
        progress: where to say what is going on.
    """

    def __init__(
        self,
        classifier: Trainable,
        spec: Mapping[str, Any],
        train: TrainingRows,
        draws: EnvironmentBatches,
        splits: Mapping[str, EvaluationRows],
        folder: Path,
        progress: Progress,
    ) -> None:
        training, hparams = spec["training"], spec["hparams"]
        self._checkpoints, self._splits, self._classifier = folder / "checkpoints", dict(splits), classifier
        self._batch_size = training["eval_batch_size"]
        self._stopwatch = Stopwatch()
        self.precision = precision_here(training["precision"])
        arguments = quiet_arguments(
            self._checkpoints,
            max_steps=training["steps"],
            per_device_train_batch_size=len(draws) // training["steps"],
            per_device_eval_batch_size=self._batch_size,
            learning_rate=hparams["lr"],
            lr_scheduler_type="constant",
            weight_decay=hparams["weight_decay"],
            max_grad_norm=0.0,
            precision=self.precision,
            seed=derive_seed("dropout", spec["seed"]),
            save_strategy="no",
            save_total_limit=1,
            logging_strategy="no",
            logging_nan_inf_filter=False,  # a loss that is no number shall be seen
            dataloader_num_workers=reading_workers(),
        )
        self._trainer = _DomainLoop(
            args=arguments,
            order=draws,
            trainable=classifier,
            lora=training["lora"],
            optimizer_cls_and_kwargs=(torch.optim.Adam, {"lr": hparams["lr"]}),
            train_dataset=train,
            eval_dataset=self._splits,
            compute_metrics=_accuracy,
            callbacks=[progress, self._stopwatch, RetieGates(), EvaluationSteps(training["eval_every"])],
        )

    @property
    def evaluation_seconds(self) -> float:
        """Time spent in evaluations during training."""
        return self._stopwatch.evaluation

    @property
    def step_seconds(self) -> float:
        """Mean over the steps."""
        return self._stopwatch.step_seconds

    def train(self) -> list[dict[str, Any]]:
        """Train, from the last complete checkpoint where there is one.

        Returns:
            DomainBed's records: ``step``, ``loss`` (the mean since the record before) and ``<split>_acc`` of every split.
        """
        checkpoint = last_complete_checkpoint(self._checkpoints)
        if checkpoint:
            self._stopwatch.resume(checkpoint)
        self._trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        found: dict[int, dict[str, Any]] = {}
        for entry in self._trainer.state.log_history:
            record = found.setdefault(int(entry["step"]), {"step": int(entry["step"]) - 1})
            if "loss" in entry:
                record["loss"] = finite(entry["loss"])
            for name in self._splits:
                if f"eval_{name}_{ACCURACY}" in entry:
                    record[f"{name}_acc"] = entry[f"eval_{name}_{ACCURACY}"]
        # Trainer ends its log with an entry of its own, without an evaluation
        return [record for record in found.values() if len(record) > 2]

    def look(self, splits: Sequence[EvaluationRows], num_classes: int) -> Predictions:
        """Predict the splits once more, one an environment, and record which experts their images use."""
        model = self._classifier.model
        confusion = np.zeros((len(splits), num_classes, num_classes), dtype=np.int64)
        if not routed_layers(model):
            self._predict(splits, confusion, None)
            return Predictions(confusion, {}, {})
        with emoe.record_routing(model) as record:
            self._predict(splits, confusion, record)
        loads: dict[int, NDArray[np.int64]] = {}
        for layer, found in record.layers.items():
            loads[layer] = np.zeros((len(splits) * num_classes, found.num_experts), dtype=np.int64)
            for label, counts in found.by_label.items():
                loads[layer][label] = counts.numpy()
        shaped = {layer: counts.reshape(len(splits), num_classes, -1) for layer, counts in loads.items()}
        told = {
            "class_information": [information(counts.sum(0)) for counts in shaped.values()],
            "environment_information": [information(counts.sum(1)) for counts in shaped.values()],
        }
        means = {name: sum(values) / len(values) for name, values in told.items()}
        return Predictions(confusion, shaped, record.summary() | means)

    def _predict(self, splits: Sequence[EvaluationRows], confusion: NDArray[np.int64], record: Any) -> None:
        model = self._classifier.model.eval()
        device = next(model.parameters()).device
        for env, rows in enumerate(splits):
            for batch in DataLoader(rows, self._batch_size, num_workers=reading_workers()):
                labels = batch["labels"]
                if record is not None:
                    record.set_labels(env * confusion.shape[1] + labels)
                with torch.inference_mode(), self._trainer.compute_loss_context_manager():
                    predicted = model(batch["pixel_values"].to(device))["logits"].argmax(-1).cpu()
                np.add.at(confusion[env], (labels.numpy(), predicted.numpy()), 1)


def reading_workers() -> int:
    """Processes that read images: the cores, where a GPU computes; none on a CPU, whose cores have enough to do. No number hangs on it."""
    return torch.get_num_threads() if torch.cuda.is_available() else 0


def information(counts: NDArray[np.int64]) -> float:
    """Bits that a token's choice of an expert tells about what its image is, and the other way round.

    Mutual information of the empirical distribution; 0 where every row uses the experts alike.

    Args:
        counts: ``[classes or environments, experts]``, how often each expert was chosen.
    """
    return float(mutual_info_score(None, None, contingency=counts) / math.log(2))


def _accuracy(prediction: EvalPrediction) -> dict[str, float]:
    labels: Any = prediction.label_ids
    return {ACCURACY: score(ACCURACY, plain_logits(prediction.predictions), labels)}
