"""A callback for ``transformers.Trainer`` that trains and saves a converted model's experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
import transformers
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerState, TrainingArguments
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from emoe.architectures import is_registered
from emoe.checkpoint import save_partition_file
from emoe.convert import converted_layers
from emoe.errors import ConfigError
from emoe.layer import aux_loss, update_gates_
from emoe.model_config import describe_experts_

_IGNORED_LABEL = -100
# the hooks of each model in training
_handles: WeakKeyDictionary[nn.Module, list[RemovableHandle]] = WeakKeyDictionary()


class TrainerCallback(transformers.TrainerCallback):
    """A callback that trains and saves the experts of a converted model.

    The callback adds the balance loss to the model's loss during training and updates running gates
    after each optimizer step. It writes the original order of the neurons
    (``emoe_partition.safetensors``) into every checkpoint. Checkpoints of a module around converted
    models do not get this file, unless the registry has a row for the module
    (:func:`emoe.register_ffn`): without a row, emoe cannot load them.

    Args:
        add_aux_loss: false if your ``compute_loss_func`` adds :func:`emoe.aux_loss` itself.
    """

    def __init__(self, *, add_aux_loss: bool = True) -> None:
        self.add_aux_loss = add_aux_loss

    def on_train_begin(
        self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any
    ) -> None:
        """Describe the experts in the model's configuration, and start adding the balance loss."""
        model: nn.Module = kwargs["model"]
        layers = converted_layers(model, "TrainerCallback")
        if not hasattr(model, "peft_config"):
            describe_experts_(model)
        # an interrupted training has not removed its hooks
        _stop_adding(model)
        # parts of the model may have been converted separately, some without a balance loss
        has_balance_loss = any(layer.config.aux_loss_coefficient > 0 for layer in layers)
        if self.add_aux_loss and has_balance_loss:
            _check_checkpointing(args)
            _start_adding(model)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop adding the balance loss."""
        _stop_adding(kwargs["model"])

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Update running gates, unless mixed precision skipped the optimizer step."""
        if not getattr(kwargs["optimizer"], "step_was_skipped", False):
            update_gates_(kwargs["model"])

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any
    ) -> None:
        """Write the original order of the neurons into the checkpoint.

        Nothing is written for PEFT's checkpoints, and for modules that are not in the registry.
        """
        model: nn.Module = kwargs["model"]
        # PEFT saves the adapters without the model
        if hasattr(model, "peft_config"):
            return
        # the file numbers the layers of the whole model, which only the registry can find
        if not is_registered(model):
            return
        folder = _checkpoint_folder(args, state)
        # one process writes, if Trainer has made a folder for the checkpoint
        is_written_here = args.should_save and folder.is_dir()
        # every process must make this call, because it gathers sharded weights from all of them
        save_partition_file(model, folder, write=is_written_here)


def _checkpoint_folder(args: TrainingArguments, state: TrainerState) -> Path:
    """Return the folder of the checkpoint that is being saved. It may not exist."""
    output = Path(str(args.output_dir))
    name = f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
    # a search of hyper-parameters has a folder for each trial; the newest one is in use
    nested = output.glob(f"*/{name}")
    existing = [path for path in (output / name, *nested) if path.is_dir()]
    if not existing:
        return output / name
    return max(existing, key=_modification_time)


def _modification_time(path: Path) -> float:
    """Return the time of a folder's last change."""
    return path.stat().st_mtime


def _check_checkpointing(args: TrainingArguments) -> None:
    """Raise :class:`ConfigError` for reentrant activation checkpointing.

    With it, the balance loss would have no gradient.
    """
    options: Any = args.activation_checkpointing_kwargs
    if not args.activation_checkpointing or not options:
        return
    if options.get("use_reentrant"):
        raise ConfigError(
            "TrainerCallback: set activation_checkpointing_kwargs={'use_reentrant': False}"
        )


def _start_adding(model: nn.Module) -> None:
    """Add the balance loss to the loss of every forward pass in training."""
    before = model.register_forward_pre_hook(_prepare_count, with_kwargs=True)
    after = model.register_forward_hook(_add_balance_loss, with_kwargs=True)
    _handles[model] = [before, after]


def _stop_adding(model: nn.Module) -> None:
    """Remove the hooks of :func:`_start_adding`, if there are any."""
    for handle in _handles.pop(model, []):
        handle.remove()


# How the balance loss is scaled. An optimizer step sums the losses of several forward passes. The
# balance loss of a pass gets the weight that the pass has in the task's loss:
#
# - Trainer may divide the model's loss by the number of passes, and with it the balance loss.
# - Or Trainer divides nothing, and gives the model `num_items_in_batch`, the number of labels in
#   the step. It does so for every model whose forward method takes `**kwargs`. Some models divide
#   their loss by this number: a pass has the weight (its labels) / (labels in the step).
#   Others ignore it and return the mean over the pass, so each pass has the weight 1.
#
# No attribute of a model says whether it divides. We tried 64 heads of our architectures that get
# the number: 19 divide by it, and 19 call a loss function that could, but do not pass the number
# on. So we look at the computation: a loss has a gradient with respect to the number if it depends
# on it.


def _prepare_count(_model: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    """Return the arguments with a ``num_items_in_batch`` that requires a gradient.

    This is a forward pre-hook. :func:`_depends_on` needs the gradient.
    """
    count = kwargs.get("num_items_in_batch")
    if count is None:
        return args, kwargs
    differentiable = torch.as_tensor(count).float().detach().requires_grad_()
    return args, {**kwargs, "num_items_in_batch": differentiable}


def _add_balance_loss(model: nn.Module, _args: Any, kwargs: dict[str, Any], output: Any) -> Any:
    """Add the balance loss to a model's training loss, scaled like the task loss. A forward hook.

    Raises:
        ConfigError: the model returned no scalar loss.
    """
    if not model.training:
        return output
    balance = aux_loss(model)
    # the loss is the number 0.0 if no layer has one
    if not isinstance(balance, Tensor):
        return output

    loss = output.get("loss") if isinstance(output, dict) else output[0]
    if loss is None or loss.numel() != 1:
        raise ConfigError(
            "the model returned no loss to add to (compute_loss_func or label smoothing?): "
            "add emoe.aux_loss(model) in compute_loss_func "
            "and use TrainerCallback(add_aux_loss=False)"
        )

    weight = _loss_weight(model, kwargs, loss)
    # the layers may be on other devices than the head, which computed the loss
    total = loss + balance.to(loss.device) * weight
    if isinstance(output, tuple):
        return (total, *output[1:])
    output["loss"] = total
    return output


def _loss_weight(model: nn.Module, kwargs: dict[str, Any], loss: Tensor) -> Tensor | float:
    """Return the weight that a forward pass has in the loss of an optimizer step.

    If the model divides its loss by the number of labels in the step, the weight is the share of
    these labels that the pass has. Otherwise it is 1.
    """
    # Trainer's number of labels in the step
    num_items = kwargs.get("num_items_in_batch")
    if num_items is None or not _depends_on(loss, num_items):
        return 1.0
    labels_in_pass = _count_labels(model, kwargs)
    # DataParallel repeats the number for each device
    labels_in_step = num_items.detach().flatten()[0]
    weight = labels_in_pass / labels_in_step
    return weight.to(loss.device)


def _depends_on(loss: Tensor, num_items: Tensor) -> bool:
    """Check if a loss was computed from ``num_items_in_batch``."""
    # the gradient is None if the number was not used
    (gradient,) = torch.autograd.grad(loss, num_items, retain_graph=True, allow_unused=True)
    return gradient is not None


def _count_labels(model: Any, kwargs: dict[str, Any]) -> Tensor:
    """Count the labels of a forward pass as Trainer does for ``num_items_in_batch``."""
    if "shift_labels" in kwargs:
        labels: Tensor = kwargs["shift_labels"]
    else:
        labels = kwargs["labels"]
        loss_type = getattr(model, "loss_type", "")
        is_causal = LOSS_MAPPING.get(loss_type) is ForCausalLMLoss
        if is_causal and not model.config.is_encoder_decoder:
            labels = labels[..., 1:]  # the first token is not predicted
    return labels.ne(_IGNORED_LABEL).sum()
