"""Tensors that take something along between the projections of one FFN, so that no module has to remember it.

Somebody else's code calls in-projection, activation, up- and out-projection one by one. What the later ones have to know of the earlier
ones travels with the data: a forward pass leaves nothing behind, threads do not meet, and an error in the middle feeds nothing to the next pass.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only


class CarrierTensor(Tensor):
    """An ordinary tensor with an ``extra`` that follows it through any operation (adding an adapter's part, cutting it in two)."""

    extra: Any

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if DeferredTensor in types:  # the part of an up-projection, whose in-projection takes the masked path
            args, kwargs = tree_map_only(DeferredTensor, DeferredTensor.value, (tuple(args), kwargs))
        with torch._C.DisableTorchFunctionSubclass():
            found = func(*args, **(kwargs or {}))
        extra = next((arg.extra for arg in args if isinstance(arg, CarrierTensor)), None)
        if extra is None or func in torch.overrides.get_default_nowrap_functions():
            return found
        if isinstance(found, tuple | list):
            return type(found)(carry(part, extra) if type(part) is Tensor else part for part in found)
        return carry(found, extra) if type(found) is Tensor else found


def carry(tensor: Tensor, extra: Any) -> Tensor:
    """The same tensor with something that travels along; one of another class takes it no further than to the next call."""
    if type(tensor) not in (Tensor, CarrierTensor):
        if isinstance(tensor, Tensor):
            tensor.extra = extra  # type: ignore[attr-defined]
        return tensor
    carrier = tensor.as_subclass(CarrierTensor)
    carrier.extra = extra
    return carrier


def carried(tensor: Tensor) -> tuple[Tensor, Any]:
    """The plain tensor, and what travelled along, or None."""
    if isinstance(tensor, CarrierTensor):
        return tensor.as_subclass(Tensor), tensor.extra
    return tensor, None if type(tensor) is Tensor else getattr(tensor, "extra", None)


@dataclass
class RoutedCall:
    """One call of an FFN that is computed as a whole: what travels along with its neurons.

    Attributes:
        x: the FFN's input, None where it is not known.
        layer: who was called.
        weights: the experts' ``[T, N]``, once they are known.
        is_routed: they are, before the activation.
    """

    x: Tensor | None
    layer: object = None
    weights: Tensor | None = None
    is_routed: bool = False


def autocast_dtype(device: str) -> torch.dtype | None:
    """What autocast computes in on a type of device, or None where it is off."""
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


@dataclass
class Deferred:
    """One call of an FFN whose output is known, although its neurons were not computed.

    Attributes:
        layer: what computed the output.
        x: the FFN's input.
        output: the output; None once somebody has looked at neurons, which then count.
        tell: called when that happens, or None.
        read: what neurons that are looked at are computed from; changed since, they cannot be.
        read_by_up: what the up-projection's part is to be computed from, as it was when the output was, or None.
        is_still: whether what is done with the neurons is what was done for the output.
        tell_of_a_function: called where an ``autograd.Function`` turns out to have made or taken the neurons, or None.
        activated: which half of a fused in-projection's is activated, 0 or 1.
        requires_grad: whether the neurons have a gradient.
        grad: whether gradients were enabled at the call.
        autocast: the type that autocast was on with, or None.
    """

    layer: object
    x: Tensor
    output: Tensor | None
    tell: Callable[[], None] | None = None
    read: Sequence[Tensor] = ()
    read_by_up: Sequence[int | None] | None = None
    is_still: Callable[[], bool] | None = None
    tell_of_a_function: Callable[[], None] | None = None
    activated: int = 0
    requires_grad: bool = field(default_factory=torch.is_grad_enabled)
    grad: bool = field(default_factory=torch.is_grad_enabled)
    autocast: torch.dtype | None = None

    def __post_init__(self) -> None:
        self.autocast = autocast_dtype(self.x.device.type)
        self.is_taken = False
        self.versions = versions(self.read)

    def is_like(self, other: Deferred) -> bool:
        """Whether it was called in the same modes of PyTorch's."""
        return (self.grad, self.autocast) == (other.grad, other.autocast)

    def take(self) -> Tensor | None:
        """The output, for the first who takes it as it was computed: another would get the same tensor, changed perhaps."""
        if self.is_taken or self.grad != torch.is_grad_enabled() or self.autocast != autocast_dtype(self.x.device.type):
            return None
        if self.is_still is not None and not self.is_still():
            return None
        self.is_taken = self.output is not None
        return self.output

    def refuse_gradient(self) -> None:
        """Say that neurons have no gradient of their own, which an ``autograd.Function`` would need; the next pass takes the mask (:class:`RuntimeError`)."""
        if self.tell_of_a_function is not None:
            self.tell_of_a_function()
        raise RuntimeError(_BEHIND.format("an autograd.Function"))

    def look(self) -> None:
        """Have neurons count from now on.

        Raises:
            RuntimeError: what they are computed from was changed meanwhile.
        """
        if self.output is not None:
            self.output = None
            if self.tell is not None:
                self.tell()
        if versions(self.read) != self.versions:
            raise RuntimeError(_BEHIND.format("code that changed the FFN's input or weights before"))


def versions(tensors: Sequence[Tensor]) -> list[int | None]:
    """How often PyTorch saw each of some tensors change; None for those made under ``inference_mode``, whose changes it does not count."""
    return [None if tensor.is_inference() else tensor._version for tensor in tensors]


Part = Literal["in", "up", "both"]


class DeferredTensor(Tensor):
    """Hidden neurons that were not computed, because the FFN's output is known already.

    It has their shape, dtype and device. The out-projection takes the output; whatever else looks at it gets the values, which are then
    computed by the masked path, kept, and taken by the out-projection too, with whatever was changed in them.

    Attributes:
        call: the FFN's call.
        part: whose they are: the in-projection's, the up-projection's, or of both side by side.
        is_routed: the activation has been called.
        is_whole: it is what the out-projection takes: with a gated FFN, multiplied by the up-projection's part.
        sizes: the shape, at hand without a call.
    """

    call: Deferred
    part: Part
    is_routed: bool
    is_whole: bool
    sizes: tuple[int, ...]
    _compute: Callable[[], Tensor]
    _value: Tensor | None
    _made_of_it: list[weakref.ref[DeferredTensor]]

    @staticmethod
    def of(
        shape: tuple[int, ...],
        like: Tensor,
        compute: Callable[[], Tensor],
        call: Deferred,
        part: Part,
        *,
        is_routed: bool = False,
        is_whole: bool = False,
    ) -> DeferredTensor:
        """A stand-in of this shape, with the dtype and device of ``like``.

        Args:
            shape: of the neurons.
            like: a tensor of the same dtype and device.
            compute: gives the values, if they are asked for.
            call: see the class.
            part: see the class.
            is_routed: see the class.
            is_whole: see the class.
        """
        found = Tensor._make_wrapper_subclass(
            DeferredTensor, shape, dtype=like.dtype, device=like.device, requires_grad=call.requires_grad
        )
        found.call, found.part, found.is_routed, found.is_whole, found.sizes = call, part, is_routed, is_whole, shape
        found._compute, found._value, found._made_of_it = compute, None, []
        if call.requires_grad:
            with torch._C.DisableTorchFunctionSubclass():
                found.register_hook(lambda _grad: call.refuse_gradient())
        return found

    def value(self) -> Tensor:
        """The values, computed at the first look as they would have been in the call; with what was made of them, before they change."""
        self._refuse_autograd_functions()
        if self._value is None:
            call, kind = self.call, self.call.x.device.type
            call.look()
            with (
                torch.set_grad_enabled(call.grad),
                torch.autocast(kind, call.autocast, enabled=call.autocast is not None),
            ):
                self._value = self._compute()
            for reference in self._made_of_it:
                if (made := reference()) is not None:
                    made.value()
        return self._value

    def then(
        self,
        step: Callable[[Tensor], Tensor],
        shape: tuple[int, ...],
        *,
        is_routed: bool,
        is_whole: bool = False,
        part: Part | None = None,
    ) -> Tensor:
        """What a step makes of it: deferred too, unless somebody has looked."""
        self._refuse_autograd_functions()
        if self.call.output is None:
            return step(self.value())
        made = DeferredTensor.of(
            shape,
            self,
            lambda: step(self.value()),
            self.call,
            self.part if part is None else part,
            is_routed=is_routed,
            is_whole=is_whole,
        )
        self._made_of_it.append(weakref.ref(made))
        return made

    def _refuse_autograd_functions(self) -> None:
        """See that it is what it was made as: the output of an ``autograd.Function`` would need a gradient that its values know nothing of."""
        if self.requires_grad != self.call.requires_grad:
            self.call.refuse_gradient()

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        step = _STEPS.get(func)
        if step is not None and (deferred := step(*args, **kwargs)) is not None:
            return deferred
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        args, kwargs = tree_map_only(DeferredTensor, DeferredTensor.value, (tuple(args), kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        # only what does not go through __torch_function__ arrives here, and would lose the gradient
        raise RuntimeError(_BEHIND.format(func))


_BEHIND = "{} reads an FFN's hidden neurons behind PyTorch's back: call emoe.set_backend_(model, 'masked') first"


_METADATA = {
    *(
        getattr(Tensor, name).__get__
        for name in (
            "shape",
            "dtype",
            "device",
            "ndim",
            "layout",
            "is_cuda",
            "is_cpu",
            "is_nested",
            "is_meta",
            "requires_grad",
        )
    ),
    *(Tensor.dim, Tensor.size, Tensor.numel, Tensor.is_floating_point, Tensor.nelement, Tensor.ndimension),
}


def _product(first: Any = None, second: Any = None, **_named: Any) -> Tensor | None:
    """Activated neurons times the up-projection's part of the same FFN, as nearly all code writes it."""
    if not (isinstance(first, DeferredTensor) and isinstance(second, DeferredTensor)) or _named:
        return None
    routed, other = (first, second) if first.is_routed else (second, first)
    ours, theirs = routed.call, other.call
    same = ours.layer is theirs.layer and ours.x is theirs.x and routed.sizes == other.sizes and ours.is_like(theirs)
    unchanged = ours is theirs or ours.read_by_up == theirs.versions
    seen = ours.output is None or theirs.output is None
    if seen or not same or not unchanged or (routed.part, other.part) != ("in", "up"):
        return None
    if not routed.is_routed or routed.is_whole or other.is_routed:
        return None
    made = routed.then(lambda value: value * other.value(), routed.sizes, is_routed=True, is_whole=True)
    if isinstance(made, DeferredTensor):
        other._made_of_it.append(weakref.ref(made))
    return made


def _halves(tensor: Any = None, chunks: Any = None, dim: int = 0, **_named: Any) -> tuple[Tensor, ...] | None:
    """A fused in-projection's two halves."""
    if (
        not isinstance(tensor, DeferredTensor)
        or tensor.part != "both"
        or chunks != 2
        or dim not in (-1, len(tensor.sizes) - 1)
    ):
        return None
    shape = (*tensor.sizes[:-1], tensor.sizes[-1] // 2)

    def half(place: int) -> Tensor:
        part: Part = "in" if place == tensor.call.activated else "up"
        return tensor.then(lambda value: value.chunk(2, -1)[place], shape, is_routed=tensor.is_routed, part=part)

    return half(0), half(1)


def _without_dropout(
    tensor: Any = None, p: float = 0.5, training: bool = True, *_inplace: Any, **_named: Any
) -> Tensor | None:
    return tensor if isinstance(tensor, DeferredTensor) and (p == 0 or not training) else None


def _to_same(tensor: Any, *args: Any, **kwargs: Any) -> Tensor | None:
    """``to`` where nothing changes."""
    same = args in ((tensor.dtype,), (tensor.device,)) and not kwargs
    return tensor if isinstance(tensor, DeferredTensor) and same else None


_STEPS: dict[Callable[..., Any], Callable[..., Any]] = {
    Tensor.mul: _product,
    Tensor.__mul__: _product,
    torch.mul: _product,
    Tensor.chunk: _halves,
    torch.chunk: _halves,
    F.dropout: _without_dropout,
    Tensor.to: _to_same,
}
