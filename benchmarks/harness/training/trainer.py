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
from benchmarks.harness.models.trainable import Trainable, load_trained_, trained_state
from benchmarks.harness.training.callbacks import Probe, SetEpochs, UpdateGates
from benchmarks.harness.training.checkpoints import FindBest, MarkComplete
from benchmarks.harness.training.processes import is_sharded, world_size
from emoe.files import write_tensors

_WEIGHTS, _OPTIMIZER, _SCHEDULER = (
    "trained.safetensors",
    "optimizer.pt",
    "scheduler.pt",
)  # in a checkpoint


def available_precision(requested: str) -> str:
    """Return the requested precision on an accelerator, ``fp32`` on a CPU."""
    return requested if torch.cuda.is_available() else "fp32"


def autocast(model: PreTrainedModel, precision: str) -> torch.autocast:
    """Return an autocast context, which is only enabled for ``bf16``."""
    return torch.autocast(model.device.type, torch.bfloat16, enabled=precision == "bf16")


def trainer_arguments(folder: Path, precision: str, **options: Any) -> TrainingArguments:
    """Return Trainer's arguments without reports and progress bars, for one device per process."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        report_to=[],
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        fp16=precision == "fp16",
        bf16=precision == "bf16",
        ddp_backend="gloo" if world_size() > 1 and not torch.cuda.is_available() else None,
        ddp_find_unused_parameters=False,
        remove_unused_columns=False,  # a hook takes the prefix states, which no signature has
        save_total_limit=2,  # the previous one is used if the last one is incomplete or damaged
        **options,
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = (
            1  # Trainer's DataParallel would multiply the batch size; one run takes one GPU
        )
    return arguments


class RoutedTrainer(Trainer):
    """Train routed and adapted models.

    Adds the balance loss to the task's loss, updates running gates, orders the rows by seed and epoch, lowers the
    learning rate of some parameters, and saves only the trained parameters in its checkpoints.

    Args:
        order: The order of the rows.
        trainable: The model.
        probe: The probe that records the loss of the first batches.
        base_lr_ratio: The share of the learning rate for trained parameters other than adapters and head.
        by_token: True to average a step's loss over its learned tokens, False over its batches.
        **kwargs: The arguments of Trainer.
    """

    def __init__(
        self,
        *,
        order: Sampler[Any],
        trainable: Trainable,
        probe: Probe,
        base_lr_ratio: float = 1.0,
        by_token: bool = False,
        **kwargs: Any,
    ) -> None:
        # Trainer does not save models that were sharded before; this class does
        kwargs["args"].save_only_model = is_sharded()
        super().__init__(model=trainable.model, **kwargs)
        self.args.save_only_model = False
        self.model_accepts_loss_kwargs = self.loss_is_scaled_for_ga = by_token
        self._order, self._trainable, self._probe, self._base_lr_ratio = (
            order,
            trainable,
            probe,
            base_lr_ratio,
        )
        self.add_callback(probe)
        self.add_callback(UpdateGates())
        if hasattr(order, "set_epoch"):
            self.add_callback(SetEpochs(order))
        self.add_callback(MarkComplete())
        self.add_callback(FindBest())

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[Any]:
        return self._order

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(model)
        is_slow = {
            parameter: name in self._trainable.slow
            for name, parameter in self._trained.named_parameters()
        }
        for group in list(optimizer.param_groups):
            slow = [parameter for parameter in group["params"] if is_slow[parameter]]
            if slow:
                group["params"] = [
                    parameter for parameter in group["params"] if not is_slow[parameter]
                ]
                optimizer.add_param_group(
                    {**group, "params": slow, "lr": group["lr"] * self._base_lr_ratio}
                )
        return optimizer

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        self._probe.add_loss(loss)
        return loss

    def compute_loss(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        loss: Any = super().compute_loss(model, *args, **kwargs)
        balance = emoe.aux_loss(model) if model.training else 0.0
        if not isinstance(balance, Tensor):
            return loss
        if self.loss_is_scaled_for_ga:  # like the task's loss
            balance = balance / self.current_gradient_accumulation_steps
        return loss + balance

    @property
    def _trained(self) -> nn.Module:
        return cast(nn.Module, self.model)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder, state = Path(str(output_dir)), trained_state(self._trained)
        if self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            write_tensors(state, folder / _WEIGHTS)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        load_trained_(self._trained, Path(resume_from_checkpoint) / _WEIGHTS)

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(str(self.state.best_model_checkpoint))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        options = StateDictOptions(
            full_state_dict=True, cpu_offload=True, ignore_frozen_params=True
        )
        # whole tensors by parameter name, which fit any number of processes
        state = get_optimizer_state_dict(self._trained, self._unwrapped_optimizer, options=options)
        if self.args.should_save:
            torch.save(state, Path(output_dir) / _OPTIMIZER)
            torch.save(cast(Any, self.lr_scheduler).state_dict(), Path(output_dir) / _SCHEDULER)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            folder = Path(checkpoint)
            state = torch.load(
                folder / _OPTIMIZER, map_location="cpu", mmap=True, weights_only=True
            )
            options = StateDictOptions(full_state_dict=True)
            set_optimizer_state_dict(
                self._trained, self._unwrapped_optimizer, state, options=options
            )
            cast(Any, self.lr_scheduler).load_state_dict(
                torch.load(folder / _SCHEDULER, weights_only=True)
            )

    @property
    def _unwrapped_optimizer(self) -> torch.optim.Optimizer:
        return cast(torch.optim.Optimizer, getattr(self.optimizer, "optimizer", self.optimizer))


def extract_logits(predictions: Any) -> NDArray[Any]:
    """Return the logits of a model's predictions, which may be a tuple."""
    return cast(NDArray[Any], predictions[0] if isinstance(predictions, tuple) else predictions)


def finite_or_none(loss: float) -> float | None:
    """Return a loss, or None if it is not finite, which JSON cannot hold."""
    return loss if math.isfinite(loss) else None
