"""Checks of a model before a conversion changes it. Every check raises :class:`ConversionError`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from emoe.architectures import FFN
from emoe.errors import ConversionError, nearest_divisor


def check_weights(model: nn.Module, ffns: Sequence[FFN]) -> None:
    """Check that weights are plain, finite, unshared and of matching shapes.

    Also check that no module between the activation and the out-projection mixes neurons.
    """
    check_plain(ffns)
    for ffn in ffns:
        _check_shapes(ffn)
        _check_between(ffn)
    _check_unshared(model, ffns)


def check_plain(ffns: Iterable[FFN]) -> None:
    """Check that weights are finite floating-point matrices: not quantised, sharded or wrapped by an adapter."""
    for ffn in ffns:
        for path, module in ffn.projections():
            _check_weight(f"{ffn.name}.{path}", module)


def _check_weight(name: str, module: nn.Module) -> None:
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    # a computed weight (weight norm, pruning) is not a parameter; a sharded or quantised one has another class
    if (
        weight is None
        or type(weight.detach()) is not Tensor
        or not weight.is_floating_point()
        or weight.itemsize < 2
    ):
        raise ConversionError(
            f"{name} has no plain weight: convert before adapting, quantising, sharding or pruning"
        )
    if weight.is_meta:
        raise ConversionError(
            f"{name}.weight is on the meta device: load the weights before converting"
        )
    for tensor_name in ("weight", "bias"):
        tensor = getattr(module, tensor_name, None)
        if isinstance(tensor, Tensor) and not torch.isfinite(tensor).all():
            raise ConversionError(f"{name}.{tensor_name} has values that are not finite")


def _check_shapes(ffn: FFN) -> None:
    d = ffn.d
    for path, module in ffn.in_projections():
        rows = module.weight.shape[1 if ffn.spec.transposed else 0]  # type: ignore[index]
        if rows != (2 * d if ffn.spec.fused else d):
            hint = "; set fused in emoe.FFNSpec" if rows == 2 * d else ""
            raise ConversionError(
                f"{ffn.name}.{path} has {rows} outputs, but {ffn.spec.proj_out} has {d} inputs{hint}"
            )


def _check_between(ffn: FFN) -> None:
    if (
        isinstance(ffn.activation, nn.Module)
        and next(ffn.activation.parameters(), None) is not None
    ):
        kind = type(ffn.activation).__name__
        raise ConversionError(
            f"{ffn.name}.{ffn.spec.activation} ({kind}) has parameters, which EMoE does not support"
        )
    for path, module in ffn.between():
        if not isinstance(module, nn.Identity | nn.Dropout):
            raise ConversionError(
                f"{ffn.name}.{path} is {type(module).__name__}, which mixes the experts' neurons"
            )


def _check_unshared(model: nn.Module, ffns: Sequence[FFN]) -> None:
    """Check that no other module shares the weights, because a permutation would change that module too."""
    users: dict[int, set[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for parameter in module.parameters(recurse=False):
            users.setdefault(id(parameter), set()).add(name)
    for ffn in ffns:
        for path, module in ffn.projections():
            name = f"{ffn.name}.{path}"
            if others := users.get(id(module.weight), set()) - {name}:
                raise ConversionError(
                    f"{name}.weight is shared with {', '.join(sorted(others))}: untie them first"
                )


def check_divisible(ffns: Iterable[FFN], num_experts: int) -> None:
    """Check that ``num_experts`` divides the width of every FFN."""
    for ffn in ffns:
        if ffn.d % num_experts:
            nearest = f"the nearest number that can is {nearest_divisor(ffn.d, num_experts)}"
            raise ConversionError(
                f"{ffn.name}: {ffn.d} neurons cannot be split into {num_experts} experts; {nearest}"
            )
