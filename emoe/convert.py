"""Dense model to experts and back, in place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from emoe.architectures import FFN, bias_of, find_ffns
from emoe.calibration import Batch
from emoe.checks import check_divisible, check_gated, check_plain, check_trainable, check_weights
from emoe.config import EMoEConfig, GMoEConfig, check_config
from emoe.errors import ConversionError
from emoe.guards import guard_, unguard_
from emoe.layer import RoutedActivation, routed_layers
from emoe.layer_numbers import resolve_layers
from emoe.marks import mark_, no_experts, renew_mark_
from emoe.partitioning import Partition, is_permutation
from emoe.partitioning import partition as build_partition
from emoe.projections import with_values
from emoe.registry import ROUTERS
from emoe.routers import FixedRouter
from emoe.tokens import PaddingMaskHook, remove_hooks, watch_padding, watch_passes

_ALIGNMENT = ("right", "left", *["right"] * 6)


@dataclass(frozen=True)
class LayerReport:
    """Describe one converted FFN: its layer, ``neurons`` in all, ``experts`` of ``expert_size`` neurons each.

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
    """Tell what :func:`convert_` did; ``print`` it for a table.

    ``active_neurons`` is the number of FFN neurons that a token uses, over all layers, as a share of the
    dense model's: below 1 for EMoE, above 1 for GMoE with more than one copy in use.
    """

    layers: tuple[LayerReport, ...]
    total_layers: int
    active_neurons: float
    added_parameters: int

    def __str__(self) -> str:
        from tabulate import tabulate  # `import emoe` needs torch and safetensors alone

        rows = [
            {
                "layer": row.index,
                "FFN": row.name,
                "neurons": row.neurons,
                "experts": row.experts,
                "size": row.expert_size,
                "top_k": row.top_k,
                "explained": "-" if row.explained is None else f"{row.explained:.3f}",
                "seconds": "-" if row.seconds is None else f"{row.seconds:.2f}",
            }
            for row in self.layers
        ]
        table = tabulate(rows, headers="keys", tablefmt="simple", disable_numparse=[1, 6, 7], colalign=_ALIGNMENT)
        return (
            f"{table}\n{len(self.layers)} of {self.total_layers} FFNs converted, "
            f"{self.active_neurons:.1%} of FFN neurons active per token, {self.added_parameters:,} parameters added"
        )


def convert_(
    model: nn.Module,
    config: EMoEConfig | GMoEConfig,
    *,
    partition: Mapping[int, Tensor] | None = None,
    calibration: Iterable[Batch] | None = None,
    progress: bool = False,
) -> ConversionReport:
    """Turn the chosen FFNs of ``model`` into experts, in place (the paper's method).

    EMoE permutes each FFN's neurons and routes between blocks of them; state-dict keys and shapes
    stay the dense model's (plus, below the activation, ``router.*`` of a learned router, ``router.gate`` with
    ``gate_momentum`` and ``output_bias`` unless that is ``shared``). GMoE widens each chosen
    FFN to ``num_experts`` copies. Every check is made before anything is changed.

    >>> layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    >>> model = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    >>> report = emoe.convert_(model, emoe.EMoEConfig(num_experts=4, top_k=1, layers="all"))
    >>> report.active_neurons, report.added_parameters
    (0.25, 0)

    Args:
        model: a dense model with a row in the registry (see :func:`emoe.register_ffn`).
        config: what to build.
        partition: layer number to permutation ``[d]``, from :func:`emoe.partition` or a cache; built here
            when not given. EMoE only.
        calibration: batches for a co-activation partition, see :func:`emoe.partition`.
        progress: show a progress bar while neurons are grouped.

    Raises:
        ConversionError: the model was converted before, its architecture is unknown, a width does not
            divide, a norm stands inside an FFN, weights are quantised, sharded, wrapped, shared or not
            finite, keys are zero or equal (k-means only), the FFN is frozen (GMoE only), it has no
            up-projection to score by, the router is ``fixed``, or the partition does not fit. The model is unchanged.
        ConfigError: ``layers`` matches nothing, or the configuration is none.
    """
    check_config(config, "convert_")
    if not isinstance(model, nn.Module):
        raise ConversionError(f"convert_: the model is {model!r:.80}; load it first, by its own library")
    if routed_layers(model):
        raise ConversionError(f"{type(model).__name__} is converted already; call emoe.to_dense_ first")
    ffns = find_ffns(model)
    chosen = [ffns[i] for i in resolve_layers(config.layers, len(ffns))]  # type: ignore[arg-type]
    check_weights(model, chosen)
    before, neurons = count_parameters(model), sum(ffn.d for ffn in ffns)
    if isinstance(config, GMoEConfig) and (partition is not None or calibration is not None):
        raise ConversionError("GMoE copies whole FFNs; it takes no partition")
    check_config_fits(chosen, config)
    if isinstance(config, EMoEConfig):
        if partition is None:
            partition = build_partition(model, config, calibration=calibration, progress=progress)
        _check_partition(chosen, partition)
    padding = padding_watches(model, chosen, config)
    reports = [convert_ffn(ffn, config, partition or {}, padding.get(ffn.index)) for ffn in chosen]
    watch_losses(model)
    mark_(model)
    guard_(model)
    return conversion_report(reports, config, len(ffns), neurons, count_parameters(model) - before)


def count_parameters(model: nn.Module) -> int:
    """Count the numbers that a model's parameters hold."""
    return sum(parameter.numel() for parameter in model.parameters())


def check_config_fits(ffns: list[FFN], config: EMoEConfig | GMoEConfig) -> None:
    """Check that FFNs have what a configuration asks for (:class:`ConversionError`)."""
    if isinstance(config, GMoEConfig):
        check_trainable(ffns)
        return
    check_divisible(ffns, config.num_experts)
    if ROUTERS[config.router].load() is FixedRouter:
        raise ConversionError(
            "router='fixed' needs to know which experts are used: convert with router='avg_k', record_routing rows of the task, then emoe.fix_experts_"
        )
    if config.score in ("up", "up_abs"):
        check_gated(ffns)


def padding_watches(model: nn.Module, ffns: list[FFN], config: EMoEConfig | GMoEConfig) -> dict[int, PaddingMaskHook]:
    """What tells the routed layers which tokens are padding, where the configuration makes them care."""
    cares = not config.count_padding and (config.capacity_factor is not None or config.aux_loss_coefficient > 0)
    return watch_padding(model, ffns) if cares else {}


def watch_losses(model: nn.Module) -> None:
    """Let the layers of a freshly converted model know where a forward pass begins, if they have a balance loss."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, RoutedActivation)}
    if layers := {name: layer for name, layer in found.items() if layer.config.aux_loss_coefficient > 0}:
        watch_passes(model, layers)


def _check_partition(chosen: list[FFN], partition: Mapping[int, Tensor]) -> None:
    if not isinstance(partition, Mapping):
        raise ConversionError(
            f"the partition is a {type(partition).__name__}; give layer number to permutation, as emoe.partition"
        )
    for ffn in chosen:
        if ffn.index not in partition:
            raise ConversionError(f"the partition has no layer {ffn.index}; it has {sorted(partition)}")
        if not is_permutation(partition[ffn.index], ffn.d):
            raise ConversionError(
                f"the partition's layer {ffn.index} is no permutation of {ffn.name}'s {ffn.d} neurons"
            )


def convert_ffn(
    ffn: FFN,
    config: EMoEConfig | GMoEConfig,
    partition: Mapping[int, Tensor],
    padding: PaddingMaskHook | None = None,
) -> LayerReport:
    """Turn one FFN that was checked into experts, in place.

    Args:
        ffn: to convert.
        config: what to build.
        partition: layer number to permutation; empty for GMoE.
        padding: as in :func:`attach`.
    """
    permutation, size = None, ffn.d
    if isinstance(config, GMoEConfig):
        widen(ffn, config.num_experts)
    else:
        permutation, size = partition[ffn.index].cpu(), ffn.d // config.num_experts
        ffn.permute_(permutation)
    attach(ffn, config, permutation, padding)
    notes = partition if isinstance(partition, Partition) else Partition({})
    return LayerReport(
        ffn.index,
        ffn.name,
        size * config.num_experts,
        config.num_experts,
        size,
        config.top_k,
        notes.explained.get(ffn.index),
        notes.seconds.get(ffn.index),
    )


def conversion_report(
    reports: list[LayerReport], config: EMoEConfig | GMoEConfig, ffns: int, neurons: int, added: int
) -> ConversionReport:
    """Sum up a conversion.

    Args:
        reports: of the converted FFNs.
        config: of their experts.
        ffns: how many FFNs the model has.
        neurons: of all its FFNs before.
        added: parameters.
    """
    if isinstance(config, GMoEConfig):
        active = neurons + sum(r.expert_size * (config.top_k - 1) for r in reports)
    else:
        active = neurons - sum(r.expert_size * (config.num_experts - config.num_active_experts) for r in reports)
    return ConversionReport(tuple(reports), ffns, active / neurons, added)


def attach(
    ffn: FFN, config: EMoEConfig | GMoEConfig, permutation: Tensor | None, padding: PaddingMaskHook | None
) -> RoutedActivation:
    """Put the router in place on weights that are in expert order already."""
    layer = RoutedActivation(ffn, config, permutation, padding).train(ffn.layer.training)
    ffn.replace(ffn.spec.activation, layer)
    return layer


@torch.no_grad()
def widen(ffn: FFN, copies: int) -> None:
    """Replace the projections by ``copies`` copies side by side; the output bias stays single."""
    neurons = torch.arange(ffn.d).repeat(copies)
    for path, module in [*ffn.inputs(), (ffn.spec.proj_out, ffn.proj_out)]:
        weight, bias = cast(Tensor, module.weight), bias_of(module)
        if bias is not None:
            bias = bias.clone() if path == ffn.spec.proj_out else ffn.take(f"{path}.bias", bias, neurons)
        ffn.replace(path, _like(module, ffn.take(f"{path}.weight", weight, neurons), bias))


def _like(module: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """A module of the same class and settings with other weights; its sizes follow them."""
    wide = module.__class__.__new__(module.__class__)
    nn.Module.__init__(wide)
    wide.training = module.training
    for name, value in vars(module).items():
        if not name.startswith("_") and name != "training":
            setattr(wide, name, value)
    # nn.Linear stores [out, in] and GPT-2's Conv1D [in, out]
    for name, size in zip(("out_features", "in_features", "nx", "nf"), (*weight.shape, *weight.shape), strict=True):
        if hasattr(wide, name):
            setattr(wide, name, size)
    for name, tensor in (("weight", weight), ("bias", bias)):
        parameter = cast("nn.Parameter | None", getattr(module, name, None))
        known = parameter is not None and tensor is not None
        wide.register_parameter(name, with_values(parameter, tensor) if known else None)  # type: ignore[arg-type]
    return wide


def to_dense_(model: nn.Module, *, restore_order: bool = False) -> nn.Module:
    """Fold the experts back into the dense FFN, in place: the routing is removed (EMoE2Dense).

    The weights stay as they are, bit by bit; the function does not, unless every expert was in use
    (``top_k == num_experts``): with fewer, a token had its own experts' neurons only and has all of them afterwards, so
    the outputs differ. Output biases of single experts become one:
    ``k / N`` times their sum, which is the FFN's own bias until they are trained. Adapters stay where they are.

    >>> layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    >>> model = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    >>> x = torch.ones(1, 3, 16)
    >>> before = model(x)
    >>> report = emoe.convert_(model, emoe.EMoEConfig(num_experts=4, top_k=1, layers="all"))
    >>> torch.allclose(emoe.to_dense_(model, restore_order=True)(x), before)
    True

    Args:
        model: a model converted with an :class:`EMoEConfig`.
        restore_order: also undo the permutation, so that neurons stand where they stood at first.

    Returns:
        The same model.

    Raises:
        ConversionError: nothing to fold back, a GMoE (its experts are different full FFNs and have
            no dense equal), or, with ``restore_order``, adapters on an FFN or an order that is not known (the model
            was saved by its own library, without sidecars). The model is unchanged.
    """
    layers = routed_layers(model)
    if not layers:
        raise no_experts(model, "to_dense_", "it is dense already")
    check_foldable(layer.config for layer in layers)
    if restore_order:
        check_plain(layer.ffn for layer in layers)
        check_order_known(layers)
    remove_hooks(model)
    unguard_(model)
    for layer in layers:
        layer.remove_()
        if restore_order:
            layer.ffn.permute_(torch.argsort(layer.permutation))  # type: ignore[arg-type]
    renew_mark_(model)
    return model


def check_foldable(configs: Iterable[EMoEConfig | GMoEConfig]) -> None:
    """Check that experts have a dense equal (:class:`ConversionError`)."""
    if any(isinstance(config, GMoEConfig) for config in configs):
        raise ConversionError("a GMoE has no dense equal: its experts are full FFNs that were trained apart")


def check_order_known(layers: Iterable[RoutedActivation]) -> None:
    """Check that it is known where neurons stood before the conversion (:class:`ConversionError`)."""
    unknown = [layer.ffn_name for layer in layers if layer.permutation is None]
    if unknown:
        raise ConversionError(
            f"to_dense_: where the neurons of {unknown[0]} stood at first is not known, because the model was saved without "
            "emoe.save_pretrained or emoe.TrainerCallback, or took a state dict of other weights; leave restore_order out"
        )
