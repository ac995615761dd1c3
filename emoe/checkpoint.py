"""Save and load converted models: an ordinary checkpoint with small sidecars.

A folder holds what the library of the model writes (``model.safetensors``, ``config.json``, …) and

- ``emoe_config.json``: the :class:`emoe.EMoEConfig` or :class:`emoe.GMoEConfig`;
- ``emoe_partition.safetensors``: permutations, and the key norms that tie the sidecar to its weights;
- ``emoe_extra.safetensors``: what the stock class has no place for, if there is any: learned routers,
  running gates, output biases of single experts, and GMoE's copied projections.

An EMoE's checkpoint loads into the stock dense class as it is; a GMoE's is refused there, because
its shapes differ. Nothing is ever unpickled.

A folder that the model's own library wrote (``model.save_pretrained``, ``Trainer``) is read too: ``config.json`` says
what its experts are (:mod:`emoe.marks`), and routers and the like stand among its weights. It loses the permutations,
unless :class:`emoe.TrainerCallback` wrote the sidecars beside it.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from emoe.architectures import FFN, find_ffns, has_plain_weight
from emoe.checks import check_divisible, check_one_conversion
from emoe.config import EMoEConfig, GMoEConfig
from emoe.convert import attach, padding_watches, watch_losses, widen
from emoe.errors import CheckpointError, ConversionError
from emoe.guards import guard_
from emoe.layer import RoutedActivation, routed_layers
from emoe.marks import mark_, no_experts, read_mark
from emoe.partitioning import is_permutation
from emoe.routers import in_place, is_offloaded
from emoe.sidecars import CONFIG_FILE, EXTRA_FILE, PARTITION_FILE, key_norms, projections, read_sidecars, save_sidecars
from emoe.stock import is_quantised, load_around, load_stock, save_weights
from emoe.weights import Weights, one_line

_NORM_TOLERANCE = 0.02  # key norms survive a cast to bf16 within this
_QUANTISED_NORM_TOLERANCE = 0.15  # and four bits within this


def save_pretrained(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write a converted model: an ordinary checkpoint and its sidecars.

    >>> layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    >>> model = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    >>> report = emoe.convert_(model, emoe.EMoEConfig(num_experts=4, top_k=1, layers="all"))
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     emoe.save_pretrained(model, folder)
    ...     sorted(file.name for file in Path(folder).iterdir())
    ['emoe_config.json', 'emoe_partition.safetensors', 'model.safetensors']

    Args:
        model: a converted transformers or timm model.
        folder: made when it does not exist.

    Raises:
        ConversionError: the model is not converted, or still carries adapters.
    """
    while (wrapped := _inside(model)) is not None:
        model = wrapped
    if not routed_layers(model):
        raise no_experts(model, "save_pretrained", "save it with its own library")
    # PEFT may leave its configuration on a model that it has merged
    if hasattr(model, "get_base_model") or any(hasattr(module, "base_layer") for module in model.modules()):
        raise ConversionError("save_pretrained: merge the adapters first (model = model.merge_and_unload())")
    folder = Path(folder)
    check_one_conversion(routed_layers(model), "save_pretrained")
    state = _stock_state(model)
    mark_(model)  # of a model that was converted in part, too
    folder.mkdir(parents=True, exist_ok=True)
    save_weights(model, folder, state)
    save_sidecars(model, folder)


def _inside(model: nn.Module) -> nn.Module | None:
    """The model that PyTorch has put a wrapper around, by whose names no library knows it."""
    wrapped = vars(model)["_modules"].get("_orig_mod")  # by torch.compile
    parallel = isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel)
    return cast(nn.Module, model.module) if parallel else wrapped


def _stock_state(model: nn.Module) -> dict[str, Tensor]:
    """The state that the stock class has a place for, with one output bias a layer."""
    state = dict(model.state_dict())
    names = {module: name for name, module in model.named_modules()}
    for path, layer in model.named_modules():
        if not isinstance(layer, RoutedActivation):
            continue
        for name in layer.state_dict():
            del state[f"{path}.{name}"]
        if layer.output_bias is not None:
            if (proj_out := names.get(layer.ffn.proj_out)) is None:
                raise ConversionError(
                    f"{path}: a copy of a half of its FFN was trained, whose out-projection the model does not hold"
                )
            with in_place(layer):
                state[f"{proj_out}.bias"] = layer.mean_output_bias()
    return state


def from_pretrained(loader: Any, folder: str | os.PathLike[str], **options: Any) -> nn.Module:
    """Load what :func:`save_pretrained` wrote, or a converted model's own library (``Trainer``, ``model.save_pretrained``).

    From the latter the neurons' first order is not known, unless :class:`emoe.TrainerCallback` wrote it beside the weights.

    >>> def build():
    ...     layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    ...     return torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    >>> model, x = build().eval(), torch.ones(1, 3, 16)
    >>> report = emoe.convert_(model, emoe.EMoEConfig(num_experts=4, top_k=1, layers="all"))
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     emoe.save_pretrained(model, folder)
    ...     again = emoe.from_pretrained(build, folder)
    >>> torch.allclose(again(x), model(x))
    True

    Args:
        loader: a transformers class (``AutoModelForSequenceClassification``), ``timm.create_model``, or for a
            plain module whatever builds the dense model.
        folder: the checkpoint folder.
        **options: passed to the loader.

    Returns:
        The converted model, in evaluation mode.

    Raises:
        CheckpointError: a missing or damaged file, or a sidecar of other weights.
    """
    if not callable(loader) and not hasattr(loader, "from_pretrained"):
        raise CheckpointError(
            f"from_pretrained: the loader is {loader!r:.80}; give a transformers class, timm.create_model, or what builds the model"
        )
    folder = Path(folder)
    config, indices, tensors, extra = read_sidecars(folder)
    _check_quantised(config, folder, options)
    weights = Weights(folder)
    resized = isinstance(config, GMoEConfig)
    if resized or _holds_routing(weights, config):
        model = load_around(loader, folder, resized=resized, **options)
    else:
        model = load_stock(loader, folder, **options)
    chosen, order = marked_ffns(model, folder, config, indices, tensors)
    _check_in_place(chosen, config, folder)
    padding = padding_watches(model, chosen, config)
    for ffn in chosen:
        if resized:
            widen(ffn, config.num_experts)
        layer = attach(ffn, config, order[ffn.index], padding.get(ffn.index))
        restore_layer(layer, tensors, extra, weights, folder)
    watch_losses(model)
    mark_(model)
    guard_(model)
    return model.eval()


def marked_ffns(
    model: nn.Module, folder: Path, config: EMoEConfig | GMoEConfig, indices: list[int], tensors: dict[str, Tensor]
) -> tuple[list[FFN], dict[int, Tensor | None]]:
    """The FFNs of a folder's model that are experts, and the permutation of each, where that is known.

    Args:
        model: the dense model.
        folder: of the checkpoint.
        config: of the experts.
        indices: their layers' numbers.
        tensors: of the partition file.

    Raises:
        CheckpointError: the sidecars are not of this model.
    """
    chosen = _numbered_ffns(find_ffns(model), indices, folder)
    if isinstance(config, EMoEConfig):
        check_divisible(chosen, config.num_experts)
    order = {ffn.index: tensors.get(f"permutation.{ffn.index}") for ffn in chosen}
    if isinstance(config, EMoEConfig) and any(permutation is not None for permutation in order.values()):
        for ffn in chosen:
            if not is_permutation(order[ffn.index], ffn.d):
                raise CheckpointError(f"{folder / PARTITION_FILE} has no permutation of {ffn.name}'s {ffn.d} neurons")
    return chosen, order


def _numbered_ffns(ffns: list[FFN], indices: list[int], folder: Path) -> list[FFN]:
    """The FFNs that a folder's layer numbers name, once it is clear that they were counted in this model."""
    missing = sorted(set(indices) - set(range(len(ffns))))
    named_by = CONFIG_FILE if (folder / CONFIG_FILE).exists() else "config.json"
    if missing:
        raise CheckpointError(f"{folder / named_by} names the layers {missing}, which the model does not have")
    mark = read_mark(folder)
    if mark is not None and mark.ffns not in (None, len(ffns)):
        raise CheckpointError(
            f"{folder} holds a model of {len(ffns)} FFNs, but its experts were counted in a part of {mark.ffns}: "
            "load and convert that part for itself"
        )
    return [ffns[index] for index in indices]


def _holds_routing(weights: Weights, config: EMoEConfig | GMoEConfig) -> bool:
    """Whether the state of routed layers stands among the weights, as it does where the model's own library saved them."""
    return config.has_routing_state and any(re.search(r"\.(router\..+|output_bias)$", name) for name in weights.names)


def restore_layer(
    layer: RoutedActivation, tensors: dict[str, Tensor], extra: dict[str, Tensor], weights: Weights, folder: Path
) -> None:
    """Give a routed layer, and a GMoE's projections, the state that the stock class has no place for.

    Args:
        layer: fresh, its FFN's weights in place.
        tensors: of the partition file; empty where there is none.
        extra: of the file of such state.
        weights: of the folder.
        folder: of the checkpoint.

    Raises:
        CheckpointError: a part of the state is missing, or the sidecars are of other weights.
    """
    ffn = layer.ffn
    parts: dict[str, tuple[str, nn.Module]] = {"routing": (ffn.spec.activation, layer)}
    if isinstance(layer.config, GMoEConfig):
        parts |= {path: (path, ffn.layer.get_submodule(path)) for path in projections(ffn)}
    apart = {name: tensor for name, tensor in extra.items() if name.startswith(f"{ffn.index}.")}
    beside = weights.below(ffn.name, ffn.spec.activation, layer.state_dict())
    if any(not _equal(tensor, apart.get(f"{ffn.index}.routing.{name}")) for name, tensor in beside.items()):
        apart = {}  # the weights were written again without it
    for name, (path, module) in parts.items():
        prefix = f"{ffn.index}.{name}."
        state = {key.removeprefix(prefix): tensor for key, tensor in apart.items() if key.startswith(prefix)}
        state = state or weights.below(ffn.name, path, module.state_dict())
        if module.state_dict() and not state and not extra:
            raise CheckpointError(
                f"{folder} does not hold the {', '.join(module.state_dict())} of {ffn.name}.{path}: "
                "save the model by emoe.save_pretrained, or train it with emoe.TrainerCallback"
            )
        try:
            module.load_state_dict(state)
        except RuntimeError as error:
            raise CheckpointError(
                f"{folder / EXTRA_FILE} does not hold '{prefix}*' as the model needs it: {one_line(error)}"
            ) from error
    if tensors:
        _check_norms(ffn, tensors[f"key_norms.{ffn.index}"], folder)


def _equal(tensor: Tensor, other: Tensor | None) -> bool:
    return other is not None and tensor.shape == other.shape and torch.equal(tensor, other.to(tensor.dtype))


def _check_quantised(config: EMoEConfig | GMoEConfig, folder: Path, options: dict[str, Any]) -> None:
    """Refuse experts that need weights themselves, where these are to be quantised or are."""
    if options.get("quantization_config") is None and not is_quantised(folder):
        return
    if isinstance(config, GMoEConfig):
        raise CheckpointError(
            f"{folder} holds a GMoE, whose copies lie beside the stock weights: it is not loaded quantised"
        )
    needing = [name for name in ("normalize_gate", "value_norm_weighted", "gate_momentum") if getattr(config, name)]
    if needing:
        raise CheckpointError(
            f"{folder} holds experts with {needing[0]}, which needs the keys themselves: it is not loaded quantised"
        )


def _check_in_place(ffns: list[FFN], config: EMoEConfig | GMoEConfig, folder: Path) -> None:
    """Experts whose routing has state of its own are not split over devices: it would have no place beside weights that are not there."""
    for ffn in ffns if config.has_routing_state else []:
        if any(is_offloaded(module) for module in (ffn.proj_in, ffn.proj_out)):
            raise CheckpointError(
                f"{folder}: the device_map offloads {ffn.name}, whose experts have a router, running gate, copies or biases of their own: "
                "keep that layer on a device, or call accelerate.cpu_offload on the loaded model"
            )


def _check_norms(ffn: FFN, norms: Tensor, folder: Path) -> None:
    with torch.no_grad(), in_place(ffn.proj_in):
        found = key_norms(ffn)
    tolerance = _NORM_TOLERANCE if has_plain_weight(ffn.proj_in) else _QUANTISED_NORM_TOLERANCE
    if found.shape != norms.shape or not torch.allclose(found, norms.float(), rtol=tolerance, atol=1e-6):
        raise CheckpointError(
            f"{folder / PARTITION_FILE} does not match the weights of {ffn.name}: it belongs to another model or the weights were changed without it"
        )
