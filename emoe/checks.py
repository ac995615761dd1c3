"""Checks of a model before a conversion changes it. Every check raises :class:`ConversionError`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from emoe.architectures import FFN
from emoe.errors import ConversionError, nearest_divisor


def check_convertible(model: nn.Module, ffns: Sequence[FFN]) -> None:
    """Raise :class:`ConversionError` if FFNs of a model cannot be converted.

    Their weights must be ordinary matrices (see :func:`check_projections`) of matching shapes. No
    other module may share these weights or the biases. The activation must have no parameters.
    Between it and the out-projection there may only be dropouts or identities.
    """
    check_projections(ffns)
    for ffn in ffns:
        _check_shapes(ffn)
        _check_activation(ffn)
        _check_between(ffn)
    _check_unshared(model, ffns)


def check_projections(
    ffns: Iterable[FFN], hint: str = "convert before adapting, quantising, sharding or pruning"
) -> None:
    """Raise :class:`ConversionError` unless the weights of all projections are ordinary and finite.

    Quantised and sharded weights, and projections that an adapter wraps, are refused. ``hint`` ends
    the message about them.
    """
    for ffn in ffns:
        for path, module in ffn.projections():
            _check_projection(f"{ffn.name}.{path}", module, hint)


def _check_projection(name: str, module: nn.Module, hint: str) -> None:
    """Check that a projection has an ordinary loaded weight, and that weight and bias are finite.

    ``name`` is the projection's name in error messages. ``hint`` ends the message about a weight
    that is not an ordinary tensor.
    """
    # a computed weight (weight norm, pruning) is not a parameter
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    if weight is None or not _is_ordinary_float(weight):
        raise ConversionError(f"{name}.weight is not an ordinary floating-point parameter: {hint}")
    if weight.is_meta:
        raise ConversionError(
            f"{name}.weight is on the meta device: load the weights before converting"
        )
    for tensor_name in ("weight", "bias"):
        tensor = getattr(module, tensor_name, None)
        if isinstance(tensor, Tensor) and not torch.isfinite(tensor).all():
            raise ConversionError(f"{name}.{tensor_name} has values that are not finite")


def _is_ordinary_float(weight: nn.Parameter) -> bool:
    """Check if a weight is an ordinary floating-point tensor of at least 16 bits."""
    # a sharded or quantised weight has another class
    has_tensor_class = type(weight.detach()) is Tensor
    return has_tensor_class and weight.is_floating_point() and weight.itemsize >= 2


def _check_shapes(ffn: FFN) -> None:
    """Check that each in-projection has as many outputs as the out-projection has inputs."""
    d = ffn.d
    # a fused in-projection computes two halves of d neurons
    expected = 2 * d if ffn.spec.fused else d
    for path, module in ffn.in_projections():
        weight = cast(Tensor, module.weight)
        outputs = weight.shape[1] if ffn.spec.transposed else weight.shape[0]
        if outputs != expected:
            hint = "; set fused in emoe.FFNSpec" if outputs == 2 * d else ""
            raise ConversionError(
                f"{ffn.name}.{path} has {outputs} outputs, "
                f"but {ffn.spec.proj_out} has {d} inputs{hint}"
            )


def _check_activation(ffn: FFN) -> None:
    """Check that the activation has no parameters."""
    # an activation that is a function has no parameters
    if not isinstance(ffn.activation, nn.Module):
        return
    has_parameters = len(list(ffn.activation.parameters())) > 0
    if has_parameters:
        class_name = type(ffn.activation).__name__
        raise ConversionError(
            f"{ffn.name}.{ffn.spec.activation} ({class_name}) has parameters, "
            "which EMoE does not support"
        )


def _check_between(ffn: FFN) -> None:
    """Check that all modules between activation and out-projection are dropouts or identities."""
    for path, module in ffn.between():
        if not isinstance(module, nn.Identity | nn.Dropout):
            raise ConversionError(
                f"{ffn.name}.{path} is {type(module).__name__}, but only dropouts and nn.Identity "
                "may be between activation and out-projection"
            )


def _check_unshared(model: nn.Module, ffns: Sequence[FFN]) -> None:
    """Check that no other module shares the weights or biases.

    Reordering the neurons would change that module too.
    """
    # names of the modules that use a parameter, by the parameter's id
    users: dict[int, set[str]] = defaultdict(set)
    for name, module in model.named_modules(remove_duplicate=False):
        for parameter in module.parameters(recurse=False):
            users[id(parameter)].add(name)

    for ffn in ffns:
        for path, module in ffn.projections():
            name = f"{ffn.name}.{path}"
            for parameter_name, parameter in module.named_parameters(recurse=False):
                others = users[id(parameter)] - {name}
                if others:
                    listed = ", ".join(sorted(others))
                    raise ConversionError(
                        f"{name}.{parameter_name} is shared with {listed}: untie them first"
                    )


def check_divisible(ffns: Iterable[FFN], num_experts: int) -> None:
    """Raise :class:`ConversionError` unless ``num_experts`` divides every FFN's neurons evenly."""
    for ffn in ffns:
        if ffn.d % num_experts != 0:
            nearest = nearest_divisor(ffn.d, num_experts)
            raise ConversionError(
                f"{ffn.name}: {ffn.d} neurons cannot be split into {num_experts} experts; "
                f"the nearest number that can is {nearest}"
            )
