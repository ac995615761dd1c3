"""A callback for ``transformers.Trainer`` that trains and saves the experts of a converted model."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
import transformers
from torch import Tensor, nn
from transformers import TrainerState, TrainingArguments
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from emoe.checkpoint import save_sidecars
from emoe.convert import mark_, no_experts
from emoe.errors import ConfigError
from emoe.layer import aux_loss, routed_layers, update_gates_

_IGNORED_LABEL = -100
_adders: WeakKeyDictionary[nn.Module, _BalanceLossAdder] = WeakKeyDictionary()


class TrainerCallback(transformers.TrainerCallback):
    """Train and save a converted model's experts with ``transformers.Trainer``.

    The callback adds the balance loss to the model's loss during training and updates running gates after each
    optimizer step. It writes the sidecars of :func:`emoe.save_pretrained` into every checkpoint.

    Args:
        add_aux_loss: false if your ``compute_loss_func`` adds :func:`emoe.aux_loss` itself.
    """

    def __init__(self, *, add_aux_loss: bool = True) -> None:
        self.add_aux_loss = add_aux_loss
        self._is_training = False

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Mark the model as converted and start to add the balance loss."""
        model: nn.Module = kwargs["model"]
        layers = routed_layers(model)
        if not layers:
            raise no_experts(model, "TrainerCallback", "convert it first")
        if not hasattr(model, "peft_config"):
            mark_(model)
        self._is_training = True
        _stop_adding(model)  # an interrupted training did not
        if self.add_aux_loss and layers[0].config.aux_loss_coefficient > 0:
            checkpointing: Any = args.activation_checkpointing_kwargs or {}
            if args.activation_checkpointing and checkpointing.get("use_reentrant"):
                raise ConfigError(
                    "TrainerCallback: with reentrant checkpointing the balance loss has no gradient; set "
                    "activation_checkpointing_kwargs={'use_reentrant': False}"
                )
            _adders[model] = _BalanceLossAdder(model)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop adding the balance loss."""
        self._is_training = False
        _stop_adding(kwargs["model"])

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Update running gates, unless mixed precision skipped the optimizer step."""
        if not getattr(kwargs["optimizer"], "step_was_skipped", False):
            update_gates_(kwargs["model"])

    def on_save(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Write the sidecars into the checkpoint."""
        _save(kwargs["model"], _checkpoint(args, state), write=args.should_save)

    def on_push_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Write the sidecars into the folders that are uploaded, because an upload starts before :meth:`on_save`."""
        model: nn.Module = kwargs["model"]
        is_sharded = any(hasattr(parameter, "full_tensor") for parameter in model.parameters())
        if is_sharded or not args.should_save:  # gathering shards takes all processes, but only one uploads
            return
        output = Path(str(args.output_dir))
        output.mkdir(parents=True, exist_ok=True)
        _save(model, output, write=True)
        if self._is_training:  # afterwards, the model may be the best one instead of the newest checkpoint's
            _save(model, _checkpoint(args, state), write=True)


def _stop_adding(model: nn.Module) -> None:
    if model in _adders:
        _adders.pop(model).remove(model)


def _save(model: nn.Module, folder: Path, *, write: bool) -> None:
    if not hasattr(model, "peft_config"):  # adapters are saved without the model
        save_sidecars(model, folder, write=write and folder.is_dir())


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    output, name = Path(str(args.output_dir)), f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
    folders = [path for path in (output / name, *output.glob(f"*/{name}")) if path.is_dir()]  # deeper in a search
    return max(folders, key=lambda path: path.stat().st_mtime, default=output / name)


class _BalanceLossAdder:
    """Add the balance loss to the loss that a model returns in training, with the same scale.

    The model's loss is a mean over the labels of one forward pass. If the model uses ``num_items_in_batch`` (the number
    of labels in the optimizer step, passed by ``Trainer``), its loss is a share of the mean over the whole step.
    """

    def __init__(self, model: nn.Module) -> None:
        base = _base_model(model)
        self._config = getattr(base, "config", None)
        causal = LOSS_MAPPING.get(getattr(base, "loss_type", "")) is ForCausalLMLoss
        self._shifts_labels = causal and not getattr(self._config, "is_encoder_decoder", False)
        self._uses_count = "num_items_in_batch" in inspect.signature(base.forward).parameters
        self._hook = model.register_forward_hook(self._add, with_kwargs=True)
        self._loss_function = getattr(base, "loss_function", None)
        if self._loss_function is not None:  # many models take num_items_in_batch, but do not pass it on
            base.loss_function = self._watch_loss

    def remove(self, model: nn.Module) -> None:
        """Restore the model's own loss."""
        self._hook.remove()
        if self._loss_function is not None:
            _base_model(model).loss_function = self._loss_function

    def _watch_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = self._loss_function(*args, **kwargs)  # type: ignore[misc]
        ignores_count = getattr(self._config, "problem_type", None) in ("regression", "multi_label_classification")
        self._uses_count = kwargs.get("num_items_in_batch") is not None and not ignores_count
        return loss

    def _add(self, model: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        balance = aux_loss(model) if model.training else 0.0
        if not isinstance(balance, Tensor):
            return output
        if isinstance(output, dict) and output.get("loss") is not None:
            output["loss"] = output["loss"] + balance * self._share(kwargs)
            return output
        if isinstance(output, tuple) and isinstance(output[0], Tensor) and not output[0].ndim:
            return (output[0] + balance * self._share(kwargs), *output[1:])
        raise ConfigError(
            "TrainerCallback: the model returned no loss to add the balance loss to, as with compute_loss_func or "
            "label smoothing; add emoe.aux_loss(model) in compute_loss_func and use TrainerCallback(add_aux_loss=False)"
        )

    def _share(self, kwargs: dict[str, Any]) -> Tensor | float:
        total = kwargs.get("num_items_in_batch")
        if total is None or not self._uses_count:
            return 1.0
        labels: Tensor = kwargs["shift_labels"] if "shift_labels" in kwargs else kwargs["labels"]
        if self._shifts_labels and "shift_labels" not in kwargs:
            labels = labels[..., 1:]
        return labels.ne(_IGNORED_LABEL).sum() / torch.as_tensor(total, device=labels.device).flatten()[0]


def _base_model(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model
