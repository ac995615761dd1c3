"""What can be wrong with a model, found before anything is changed. Every check raises :class:`ConversionError`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from emoe.architectures import FFN
from emoe.errors import ConversionError, nearest_divisor
from emoe.layer import RoutedActivation


def check_weights(model: nn.Module, ffns: Sequence[FFN]) -> None:
    """Plain, finite, unshared floating-point weights of matching shapes, and nothing between the neurons."""
    check_plain(ffns)
    for ffn in ffns:
        _check_shapes(ffn)
        _check_between(ffn)
    check_unshared(model, ffns)


def check_plain(ffns: Iterable[FFN]) -> None:
    """Plain, finite floating-point weights: not quantised, sharded or wrapped by an adapter."""
    for ffn in ffns:
        for path, module in projections(ffn):
            _check_weight(f"{ffn.name}.{path}", module)


def projections(ffn: FFN) -> list[tuple[str, nn.Module]]:
    """The in-projections and the out-projection of an FFN with their paths below the layer."""
    return [*ffn.inputs(), (ffn.spec.proj_out, ffn.proj_out)]


def _check_weight(name: str, module: nn.Module) -> None:
    if hasattr(module, "base_layer"):
        raise ConversionError(f"{name} carries an adapter: convert first, or merge it (model.merge_and_unload())")
    weight = module._parameters.get("weight")
    what = f"{name} ({type(module).__name__})"
    # one that is computed (weight norm, pruning) is no parameter, a sharded or quantised one of another class
    if weight is None:
        raise ConversionError(f"{what} has no plain weight: convert before quantising, pruning or parametrising")
    if type(weight.detach()) is not Tensor or not weight.is_floating_point() or weight.itemsize < 2:
        kind = str(weight.dtype) if type(weight.detach()) is Tensor else type(weight).__name__
        raise ConversionError(f"{what} has a weight of {kind}: convert before quantising, sharding or adding adapters")
    if weight.ndim != 2:
        raise ConversionError(f"{what} has a weight of {weight.ndim} dimensions; only linear projections can be split")
    if weight.is_meta:
        raise ConversionError(f"{name}.weight is on the meta device: load the weights before converting")
    if weight.is_inference():
        raise ConversionError(
            f"{name}.weight is frozen: it was made under torch.inference_mode and cannot be changed; load the model outside of it"
        )
    for part in ("weight", "bias"):
        tensor = getattr(module, part, None)
        if isinstance(tensor, Tensor) and not torch.isfinite(tensor).all():
            raise ConversionError(f"{name}.{part} holds values that are not finite")


def _check_shapes(ffn: FFN) -> None:
    d, factor = ffn.d, 2 if ffn.spec.fused else 1
    if d == 0:
        raise ConversionError(f"{ffn.name}.{ffn.spec.proj_out} has no neurons")
    for path, module in ffn.inputs():
        rows = module.weight.shape[ffn.neuron_dim_in]  # type: ignore[index]
        if rows != factor * d:
            raise ConversionError(
                f"{ffn.name}.{path} has {rows} outputs where {ffn.spec.proj_out} has {d} inputs: they are not the two sides "
                f"of one FFN{' (a fused gate and up-projection? see fused in emoe.FFNSpec)' if rows == 2 * d else ''}"
            )


def _check_between(ffn: FFN) -> None:
    if next(ffn.activation.parameters(), None) is not None:
        raise ConversionError(
            f"{ffn.name}.{ffn.spec.activation} ({type(ffn.activation).__name__}) has parameters of its own, "
            "which the routed FFN has no place for"
        )
    for path in ffn.spec.between:
        module = ffn.layer.get_submodule(path)
        if not isinstance(module, nn.Identity | nn.Dropout):
            raise ConversionError(
                f"{ffn.name}.{path} is {type(module).__name__}: a norm between activation and out-projection mixes the experts"
            )


def check_unshared(model: nn.Module, ffns: Sequence[FFN]) -> None:
    """Permuting a weight that another module uses too would change that module."""
    users: dict[int, set[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for parameter in module.parameters(recurse=False):
            users.setdefault(id(parameter), set()).add(name)
    for ffn in ffns:
        for path, module in projections(ffn):
            others = users.get(id(module.weight), set()) - {f"{ffn.name}.{path}"}
            if others:
                raise ConversionError(
                    f"{ffn.name}.{path}.weight is shared with {', '.join(sorted(others))}: untie them before converting"
                )


def check_divisible(ffns: Iterable[FFN], num_experts: int) -> None:
    """``num_experts`` divides the width of every FFN."""
    for ffn in ffns:
        if ffn.d % num_experts:
            raise ConversionError(
                f"{ffn.name}: {ffn.d} neurons cannot be split into {num_experts} equal experts; the nearest number that can is {nearest_divisor(ffn.d, num_experts)}"
            )


def check_trainable(ffns: Iterable[FFN]) -> None:
    """The FFNs train; copies of a frozen one would stay equal, and routing between them would mean nothing."""
    for ffn in ffns:
        for path, module in projections(ffn):
            if not module.weight.requires_grad:
                raise ConversionError(
                    f"{ffn.name}.{path} is frozen: GMoE's copies would never differ. Set requires_grad before converting "
                    "(EMoE takes frozen FFNs)"
                )


def check_gated(ffns: Iterable[FFN]) -> None:
    """The FFNs have an up-projection."""
    for ffn in ffns:
        if not ffn.gated:
            raise ConversionError(
                f"{ffn.name} is no gated FFN and has no up-projection to score by; choose score 'keys', 'gate', 'inter' or 'inter_abs'"
            )


def check_distinct_keys(ffns: Iterable[FFN]) -> None:
    """Every key has a direction, and no two neurons have the same key; k-means cannot tell such neurons apart."""
    way_out = "use partition='random', 'contiguous' or 'coactivation', or pass a partition of your own"
    for ffn in ffns:
        keys = ffn.keys().detach()
        name = f"{ffn.name}.{ffn.spec.proj_in}"
        zero = (keys == 0).all(1).nonzero().flatten().tolist()
        if zero:
            raise ConversionError(
                f"{name}: the keys of neurons {_some(zero)} are all zero and have no direction; {way_out}"
            )
        seen: dict[bytes, int] = {}
        for row, key in enumerate(keys.float().cpu().contiguous()):
            first = seen.setdefault(hashlib.sha256(key.numpy().data).digest(), row)
            if first != row:
                raise ConversionError(f"{name}: neurons {first} and {row} have the same key; {way_out}")


def check_one_conversion(layers: Sequence[RoutedActivation], what: str) -> None:
    """Refuse a model whose parts were converted apart (:class:`ConversionError`): their layer numbers collide."""
    if len({layer.ffn_index for layer in layers}) < len(layers) or len({layer.config for layer in layers}) > 1:
        raise ConversionError(f"{what}: parts of the model were converted apart; take each part for itself")


def _some(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:5])) + (f" and {len(numbers) - 5} more" if len(numbers) > 5 else "")
