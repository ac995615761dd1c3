"""Train on some environments of an image set, and evaluate on all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from benchmarks.harness.training.checkpoints import Origin, resume
from benchmarks.harness.training.metrics import score
from benchmarks.harness.training.progress import Progress
from benchmarks.harness.training.routing import label_rows, loads_by_row
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
    """A callback that evaluates, logs and saves at DomainBed's steps.

    These are the steps 0, ``every``, 2 · ``every``, …, and the last step. DomainBed's step 0 is the
    state after one update.
    """

    def __init__(self, every: int) -> None:
        self._every = every

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ask Trainer to log, evaluate and save at DomainBed's steps."""
        # Trainer counts updates from 1; DomainBed calls the first step 0
        step = state.global_step - 1
        is_last = state.global_step == state.max_steps
        if step % self._every == 0 or is_last:
            control.should_log = True
            control.should_evaluate = True
            # repeating the first step is faster than saving it
            control.should_save = step > 0


class DomainTrainer(RoutedTrainer):
    """The trainer of one image classifier, with the settings of a run's spec.

    As in DomainBed, Adam has an L2 penalty on every parameter. Every evaluation except the first
    writes a checkpoint. A killed run resumes from the last complete checkpoint, and ends with the
    same numbers.

    Args:
        classifier: The model.
        spec: The settings of the run.
        train: The training rows.
        draws: The sampler of the images of every step.
        splits: The evaluated splits, by name (``env0_in``, ``env0_out``, …).
        folder: The run's folder, for checkpoints.
        progress: The reporter of progress.

    Attributes:
        probe: The recorder of numbers that are compared between machines.
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
        training = spec.training
        self._splits = dict(splits)
        self._eval_batch_size = training.eval_batch_size
        self._shuffle_seed = derive_seed("chance", spec.seed)
        self._warn = progress.warn
        self._precision = available_precision(training.precision)
        self._stopwatch = Stopwatch()

        images_per_step = len(draws) // training.steps
        arguments = _arguments(spec, folder, images_per_step, self._precision)
        # never None: a run's spec has the image set's number if the suite has null
        eval_every = cast(int, training.eval_every)

        # The probe records the model's output on a fixed batch, to compare machines. Any images do.
        first_split = next(iter(splits.values()))
        fixed_images = default_collate(fixed_rows(first_split))
        probe = Probe()
        probe.observe(classifier.model, fixed_images)

        super().__init__(
            args=arguments,
            order=draws,
            trainable=classifier,
            lora=training.lora,
            optimizer_cls_and_kwargs=(torch.optim.Adam, {"lr": spec.hparams.lr}),
            probe=probe,
            train_dataset=train,
            eval_dataset=self._splits,
            compute_metrics=_accuracy,
            callbacks=[progress, self._stopwatch, EvaluationSteps(eval_every)],
        )

    @property
    def cost(self) -> dict[str, Any]:
        """Return the times of training and evaluation, the steps and the precision of the run.

        These numbers are the section ``cost`` of ``metrics.json``.
        """
        return {
            **self._stopwatch.cost(self.args.max_steps),
            "evaluation_seconds": self._stopwatch.evaluation,
            "precision": self._precision,
        }

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        # Trainer would leave out biases and norms
        return [name for name, _ in model.named_parameters()]

    def evaluation_loop(self, dataloader: DataLoader[Any], *args: Any, **kwargs: Any) -> Any:
        # the step seeds random transforms, so every evaluation has new ones
        rows: Any = dataloader.dataset
        rows.step = self.state.global_step
        # a data loader takes a seed from the global generator, which training uses
        with torch.random.fork_rng(devices=[]):
            return super().evaluation_loop(dataloader, *args, **kwargs)

    def fit(self, origin: Origin) -> list[dict[str, Any]]:
        """Train from the last complete checkpoint, if any.

        Args:
            origin: The digests of the images and of the pre-trained weights.

        Returns:
            A record in DomainBed's form for each evaluated step: the ``step``, the ``loss`` (the
            mean since the previous record), and ``<split>_acc`` for each split.
        """
        checkpoint = resume(self, origin, self._warn)
        self.train(resume_from_checkpoint=checkpoint)
        records = []
        for step, logged in self._log_by_step().items():
            accuracies = {}
            for name in self._splits:
                key = f"eval_{name}_{ACCURACY}"
                if key in logged:
                    accuracies[f"{name}_acc"] = logged[key]
            # a step without accuracies was not evaluated
            if accuracies:
                loss = finite_or_none(logged["loss"])
                # Trainer counts steps from 1, DomainBed from 0
                records.append({"step": step - 1, "loss": loss, **accuracies})
        return records

    def _log_by_step(self) -> dict[int, dict[str, Any]]:
        """Join Trainer's log entries of each step: the loss and each split are separate entries.

        Returns what is logged at each step, by number of the step, from 1.
        """
        log_by_step: dict[int, dict[str, Any]] = {}
        for entry in self.state.log_history:
            step = int(entry["step"])
            joined_entry = log_by_step.setdefault(step, {})
            joined_entry.update(entry)
        return log_by_step

    def predict_splits(
        self, splits: Sequence[EvaluationRows], num_classes: int
    ) -> tuple[NDArray[np.int64], dict[str, Any]]:
        """Predict one split per environment, and record the routing of its images.

        Returns:
            The confusion counts ``[environments, true classes, predicted classes]``, and the
            routing summary of :meth:`_routing`, which is empty for a dense model.
        """
        if not emoe.is_converted(self._module):
            return self._confusion(splits, num_classes), {}
        # images are numbered from 0 over all splits, and the record stores routing by this number
        num_images = sum(len(rows) for rows in splits)
        image_numbers = torch.arange(num_images)
        with (
            emoe.record_routing(self._module) as record,
            label_rows(self._module, record, image_numbers),
        ):
            confusion = self._confusion(splits, num_classes)
        return confusion, self._routing(splits, num_classes, record)

    def _confusion(self, splits: Sequence[EvaluationRows], num_classes: int) -> NDArray[np.int64]:
        """Count predictions, ``[environments, true classes, predicted classes]``.

        ``splits`` has one split per environment. The model reads every image once, split by split.
        """
        model = self._module.eval()
        device = next(model.parameters()).device
        confusion = np.zeros((len(splits), num_classes, num_classes), dtype=np.int64)
        for env, rows in enumerate(splits):
            for batch in DataLoader(rows, self._eval_batch_size, num_workers=reading_workers()):
                labels = batch.pop("labels")
                inputs = {name: values.to(device) for name, values in batch.items()}
                with torch.inference_mode(), self.compute_loss_context_manager():
                    logits = model(**inputs)["logits"]
                predicted = logits.argmax(-1).cpu()
                # add.at counts every image; `+= 1` would count images of the same cell once
                cells = (labels.numpy(), predicted.numpy())
                np.add.at(confusion[env], cells, 1)
        return confusion

    def _routing(
        self, splits: Sequence[EvaluationRows], num_classes: int, record: RoutingRecord
    ) -> dict[str, Any]:
        """Summarise the recorded routing, with the mutual information of experts and labels.

        Returns:
            - the statistics of the record, as means over layers.
            - the mutual information of experts with ``class`` and with ``environment`` in bits, as
              means over layers. Beside each are the mean and the quantile for shuffled labels.
            - ``loads``: for each layer, the counts of expert choices
              ``[environments, classes, experts]``.
            - ``chance``: for each layer, two numbers for ``class`` and two for ``environment``: the
              mean and the 95 % quantile of the mutual information of shuffled labels, in bits.
        """
        # the environment and the class of each image, in the order of the recorded images
        images_of_split = [len(rows) for rows in splits]
        environments = np.repeat(np.arange(len(splits)), images_of_split)
        classes = np.concatenate([rows.labels for rows in splits])
        # how often each image chooses each expert: [images, layers, experts]
        num_images = len(classes)
        loads_of_layers = [loads_by_row(layer, num_images) for layer in record.layers.values()]
        image_loads = np.stack(loads_of_layers, axis=1)

        # Mutual information in bits, [1 + shuffles, layers]. The first row has the true labels, the
        # others have shuffled labels. Environments differ in their classes, so an expert that
        # depends on the environment alone also has information on the class. Classes are shuffled
        # within each environment (its stratum), so that chance includes this. Environments are
        # shuffled within each class.
        class_bits = shuffled_information(
            image_loads, labels=classes, strata=environments, seed=self._shuffle_seed
        )
        environment_bits = shuffled_information(
            image_loads, labels=environments, strata=classes, seed=self._shuffle_seed
        )

        # the sums over the images with the same environment and class:
        # [environments, classes, layers, experts]
        _num_images, num_layers, num_experts = image_loads.shape
        loads = np.zeros((len(splits), num_classes, num_layers, num_experts), dtype=np.int64)
        # add.at adds the loads of every image; `+=` would keep one image per environment and class
        np.add.at(loads, (environments, classes), image_loads)

        loads_by_layer = {}
        chance_by_layer = {}
        for index, layer in enumerate(record.layers):
            loads_by_layer[str(layer)] = loads[:, :, index].tolist()
            chance_by_layer[str(layer)] = {
                "class": list(shuffle_statistics(class_bits[:, index])),
                "environment": list(shuffle_statistics(environment_bits[:, index])),
            }
        # means over layers
        class_information = MutualInformation.averaged(class_bits)
        environment_information = MutualInformation.averaged(environment_bits)
        return {
            **record.summary(),
            **class_information.numbers("class"),
            **environment_information.numbers("environment"),
            "loads": loads_by_layer,
            "chance": chance_by_layer,
        }


def reading_workers() -> int:
    """Return the number of data loader workers: torch's threads if there is a GPU, else 0."""
    if torch.cuda.is_available():
        return torch.get_num_threads()
    return 0


def _arguments(
    spec: ImageSpec, folder: Path, images_per_step: int, precision: str
) -> TrainingArguments:
    """Return Trainer's arguments. A step has ``images_per_step`` images of all environments."""
    training = spec.training
    return trainer_arguments(
        folder / "checkpoints",
        max_steps=training.steps,
        per_device_train_batch_size=images_per_step,
        per_device_eval_batch_size=training.eval_batch_size,
        learning_rate=spec.hparams.lr,
        lr_scheduler_type="constant",
        weight_decay=spec.hparams.weight_decay,
        max_grad_norm=0.0,  # no clipping
        precision=precision,
        seed=derive_seed("dropout", spec.seed),
        # EvaluationSteps decides when to save and to log
        save_strategy="no",
        logging_strategy="no",
        logging_nan_inf_filter=False,  # show losses that are nan
        dataloader_num_workers=reading_workers(),
    )


def _accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Compute the accuracy of a split, for Trainer."""
    labels: Any = prediction.label_ids
    logits = extract_logits(prediction.predictions)
    return {ACCURACY: score(ACCURACY, logits, labels)}
