"""Tensors that take something along between the projections of one FFN, so that no module has to remember it.

Somebody else's code calls in-projection, activation, up- and out-projection one by one. What the later ones have to know of the earlier
ones travels with the data: a forward pass leaves nothing behind, threads do not meet, and an error in the middle feeds nothing to the next pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


class CarrierTensor(Tensor):
    """An ordinary tensor with an ``extra`` that follows it through any operation (adding an adapter's part, cutting it in two)."""

    extra: Any

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            found = func(*args, **(kwargs or {}))
        extra = next((arg.extra for arg in args if isinstance(arg, CarrierTensor)), None)
        if extra is None or func in torch.overrides.get_default_nowrap_functions():
            return found
        if isinstance(found, tuple | list):
            return type(found)(carry(part, extra) if type(part) is Tensor else part for part in found)
        return carry(found, extra) if type(found) is Tensor else found


def carry(tensor: Tensor, extra: Any) -> Tensor:
    """The same tensor with something that travels along; as it is where its class is not PyTorch's own."""
    if type(tensor) not in (Tensor, CarrierTensor):
        return tensor
    carrier = tensor.as_subclass(CarrierTensor)
    carrier.extra = extra
    return carrier


def carried(tensor: Tensor) -> tuple[Tensor, Any]:
    """The plain tensor, and what travelled along, or None."""
    if isinstance(tensor, CarrierTensor):
        return tensor.as_subclass(Tensor), tensor.extra
    return tensor, None


class DeferredTensor(Tensor):
    """Hidden neurons that were not computed, because the FFN's output is known already.

    It has their shape, dtype and device. The out-projection takes the output; whatever else looks at it gets the values, which are then
    computed by the masked path.

    Attributes:
        output: the FFN's output, or None for an up-projection's part.
        owner: what computed the output.
        is_routed: the activation has been called.
        sizes: the shape, at hand without a call.
    """

    output: Tensor | None
    owner: object
    is_routed: bool
    sizes: tuple[int, ...]
    _compute: Callable[[], Tensor]

    @staticmethod
    def of(
        shape: tuple[int, ...],
        like: Tensor,
        compute: Callable[[], Tensor],
        owner: object,
        output: Tensor | None = None,
        *,
        is_routed: bool = False,
    ) -> DeferredTensor:
        """A stand-in of this shape, with the dtype and device of ``like``.

        Args:
            shape: of the neurons.
            like: a tensor of the same dtype and device.
            compute: gives the values, if they are asked for.
            owner: see the class.
            output: see the class.
            is_routed: see the class.
        """
        found = Tensor._make_wrapper_subclass(DeferredTensor, shape, dtype=like.dtype, device=like.device)
        found.output, found.owner, found.is_routed, found.sizes = output, owner, is_routed, shape
        found._compute = compute
        return found

    def value(self) -> Tensor:
        """The values, computed now."""
        return self._compute()

    def then(self, step: Callable[[Tensor], Tensor], shape: tuple[int, ...], *, is_routed: bool) -> DeferredTensor:
        """What a step makes of it, deferred too."""
        return DeferredTensor.of(shape, self, lambda: step(self.value()), self.owner, self.output, is_routed=is_routed)

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
        return func(
            *(arg.value() if isinstance(arg, DeferredTensor) else arg for arg in args),
            **{name: arg.value() if isinstance(arg, DeferredTensor) else arg for name, arg in kwargs.items()},
        )

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        # only what does not go through __torch_function__ arrives here, and would lose the gradient
        raise RuntimeError(
            f"{func} reads an FFN's hidden neurons behind PyTorch's back: call emoe.set_backend_(model, 'masked') first"
        )


_METADATA = {
    *(
        getattr(Tensor, name).__get__
        for name in ("shape", "dtype", "device", "ndim", "layout", "is_cuda", "is_cpu", "is_nested", "is_meta")
    ),
    *(Tensor.dim, Tensor.size, Tensor.numel, Tensor.is_floating_point, Tensor.nelement, Tensor.ndimension),
}


def _product(first: Any, second: Any) -> Tensor | None:
    """Activated neurons times the up-projection's part of the same FFN."""
    if not (isinstance(first, DeferredTensor) and isinstance(second, DeferredTensor)):
        return None
    routed, other = (first, second) if first.is_routed else (second, first)
    if not routed.is_routed or other.is_routed or routed.owner is not other.owner or routed.sizes != other.sizes:
        return None
    return routed.then(lambda value: value * other.value(), routed.sizes, is_routed=True)


def _halves(tensor: Any, chunks: Any, dim: int = 0) -> tuple[Tensor, ...] | None:
    """A fused in-projection's two halves."""
    if not isinstance(tensor, DeferredTensor) or chunks != 2 or dim not in (-1, len(tensor.sizes) - 1):
        return None
    shape = (*tensor.sizes[:-1], tensor.sizes[-1] // 2)

    def half(place: int) -> DeferredTensor:
        return tensor.then(lambda value: value.chunk(2, -1)[place], shape, is_routed=tensor.is_routed)

    return half(0), half(1)


def _without_dropout(
    tensor: Any, p: float = 0.5, training: bool = True, *_inplace: Any, **_named: Any
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
