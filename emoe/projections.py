"""Stand around the call of a projection, or of a whole FFN, by giving it a class of its own, as FSDP2 does.

Hooks, wrappers, copies and replaced ``forward`` methods go on working, and other people's are left alone when ours is taken away.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import PurePath
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from emoe.decision_guard import Guard

Handler = Callable[..., Any]
_HANDLER = "_emoe_handler"
# as they are when this is imported, to see that nobody has put something in their place
FUNCTIONS = dict(vars(F))
_PLACES = ((F, FUNCTIONS), (torch, dict(vars(torch))))
_LINEAR_FORWARD = nn.Linear.forward
CALLS = {name: getattr(nn.Module, name) for name in ("__call__", "_wrapped_call_impl", "_call_impl")}


class RoutedProjection(nn.Module):
    """A projection whose calls go through a handler: ``handler(call, *args, **kwargs)``."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        handler, call = self.__dict__.get(_HANDLER), super().__call__
        if handler is None or torch.compiler.is_compiling():
            return call(*args, **kwargs)
        return handler(call, *args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the projection; a compiler may come here without a call."""
        plain, handler = _own_forward(self, RoutedProjection), self.__dict__.get(_HANDLER)
        if handler is None or not torch.compiler.is_compiling():
            return plain(*args, **kwargs)
        return handler(plain, *args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _reduced(self, RoutedProjection, super().__reduce_ex__(protocol))


_ROUTED_CALLS = {**CALLS, **{name: vars(RoutedProjection)[name] for name in ("__call__", "forward")}}


class RoutedFFN(nn.Module):
    """The module of a whole FFN, of whose forward pass a handler may have the result: ``handler(x)``, None where it has not.

    Hooks of the module, and what is put around its ``forward``, see the call as they would without.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the FFN."""
        if not torch.compiler.is_compiling():
            handler = self.__dict__.get(_HANDLER)
            if handler is not None and len(args) == 1 and not kwargs and (y := handler(args[0])) is not None:
                return y
        return _own_forward(self, RoutedFFN)(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _reduced(self, RoutedFFN, super().__reduce_ex__(protocol))


def _own_forward(module: nn.Module, base: _Base) -> Callable[..., Any]:
    # somebody may have kept our method while the class was taken away again
    if not isinstance(module, base):
        return functools.partial(type(module).forward, module)
    return cast(Any, super(base, module)).forward


def _reduced(module: nn.Module, base: _Base, reduced: Any) -> Any:
    # pickle finds a class by its name, and this one is made when it is needed
    plain = next(found for found in type(module).__mro__ if not issubclass(found, base))
    return (_new, (base, plain), *reduced[2:])


_Base = type[RoutedProjection] | type[RoutedFFN]
_classes: dict[tuple[_Base, type[nn.Module]], type[nn.Module]] = {}


def _routed_class(base: _Base, plain: type[nn.Module]) -> type[nn.Module]:
    if (base, plain) not in _classes:
        _classes[base, plain] = type(f"Routed{plain.__name__}", (base, plain), {"__module__": __name__})
    return _classes[base, plain]


def _new(base: _Base, plain: type[nn.Module]) -> nn.Module:
    return _routed_class(base, plain).__new__(_routed_class(base, plain))


def stand_around_(module: nn.Module, handler: Handler, base: _Base = RoutedProjection) -> None:
    """Let the calls of a projection, or of a whole FFN, go through a handler from now on, in place."""
    module.__dict__[_HANDLER] = handler
    if not isinstance(module, base):  # it still is where somebody put a class on top of ours
        module.__class__ = _routed_class(base, type(module))


def leave_(module: nn.Module) -> None:
    """Take the handler away again, and the class unless somebody else has put theirs on top of it."""
    module.__dict__.pop(_HANDLER, None)
    plain = plain_class(module)
    if plain is not None:
        module.__class__ = plain


def plain_class(module: nn.Module) -> type[nn.Module] | None:
    """The class that ours was made of, where we stand around a module and nobody has put theirs on top."""
    own = type(module)
    return own.__mro__[2] if own.__bases__[0] in (RoutedProjection, RoutedFFN) else None


def is_linear_routed_by(projection: nn.Module, handler: Handler, guard: Guard) -> bool:
    """Whether the calls of this module go through this handler, and it does what its weight and bias say and nothing else: PyTorch's linear layer or GPT-2's, as they are."""
    if guard.item(projection.__dict__, _HANDLER) != handler:
        return False
    guard.attribute(projection, "__class__")
    plain = plain_class(projection)
    if plain is None or not has_plain_call(plain, guard):
        return False
    if any(guard.attribute(type(projection), name) is not call for name, call in _ROUTED_CALLS.items()):
        return False
    forward = guard.attribute(plain, "forward")
    is_known = forward is _LINEAR_FORWARD or (plain.__name__, plain.__module__) == (
        "Conv1D",
        "transformers.pytorch_utils",
    )
    return is_known and is_as_written(forward, guard)


def is_as_written(function: Any, guard: Guard) -> bool:
    """Whether a function was written in the file of its module, and those of PyTorch's that it calls are PyTorch's own."""
    code = guard.attribute(function, "__code__")
    if code is None or not _is_in_file_of(code.co_filename, function.__module__):
        return False
    return all(
        guard.item(vars(place), name) is own[name] for place, own in _PLACES for name in code.co_names if name in own
    )


@functools.cache
def _is_in_file_of(file: str, module: str) -> bool:
    names = tuple(module.split("."))  # the end of the file's path, for it may have been compiled elsewhere
    return PurePath(file).with_suffix("").parts[-len(names) :] == names


def has_plain_call(kind: type[nn.Module], guard: Guard) -> bool:
    """Whether modules of a class are called as PyTorch calls them: hooks and ``forward``, and nothing around that."""
    return all(guard.attribute(kind, name) is call for name, call in CALLS.items())


def is_routed_by(projection: nn.Module, handler: Handler) -> bool:
    """Whether the calls of this module go through this handler."""
    return projection.__dict__.get(_HANDLER) == handler and isinstance(projection, RoutedProjection)


def with_values(parameter: nn.Parameter, values: Tensor) -> nn.Parameter:
    """The same parameter with values of another shape, so that an optimiser that has it goes on training it.

    While a graph of an earlier forward pass lives its parameters cannot change shape; then it is a new one.
    """
    new = nn.Parameter(values.detach(), requires_grad=parameter.requires_grad)
    try:
        torch.utils.swap_tensors(parameter, new)
    except RuntimeError:
        return new
    return parameter


def without_adapter(module: nn.Module) -> nn.Module:
    """The projection itself, where an adapter is around it."""
    return cast(nn.Module, getattr(module, "base_layer", module))
