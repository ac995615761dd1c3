"""Save and load converted models.

A transformers model is an ordinary checkpoint: ``config.json`` describes the experts (:mod:`emoe.model_config`), the
weights include routers and experts' own biases, and ``AutoModel.from_pretrained`` loads it once emoe is imported.

A timm or plain PyTorch model, and a quantised one, are written as the dense model, with small files beside it:

- ``emoe_config.json``: the experts' configuration, and the numbers of the converted FFNs;
- ``emoe_extra.safetensors``, if there is state that the dense model lacks: learned routers, running gates, output
  biases of single experts, and GMoE's copied projections.

In both cases ``emoe_partition.safetensors`` holds the original order of the neurons, which only
``emoe.to_dense_(model, restore_order=True)`` needs, and the key norms that tie this file to its weights. The library's
own ``save_pretrained`` does not write it, so the order is then unknown.

Folders of emoe 0.1, which had the small files for every library, still load with :func:`from_pretrained`.
"""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from emoe import files
from emoe.architectures import FFN, find_ffns, has_plain_weight
from emoe.checks import check_divisible
from emoe.config import EMoEConfig, GMoEConfig
from emoe.convert import converted_layers, finish_conversion_, widen
from emoe.errors import CheckpointError, ConversionError
from emoe.layer import RoutedActivation, check_one_conversion, routed_layers
from emoe.model_card import write_model_card
from emoe.model_config import (
    IMPLEMENTATION_KEY,
    QUANTIZATION_CONFIG,
    SEPARATE_KEY,
    Experts,
    describe_experts_,
    is_ours,
    numbered_layers,
)
from emoe.partitioning import is_permutation
from emoe.routers import is_offloaded, unsharded, weights_in_place

CONFIG_FILE = "emoe_config.json"
PARTITION_FILE = "emoe_partition.safetensors"
EXTRA_FILE = "emoe_extra.safetensors"
_WITHOUT_FILE = "without this file the model loads, and its neurons' original order is unknown"
_NORM_TOLERANCE = 0.02  # for key norms after a cast to bfloat16


def save_pretrained(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write a converted model: its checkpoint, the original order of its neurons, and a model card.

    Args:
        model: converted model of transformers, timm or another library.
        folder: folder to write to. A ``README.md`` in it is kept.

    Raises:
        ConversionError: the model is not converted, or still carries adapters.
    """
    while hasattr(model, "_orig_mod") or isinstance(
        model, nn.DataParallel | nn.parallel.DistributedDataParallel
    ):
        model = cast(
            nn.Module, getattr(model, "_orig_mod", None) or model.module
        )  # torch.compile sets _orig_mod
    layers = converted_layers(model, "save_pretrained", "save it with its own library")
    # PEFT may leave its configuration on a model that it has merged
    if hasattr(model, "get_base_model") or any(
        hasattr(module, "base_layer") for module in model.modules()
    ):
        raise ConversionError(
            "save_pretrained: merge the adapters first (model = model.merge_and_unload())"
        )
    check_one_conversion(layers, "save_pretrained")
    folder = Path(folder)
    describe_experts_(model)
    if is_ours(getattr(getattr(model, "config", None), QUANTIZATION_CONFIG, None)):
        files.save_weights(model, folder)
        for name in (CONFIG_FILE, EXTRA_FILE):  # of an older save
            (folder / name).unlink(missing_ok=True)
    else:
        files.save_weights(model, folder, _dense_state(model))
        _save_beside_dense(model, folder)
    save_order(model, folder)
    write_model_card(model, folder)


def _dense_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the model's state without the routing, with one output bias per FFN."""
    state = dict(model.state_dict())
    names = {module: name for name, module in model.named_modules()}
    for layer in routed_layers(model):
        for name in layer.state_dict():
            del state[f"{names[layer]}.{name}"]
        if layer.output_bias is not None:
            with weights_in_place(layer):
                state[f"{names[layer.ffn.proj_out]}.bias"] = layer.mean_output_bias()
    return state


def _save_beside_dense(model: nn.Module, folder: Path) -> None:
    """Write the configuration and the state that the dense model lacks."""
    layers = numbered_layers(model)
    config = next(iter(layers.values())).config
    extra: dict[str, Tensor] = {}
    for number, layer in layers.items():
        for key, _, module in _modules_with_state(layer):
            with weights_in_place(*module.modules()):
                for name, tensor in module.state_dict().items():
                    extra[f"{number}.{key}.{name}"] = unsharded(tensor).cpu().contiguous()
    (folder / EXTRA_FILE).unlink(missing_ok=True)
    if extra:
        files.write_tensors(extra, folder / EXTRA_FILE)
    content = {"config": config.to_dict(), "layers": sorted(layers)}
    (folder / CONFIG_FILE).write_text(json.dumps(content, indent=2) + "\n")


def _modules_with_state(layer: RoutedActivation) -> list[tuple[str, str, nn.Module]]:
    """Return the modules whose state the dense model lacks.

    Each has its name in the extra file and its path in the layer.
    """
    routing = ("routing", layer.ffn.spec.activation, layer)
    if not isinstance(layer.config, GMoEConfig):
        return [routing]
    return [routing, *((path, path, module) for path, module in layer.ffn.projections())]


def save_order(model: nn.Module, folder: Path, *, write: bool = True) -> None:
    """Write the original order of the neurons and the key norms.

    Sharded weights are gathered, so every process must call this; all but one pass ``write=False``.
    """
    layers = numbered_layers(model)
    experts = next(iter(layers.values())).config.num_experts
    tensors = {"num_experts": torch.tensor(experts)}
    for number, layer in layers.items():
        with weights_in_place(layer.ffn.proj_in):
            tensors[f"key_norms.{number}"] = _key_norms(layer.ffn)
        if layer.permutation is not None:
            tensors[f"permutation.{number}"] = layer.permutation.contiguous()
    if write:
        files.write_tensors(tensors, folder / PARTITION_FILE)


def _key_norms(ffn: FFN) -> Tensor:
    """Return the Euclidean norms of the keys ``[d]``; zeros for quantised keys, which are not compared."""
    if not has_plain_weight(ffn.proj_in):
        return torch.zeros(ffn.d)
    return unsharded(ffn.keys().detach().float().norm(dim=1)).cpu()


def read_experts(folder: Path) -> Experts | None:
    """Read the description of a folder's experts. None if the folder holds a dense model.

    ``config.json`` takes precedence over ``emoe_config.json``, because the model's library writes it with the weights.
    A damaged file raises :class:`CheckpointError`.
    """
    path = folder / files.STOCK_CONFIG_FILE
    settings = files.read_settings(folder)
    try:
        if is_ours(settings.get(QUANTIZATION_CONFIG)):
            return Experts.from_quantization_config(settings[QUANTIZATION_CONFIG])
        content = settings.get(SEPARATE_KEY)
        if not content:
            path = folder / CONFIG_FILE
            if not path.exists():
                return None
            content = files.read_object(path)
        return Experts.from_dict(content["config"], content["layers"])
    except CheckpointError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {files.one_line(error)}") from error


def from_pretrained(loader: Any, folder: str | os.PathLike[str], **options: Any) -> Any:
    """Load a converted model of any library.

    A transformers checkpoint also loads with transformers' own ``from_pretrained``. This function checks it more
    strictly: each tensor must be stored in the model's shape. It also reads timm and plain models, folders of emoe 0.1,
    and quantises a converted checkpoint (``quantization_config=…``).

    Args:
        loader: transformers class, ``timm.create_model``, or function that builds the dense model (a plain module).
        folder: folder of the checkpoint, or a hub id.
        **options: options of the loader, for example ``device_map``, ``revision`` or ``quantization_config``.

    Returns:
        The converted model, in evaluation mode. With ``output_loading_info=True``, also transformers' report.

    Raises:
        CheckpointError: a file is missing or damaged, or the small files belong to other weights.
    """
    folder = files.model_folder(str(folder), options)
    experts = read_experts(folder)
    if experts is None:
        raise CheckpointError(
            f"{folder} holds no experts; load it with its own library, and call emoe.convert_"
        )
    if not hasattr(loader, "from_pretrained"):
        others = {name: value for name, value in options.items() if name not in files.HUB_OPTIONS}
        return _load_plain(loader, folder, experts, others)
    stored = files.read_settings(folder).get(QUANTIZATION_CONFIG)
    if options.get(QUANTIZATION_CONFIG) or (stored and not is_ours(stored)):
        return _load_quantised(loader, folder, experts, options)
    if is_ours(stored):
        return files.load_stock(loader, folder, **options)
    config, options = _read_config(folder, options)
    setattr(config, QUANTIZATION_CONFIG, experts.quantization_config())
    restored = routing_names if (folder / EXTRA_FILE).exists() else None
    return files.load_stock(loader, folder, restored=restored, config=config, **options)


def _read_config(folder: Path, options: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return a folder's transformers configuration without the experts, and the options that are left for the loader.

    Options that are fields of the configuration change it, as in transformers' own ``from_pretrained``.
    """
    from transformers import AutoConfig

    others = {"trust_remote_code": False, **options}
    # AutoConfig would write these into the configuration, or drop them
    kept = {
        name: others.pop(name)
        for name in (QUANTIZATION_CONFIG, "trust_remote_code")
        if name in others
    }
    config = others.pop("config", None)
    if config is None:
        try:
            config, others = AutoConfig.from_pretrained(
                str(folder),
                return_unused_kwargs=True,
                trust_remote_code=kept["trust_remote_code"],
                **others,
            )
        except Exception as error:  # a damaged configuration raises anything
            raise CheckpointError(
                f"{folder / files.STOCK_CONFIG_FILE} is damaged: {files.one_line(error)}"
            ) from error
    config = copy.deepcopy(config)
    others |= kept
    if is_ours(getattr(config, QUANTIZATION_CONFIG, None)):
        delattr(config, QUANTIZATION_CONFIG)
    if hasattr(config, SEPARATE_KEY):
        delattr(config, SEPARATE_KEY)
    others[IMPLEMENTATION_KEY] = (
        None  # the configuration's value makes transformers refuse the folder
    )
    return config, others


def _load_quantised(loader: Any, folder: Path, experts: Experts, options: Mapping[str, Any]) -> Any:
    """Load a checkpoint quantised, then build its experts: transformers has room for one quantizer."""
    config = experts.config
    if isinstance(config, GMoEConfig) or config.gate_momentum:
        raise CheckpointError(
            f"{folder}: a GMoE, or experts with gate_momentum, cannot be loaded quantised"
        )
    model_config, others = _read_config(folder, options)
    others["output_loading_info"] = True
    with files.quiet():  # transformers would report the routers, which are loaded below
        model, info = files.load_stock(loader, folder, config=model_config, **others)
    layers = build_experts_(model, experts, folder)
    if (folder / EXTRA_FILE).exists():
        load_extra_(layers, folder)
    else:
        _load_routing_(layers, files.Weights(folder), folder)
    check_placement(layers)
    read_order_(layers, folder)
    finish_conversion_(model)
    model.eval()
    return (model, info) if options.get("output_loading_info") else model


def _load_plain(
    loader: Any, folder: Path, experts: Experts, options: Mapping[str, Any]
) -> nn.Module:
    """Build a timm or plain model and its experts, then load their state."""
    model = files.build_without_weights(loader, folder, **options)
    layers = build_experts_(model, experts, folder)
    state = files.read_tensors(folder / files.WEIGHT_FILES[0])
    names = {module: name for name, module in model.named_modules()}
    restored = routing_names(model)
    for layer in layers:
        if isinstance(experts.config, GMoEConfig):
            for path, _ in layer.ffn.projections():
                prefix = f"{names[layer.ffn.module(path)]}."
                restored |= {name for name in model.state_dict() if name.startswith(prefix)}
        if layer.output_bias is not None:  # the stored one is the mean of the experts' biases
            restored.add(f"{names[layer.ffn.proj_out]}.bias")
    files.load_state_(
        model, {name: state[name] for name in state.keys() - restored}, folder, restored
    )
    load_extra_(layers, folder)
    read_order_(layers, folder)
    finish_conversion_(model)
    return model.eval()


def build_experts_(
    model: nn.Module, experts: Experts, source: str | os.PathLike[str]
) -> list[RoutedActivation]:
    """Turn the FFNs that a checkpoint stores as experts into routed ones, before or after their weights load.

    Args:
        model: dense model.
        experts: description of the experts.
        source: checkpoint, for error messages.

    Raises:
        CheckpointError: the model has fewer FFNs.
    """
    ffns = find_ffns(model)
    config = experts.config
    last = experts.layers[-1]
    if last >= len(ffns):
        raise CheckpointError(
            f"{source} has experts in layer {last}, but the model only {len(ffns)} FFNs"
        )
    chosen = [ffns[number] for number in experts.layers]
    if isinstance(config, EMoEConfig):
        check_divisible(chosen, config.num_experts)
    layers = []
    for ffn in chosen:
        if isinstance(config, GMoEConfig):
            widen(ffn, config.num_experts)
        layers.append(RoutedActivation(ffn, config, permutation=None))
    return layers


def routing_names(model: nn.Module) -> set[str]:
    """Return the names of the state of routers and experts' biases."""
    prefixes = [
        name for name, module in model.named_modules() if isinstance(module, RoutedActivation)
    ]
    return {
        name
        for name in model.state_dict()
        if name.startswith(tuple(f"{prefix}." for prefix in prefixes))
    }


def check_placement(layers: Sequence[RoutedActivation]) -> None:
    """Raise :class:`CheckpointError` if a ``device_map`` offloads an FFN with a router, biases or copies of its own."""
    for layer in layers:
        if layer.config.has_routing_state and any(
            map(is_offloaded, (layer.ffn.proj_in, layer.ffn.proj_out))
        ):
            raise CheckpointError(
                f"the device_map offloads {layer.ffn.name}; keep these experts on a device"
            )


def read_order_(layers: Sequence[RoutedActivation], folder: Path) -> None:
    """Read the original order of the neurons; it stays unknown without the partition file.

    Raises:
        CheckpointError: the file is damaged or belongs to other weights, or is missing beside ``emoe_config.json``.
    """
    path = folder / PARTITION_FILE
    if not path.exists() and not (folder / CONFIG_FILE).exists():
        return
    tensors = files.read_tensors(path)
    expected = {f"key_norms.{layer.ffn.index}" for layer in layers}
    stored = {name for name in tensors if name.startswith("key_norms.")}
    has_number = "num_experts" in tensors and tensors["num_experts"].numel() == 1
    num_experts = int(tensors["num_experts"]) if has_number else None
    if stored != expected or num_experts != layers[0].config.num_experts:
        raise CheckpointError(
            f"{path} describes other layers or numbers of experts than the configuration; {_WITHOUT_FILE}"
        )
    for layer in layers:
        ffn, permutation = layer.ffn, tensors.get(f"permutation.{layer.ffn.index}")
        if permutation is not None and not is_permutation(permutation, ffn.d):
            raise CheckpointError(f"{path} has no permutation of {ffn.name}'s {ffn.d} neurons")
        _check_key_norms(ffn, tensors[f"key_norms.{ffn.index}"].float(), path)
        layer.permutation = permutation


def _check_key_norms(ffn: FFN, saved: Tensor, path: Path) -> None:
    """Raise :class:`CheckpointError` if the partition file belongs to other weights."""
    if not has_plain_weight(ffn.proj_in):
        return
    with torch.no_grad(), weights_in_place(ffn.proj_in):
        if cast(Tensor, ffn.proj_in.weight).is_meta:  # device_map="meta" loads no weights
            return
        norms = _key_norms(ffn)
    if norms.shape != saved.shape or not torch.allclose(
        norms, saved, rtol=_NORM_TOLERANCE, atol=1e-6
    ):
        raise CheckpointError(f"{path} does not match the weights of {ffn.name}; {_WITHOUT_FILE}")


def load_extra_(layers: Sequence[RoutedActivation], folder: Path) -> None:
    """Load the state that the dense model lacks from the extra file."""
    path = folder / EXTRA_FILE
    tensors = files.read_tensors(path) if path.exists() else {}
    for layer in layers:
        if layer.output_bias is not None:  # the weights hold the mean of the experts' biases
            cast(Tensor, layer.ffn.proj_out.bias).zero_()
        for key, _, module in _modules_with_state(layer):
            names = {name: f"{layer.ffn.index}.{key}.{name}" for name in module.state_dict()}
            _load_named_(module, names, tensors, folder)


def _load_routing_(
    layers: Sequence[RoutedActivation], weights: files.Weights, folder: Path
) -> None:
    """Load the routing state of a model that transformers loaded without experts."""
    stored = stored_routing(layers, weights.files)
    for layer in layers:
        names = {name: stored.get((layer, name), name) for name in layer.state_dict()}
        tensors = {key: weights[key] for key in names.values() if key in weights.files}
        _load_named_(layer, names, tensors, folder)


def _load_named_(
    module: nn.Module, names: Mapping[str, str], tensors: Mapping[str, Tensor], folder: Path
) -> None:
    """Load a module's state, given the key of each name (raises :class:`CheckpointError`)."""
    for key in names.values():
        if key not in tensors:
            raise CheckpointError(
                f"{folder} lacks {key}, the state of a router or of experts' biases"
            )
    try:
        module.load_state_dict({name: tensors[key] for name, key in names.items()})
    except RuntimeError as error:
        raise CheckpointError(
            f"{folder}: the state of the experts does not fit: {files.one_line(error)}"
        ) from error


def stored_routing(
    layers: Sequence[RoutedActivation], stored: Mapping[str, Path]
) -> dict[tuple[RoutedActivation, str], str]:
    """Map each layer and name of its routing state to the name in a checkpoint, without names that are not stored.

    A checkpoint's names may have another prefix than the model's, and transformers renames parts of some prefixes. But
    they end alike, and their layers are in the same order.
    """
    matches: dict[tuple[RoutedActivation, str], str] = {}
    endings = {
        f"{layer.ffn.spec.activation}.{name}" for layer in layers for name in layer.state_dict()
    }
    for ending in sorted(endings):
        names = sorted((name for name in stored if name.endswith(f".{ending}")), key=_layer_numbers)
        owners = [layer for layer in layers if ending.startswith(f"{layer.ffn.spec.activation}.")]
        if len(names) == len(owners):
            for layer, name in zip(owners, names, strict=True):
                matches[layer, ending.removeprefix(f"{layer.ffn.spec.activation}.")] = name
    return matches


def _layer_numbers(name: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", name)]


def check_routing_is_stored(
    layers: Sequence[RoutedActivation], stored: Mapping[str, Path], folder: Path
) -> None:
    """Raise :class:`CheckpointError` if a checkpoint lacks a router or experts' biases.

    Transformers would only warn, and leave them as uninitialised memory.
    """
    matches = stored_routing(layers, stored)
    for layer in layers:
        for name in layer.state_dict():
            if (layer, name) not in matches:
                missing = f"{layer.ffn.name}.{layer.ffn.spec.activation}.{name}"
                raise CheckpointError(
                    f"{folder} lacks {missing}; save with emoe.save_pretrained or Trainer"
                )
