"""A callback for ``transformers.Trainer`` that trains and saves the experts of a converted model."""

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

from emoe.checkpoint import save_order
from emoe.convert import converted_layers
from emoe.errors import ConfigError
from emoe.layer import aux_loss, update_gates_
from emoe.model_config import describe_experts_

_IGNORED_LABEL = -100
_handles: WeakKeyDictionary[nn.Module, tuple[RemovableHandle, ...]] = WeakKeyDictionary()


class TrainerCallback(transformers.TrainerCallback):
    """Train and save a converted model's experts with ``transformers.Trainer``.

    The callback adds the balance loss to the model's loss during training and updates running gates after each
    optimizer step. It writes the sidecars of :func:`emoe.save_pretrained` into every checkpoint.

    Args:
        add_aux_loss: false if your ``compute_loss_func`` adds :func:`emoe.aux_loss` itself.
    """

    def __init__(self, *, add_aux_loss: bool = True) -> None:
        self.add_aux_loss = add_aux_loss

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Mark the model as converted and start to add the balance loss."""
        model: nn.Module = kwargs["model"]
        layers = converted_layers(model, "TrainerCallback")
        if not hasattr(model, "peft_config"):
            describe_experts_(model)
        _stop_adding(model)  # an interrupted training left its hooks
        if self.add_aux_loss and layers[0].config.aux_loss_coefficient > 0:
            checkpointing: Any = args.activation_checkpointing_kwargs if args.activation_checkpointing else None
            if checkpointing and checkpointing.get("use_reentrant"):  # the balance loss would have no gradient
                raise ConfigError("TrainerCallback: set activation_checkpointing_kwargs={'use_reentrant': False}")
            pre_hook = model.register_forward_pre_hook(_differentiate_count, with_kwargs=True)
            _handles[model] = pre_hook, model.register_forward_hook(_add_balance_loss, with_kwargs=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop adding the balance loss."""
        _stop_adding(kwargs["model"])

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Update running gates, unless mixed precision skipped the optimizer step."""
        if not getattr(kwargs["optimizer"], "step_was_skipped", False):
            update_gates_(kwargs["model"])

    def on_save(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Write the sidecars into the checkpoint."""
        model, folder = kwargs["model"], _checkpoint(args, state)
        if not hasattr(model, "peft_config"):  # adapters are saved without the model
            save_order(model, folder, write=args.should_save and folder.is_dir())


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    """Return the folder of the newest checkpoint; a search of hyper-parameters nests it."""
    output, name = Path(str(args.output_dir)), f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
    folders = [path for path in (output / name, *output.glob(f"*/{name}")) if path.is_dir()]
    return max(folders, key=lambda path: path.stat().st_mtime, default=output / name)


def _stop_adding(model: nn.Module) -> None:
    for handle in _handles.pop(model, ()):
        handle.remove()


def _differentiate_count(_model: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    """Make ``num_items_in_batch`` require a gradient, for :func:`_loss_weight`."""
    if (count := kwargs.get("num_items_in_batch")) is not None:
        kwargs = {**kwargs, "num_items_in_batch": torch.as_tensor(count).float().detach().requires_grad_()}
    return args, kwargs


def _add_balance_loss(model: nn.Module, _args: Any, kwargs: dict[str, Any], output: Any) -> Any:
    """Add the balance loss to a model's training loss, scaled like the task loss."""
    balance = aux_loss(model) if model.training else 0.0
    if not isinstance(balance, Tensor):
        return output
    loss = output.get("loss") if isinstance(output, dict) else output[0]
    if loss is None or loss.numel() != 1:
        way_out = "add emoe.aux_loss(model) in compute_loss_func and use TrainerCallback(add_aux_loss=False)"
        raise ConfigError(f"the model returned no loss to add to (compute_loss_func or label smoothing?): {way_out}")
    loss = loss + balance * _loss_weight(model, kwargs, loss)
    if isinstance(output, tuple):
        return (loss, *output[1:])
    output["loss"] = loss
    return output


def _loss_weight(model: Any, kwargs: dict[str, Any], loss: Tensor) -> Tensor | float:
    """Return the weight of one forward pass in the loss of the optimizer step.

    Most models get ``num_items_in_batch``, the number of labels in the step, but only some divide their loss by it. In
    others, the loss is a mean over the forward pass, without gradient with respect to this number.
    """
    count = kwargs.get("num_items_in_batch")
    if count is None or torch.autograd.grad(loss, count, retain_graph=True, allow_unused=True)[0] is None:
        return 1.0
    is_causal = LOSS_MAPPING.get(getattr(model, "loss_type", "")) is ForCausalLMLoss
    if "shift_labels" in kwargs:
        labels: Tensor = kwargs["shift_labels"]
    elif is_causal and not model.config.is_encoder_decoder:
        labels = kwargs["labels"][..., 1:]  # the first token is not predicted
    else:
        labels = kwargs["labels"]
    return labels.ne(_IGNORED_LABEL).sum() / count.detach().flatten()[0]
