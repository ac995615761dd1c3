"""Train on some environments and evaluate on all of them, with the suite's training loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils.data import DataLoader, default_collate
from transformers import (
    EvalPrediction,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

import emoe
from benchmarks.domainbed.batches import EnvironmentBatches, EvaluationRows, TrainingRows
from benchmarks.domainbed.definition import ImageSpec
from benchmarks.harness.base import derive_seed
from benchmarks.harness.models.trainable import Trainable
from benchmarks.harness.results.statistics import (
    MutualInformation,
    shuffle_statistics,
    shuffled_information,
)
from benchmarks.harness.training.callbacks import Probe, Stopwatch, fixed_rows
from benchmarks.harness.training.checkpoints import resume
from benchmarks.harness.training.metrics import score
from benchmarks.harness.training.progress import Progress
from benchmarks.harness.training.routing import loads_by_row
from benchmarks.harness.training.trainer import (
    RoutedTrainer,
    available_precision,
    extract_logits,
    finite_or_none,
    trainer_arguments,
)
from emoe.records import RoutingRecord

ACCURACY = "accuracy"


class EvaluationSteps(TrainerCallback):
    """Evaluate, log and save at DomainBed's steps 0, ``every``, 2 · ``every``, … and at the last one.

    DomainBed's step 0 is the state after one update.
    """

    def __init__(self, every: int) -> None:
        self._every = every

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        step = state.global_step - 1
        if step % self._every == 0 or state.global_step == state.max_steps:
            control.should_log = control.should_evaluate = True
            control.should_save = step > 0  # repeating the first step is faster than saving it


class DomainTrainer(RoutedTrainer):
    """Train one image classifier according to a run's spec, with Adam's L2 penalty on every parameter, as in DomainBed.

    Every evaluation writes a checkpoint below ``folder``. A killed run resumes from the last complete one, with the
    same final numbers. ``splits`` are the evaluated splits by name (``env0_in``, ``env0_out``, …).
    """

    def __init__(
        self,
        classifier: Trainable,
        spec: ImageSpec,
        train: TrainingRows,
        draws: EnvironmentBatches,
        splits: Mapping[str, EvaluationRows],
        folder: Path,
        progress: Progress,
    ) -> None:
        training, hparams = spec.training, spec.hparams
        self._splits = dict(splits)
        self._batch_size, self._seed = training.eval_batch_size, derive_seed("chance", spec.seed)
        self._stopwatch, self.probe = Stopwatch(), Probe()
        self._say = progress.say
        self._precision = available_precision(training.precision)
        every = cast(int, training.eval_every)  # a run's spec has the set's number instead of null
        arguments = trainer_arguments(
            folder / "checkpoints",
            max_steps=training.steps,
            per_device_train_batch_size=len(draws) // training.steps,
            per_device_eval_batch_size=training.eval_batch_size,
            learning_rate=hparams.lr,
            lr_scheduler_type="constant",
            weight_decay=hparams.weight_decay,
            max_grad_norm=0.0,
            precision=self._precision,
            seed=derive_seed("dropout", spec.seed),
            save_strategy="no",
            logging_strategy="no",
            logging_nan_inf_filter=False,  # show losses that are nan
            dataloader_num_workers=reading_workers(),
        )
        self.probe.observe(
            classifier.model, default_collate(fixed_rows(next(iter(splits.values()))))
        )
        super().__init__(
            args=arguments,
            order=draws,
            trainable=classifier,
            base_lr_ratio=training.lora.base_lr_ratio if training.lora else 1.0,
            optimizer_cls_and_kwargs=(torch.optim.Adam, {"lr": hparams.lr}),
            probe=self.probe,
            train_dataset=train,
            eval_dataset=self._splits,
            compute_metrics=_accuracy,
            callbacks=[progress, self._stopwatch, EvaluationSteps(every)],
        )

    @property
    def cost(self) -> dict[str, Any]:
        """Return the cost of training and of the evaluations during it, for ``metrics.json``."""
        times = self._stopwatch.cost(self.args.max_steps)
        return {
            **times,
            "evaluation_seconds": self._stopwatch.evaluation,
            "precision": self._precision,
        }

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        return [name for name, _ in model.named_parameters()]

    def evaluation_loop(self, dataloader: DataLoader[Any], *args: Any, **kwargs: Any) -> Any:
        rows: Any = dataloader.dataset
        rows.step = self.state.global_step
        with torch.random.fork_rng(
            devices=[]
        ):  # a data loader takes a seed from the global generator
            return super().evaluation_loop(dataloader, *args, **kwargs)

    def fit(self) -> list[dict[str, Any]]:
        """Train from the last complete checkpoint, if any.

        Returns:
            DomainBed's records, with ``step``, ``loss`` (mean since the previous record) and ``<split>_acc``.
        """
        self.train(resume_from_checkpoint=resume(self, self._say))
        records: dict[int, dict[str, Any]] = {}
        for entry in self.state.log_history:
            step = int(entry["step"])
            record = records.setdefault(step, {"step": step - 1})
            if "loss" in entry:
                record["loss"] = finite_or_none(entry["loss"])
            for name in self._splits:
                if f"eval_{name}_{ACCURACY}" in entry:
                    record[f"{name}_acc"] = entry[f"eval_{name}_{ACCURACY}"]
        # Trainer's last log entry has no evaluation
        return [record for record in records.values() if len(record) > 2]

    def predict_splits(
        self, splits: Sequence[EvaluationRows], num_classes: int
    ) -> tuple[NDArray[np.int64], dict[str, Any]]:
        """Predict one split per environment, and record the routing of its images.

        Returns:
            The confusion counts ``[environments, true classes, predicted classes]``, and a routing summary, which is
            empty for a dense model. By layer it has ``loads``, the expert choices ``[environments, classes, experts]``,
            and ``chance``, the mean and 95 % quantile of the information of shuffled labels, in bits.
        """
        with (
            emoe.record_routing(self._trained)
            if emoe.is_converted(self._trained)
            else nullcontext() as record
        ):
            confusion = self._confusion(splits, num_classes, record)
        if record is None:
            return confusion, {}
        environments = np.repeat(np.arange(len(splits)), [len(rows) for rows in splits])
        classes = np.concatenate([rows.labels for rows in splits])
        loads = np.stack(
            [loads_by_row(layer, len(classes)) for layer in record.layers.values()], axis=1
        )
        counts = np.zeros((len(splits), num_classes, *loads.shape[1:]), dtype=np.int64)
        np.add.at(counts, (environments, classes), loads)
        # labels are shuffled within strata of the other label, so chance includes the dependence of the two
        bits = {
            "class": shuffled_information(loads, classes, environments, self._seed),
            "environment": shuffled_information(loads, environments, classes, self._seed),
        }
        routing: dict[str, Any] = record.summary()
        for name, values in bits.items():
            routing |= MutualInformation.mean(values).numbers(name)
        routing["loads"] = {
            str(layer): counts[:, :, i].tolist() for i, layer in enumerate(record.layers)
        }
        routing["chance"] = {
            str(layer): {
                name: list(shuffle_statistics(values[:, i])) for name, values in bits.items()
            }
            for i, layer in enumerate(record.layers)
        }
        return confusion, routing

    def _confusion(
        self, splits: Sequence[EvaluationRows], num_classes: int, record: RoutingRecord | None
    ) -> NDArray[np.int64]:
        model = self._trained.eval()
        device = next(model.parameters()).device
        confusion = np.zeros((len(splits), num_classes, num_classes), dtype=np.int64)
        images = 0
        for env, rows in enumerate(splits):
            for batch in DataLoader(rows, self._batch_size, num_workers=reading_workers()):
                labels = batch.pop("labels")
                if record is not None:  # one label per image
                    record.set_labels(torch.arange(images, images + len(labels)))
                images += len(labels)
                inputs = {name: values.to(device) for name, values in batch.items()}
                with torch.inference_mode(), self.compute_loss_context_manager():
                    predicted = model(**inputs)["logits"].argmax(-1).cpu()
                np.add.at(confusion[env], (labels.numpy(), predicted.numpy()), 1)
        return confusion


def reading_workers() -> int:
    """Return the number of data loader workers: the cores with a GPU, else 0."""
    return torch.get_num_threads() if torch.cuda.is_available() else 0


def _accuracy(prediction: EvalPrediction) -> dict[str, float]:
    labels: Any = prediction.label_ids
    return {ACCURACY: score(ACCURACY, extract_logits(prediction.predictions), labels)}
