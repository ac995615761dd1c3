"""Which activations take each neuron for itself, and which of them the compiled kernels have."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn
from torch.nn import functional as F

from emoe.decision_guard import Guard
from emoe.projections import FUNCTIONS, has_plain_call, is_as_written

_ELEMENTWISE = {
    *(nn.CELU, nn.ELU, nn.GELU, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.Identity, nn.LeakyReLU, nn.LogSigmoid),
    *(nn.Mish, nn.ReLU, nn.ReLU6, nn.SELU, nn.SiLU, nn.Sigmoid, nn.Softplus, nn.Softsign, nn.Tanh, nn.Tanhshrink),
}
_TRANSFORMERS = "transformers.activations"
_ELEMENTWISE_MODULES = {_TRANSFORMERS, "timm.layers.activations"}
_FORWARDS = {nn.ReLU.forward: "relu", nn.SiLU.forward: "silu", nn.GELU.forward: "gelu"}
_GELU_OF = {"none": "gelu", "tanh": "gelu_tanh"}


def is_elementwise(activation: nn.Module, guard: Guard) -> bool:
    """Whether an activation is one of those that take each neuron for itself, always give the same and leave their input as it is."""
    guard.attribute(activation, "__class__")
    kind = type(activation)
    if kind not in _ELEMENTWISE and kind.__module__ not in _ELEMENTWISE_MODULES:
        return False
    state = vars(activation)
    parts = ("_parameters", "_modules")
    if any(guard.items(guard.item(state, name)) for name in parts) or guard.item(state, "inplace"):
        return False
    forward = guard.attribute(kind, "forward")
    if not has_plain_call(kind, guard) or not is_as_written(forward, guard) or not _is_of(forward, kind):
        return False
    act = guard.item(state, "act")  # what an activation of transformers calls
    function = act.func if isinstance(act, partial) else act
    known = function is None or any(function is own for own in FUNCTIONS.values())
    return known or getattr(function, "__self__", None) is activation


def _is_of(forward: Any, kind: type) -> bool:
    """Whether a ``forward`` was written for a class, or one that it is made of."""
    written = (forward.__module__, forward.__qualname__)
    return any(written == (base.__module__, f"{base.__qualname__}.forward") for base in kind.__mro__)


def activation_name(activation: nn.Module, guard: Guard) -> str | None:
    """The name by which the compiled kernels know an elementwise activation, or None.

    They have ReLU, SiLU, GELU and its tanh form, as PyTorch's functions compute them: in float32, rounded once. An activation that puts one of them together
    from several operations, as ``gelu_new`` does, rounds after each, and is left to PyTorch.
    """
    guard.attribute(activation, "__class__")
    kind = type(activation)
    forward = guard.attribute(kind, "forward")
    if not has_plain_call(kind, guard):
        return None
    function, approximate = _FORWARDS.get(forward), guard.item(vars(activation), "approximate")
    if (kind.__module__, forward.__module__) == (_TRANSFORMERS, _TRANSFORMERS):
        function, approximate = _of_transformers(kind.__name__, guard.item(vars(activation), "act"), guard)
    if function is None or guard.item(vars(F), function) is not FUNCTIONS[function]:
        return None
    return _GELU_OF.get(approximate) if function == "gelu" else function


def _of_transformers(name: str, act: Any, guard: Guard) -> tuple[str | None, Any]:
    """The function that an activation of transformers calls, and GELU's ``approximate``."""
    if name == "SiLUActivation":
        return "silu", None
    if name == "GELUActivation" and act is F.gelu:
        return "gelu", "none"
    if name == "GELUTanh" and isinstance(act, partial) and act.func is F.gelu and not act.args:
        guard.items(act.keywords)
        if list(act.keywords) == ["approximate"]:
            return "gelu", act.keywords["approximate"]
    return None, None
