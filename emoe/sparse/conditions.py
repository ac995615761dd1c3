"""Where the sparse path gives the masked path's results. It does not, so the mask is taken for this forward pass, where

- a projection carries an adapter, whose effect on a neuron is not known before all are computed;
- a weight is sharded, quantised, offloaded or of another dtype at that moment (FSDP must shard the layer, not its projections);
- dropout acts on the hidden neurons;
- experts are scored by their neurons (``gate``, ``up``) in half precision, to which the masked path rounds these; or autocast meets float64;
- the activation is none of the known ones that take each neuron for itself, or writes over its input;
- a projection is no plain linear layer, or is called by another's code than PyTorch's;
- somebody else looks at a projection, the activation, or a module that holds a part of the FFN: a hook of any kind, also a global one
  (a backward hook: where gradients are recorded), or a replaced ``forward``;
- the FFN's own code was seen to look at hidden neurons, or an ``autograd.Function`` to call a part of it;
- the router is an avg-k of somebody's own making, which may score by all neurons;
- the model is compiled, traced or transformed (``torch.func``), forward-mode derivatives are taken, or a mode of PyTorch's (``TorchFunctionMode``,
  ``TorchDispatchMode``) sees each operation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as nn_module
from torch.overrides import _get_current_function_mode_stack

from emoe.architectures import FFN
from emoe.config import EMoEConfig, GMoEConfig
from emoe.decision_guard import Guard
from emoe.optimizer_steps import COUNT
from emoe.projections import CALLS, is_linear_routed_by
from emoe.routers import AvgKRouter
from emoe.sparse.activations import is_elementwise
from emoe.tensors import autocast_dtype
from emoe.tokens import is_own_hook

_FORWARD_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_BACKWARD_HOOKS = ("_backward_hooks", "_backward_pre_hooks")
_PLAIN = (Tensor, nn.Parameter)
_OF_NEURONS = ("gate", "up")
_HALF = (torch.bfloat16, torch.float16)
# as they are when this is imported, to see that nobody has put something in their place
_AVG_K = {name: getattr(AvgKRouter, name) for name in ("scores", "linear_scores", "current_gate")}

Projections = Sequence[tuple[str, nn.Module, Callable[..., Any]]]


class Layer(Protocol):
    """What the conditions need of a routed FFN's activation."""

    activation: nn.Module
    training: bool

    @property
    def config(self) -> EMoEConfig | GMoEConfig: ...


class Conditions:
    """What has to be so for one FFN's sparse path to give the masked path's results.

    Args:
        ffn: the FFN.
        layer: its routed activation, a module.
        projections: path, module and the handler that its calls go through, of each of the FFN's projections, the out-projection last.
    """

    def __init__(self, ffn: FFN, layer: Layer, projections: Projections) -> None:
        self._layer = layer
        self._projections = tuple((module, handler) for _, module, handler in projections)
        # where each part stands, to see that it still does
        parts = [*((path, module) for path, module, _ in projections), (ffn.spec.activation, cast(nn.Module, layer))]
        self._places = tuple((*_place(ffn.layer, path), module) for path, module in parts)
        between = [ffn.layer.get_submodule(path) for path in ffn.spec.between]
        self._dropouts = tuple(module for module in between if isinstance(module, nn.Dropout))
        projected = (module for module, _ in self._projections)
        self._others = (cast(nn.Module, layer), *projected, *between, *_holders(ffn))
        kind = cast(type[nn.Module], type(layer))
        self._calls = {**CALLS, "__call__": kind.__call__, "forward": kind.forward}
        self._watch_activation()
        self._looked_at: int | None = None
        self._is_called_inside = False

    def tell_of_a_look(self) -> None:
        """Have the mask taken from now on, because the FFN's own code looks at hidden neurons; with gradients from the next optimiser's step on.

        What is computed again for a gradient, as checkpointing does it, has to be computed as it was.
        """
        self._looked_at = COUNT["steps"]

    def tell_of_a_function(self) -> None:
        """Have the mask taken from now on, because an ``autograd.Function`` calls parts of the FFN, and neurons need a gradient of their own."""
        self._is_called_inside = True

    def _watch_activation(self) -> None:
        self._activation = self._layer.activation
        self._watched: tuple[nn.Module, ...] = (*self._others, *self._activation.modules())

    def tensors(self, guard: Guard) -> list[Tensor]:
        """Weights and biases of the projections; none where a weight is computed, and not the projection's own."""
        found = []
        for module, _ in self._projections:
            if (weight := own_tensor(module, "weight", guard)) is None:
                return []
            bias = own_tensor(module, "bias", guard)
            if bias is None and not any("bias" in vars(module)[kind] for kind in ("_parameters", "_buffers")):
                return []
            found += [weight] if bias is None else [weight, bias]
        return found

    def fallback_reason(self, x: Tensor, tensors: Sequence[Tensor], guard: Guard) -> str | None:
        """Why a forward pass with this input cannot take the sparse path, or None.

        Args:
            x: the FFN's input.
            tensors: the projections'.
            guard: through which all is read that may be another in the next pass, but ``x`` and PyTorch's modes.
        """
        layer = self._layer
        if is_transformed():
            return "torch.func, forward-mode derivatives or a mode of PyTorch's act on it"
        for parent, name, own in self._places:
            if guard.item(_children(parent, guard), name) is not own or guard.item(vars(parent), name) is not None:
                return "a projection carries an adapter or was replaced"
        if not tensors or not all(is_linear_routed_by(*projection, guard) for projection in self._projections):
            return "a projection's class was replaced, or its weight is computed"
        device, dtype = x.device, x.dtype
        autocast = autocast_dtype(device.type)
        if autocast is not None and torch.float64 in (dtype, tensors[0].dtype):
            return "autocast leaves float64 as it is"
        guard.attribute(layer, "__class__")
        config = guard.item(vars(layer), "config")
        if isinstance(config, EMoEConfig) and config.score in _OF_NEURONS and (autocast or dtype) in _HALF:
            return "scores of neurons are rounded like them in half precision"
        for tensor in tensors:
            if type(tensor) not in _PLAIN:
                return f"a weight is a {type(tensor).__name__}"
            if tensor.layout is not torch.strided or tensor.is_neg():
                return "a weight is sparse, or a view of others' negatives"
            if not tensor.is_contiguous() and 0 in tensor.stride():
                return "numbers of a weight lie in one place"
            if tensor.device != device:
                return f"a weight is on {tensor.device}, the input on {device}"
            if tensor.dtype != dtype and (tensor.dtype != tensors[0].dtype or autocast is None):
                return "weights and input are of several dtypes"
        if guard.item(vars(layer), "training"):
            if config.expert_dropout:
                return "expert_dropout acts on hidden neurons"
            if any(module.training and module.p for module in self._dropouts):
                return "dropout acts on hidden neurons"
        children = _children(cast(nn.Module, layer), guard)
        router = guard.item(children, "router")
        guard.attribute(router, "__class__")
        if isinstance(router, AvgKRouter) and not _is_plain_avg_k(router, guard):
            return "the router is no plain avg-k"
        activation = guard.item(children, "activation")
        if not is_elementwise(activation, guard):
            return "the activation is not known to take each neuron for itself, is random, or writes over its input"
        if activation is not self._activation:
            self._watch_activation()
        looked_at = guard.item(vars(self), "_looked_at")
        if looked_at is not None and (looked_at != COUNT["steps"] or not torch.is_grad_enabled()):
            return "the FFN's own code looks at hidden neurons"
        if guard.item(vars(self), "_is_called_inside"):
            return "an autograd.Function calls a part of the FFN"
        if any(guard.attribute(type(layer), name) is not own for name, own in self._calls.items()):
            return "how the routed activation is called was replaced"
        states = (guard.attribute(module, "__dict__") for module in self._watched)
        if any(_is_looked_at(state, guard) for state in states) or _has_global_hook(guard):
            return "a hook or a replaced forward looks at the FFN"
        return None


def _is_plain_avg_k(router: AvgKRouter, guard: Guard) -> bool:
    """Whether an avg-k is the paper's, and nobody has changed it."""
    return type(router) is AvgKRouter and all(
        guard.attribute(AvgKRouter, name) is own and guard.item(vars(router), name) is None
        for name, own in _AVG_K.items()
    )


def is_plain(x: Tensor) -> bool:
    """Whether an input is a tensor of numbers and nothing else."""
    tracing: bool = torch.jit.is_tracing()  # type: ignore[attr-defined]
    return type(x) in _PLAIN and not (x.is_nested or x.is_meta or x.is_neg() or tracing) and x.numel() > 0


def is_transformed() -> bool:
    """Whether ``torch.func``, forward-mode derivatives or a mode of PyTorch's act on what is computed now."""
    return (
        torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or torch._C._len_torch_dispatch_stack() > 0
        or not torch._C._is_torch_function_enabled()
        or (torch._C._len_torch_function_stack() > 0 and not all(map(_only_places, _get_current_function_mode_stack())))
    )


def _only_places(mode: object) -> bool:
    """Whether a mode does nothing but say where new tensors lie, as ``torch.set_default_device`` has one do."""
    return (type(mode).__module__, type(mode).__name__) == ("torch.utils._device", "DeviceContext")


def _holders(ffn: FFN) -> list[nn.Module]:
    """Modules of the layer that hold a part of the FFN: hidden neurons go in or out of them."""
    spec = ffn.spec
    paths = [path for path in (spec.proj_in, spec.proj_up, spec.proj_out, spec.activation, *spec.between) if path]
    holders = {path[:end] for path in paths for end, sign in enumerate(path) if sign == "."}
    return [
        ffn.layer.get_submodule(holder)
        for holder in sorted(holders)
        if not all(path.startswith(f"{holder}.") for path in paths)
    ]


def _place(layer: nn.Module, path: str) -> tuple[nn.Module, str]:
    prefix, _, name = path.rpartition(".")
    return layer.get_submodule(prefix), name


def _children(module: nn.Module, guard: Guard) -> dict[str, nn.Module | None]:
    found: dict[str, nn.Module | None] = guard.item(guard.attribute(module, "__dict__"), "_modules")
    return found


def own_tensor(module: nn.Module, name: str, guard: Guard) -> Tensor | None:
    """A parameter or buffer that a module holds itself, and nothing in front of it."""
    if guard.item(vars(module), name) is not None or guard.attribute(type(module), name) is not None:
        return None
    parameters = guard.item(vars(module), "_parameters")
    found: Tensor | None = guard.item(parameters, name)
    if name in parameters:
        return found
    guard.items(parameters)  # to see it become one
    return cast(Tensor | None, guard.item(guard.item(vars(module), "_buffers"), name))


def _hooks() -> tuple[str, ...]:
    """Where those stand that are called in this forward pass, or in its backward pass if it has one."""
    return (*_FORWARD_HOOKS, *_BACKWARD_HOOKS) if torch.is_grad_enabled() else _FORWARD_HOOKS


def _is_looked_at(state: dict[str, Any], guard: Guard) -> bool:
    """Whether a hook that is not ours, or a replaced ``forward``, sees what the module of this state computes."""
    hooks = (hook for name in _hooks() for hook in guard.items(guard.item(state, name)))
    others = ("forward", "_compiled_call_impl")
    return not all(map(is_own_hook, hooks)) or any(guard.item(state, name) is not None for name in others)


def _has_global_hook(guard: Guard) -> bool:
    state = vars(nn_module)
    return any(guard.items(guard.item(state, f"_global{name}")) for name in _hooks())
