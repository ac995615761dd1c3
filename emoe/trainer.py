"""What a converted model needs of ``transformers.Trainer``, as a callback."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
import transformers
from torch import Tensor, nn
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from emoe.errors import ConfigError
from emoe.layer import routed_layers
from emoe.marks import mark_, no_experts
from emoe.sidecars import save_sidecars
from emoe.training import aux_loss, update_gates_

_IGNORED = -100  # label of a token without one
_added: WeakKeyDictionary[nn.Module, _BalanceLoss] = WeakKeyDictionary()


class TrainerCallback(transformers.TrainerCallback):
    """Trains and saves a converted model's experts with ``transformers.Trainer``.

    It adds the balance loss to the model's loss while it trains, moves running gates after each optimiser step, and
    writes the sidecars of :func:`emoe.save_pretrained` into every checkpoint, so that :func:`emoe.from_pretrained` reads them.

    Args:
        add_aux_loss: false where your ``compute_loss_func`` adds :func:`emoe.aux_loss` itself.
    """

    def __init__(self, *, add_aux_loss: bool = True) -> None:
        self.add_aux_loss = add_aux_loss
        self._trains = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse a model without experts; mark it, and have the balance loss added."""
        model = cast(nn.Module, kwargs["model"])
        layers = routed_layers(model)
        if not layers:
            raise no_experts(model, "TrainerCallback", "convert it first")
        if not hasattr(model, "peft_config"):
            mark_(model)
        self._trains = True
        _stop_adding(model)  # a training that broke off did not
        if self.add_aux_loss and layers[0].config.aux_loss_coefficient > 0:
            _added[model] = _BalanceLoss(model)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the model's loss as it was."""
        self._trains = False
        _stop_adding(kwargs["model"])

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Move running gates towards the keys, unless mixed precision skipped the step."""
        if not getattr(kwargs["optimizer"], "step_was_skipped", False):
            update_gates_(kwargs["model"])

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the sidecars into the checkpoint."""
        _save_beside(kwargs["model"], _checkpoint(args, state), write=args.should_save)

    def on_push_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write them before the upload, which comes before :meth:`on_save`, into what is uploaded."""
        model = kwargs["model"]
        if args.should_save and not _is_sharded(model):  # one process alone cannot gather shards
            output = Path(cast(str, args.output_dir))
            output.mkdir(parents=True, exist_ok=True)
            # later the model may be another than that of the newest checkpoint: the best
            for folder in (output, _checkpoint(args, state)) if self._trains else (output,):
                _save_beside(model, folder, write=True)


def _stop_adding(model: nn.Module) -> None:
    if model in _added:
        _added.pop(model).remove()


def _save_beside(model: nn.Module, folder: Path, *, write: bool) -> None:
    """Sidecars of a model that is saved whole; adapters are saved without the model whose experts they use."""
    if not hasattr(model, "peft_config"):
        save_sidecars(model, folder, write=write and folder.is_dir())


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    """The folder of the newest checkpoint, which is one deeper in a search for hyper-parameters."""
    output, name = Path(cast(str, args.output_dir)), f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
    found = [path for path in (output / name, *output.glob(f"*/{name}")) if path.is_dir()]
    return max(found, key=lambda path: path.stat().st_mtime, default=output / name)


def _is_sharded(model: nn.Module) -> bool:
    return any(hasattr(parameter, "full_tensor") for parameter in model.parameters())


class _BalanceLoss:
    """Adds the balance loss of each training pass to the loss that a model returns, until it is removed."""

    def __init__(self, model: nn.Module) -> None:
        base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
        self._config = getattr(base, "config", None)
        self._sums = _divides_by_count(type(base).forward)
        causal = LOSS_MAPPING.get(getattr(base, "loss_type", "")) is ForCausalLMLoss
        self._shifts = causal and not getattr(self._config, "is_encoder_decoder", False)
        self._hook = model.register_forward_hook(self._add, with_kwargs=True)

    def remove(self) -> None:
        """Leave the model's loss as it is."""
        self._hook.remove()

    def _add(self, model: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if not model.training:
            return output
        balance = aux_loss(model)
        if isinstance(balance, float):  # no routed layer took part
            return output
        if torch.is_grad_enabled() and not balance.requires_grad and _computes_again_without_a_graph(model):
            raise ConfigError(
                "TrainerCallback: under reentrant checkpointing the balance loss has no gradient; set "
                "gradient_checkpointing_kwargs={'use_reentrant': False}"
            )
        if isinstance(output, dict) and output.get("loss") is not None:
            output["loss"] = output["loss"] + balance * self._share(kwargs)
            return output
        if isinstance(output, tuple) and isinstance(output[0], Tensor) and not output[0].ndim:
            return (output[0] + balance * self._share(kwargs), *output[1:])
        self.remove()
        raise ConfigError(
            "TrainerCallback: the model returned no loss to add the balance loss to, as with compute_loss_func and label "
            "smoothing; add emoe.aux_loss(model) in compute_loss_func and give TrainerCallback(add_aux_loss=False)"
        )

    def _share(self, kwargs: dict[str, Any]) -> Tensor | float:
        """What the model's own loss of this pass weighs, of all passes of an optimiser step.

        That is 1 for a mean. Where the ``Trainer`` tells a model how many labels there are in all, over accumulated
        passes and processes, and the model divides its sum by that, it is the share of them that this pass has.
        """
        total = kwargs.get("num_items_in_batch")
        kind = getattr(self._config, "problem_type", None)
        if total is None or not self._sums or kind not in (None, "single_label_classification"):
            return 1.0
        labels: Any = kwargs.get("shift_labels", kwargs.get("labels"))
        if "shift_labels" not in kwargs and self._shifts:
            labels = labels[..., 1:]
        return cast(Tensor, labels).ne(_IGNORED).sum() / torch.as_tensor(total, device=labels.device).flatten()[0]


def _computes_again_without_a_graph(model: nn.Module) -> bool:
    """Whether layers are checkpointed by a function that calls them without gradients first."""
    functions = (getattr(module, "_gradient_checkpointing_func", None) for module in model.modules())
    return any(getattr(function, "keywords", {}).get("use_reentrant") for function in functions)


def _divides_by_count(forward: Callable[..., Any]) -> bool:
    """Whether a model's forward pass hands the number of labels on to its loss; some take it and give a mean all the same."""
    try:
        source = inspect.getsource(forward)
    except (OSError, TypeError):
        return True
    return "num_items_in_batch" in source or re.search(r"loss_function\((\([^()]*\)|[^()])*\*\*", source) is not None
