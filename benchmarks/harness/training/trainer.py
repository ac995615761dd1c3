"""Train routed and adapted models with transformers' Trainer."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, cast

import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.utils.data import Sampler
from transformers import PreTrainedModel, Trainer, TrainingArguments

import emoe
from benchmarks.harness.base import TRAINED_FILE
from benchmarks.harness.config.methods import LoRA
from benchmarks.harness.models.trainable import Trainable, load_trained_, trained_state
from benchmarks.harness.training.callbacks import Probe, SetEpochs, UpdateGates
from benchmarks.harness.training.checkpoints import (
    OPTIMIZER,
    SCHEDULER,
    MarkComplete,
    UpdateBestPath,
)
from benchmarks.harness.training.processes import is_sharded, world_size
from emoe.files import write_tensors


def available_precision(requested: str) -> str:
    """Return the requested precision on an accelerator, ``fp32`` on a CPU."""
    return requested if torch.cuda.is_available() else "fp32"


def autocast(model: PreTrainedModel, precision: str) -> torch.autocast:
    """Return an autocast context, which is only enabled for ``bf16``."""
    return torch.autocast(model.device.type, torch.bfloat16, enabled=precision == "bf16")


def trainer_arguments(folder: Path, precision: str, **options: Any) -> TrainingArguments:
    """Return Trainer's arguments without reports and progress bars, for one device per process.

    Args:
        folder: The folder of the run.
        precision: ``fp32``, ``fp16`` or ``bf16``.
        **options: More arguments.
    """
    use_cpu = not torch.cuda.is_available()
    backend = None
    if use_cpu and world_size() > 1:
        backend = "gloo"
    arguments = TrainingArguments(
        output_dir=str(folder),
        report_to=[],
        disable_tqdm=True,
        use_cpu=use_cpu,
        fp16=precision == "fp16",
        bf16=precision == "bf16",
        ddp_backend=backend,
        ddp_find_unused_parameters=False,
        remove_unused_columns=False,  # keeps prefix states, which only a hook takes
        save_total_limit=2,  # the previous one is used if the last one is incomplete or damaged
        **options,
    )
    # one run takes one GPU: Trainer's DataParallel would multiply the batch size
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1
    return arguments


class RoutedTrainer(Trainer):
    """Trainer for routed and adapted models.

    Adds the balance loss to the task's loss, updates running gates, orders the rows by seed and
    epoch, lowers the learning rate of some parameters, and saves only the trained parameters in its
    checkpoints.

    Args:
        order: The order of the rows.
        trainable: The model, and the names of parameters with a lower learning rate.
        probe: The probe that records the loss of the first batches.
        lora: The settings of the adapters; None without adapters. With adapters, all other trained
            parameters except the head have a lower learning rate.
        by_token: True to average the loss of a step over all tokens with labels; False to average
            it over the batches of the step.
        **kwargs: The arguments of Trainer.
    """

    def __init__(
        self,
        *,
        order: Sampler[Any],
        trainable: Trainable,
        probe: Probe,
        lora: LoRA | None = None,
        by_token: bool = False,
        **kwargs: Any,
    ) -> None:
        # Trainer checks that a sharded model is saved without its optimizer. This class can save
        # both, so the option is true during the check only.
        kwargs["args"].save_only_model = is_sharded()
        super().__init__(model=trainable.model, **kwargs)
        self.args.save_only_model = False
        # With by_token, the model divides its loss by the number of tokens with labels in the step.
        # Trainer must then not divide it by the number of batches in the step.
        self.model_accepts_loss_kwargs = by_token
        self.loss_is_scaled_for_ga = by_token
        self._order = order
        self._trainable = trainable
        self.probe = probe
        self._base_lr_ratio = 1.0
        if lora is not None:
            self._base_lr_ratio = lora.base_lr_ratio
        self.add_callback(probe)
        self.add_callback(UpdateGates())
        if hasattr(order, "set_epoch"):
            self.add_callback(SetEpochs(order))
        self.add_callback(MarkComplete())
        self.add_callback(UpdateBestPath())

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[Any]:
        return self._order

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create Trainer's optimizer, and scale the learning rate of the slow parameters."""
        optimizer = super().create_optimizer(model)
        # parameters with a lower learning rate
        slow = set()
        for name, parameter in self._module.named_parameters():
            if name in self._trainable.slow:
                slow.add(parameter)
        # Move them into groups of their own. The loop is over a copy of the list, because it
        # appends groups.
        for group in list(optimizer.param_groups):
            slow_parameters = [parameter for parameter in group["params"] if parameter in slow]
            others = [parameter for parameter in group["params"] if parameter not in slow]
            if not slow_parameters:
                continue
            slow_learning_rate = group["lr"] * self._base_lr_ratio
            # a group without parameters could not be loaded from a checkpoint
            if not others:
                group["lr"] = slow_learning_rate
                continue
            group["params"] = others
            # a copy of the group, with the same weight decay and other settings
            slow_group = {**group, "params": slow_parameters, "lr": slow_learning_rate}
            optimizer.add_param_group(slow_group)
        return optimizer

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        self.probe.add_loss(loss)
        return loss

    def compute_loss(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        loss: Any = super().compute_loss(model, *args, **kwargs)
        if not model.training:
            return loss
        balance = emoe.aux_loss(model)
        # aux_loss returns the number 0.0 if no layer has a balance loss
        if not isinstance(balance, Tensor):
            return loss
        # Trainer does not divide this loss by the number of batches in the step
        if self.loss_is_scaled_for_ga:
            balance = balance / self.current_gradient_accumulation_steps
        return loss + balance

    @property
    def _module(self) -> nn.Module:
        """The model, typed as a module."""
        return cast(nn.Module, self.model)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(str(output_dir))
        # all processes take part in gathering the tensors
        state = trained_state(self._module)
        if self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            write_tensors(state, folder / TRAINED_FILE)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        load_trained_(self._module, Path(resume_from_checkpoint) / TRAINED_FILE)

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(str(self.state.best_model_checkpoint))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        # whole tensors by parameter name, which fit any number of processes
        options = StateDictOptions(
            full_state_dict=True, cpu_offload=True, ignore_frozen_params=True
        )
        state = get_optimizer_state_dict(self._module, self._unwrapped_optimizer, options=options)
        if self.args.should_save:
            folder = Path(output_dir)
            scheduler: Any = self.lr_scheduler
            torch.save(state, folder / OPTIMIZER)
            torch.save(scheduler.state_dict(), folder / SCHEDULER)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        folder = Path(checkpoint)
        state = torch.load(folder / OPTIMIZER, map_location="cpu", mmap=True, weights_only=True)
        options = StateDictOptions(full_state_dict=True)
        set_optimizer_state_dict(self._module, self._unwrapped_optimizer, state, options=options)
        scheduler: Any = self.lr_scheduler
        scheduler.load_state_dict(torch.load(folder / SCHEDULER, weights_only=True))

    @property
    def _unwrapped_optimizer(self) -> torch.optim.Optimizer:
        # accelerate wraps the optimizer
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        return cast(torch.optim.Optimizer, optimizer)


def extract_logits(predictions: Any) -> NDArray[Any]:
    """Return the logits: the predictions themselves, or their first element if they are a tuple."""
    logits = predictions[0] if isinstance(predictions, tuple) else predictions
    return cast(NDArray[Any], logits)


def finite_or_none(loss: float) -> float | None:
    """Return a loss, or None if it is infinite or not a number. JSON cannot hold such values."""
    return loss if math.isfinite(loss) else None
