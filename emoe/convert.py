"""Dense model to experts and back, in place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from emoe.architectures import FFN, find_ffns, resolve_layers
from emoe.config import EMoEConfig, GMoEConfig
from emoe.errors import ConversionError
from emoe.layer import RoutedActivation, routed_layers
from emoe.partitioning import Partition, check_divisible, check_keys
from emoe.partitioning import partition as build_partition


@dataclass(frozen=True)
class LayerReport:
    """One converted FFN: its layer, ``neurons`` in all, ``experts`` of ``expert_size`` neurons each.

    ``explained`` is the share of the variance between keys that the grouping explains (None for
    GMoE, which groups nothing) and ``seconds`` the time that grouping took.
    """

    index: int
    name: str
    neurons: int
    experts: int
    expert_size: int
    top_k: int
    explained: float | None
    seconds: float | None


@dataclass(frozen=True)
class ConversionReport:
    """What :func:`convert_` did; ``print`` it for a table.

    ``active_neurons`` is the number of FFN neurons that a token uses, over all layers, as a share of the
    dense model's: below 1 for EMoE, above 1 for GMoE with more than one copy in use.
    """

    layers: tuple[LayerReport, ...]
    total_layers: int
    active_neurons: float
    added_parameters: int

    def __str__(self) -> str:
        head = f"{'layer':<28}{'neurons':>9}{'experts':>9}{'size':>7}{'top_k':>7}{'explained':>11}{'seconds':>9}"
        lines = [head, "-" * len(head)]
        for row in self.layers:
            explained = "-" if row.explained is None else f"{row.explained:.3f}"
            seconds = "-" if row.seconds is None else f"{row.seconds:.2f}"
            lines.append(
                f"{row.name:<28}{row.neurons:>9}{row.experts:>9}{row.expert_size:>7}{row.top_k:>7}{explained:>11}{seconds:>9}"
            )
        lines.append(
            f"{len(self.layers)} of {self.total_layers} FFNs converted, "
            f"{self.active_neurons:.1%} of FFN neurons active per token, {self.added_parameters:,} parameters added"
        )
        return "\n".join(lines)


def convert_(
    model: nn.Module, config: EMoEConfig | GMoEConfig, *, partition: Mapping[int, Tensor] | None = None
) -> ConversionReport:
    """Turn the chosen FFNs of ``model`` into experts, in place (the paper's method).

    EMoE permutes each FFN's neurons and routes between blocks of them; state-dict keys and shapes
    stay the dense model's (plus the router's with ``router="cosine"``). GMoE widens each chosen
    FFN to ``num_experts`` copies. Every check is made before anything is changed.

    Args:
        model: a dense model with a row in the registry (see :func:`emoe.register_ffn`).
        config: what to build.
        partition: layer number to permutation, from :func:`emoe.partition` or a cache; built here
            when not given. EMoE only.

    Raises:
        ConversionError: the model was converted before, its architecture is unknown, a width does not
            divide, a norm stands inside an FFN, weights are quantised, wrapped or not finite, or the
            partition does not fit. The model is unchanged.
        ConfigError: ``layers`` matches nothing.
    """
    if routed_layers(model):
        raise ConversionError(f"{type(model).__name__} is converted already; call emoe.to_dense_ first")
    ffns = find_ffns(model)
    chosen = [ffns[i] for i in resolve_layers(config.layers, len(ffns))]  # type: ignore[arg-type]
    check_keys(chosen)
    for ffn in chosen:
        _check_no_norm(ffn)
    before = sum(p.numel() for p in model.parameters())
    neurons = sum(ffn.keys().shape[0] for ffn in ffns)
    if isinstance(config, GMoEConfig):
        if partition is not None:
            raise ConversionError("GMoE copies whole FFNs; it takes no partition")
        reports = [_copy(ffn, config) for ffn in chosen]
        active = neurons + sum(r.expert_size * (config.top_k - 1) for r in reports)
    else:
        check_divisible(chosen, config.num_experts)
        if partition is None:
            partition = build_partition(model, config)
        _check_partition(chosen, partition)
        reports = [_split(ffn, config, partition) for ffn in chosen]
        used = config.num_experts - config.top_k if config.selection == "not_top" else config.top_k
        active = neurons - sum(r.expert_size * (config.num_experts - used) for r in reports)
    added = sum(p.numel() for p in model.parameters()) - before
    return ConversionReport(tuple(reports), len(ffns), active / neurons, added)


def _check_no_norm(ffn: FFN) -> None:
    if ffn.spec.norm is None:
        return
    norm = ffn.layer.get_submodule(ffn.spec.norm)
    if not isinstance(norm, nn.Identity):
        raise ConversionError(
            f"{ffn.name}.{ffn.spec.norm} is {type(norm).__name__}: a norm between activation and out-projection mixes the experts"
        )


def _check_partition(chosen: list[FFN], partition: Mapping[int, Tensor]) -> None:
    for ffn in chosen:
        if ffn.index not in partition:
            raise ConversionError(f"the partition has no layer {ffn.index}; it has {sorted(partition)}")
        d = ffn.keys().shape[0]
        if not torch.equal(partition[ffn.index].sort().values.cpu(), torch.arange(d)):
            raise ConversionError(f"the partition's layer {ffn.index} is no permutation of {ffn.name}'s {d} neurons")


def _split(ffn: FFN, config: EMoEConfig, partition: Mapping[int, Tensor]) -> LayerReport:
    permutation = partition[ffn.index].cpu()
    ffn.permute_(permutation)
    attach(ffn, config, permutation)
    notes = partition if isinstance(partition, Partition) else Partition({})
    return _report(
        ffn,
        config,
        len(permutation) // config.num_experts,
        notes.explained.get(ffn.index),
        notes.seconds.get(ffn.index),
    )


def _copy(ffn: FFN, config: GMoEConfig) -> LayerReport:
    size = ffn.keys().shape[0]
    widen(ffn, config.num_experts)
    attach(ffn, config, None)
    return _report(ffn, config, size, None, None)


def _report(
    ffn: FFN, config: EMoEConfig | GMoEConfig, size: int, explained: float | None, seconds: float | None
) -> LayerReport:
    return LayerReport(
        ffn.index, ffn.name, size * config.num_experts, config.num_experts, size, config.top_k, explained, seconds
    )


def attach(ffn: FFN, config: EMoEConfig | GMoEConfig, permutation: Tensor | None) -> RoutedActivation:
    """Put the router in place on weights that are in expert order already."""
    layer = RoutedActivation(ffn, config, permutation).train(ffn.layer.training)
    ffn.replace(ffn.spec.activation, layer)
    return layer


@torch.no_grad()
def widen(ffn: FFN, copies: int) -> None:
    """Replace the projections by ``copies`` copies side by side; the output bias stays single."""
    dim = ffn.neuron_dim_in
    for path, module in ffn.inputs():
        ffn.replace(path, _repeated(module, copies, dim, repeat_bias=True))
    ffn.replace(ffn.spec.proj_out, _repeated(ffn.proj_out, copies, 1 - dim, repeat_bias=False))


def _repeated(module: nn.Module, copies: int, dim: int, *, repeat_bias: bool) -> nn.Module:
    """A module of the same class and settings whose weight is repeated along ``dim``."""
    weight, bias = cast(nn.Parameter, module.weight), cast(nn.Parameter | None, module.bias)
    repeats = [copies if i == dim else 1 for i in range(2)]
    wide = module.__class__.__new__(module.__class__)
    nn.Module.__init__(wide)
    wide.training = module.training
    for name, value in vars(module).items():
        if not name.startswith("_") and name != "training":
            setattr(wide, name, value)
    for name in ("out_features", "nf") if repeat_bias else ("in_features", "nx"):
        if hasattr(wide, name):
            setattr(wide, name, getattr(wide, name) * copies)
    wide.weight = nn.Parameter(weight.repeat(repeats), requires_grad=weight.requires_grad)
    if bias is None:
        wide.register_parameter("bias", None)
    else:
        wide.bias = nn.Parameter(bias.repeat(copies) if repeat_bias else bias.clone(), requires_grad=bias.requires_grad)
    return wide


def to_dense_(model: nn.Module, *, restore_order: bool = False) -> nn.Module:
    """Fold the experts back into the dense FFN, in place: the routing is removed (EMoE2Dense).

    The weights stay as they are, so for a model whose every expert was in use
    (``top_k == num_experts``) the function does not change.

    Args:
        model: a model converted with an :class:`EMoEConfig`.
        restore_order: also undo the permutation, so that neurons stand where they stood at first.

    Returns:
        The same model.

    Raises:
        ConversionError: nothing to fold back, a GMoE (its experts are different full FFNs and have
            no dense equal), or, with ``restore_order``, adapters on an FFN. The model is unchanged.
    """
    layers = routed_layers(model)
    if not layers:
        raise ConversionError(f"{type(model).__name__} has no routed FFN to fold back")
    if any(isinstance(layer.config, GMoEConfig) for layer in layers):
        raise ConversionError("a GMoE has no dense equal: its experts are full FFNs that were trained apart")
    ffns = {layer.ffn_index: _ffn_of(model, layer) for layer in layers}
    if restore_order:
        check_keys(ffns.values())
    for layer in layers:
        ffn = ffns[layer.ffn_index]
        layer.remove_hook()
        ffn.replace(ffn.spec.activation, layer.activation)
        if restore_order and layer.permutation is not None:
            ffn.permute_(torch.argsort(layer.permutation))
    return model


def _ffn_of(model: nn.Module, layer: RoutedActivation) -> FFN:
    return next(ffn for ffn in find_ffns(model) if ffn.index == layer.ffn_index)
