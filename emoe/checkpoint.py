"""Save and load converted models: an ordinary checkpoint and small files beside it.

A folder holds what the model's library writes (``model.safetensors``, ``config.json``, …) and

- ``emoe_config.json``: the :class:`emoe.EMoEConfig` or :class:`emoe.GMoEConfig`, and the numbers of the converted FFNs;
- ``emoe_partition.safetensors``: the permutations, and the key norms that tie this file to its weights;
- ``emoe_extra.safetensors``, if there is state that the stock class lacks: learned routers, running gates, output
  biases of single experts, and GMoE's copied projections.

An EMoE's checkpoint loads into the stock dense class; a GMoE's is refused there, because its shapes differ. Folders
that the model's library wrote (``Trainer``) load too: ``config.json`` holds the configuration, and the weights include
the routers. Permutations are unknown then, unless :class:`emoe.TrainerCallback` wrote the small files.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from emoe import files
from emoe.architectures import FFN, find_ffns, has_plain_weight
from emoe.checks import check_divisible
from emoe.config import EMoEConfig, GMoEConfig, config_from_dict
from emoe.convert import MARK, converted_layers, finish_conversion_, mark_, numbered_layers, widen
from emoe.errors import CheckpointError, ConversionError
from emoe.layer import RoutedActivation, check_one_conversion, routed_layers
from emoe.partitioning import is_permutation
from emoe.routers import is_offloaded, unsharded, weights_in_place

CONFIG_FILE = "emoe_config.json"
PARTITION_FILE = "emoe_partition.safetensors"
EXTRA_FILE = "emoe_extra.safetensors"
_NORM_TOLERANCE = 0.02  # for key norms after a cast to bfloat16


@dataclass(frozen=True)
class Mark:
    """Hold the configuration of a folder's experts and the layer numbers of its converted FFNs."""

    config: EMoEConfig | GMoEConfig
    layers: list[int]


def read_mark(folder: Path) -> Mark | None:
    """Read the mark of a folder: the configuration of its experts. None if the folder holds a dense model.

    The mark in ``config.json`` takes precedence over ``emoe_config.json``, because the model's library writes it
    with the weights. A damaged file raises :class:`CheckpointError`.
    """
    path = folder / files.STOCK_CONFIG_FILE
    content = files.read_settings(folder).get(MARK)
    if not content:
        path = folder / CONFIG_FILE
        if not path.exists():
            return None
        content = files.read_object(path)
    try:
        return Mark(config_from_dict(content["config"]), sorted(content["layers"]))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {files.one_line(error)}") from error


def read_sidecars(folder: Path) -> tuple[Mark, dict[str, Tensor], dict[str, Tensor]]:
    """Read the small files of a converted model's folder (raises :class:`CheckpointError`).

    Returns:
        The mark, and the tensors of the partition file and of the extra file (empty if the library wrote the folder).
    """
    files.check_loadable(folder)
    mark, path = read_mark(folder), folder / PARTITION_FILE
    if mark is None:
        raise CheckpointError(f"{folder} holds no experts; load it with its own library, and call emoe.convert_")
    if not path.exists() and not (folder / CONFIG_FILE).exists():
        return mark, {}, {}
    tensors = files.read_tensors(path)
    layers = sorted(int(name.removeprefix("key_norms.")) for name in tensors if name.startswith("key_norms."))
    experts: Any = tensors.get("num_experts", torch.zeros(1)).tolist()
    if experts != mark.config.num_experts or layers != mark.layers:
        raise CheckpointError(f"{path} describes other layers or numbers of experts than the configuration")
    extra = folder / EXTRA_FILE
    return mark, tensors, files.read_tensors(extra) if extra.exists() else {}


def save_pretrained(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write a converted model: an ordinary checkpoint, and sidecar files.

    Args:
        model: converted model of transformers, timm or another library.
        folder: folder to write to.

    Raises:
        ConversionError: the model is not converted, or still carries adapters.
    """
    while hasattr(model, "_orig_mod") or isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        model = cast(nn.Module, getattr(model, "_orig_mod", None) or model.module)  # torch.compile sets _orig_mod
    layers = converted_layers(model, "save_pretrained", "save it with its own library")
    # PEFT may leave its configuration on a model that it has merged
    if hasattr(model, "get_base_model") or any(hasattr(module, "base_layer") for module in model.modules()):
        raise ConversionError("save_pretrained: merge the adapters first (model = model.merge_and_unload())")
    check_one_conversion(layers, "save_pretrained")
    state = _stock_state(model)
    mark_(model)
    files.save_weights(model, Path(folder), state)
    save_sidecars(model, Path(folder))


def _stock_state(model: nn.Module) -> dict[str, Tensor]:
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


def save_sidecars(model: nn.Module, folder: Path, *, write: bool = True) -> None:
    """Write the small files of a converted model's folder.

    Sharded weights are gathered, so every process must call this; all but one pass ``write=False``.
    """
    layers = numbered_layers(model)
    described = [describe_layer(index, layer) for index, layer in layers.items()]
    if write:
        write_sidecars(described, next(iter(layers.values())).config, sorted(layers), folder)


def write_sidecars(
    described: Iterable[Sequence[dict[str, Tensor]]], config: EMoEConfig | GMoEConfig, layers: list[int], folder: Path
) -> None:
    """Write the small files of a folder, given the results of :func:`describe_layer`."""
    tensors = {"num_experts": torch.tensor(config.num_experts)}
    extra: dict[str, Tensor] = {}
    for layer_tensors, layer_extra in described:
        tensors |= layer_tensors
        extra |= layer_extra
    files.write_tensors(tensors, folder / PARTITION_FILE)
    (folder / EXTRA_FILE).unlink(missing_ok=True)
    if extra:
        files.write_tensors(extra, folder / EXTRA_FILE)
    text = json.dumps({"config": config.to_dict(), "layers": layers}, indent=2)
    (folder / CONFIG_FILE).write_text(text + "\n")


def describe_layer(index: int, layer: RoutedActivation) -> Sequence[dict[str, Tensor]]:
    """Return a layer's tensors for the partition file, and those for the extra file."""
    modules = {module for _, _, root in _modules_with_state(layer) for module in root.modules()}
    with weights_in_place(*modules | {layer.ffn.proj_in}):
        tensors = {f"key_norms.{index}": _key_norms(layer.ffn)}
        if layer.permutation is not None:
            tensors[f"permutation.{index}"] = layer.permutation.contiguous()
        extra = {
            f"{index}.{key}.{name}": unsharded(tensor).cpu().contiguous()
            for key, _, module in _modules_with_state(layer)
            for name, tensor in module.state_dict().items()
        }
        return tensors, extra


def _modules_with_state(layer: RoutedActivation) -> list[tuple[str, str, nn.Module]]:
    """Return the modules whose state the dense model lacks.

    Each has its name in the extra file and its path in the layer.
    """
    copies = layer.ffn.projections() if isinstance(layer.config, GMoEConfig) else []
    return [("routing", layer.ffn.spec.activation, layer), *((path, path, module) for path, module in copies)]


def _key_norms(ffn: FFN) -> Tensor:
    """Return the Euclidean norms of the keys ``[d]``; zeros for quantised keys, which are not compared."""
    if not has_plain_weight(ffn.proj_in):
        return torch.zeros(ffn.d)
    return unsharded(ffn.keys().detach().float().norm(dim=1)).cpu()


def from_pretrained(loader: Any, folder: str | os.PathLike[str], **options: Any) -> nn.Module:
    """Load a converted model that :func:`save_pretrained` or the model's library (``Trainer``) saved.

    Args:
        loader: transformers class, ``timm.create_model``, or function that builds the dense model (a plain module).
        folder: folder of the checkpoint.
        **options: options of the loader, for example ``device_map`` or ``quantization_config``.

    Returns:
        The converted model, in evaluation mode.

    Raises:
        CheckpointError: a file is missing or damaged, or the small files belong to other weights.
    """
    folder = Path(folder)
    mark, tensors, extra = read_sidecars(folder)
    config, is_gmoe = mark.config, isinstance(mark.config, GMoEConfig)
    is_quantized = options.get("quantization_config") or "quantization_config" in files.read_settings(folder)
    if is_quantized and (isinstance(config, GMoEConfig) or config.gate_momentum):
        raise CheckpointError(f"{folder}: a GMoE, or experts with gate_momentum, cannot be loaded quantised")
    stored = files.Weights(folder)

    def copied_names(model: nn.Module) -> set[str]:
        """Return the names of the tensors that GMoE copies; they are loaded after the FFNs are widened."""
        if not is_gmoe:
            return set()
        ffns = [ffn for ffn, _ in stored_expert_ffns(model, mark, tensors, folder)]
        prefixes = tuple(f"{ffn.name}.{path}." for ffn in ffns for path, _ in ffn.projections())
        return {name for name in model.state_dict() if name.startswith(prefixes)}

    saved_by_library = has_routing_state(mark, stored)
    model = files.load_stock(loader, folder, restored=copied_names if saved_by_library or is_gmoe else None, **options)
    pairs = stored_expert_ffns(model, mark, tensors, folder)
    layers = []
    for ffn, permutation in pairs:
        if config.has_routing_state and any(map(is_offloaded, (ffn.proj_in, ffn.proj_out))):
            raise CheckpointError(f"{folder}: the device_map offloads {ffn.name}; keep these experts on a device")
        if is_gmoe:
            widen(ffn, config.num_experts)
        layers.append(RoutedActivation(ffn, config, permutation))
    # weights with routers come from the model's library and are newer than the extra file
    _restore_state(model, layers, stored if saved_by_library else extra, folder)
    for ffn, _ in pairs:
        check_key_norms(ffn, tensors, folder)
    finish_conversion_(model)
    return model.eval()


def has_routing_state(mark: Mark, stored: files.Weights) -> bool:
    """Check if a folder's weights include the state of :class:`RoutedActivation`, as the model's library saves it."""
    names = (name for name in stored.files if ".router." in name or name.endswith(".output_bias"))
    return mark.config.has_routing_state and any(names)


def stored_expert_ffns(
    model: nn.Module, mark: Mark, tensors: dict[str, Tensor], folder: Path
) -> list[tuple[FFN, Tensor | None]]:
    """Return the FFNs that the folder stores as experts, with their permutations (None if unknown)."""
    ffns = find_ffns(model)
    if mark.layers[-1] >= len(ffns):
        raise CheckpointError(f"{folder} has experts in layer {mark.layers[-1]}, but the model only {len(ffns)} FFNs")
    pairs = [(ffns[index], tensors.get(f"permutation.{index}")) for index in mark.layers]
    if isinstance(mark.config, EMoEConfig):
        check_divisible([ffn for ffn, _ in pairs], mark.config.num_experts)
    for ffn, permutation in pairs:
        if permutation is not None and not is_permutation(permutation, ffn.d):
            raise CheckpointError(f"{folder / PARTITION_FILE} has no permutation of {ffn.name}'s {ffn.d} neurons")
    return pairs


def _restore_state(
    model: nn.Module, layers: list[RoutedActivation], source: files.Weights | dict[str, Tensor], folder: Path
) -> None:
    """Load the state that the stock class lacks from the weights or from the content of the extra file."""
    keys = {
        f"{layer.ffn.name}.{path}.{name}": f"{layer.ffn.index}.{key}.{name}"
        for layer in layers
        for key, path, module in _modules_with_state(layer)
        for name in module.state_dict()
    }
    if isinstance(source, files.Weights):
        state = {name: source[stored] for name, stored in source.find(model, keys).items()}
    else:
        state = {name: source[key] for name, key in keys.items() if key in source}
    if missing := keys.keys() - state.keys():
        raise CheckpointError(f"{folder} lacks {min(missing)}; save with emoe.save_pretrained or TrainerCallback")
    try:
        model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise CheckpointError(f"{folder}: the state of the experts does not fit: {files.one_line(error)}") from error


def check_key_norms(ffn: FFN, tensors: dict[str, Tensor], folder: Path) -> None:
    """Check that the partition file, if there is one, belongs to an FFN's weights (raises :class:`CheckpointError`)."""
    if not tensors or not has_plain_weight(ffn.proj_in):
        return
    saved = tensors[f"key_norms.{ffn.index}"].float()
    with torch.no_grad(), weights_in_place(ffn.proj_in):
        norms = _key_norms(ffn)
    if norms.shape != saved.shape or not torch.allclose(norms, saved, rtol=_NORM_TOLERANCE, atol=1e-6):
        raise CheckpointError(f"{folder / PARTITION_FILE} does not match the weights of {ffn.name}")
