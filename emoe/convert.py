"""Convert a dense model to experts and back, in place."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from emoe.architectures import FFN, find_ffns, is_local_tensor
from emoe.calibration import Batch
from emoe.checks import check_convertible, check_divisible, check_projections
from emoe.config import EMoEConfig, GMoEConfig, resolve_layers
from emoe.errors import CheckpointError, ConversionError
from emoe.layer import RoutedActivation, check_one_conversion, resize_parameter_, routed_layers
from emoe.model_config import (
    check_holds_described_experts,
    copy_config_,
    describe_experts_,
    described_configs,
    update_description_,
)
from emoe.partitioning import Partition, is_permutation
from emoe.partitioning import partition as build_partition
from emoe.tokens import check_unchunked, remove_argument_hooks, watch_padding

# columns of the table, one per field of LayerReport
_HEADERS = ("layer", "FFN", "neurons", "experts", "size", "top_k", "explained", "seconds")
_FORMATS = ("", "", "", "", "", "", ".3f", ".2f")
# Two weights belong to the same model if the mean cosine of their keys is at least this. It stays
# higher while a model is trained. For another model it is far lower.
_SAME_MODEL_COSINE = 0.5
# Two keys with a higher cosine are the same neuron, perhaps trained further.
_SAME_NEURON_COSINE = 0.9
_SAMPLED_NEURONS = 64  # number of loaded neurons whose counterparts are searched


@dataclass(frozen=True)
class LayerReport:
    """One converted FFN.

    Attributes:
        index: number of the FFN in the model.
        name: qualified name of the FFN's layer.
        neurons: number of neurons of all experts.
        experts: number of experts.
        expert_size: number of neurons of an expert.
        top_k: the configuration's ``top_k``.
        explained: share of the normalised keys' variance that the partition explains. None for
            GMoE, and for a partition that :func:`emoe.partition` has not computed.
        seconds: time that the partition took. None if ``explained`` is None.
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
    """The result of :func:`convert_`; ``print`` it for a table.

    Attributes:
        layers: one report for each converted FFN.
        total_layers: number of FFNs in the model.
        active_neurons: number of FFN neurons that a token uses in all layers, divided by the number
            of FFN neurons of the dense model. At most 1 for EMoE, above 1 for GMoE with more than
            one active copy.
        added_parameters: number of parameters that the dense model does not have.
    """

    layers: tuple[LayerReport, ...]
    total_layers: int
    active_neurons: float
    added_parameters: int

    def __str__(self) -> str:
        from tabulate import tabulate  # `import emoe` needs only torch and safetensors

        rows = [astuple(layer) for layer in self.layers]
        table = tabulate(
            rows,
            headers=_HEADERS,
            tablefmt="simple",
            floatfmt=_FORMATS,
            missingval="-",
            disable_numparse=[1],  # the FFN's name, which may look like a number
        )
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

    EMoE permutes each FFN's neurons and routes between blocks of them. The dense model's names and
    shapes in the state dict do not change. Some configurations add names, all of which begin with
    the name of the activation. A learned router adds ``router.*``, and ``gate_momentum`` adds
    ``router.gate``. If the output bias is not shared, ``output_bias`` and ``output_bias_parts`` are
    added. GMoE widens each chosen FFN to ``num_experts`` copies. If a check fails, the model is
    unchanged.

    Args:
        model: dense model with a row in the registry (see :func:`emoe.register_ffn`).
        config: configuration of the experts.
        partition: permutations ``[d]`` by layer number, EMoE only. If None, :func:`emoe.partition`
            computes them.
        calibration: batches for a co-activation partition, see :func:`emoe.partition`. Not together
            with ``partition``.
        progress: show a progress bar during the partition.

    Returns:
        A report of the converted FFNs; ``print`` it for a table.

    Raises:
        ConversionError: the model, one of its chosen FFNs or the partition does not fit the
            configuration.
        ConfigError: ``layers`` matches no layer of the model.
    """
    if routed_layers(model):
        raise ConversionError(
            f"{type(model).__name__} is converted already; call emoe.to_dense_ first"
        )
    ffns = find_ffns(model)
    numbers = resolve_layers(config.layers, len(ffns))
    chosen = [ffns[number] for number in numbers]
    check_convertible(model, chosen)
    _check_config_fits(chosen, config)
    if config.counts_tokens:
        check_unchunked(model)

    permutations: Mapping[int, Tensor]
    if isinstance(config, GMoEConfig):
        if partition is not None or calibration is not None:
            raise ConversionError("GMoE copies whole FFNs; it takes no partition")
        permutations = {}
    elif partition is None:
        permutations = build_partition(model, config, calibration=calibration, progress=progress)
    else:
        if calibration is not None:
            raise ConversionError(
                "convert_ takes a partition, or calibration to compute one, but not both"
            )
        _check_permutations(partition, chosen)
        permutations = partition

    # before the conversion, which changes these numbers
    num_dense_parameters = _count_parameters(model)
    num_dense_neurons = sum(ffn.d for ffn in ffns)
    reports = [_convert_ffn(ffn, config, permutations) for ffn in chosen]
    finish_conversion_(model)
    return _build_report(
        reports,
        config,
        num_ffns=len(ffns),
        num_dense_neurons=num_dense_neurons,
        num_added=_count_parameters(model) - num_dense_parameters,
    )


def _check_permutations(partition: Mapping[int, Tensor], ffns: Iterable[FFN]) -> None:
    """Raise :class:`ConversionError` if a partition lacks a permutation of an FFN's neurons."""
    for ffn in ffns:
        if not is_permutation(partition.get(ffn.index), ffn.d):
            raise ConversionError(
                f"the partition has no permutation of {ffn.d} neurons for layer {ffn.index}"
            )


def _count_parameters(model: nn.Module) -> int:
    """Count the elements of a model's parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def _check_config_fits(ffns: list[FFN], config: EMoEConfig | GMoEConfig) -> None:
    """Raise :class:`ConversionError` if FFNs lack something that a configuration needs."""
    if isinstance(config, GMoEConfig):
        _check_trainable(ffns)
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


def _check_trainable(ffns: Iterable[FFN]) -> None:
    """Raise :class:`ConversionError` if a weight is frozen: its copies would stay equal."""
    for ffn in ffns:
        for path, module in ffn.projections():
            weight = cast(Tensor, module.weight)
            if not weight.requires_grad:
                raise ConversionError(
                    f"{ffn.name}.{path} is frozen, but GMoE's copies must train: unfreeze it"
                )


def _convert_ffn(
    ffn: FFN, config: EMoEConfig | GMoEConfig, permutations: Mapping[int, Tensor]
) -> LayerReport:
    """Turn one FFN into experts, in place and without checks, and return its report.

    ``permutations`` are the permutations of the neurons by layer number. They are empty for GMoE.
    """
    permutation = None
    if isinstance(config, GMoEConfig):
        widen(ffn, config.num_experts)
    else:
        permutation = permutations[ffn.index].cpu()
        ffn.permute_(permutation)
    # the constructor puts the module into the model
    RoutedActivation(ffn, config, permutation)

    # A Partition also has these numbers for the report. Permutations that the caller passed as a
    # dictionary have none.
    explained = None
    seconds = None
    if isinstance(permutations, Partition):
        explained = permutations.explained.get(ffn.index)
        seconds = permutations.seconds.get(ffn.index)
    return LayerReport(
        index=ffn.index,
        name=ffn.name,
        neurons=ffn.d,
        experts=config.num_experts,
        expert_size=ffn.d // config.num_experts,
        top_k=config.top_k,
        explained=explained,
        seconds=seconds,
    )


def _build_report(
    reports: list[LayerReport],
    config: EMoEConfig | GMoEConfig,
    num_ffns: int,
    num_dense_neurons: int,
    num_added: int,
) -> ConversionReport:
    """Build the report of a conversion.

    Args:
        reports: one for each converted FFN.
        config: configuration of the experts.
        num_ffns: number of FFNs in the model.
        num_dense_neurons: number of neurons of the dense model's FFNs.
        num_added: number of parameters that the dense model does not have.
    """
    # A token used all neurons of the dense model. In each converted FFN, it now uses those of its
    # active experts instead.
    num_active = num_dense_neurons
    for report in reports:
        if isinstance(config, GMoEConfig):
            # each expert is a copy of the dense FFN
            neurons_of_dense_ffn = report.expert_size
        else:
            # the experts are the parts of the dense FFN
            neurons_of_dense_ffn = report.expert_size * config.num_experts
        neurons_of_active_experts = report.expert_size * config.num_active_experts
        num_active -= neurons_of_dense_ffn
        num_active += neurons_of_active_experts
    return ConversionReport(
        layers=tuple(reports),
        total_layers=num_ffns,
        active_neurons=num_active / num_dense_neurons,
        added_parameters=num_added,
    )


@torch.no_grad()
def widen(ffn: FFN, copies: int) -> None:
    """Give an FFN ``copies`` copies of its neurons, one after the other, in place.

    The output bias is not copied, because it does not belong to a neuron.
    """
    # 0, 1, …, d - 1, once for each copy
    neurons = torch.arange(ffn.d).repeat(copies)
    neuron_dims = ffn.neuron_dims()
    for path, module in ffn.projections():
        # a list, because the loop replaces parameters of the module
        for name, parameter in list(module.named_parameters(recurse=False)):
            parameter_path = f"{path}.{name}"
            if parameter_path in neuron_dims:
                widened = ffn.take(parameter_path, parameter, neurons)
                resize_parameter_(module, name, widened)
        # Update the sizes that modules store: out_features and in_features in nn.Linear, whose
        # weight is [out, in], and nx and nf in GPT-2's Conv1D, whose weight is [in, out].
        rows, columns = cast(Tensor, module.weight).shape
        sizes = {"out_features": rows, "in_features": columns, "nx": rows, "nf": columns}
        for name, size in sizes.items():
            if hasattr(module, name):
                setattr(module, name, size)


def to_dense_(model: nn.Module, *, restore_order: bool = False) -> nn.Module:
    """Fold the experts back into the dense FFN, in place, by removing the routing (EMoE2Dense).

    The weights stay as they are, bit by bit, and adapters stay in place. The outputs stay the same
    only if every expert was in use with the weight 1 (``top_k == num_experts`` and
    ``weighting="binary"``). The experts' output biases become one: their mean, times the number of
    experts that a token used when the model was converted. Before training this is the dense FFN's
    bias.

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
        ConversionError: the model is dense or a GMoE; it is a part of a transformers model that has
            experts elsewhere; ``quantize_dynamic`` has quantised an out-projection; or accelerate
            has offloaded the experts' output biases. With ``restore_order`` also if an FFN has
            adapters, or if its order is unknown because the model was saved without
            ``emoe_partition.safetensors``. The model is unchanged.
    """
    layers = converted_layers(model, "to_dense_", "it is dense already")
    # a model that is dense in part could not be described, so it would load as a dense model
    check_holds_described_experts(model, "to_dense_")
    # check all layers before the first one is changed
    for layer in layers:
        _check_foldable(layer)
    if restore_order:
        _check_order_known(layers)

    for layer in layers:
        layer.remove_()
        if restore_order:
            # argsort inverts a permutation
            original_order = torch.argsort(cast(Tensor, layer.permutation))
            layer.ffn.permute_(original_order)
    remove_argument_hooks(model)
    _remove_state_hooks(model)
    update_description_(model)
    return model


def _check_foldable(layer: RoutedActivation) -> None:
    """Raise :class:`ConversionError` if the experts of an FFN cannot become a dense FFN."""
    if isinstance(layer.config, GMoEConfig):
        raise ConversionError(
            "a GMoE has no dense equal: its experts are full FFNs that were trained separately"
        )
    ffn = layer.ffn
    name = f"{ffn.name}.{ffn.spec.proj_out}"
    # the quantised module has copies of this library's hooks, which could not be removed
    if not isinstance(ffn.proj_out.weight, Tensor):
        raise ConversionError(f"{name} is quantised: call to_dense_ before quantize_dynamic")
    # offloaded biases have no values from which the dense bias could be computed
    if layer.output_bias is not None and layer.output_bias.is_meta:
        raise ConversionError(
            f"the experts' biases of {name} are offloaded: "
            "call accelerate.hooks.remove_hook_from_submodules first"
        )


def _check_order_known(layers: Iterable[RoutedActivation]) -> None:
    """Raise :class:`ConversionError` if the original order of neurons cannot be restored."""
    check_projections(
        (layer.ffn for layer in layers),
        hint="merge its adapter first, or leave out restore_order",
    )
    for layer in layers:
        if layer.permutation is None:
            raise ConversionError(
                f"{layer.ffn.name}: the neurons' order is unknown; leave out restore_order"
            )


def finish_conversion_(model: nn.Module) -> None:
    """Finish a conversion: describe the experts in the model's configuration and register hooks.

    The hooks check the state dicts that are loaded and, if the configuration needs it, read the
    padding mask.
    """
    # other models may share the configuration, so this model gets a copy to change
    copy_config_(model)
    describe_experts_(model)
    # if only a part of the model was folded back, hooks of the earlier conversion are left
    _remove_state_hooks(model)
    model.register_load_state_dict_pre_hook(_check_state)
    for part in _parts_with_experts(model):
        part.register_load_state_dict_pre_hook(_check_state_of_part)

    layers = routed_layers(model)
    config = layers[0].config
    if config.counts_tokens and not config.count_padding:
        hooks = watch_padding(model, [layer.ffn for layer in layers])
        for layer in layers:
            # None for a layer that no padding mask reaches
            layer.padding_hook = hooks.get(layer.ffn.index)


def _parts_with_experts(model: nn.Module) -> list[nn.Module]:
    """Return the modules below a model that contain a routed FFN.

    They are, for example, the base model, the list of layers, and a layer.
    """
    paths = set()
    for name, module in model.named_modules():
        if isinstance(module, RoutedActivation):
            # all modules that contain it, except the model itself, whose path is empty
            parent, _, _ = name.rpartition(".")
            while parent:
                paths.add(parent)
                parent, _, _ = parent.rpartition(".")
    return [model.get_submodule(path) for path in sorted(paths)]


def _remove_state_hooks(model: nn.Module) -> None:
    """Remove the hooks that check state dicts from a model, which may be a deep copy."""
    # search for the hooks, because a copy does not have their handles
    for module in model.modules():
        hooks = module._load_state_dict_pre_hooks
        for key, hook in list(hooks.items()):
            # PyTorch wraps the functions that are registered
            if getattr(hook, "hook", None) in (_check_state, _check_state_of_part):
                del hooks[key]


def _check_state_of_part(
    part: nn.Module, state: Mapping[str, Any], prefix: str, *_: object
) -> None:
    """Check the state that is loaded into a module inside a converted model. A hook of PyTorch."""
    # PyTorch also calls this hook when a larger module is loaded, then with a prefix. The larger
    # module's own hook has checked the state already.
    if prefix == "":
        _check_state(part, state, prefix)


def _check_state(model: nn.Module, state: Mapping[str, Any], prefix: str, *_: object) -> None:
    """Check the order of the neurons in a state dict, before anything is loaded. A hook of PyTorch.

    A dense model's order raises :class:`CheckpointError`. If the state is another model's, the
    original order of the neurons becomes unknown. If the order is unknown already, neurons in
    another order only give a warning.
    """
    # names of the modules in the state dict, by id
    names = {id(module): f"{prefix}{name}" for name, module in model.named_modules()}
    for layer in routed_layers(model):
        name = names.get(id(layer.ffn.proj_in))
        if name is None:  # the model is a part that has the activation, but not the projection
            continue
        weight = state.get(f"{name}.weight")
        if weight is None:  # an adapter wraps the projection
            weight = state.get(f"{name}.base_layer.weight")
        if not _is_comparable(layer.ffn, weight):
            continue
        if layer.permutation is None:
            _warn_of_other_order(layer.ffn, cast(Tensor, weight))
        else:
            _check_order_(layer, cast(Tensor, weight))


def _is_comparable(ffn: FFN, weight: Any) -> bool:
    """Check if a weight and the FFN's in-projection weight can be compared.

    They can if this process holds both (:func:`is_local_tensor`), and their shapes are equal.
    """
    present = cast(Tensor, ffn.proj_in.weight)
    are_local = is_local_tensor(weight) and is_local_tensor(present)
    return are_local and weight.shape == present.shape


def _check_order_(layer: RoutedActivation, weight: Tensor) -> None:
    """Check the order of the neurons in a weight that is to be loaded into the in-projection.

    Raise :class:`CheckpointError` if they are in the dense model's order. If the weight is another
    model's, set ``layer.permutation`` to None: the original order is unknown.
    """
    permutation = cast(Tensor, layer.permutation)
    # a neuron's key is its row of in-projection weights: both [d, h]
    present_keys = layer.ffn.keys().detach().float()
    loaded_keys = layer.ffn.keys_of(weight).to(present_keys)
    # A dense model's neurons are similar to the present ones only after the permutation that the
    # conversion applied.
    permuted_keys = loaded_keys[permutation.to(present_keys.device)]
    similarity = _mean_cosine(present_keys, loaded_keys)
    similarity_permuted = _mean_cosine(present_keys, permuted_keys)

    # if the permutation is 0, 1, 2, …, the two similarities differ only by rounding
    changes_order = bool((permutation.diff() != 1).any())
    is_same_model = similarity_permuted > _SAME_MODEL_COSINE
    fits_better_permuted = similarity_permuted > similarity
    if changes_order and is_same_model and fits_better_permuted:
        raise CheckpointError(
            f"{layer.ffn.name}: the state dict has a dense model's order of neurons; "
            "load it before emoe.convert_, or after emoe.to_dense_(model, restore_order=True)"
        )
    if similarity < _SAME_MODEL_COSINE:
        layer.permutation = None


def _warn_of_other_order(ffn: FFN, weight: Tensor) -> None:
    """Warn if an in-projection weight to load seems to be the FFN's own, with permuted neurons.

    This is for an FFN whose original order is unknown. A dense model's order would make its experts
    random groups of neurons. But the weight may also be that of another partition, which is valid.
    """
    # a neuron's key is its row of in-projection weights: both [d, h]
    present_keys = ffn.keys().detach().float()
    loaded_keys = ffn.keys_of(weight).to(present_keys)
    # the same order as now: nothing to warn of
    if _mean_cosine(present_keys, loaded_keys) >= _SAME_MODEL_COSINE:
        return
    # for some loaded neurons, the cosine with the most similar one of all present neurons
    sampled_directions = F.normalize(loaded_keys[:_SAMPLED_NEURONS], dim=1)
    present_directions = F.normalize(present_keys, dim=1)
    cosines = sampled_directions @ present_directions.t()  # [sampled, d]
    highest_cosines = cosines.max(1).values
    are_same_neurons = float(highest_cosines.mean()) > _SAME_NEURON_COSINE
    if are_same_neurons:
        logging.getLogger("emoe").warning(
            "%s: the loaded neurons have another order. If the state dict is a dense model's, the "
            "experts are now random: load it before emoe.convert_",
            ffn.name,
        )


def _mean_cosine(keys: Tensor, others: Tensor) -> float:
    """Return the cosine of each row ``[h]`` of two matrices ``[d, h]``, averaged over the rows."""
    cosines = F.cosine_similarity(keys, others, dim=1)
    return float(cosines.mean())


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
    """Return a model's routed FFNs.

    Raises:
        ConversionError: there are none. The message contains ``caller`` and ``hint``.
    """
    layers = routed_layers(model)
    if not layers:
        if described_configs(model):
            hint = (
                "its configuration describes experts, but its stock class loaded it as dense: "
                "use emoe.from_pretrained"
            )
        raise ConversionError(f"{caller}: the model has no routed FFN; {hint}")
    return layers
