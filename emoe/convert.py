"""Convert a dense model to experts and back, in place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from emoe.architectures import FFN, find_ffns, is_plain_tensor
from emoe.calibration import Batch
from emoe.checks import check_divisible, check_plain, check_weights
from emoe.config import EMoEConfig, GMoEConfig, resolve_layers
from emoe.errors import CheckpointError, ConversionError
from emoe.layer import RoutedActivation, check_one_conversion, resize_parameter_, routed_layers
from emoe.model_config import describe_experts_, described_configs, own_config_, update_description_
from emoe.partitioning import Partition, is_permutation
from emoe.partitioning import partition as build_partition
from emoe.tokens import remove_argument_hooks, watch_padding

# columns of the table, one per field of LayerReport
_HEADERS = ("layer", "FFN", "neurons", "experts", "size", "top_k", "explained", "seconds")
_FORMATS = ("", "", "", "", "", "", ".3f", ".2f")
_SIMILAR = (
    0.5  # mean cosine of keys; the same model in training is above it, another model far below
)


@dataclass(frozen=True)
class LayerReport:
    """Describe one converted FFN: its layer, and its ``neurons``, split into ``experts`` of ``expert_size`` neurons.

    ``explained`` is the share of the variance between keys that the partition explains (None for GMoE), and
    ``seconds`` the time that the partition took.
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
    """Describe a conversion by :func:`convert_`; ``print`` it for a table.

    ``active_neurons`` is the number of FFN neurons that a token uses in all layers, divided by the number of FFN
    neurons of the dense model: below 1 for EMoE, above 1 for GMoE with more than one active copy.
    """

    layers: tuple[LayerReport, ...]
    total_layers: int
    active_neurons: float
    added_parameters: int

    def __str__(self) -> str:
        from tabulate import tabulate  # `import emoe` needs only torch and safetensors

        rows = [astuple(row) for row in self.layers]
        table = tabulate(rows, _HEADERS, "simple", _FORMATS, missingval="-", disable_numparse=[1])
        converted = f"{len(self.layers)} of {self.total_layers} FFNs converted"
        active = f"{self.active_neurons:.1%} of FFN neurons active per token"
        return f"{table}\n{converted}, {active}, {self.added_parameters:,} parameters added"


def convert_(
    model: nn.Module,
    config: EMoEConfig | GMoEConfig,
    *,
    partition: Mapping[int, Tensor] | None = None,
    calibration: Iterable[Batch] | None = None,
    progress: bool = False,
) -> ConversionReport:
    """Turn the chosen FFNs of a model into experts, in place (the paper's method).

    EMoE permutes each FFN's neurons and routes between blocks of them. State-dict keys and shapes do not change.
    Below the activation, EMoE adds the keys ``router.*`` for a learned router, ``router.gate`` with
    ``gate_momentum``, and ``output_bias`` unless the bias is shared. GMoE widens each chosen FFN to ``num_experts``
    copies. If a check fails, the model is unchanged.

    Args:
        model: dense model with a row in the registry (see :func:`emoe.register_ffn`).
        config: configuration of the experts.
        partition: permutations ``[d]`` by layer number, EMoE only. If None, :func:`emoe.partition` computes them.
        calibration: batches for a co-activation partition, see :func:`emoe.partition`.
        progress: show a progress bar during the partition.

    Raises:
        ConversionError: the model, one of its chosen FFNs or the partition does not fit the configuration.
        ConfigError: ``layers`` matches nothing.
    """
    if routed_layers(model):
        raise ConversionError(
            f"{type(model).__name__} is converted already; call emoe.to_dense_ first"
        )
    ffns = find_ffns(model)
    chosen = [ffns[i] for i in resolve_layers(config.layers, len(ffns))]  # type: ignore[arg-type]
    check_weights(model, chosen)
    before, neurons = count_parameters(model), sum(ffn.d for ffn in ffns)
    check_config_fits(chosen, config)
    if isinstance(config, EMoEConfig):
        if partition is None:
            partition = build_partition(model, config, calibration=calibration, progress=progress)
        for ffn in chosen:
            if not is_permutation(partition.get(ffn.index), ffn.d):
                raise ConversionError(
                    f"the partition has no permutation of {ffn.d} neurons for layer {ffn.index}"
                )
    elif partition is not None or calibration is not None:
        raise ConversionError("GMoE copies whole FFNs; it takes no partition")
    reports = [convert_ffn(ffn, config, partition or {}) for ffn in chosen]
    finish_conversion_(model)
    return conversion_report(reports, config, len(ffns), neurons, count_parameters(model) - before)


def count_parameters(model: nn.Module) -> int:
    """Count the elements of a model's parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def check_config_fits(ffns: list[FFN], config: EMoEConfig | GMoEConfig) -> None:
    """Raise :class:`ConversionError` if FFNs lack something that a configuration needs."""
    if isinstance(config, GMoEConfig):
        for ffn in ffns:
            for path, module in ffn.projections():
                if not cast(
                    Tensor, module.weight
                ).requires_grad:  # copies of a frozen FFN would stay equal
                    raise ConversionError(
                        f"{ffn.name}.{path} is frozen, but GMoE's copies must train: unfreeze it"
                    )
        return
    check_divisible(ffns, config.num_experts)
    if config.router == "fixed":
        raise ConversionError(
            "router='fixed' needs usage: convert with router='avg_k', then call emoe.fix_experts_"
        )
    for ffn in ffns:
        if config.score in ("up", "up_abs") and not ffn.gated:
            raise ConversionError(
                f"{ffn.name} is not gated: choose score 'keys', 'gate', 'inter' or 'inter_abs'"
            )


def convert_ffn(
    ffn: FFN, config: EMoEConfig | GMoEConfig, partition: Mapping[int, Tensor]
) -> LayerReport:
    """Turn one FFN into experts, in place, without checks. The partition is empty for GMoE."""
    permutation = None
    if isinstance(config, GMoEConfig):
        widen(ffn, config.num_experts)
    else:
        permutation = partition[ffn.index].cpu()
        ffn.permute_(permutation)
    RoutedActivation(ffn, config, permutation)
    notes = partition if isinstance(partition, Partition) else Partition({})
    explained, seconds = notes.explained.get(ffn.index), notes.seconds.get(ffn.index)
    experts, size = config.num_experts, ffn.d // config.num_experts
    return LayerReport(ffn.index, ffn.name, ffn.d, experts, size, config.top_k, explained, seconds)


def conversion_report(
    reports: list[LayerReport], config: EMoEConfig | GMoEConfig, ffns: int, neurons: int, added: int
) -> ConversionReport:
    """Summarize a conversion, given the dense model's number of FFNs and neurons, and the number of new parameters."""
    dense_experts = (
        1 if isinstance(config, GMoEConfig) else config.num_experts
    )  # experts that compute the dense FFN
    active = neurons + sum(
        report.expert_size * (config.num_active_experts - dense_experts) for report in reports
    )
    return ConversionReport(tuple(reports), ffns, active / neurons, added)


@torch.no_grad()
def widen(ffn: FFN, copies: int) -> None:
    """Repeat the neurons ``copies`` times in each projection, in place. The output bias is not copied."""
    neurons = torch.arange(ffn.d).repeat(copies)
    for path, module in ffn.projections():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if f"{path}.{name}" in ffn.neuron_dims():
                resize_parameter_(module, name, ffn.take(f"{path}.{name}", parameter, neurons))
        # nn.Linear stores [out, in] and GPT-2's Conv1D [in, out]
        rows, columns = cast(Tensor, module.weight).shape
        for name, size in (
            ("out_features", rows),
            ("in_features", columns),
            ("nx", rows),
            ("nf", columns),
        ):
            if hasattr(module, name):
                setattr(module, name, size)


def to_dense_(model: nn.Module, *, restore_order: bool = False) -> nn.Module:
    """Fold the experts back into the dense FFN, in place, by removing the routing (EMoE2Dense).

    The weights stay as they are, bit by bit, and adapters stay in place. The outputs change unless every expert was in
    use (``top_k == num_experts``). The experts' output biases become one, ``k / N`` times their sum. Before training
    this is the dense FFN's bias.

    >>> layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    >>> model = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    >>> x = torch.ones(1, 3, 16)
    >>> before = model(x)
    >>> report = emoe.convert_(model, emoe.EMoEConfig(num_experts=4, top_k=1, layers="all"))
    >>> torch.allclose(emoe.to_dense_(model, restore_order=True)(x), before)
    True

    Args:
        model: model converted with an :class:`EMoEConfig`.
        restore_order: also restore the original order of the neurons.

    Returns:
        The same model.

    Raises:
        ConversionError: the model is dense or a GMoE, or, with ``restore_order``, an FFN has adapters or its order is
            unknown (the model was saved without ``emoe_partition.safetensors``). The model is unchanged.
    """
    layers = converted_layers(model, "to_dense_", "it is dense already")
    if any(isinstance(layer.config, GMoEConfig) for layer in layers):
        raise ConversionError(
            "a GMoE has no dense equal: its experts are full FFNs that were trained separately"
        )
    if restore_order:
        check_plain(layer.ffn for layer in layers)
        for layer in layers:
            if layer.permutation is None:
                raise ConversionError(
                    f"{layer.ffn.name}: the neurons' order is unknown; leave out restore_order"
                )
    for layer in layers:
        layer.remove_()
        if restore_order:
            layer.ffn.permute_(torch.argsort(layer.permutation))  # type: ignore[arg-type]
    remove_argument_hooks(model)
    update_description_(model)
    return model


def finish_conversion_(model: nn.Module) -> None:
    """Finish the conversion of a model: describe the experts in its configuration and register hooks.

    The hooks check the state dicts that are loaded and, if the configuration needs it, read the padding mask.
    """
    own_config_(model)
    describe_experts_(model)
    model.register_load_state_dict_pre_hook(_check_state)
    layers = routed_layers(model)
    for part in _parts_with_experts(model):
        part.register_load_state_dict_pre_hook(_check_state_of_part)
    config = layers[0].config
    if not config.count_padding and (
        config.capacity_factor is not None or config.aux_loss_coefficient > 0
    ):
        hooks = watch_padding(model, [layer.ffn for layer in layers])
        for layer in layers:
            layer.padding = hooks.get(layer.ffn.index)


def _parts_with_experts(model: nn.Module) -> list[nn.Module]:
    """Return the modules below a model that contain a routed FFN: the base model, the list of layers, a layer, …"""
    paths = set()
    for name, module in model.named_modules():
        if isinstance(module, RoutedActivation):
            while "." in name:
                name = name.rpartition(".")[0]
                paths.add(name)
    return [model.get_submodule(path) for path in sorted(paths)]


def _check_state_of_part(
    part: nn.Module, state: Mapping[str, Any], prefix: str, *_: object
) -> None:
    """Check the state that is loaded into a part of a converted model."""
    if prefix == "":  # else the state of a larger module is loaded, whose hook has checked it
        _check_state(part, state, prefix)


def _check_state(model: nn.Module, state: Mapping[str, Any], prefix: str, *_: object) -> None:
    """Raise :class:`CheckpointError` for a dense model's state, before anything is loaded."""
    names = {id(module): f"{prefix}{name}" for name, module in model.named_modules()}
    for layer in routed_layers(model):
        name = names.get(id(layer.ffn.proj_in))
        incoming = state.get(f"{name}.weight", state.get(f"{name}.base_layer.weight"))
        if layer.permutation is not None and _is_comparable(layer.ffn, incoming):
            _check_order_(layer, cast(Tensor, incoming))


def _is_comparable(ffn: FFN, incoming: Any) -> bool:
    """Check if an in-projection's weight and the one to be loaded are plain tensors of the same shape."""
    present = cast(Tensor, ffn.proj_in.weight)
    are_plain = is_plain_tensor(incoming) and is_plain_tensor(present)
    return are_plain and incoming.shape == present.shape


def _check_order_(layer: RoutedActivation, weight: Tensor) -> None:
    """Compare the order of the neurons in an in-projection's weight that is to be loaded with the present one.

    Raises :class:`CheckpointError` if it is the dense model's. If the weight is another model's, the layer's original
    order becomes unknown.
    """
    permutation = cast(Tensor, layer.permutation)
    keys = layer.ffn.keys().detach().float()
    incoming = layer.ffn.keys_of(weight).to(keys)
    stored = float(F.cosine_similarity(keys, incoming, dim=1).mean())
    dense = float(F.cosine_similarity(keys, incoming[permutation.to(keys.device)], dim=1).mean())
    # if both orders are equal, similarities differ only by rounding
    orders_differ = bool((permutation.diff() != 1).any())
    if orders_differ and dense > max(stored, _SIMILAR):
        way_out = "load it before emoe.convert_, or after emoe.to_dense_(model, restore_order=True)"
        raise CheckpointError(
            f"{layer.ffn.name}: the state dict has a dense model's order of neurons; {way_out}"
        )
    if stored < _SIMILAR:
        layer.permutation = None


def is_converted(model: nn.Module) -> bool:
    """Check if a model has experts.

    Args:
        model: any model, also wrapped by PEFT, DDP or ``torch.compile``.
    """
    return bool(routed_layers(model))


def config_of(model: nn.Module) -> EMoEConfig | GMoEConfig:
    """Return the configuration of a model's experts.

    Args:
        model: converted model, also wrapped by PEFT, DDP or ``torch.compile``.

    Raises:
        ConversionError: the model is not converted, or its parts were converted separately.
    """
    layers = converted_layers(model, "config_of")
    check_one_conversion(layers, "config_of")
    return layers[0].config


def converted_layers(
    model: nn.Module, caller: str, hint: str = "convert it first"
) -> list[RoutedActivation]:
    """Return a model's routed FFNs; raise :class:`ConversionError` with a hint if there are none."""
    layers = routed_layers(model)
    if not layers:
        if described_configs(model):
            hint = "its configuration describes experts, but its stock class loaded it as dense: use emoe.from_pretrained"
        raise ConversionError(f"{caller}: the model has no routed FFN; {hint}")
    return layers
