"""The sidecars of a converted model's folder: what tells it from a dense one's (:mod:`emoe.checkpoint`)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from emoe.architectures import FFN, has_plain_weight
from emoe.config import EMoEConfig, GMoEConfig
from emoe.errors import CheckpointError
from emoe.layer import RoutedActivation
from emoe.marks import mark_from, numbered_layers, read_mark
from emoe.routers import in_place, whole
from emoe.stock import refuse_adapters
from emoe.tensors import carried
from emoe.unfinished import refuse_unfinished
from emoe.weights import read_object, read_tensors, write_tensors

CONFIG_FILE = "emoe_config.json"
PARTITION_FILE = "emoe_partition.safetensors"
EXTRA_FILE = "emoe_extra.safetensors"


def save_sidecars(model: nn.Module, folder: Path, *, write: bool = True) -> None:
    """Write what tells a converted model's folder from a dense one's, beside weights that are there or are to come.

    Args:
        model: converted. Sharded weights are gathered, so every process has to call this.
        folder: exists.
        write: false in processes that gather only.
    """
    layers, _ = numbered_layers(model)
    found = [describe_layer(index, layer) for index, layer in layers.items()]
    if not write:
        return
    tensors, extra = (
        {name: tensor for part in parts for name, tensor in part.items()} for parts in zip(*found, strict=True)
    )
    config = next(iter(layers.values())).config
    write_tensors({**tensors, "num_experts": torch.tensor(config.num_experts)}, folder / PARTITION_FILE)
    if extra:
        write_tensors(extra, folder / EXTRA_FILE)
    else:
        (folder / EXTRA_FILE).unlink(missing_ok=True)
    (folder / CONFIG_FILE).write_text(config_text(config, layers))


def describe_layer(index: int, layer: RoutedActivation) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What the two sidecars with tensors hold of one layer.

    Args:
        index: its number.
        layer: whose weights are in place.
    """
    ffn = layer.ffn
    held = {
        id(module): module
        for part in (layer, ffn.proj_in, ffn.proj_out, ffn.proj_up)
        if part
        for module in part.modules()
    }
    with in_place(*held.values()):
        tensors = {f"key_norms.{index}": key_norms(ffn)}
        if layer.permutation is not None:
            tensors[f"permutation.{index}"] = layer.permutation.contiguous()
        return tensors, {f"{index}.{name}": _whole(tensor) for name, tensor in _extra(layer).items()}


def config_text(config: EMoEConfig | GMoEConfig, layers: Iterable[int]) -> str:
    """What the sidecar ``emoe_config.json`` says."""
    return json.dumps({"config": config.to_dict(), "layers": sorted(layers)}, indent=2) + "\n"


def _extra(layer: RoutedActivation) -> dict[str, Tensor]:
    """State of one layer beyond the dense model's, by ``"routing.<name>"`` or by path."""
    found = {f"routing.{name}": tensor for name, tensor in layer.state_dict().items()}
    if isinstance(layer.config, GMoEConfig):
        for path in projections(layer.ffn):
            state = layer.ffn.layer.get_submodule(path).state_dict()
            found |= {f"{path}.{name}": tensor for name, tensor in state.items()}
    return found


def projections(ffn: FFN) -> list[str]:
    return [*(path for path, _ in ffn.inputs()), ffn.spec.proj_out]


def key_norms(ffn: FFN) -> Tensor:
    if has_plain_weight(ffn.proj_in):
        keys = ffn.keys()
    else:  # quantised ones are known by what they do
        weight, bias = cast(Tensor, ffn.proj_in.weight), ffn.key_bias()
        dtype = torch.get_default_dtype() if bias is None else bias.dtype
        z, _ = carried(ffn.proj_in(torch.eye(ffn.h, dtype=dtype, device=weight.device)))
        rows = ffn.activated_rows(z.t())
        keys = rows if bias is None else rows - bias.unsqueeze(1)
    return _whole(keys.detach().float().norm(dim=1))


def _whole(tensor: Tensor) -> Tensor:
    """A tensor for a file: on the CPU, and in one piece where it is sharded."""
    return whole(tensor).cpu().contiguous()


def read_sidecars(folder: Path) -> tuple[EMoEConfig | GMoEConfig, list[int], dict[str, Tensor], dict[str, Tensor]]:
    """Configuration, layer numbers, permutations with key norms, and extra state of a converted checkpoint.

    The latter two are empty where only ``config.json`` says that the model has experts.

    Raises:
        CheckpointError: a missing or damaged file.
    """
    refuse_unfinished(folder)
    path, mark = folder / CONFIG_FILE, read_mark(folder)
    if not path.exists():
        refuse_adapters(folder)
        if mark is None or (folder / PARTITION_FILE).exists():
            raise CheckpointError(
                f"{path} does not exist: not a folder that emoe.save_pretrained wrote, nor one whose config.json alone says "
                "that the model has experts; a dense model is loaded by its own library, and converted by emoe.convert_"
            )
        return mark.config, mark.layers, {}, {}
    own = mark_from(read_object(path), str(path))
    config, indices = own.config, own.layers
    tensors = read_tensors(folder / PARTITION_FILE)
    extra = read_tensors(folder / EXTRA_FILE) if (folder / EXTRA_FILE).exists() else {}
    experts, known = _described(tensors, folder / PARTITION_FILE)
    if sorted(indices) != known or experts != config.num_experts:
        raise CheckpointError(
            f"{path} names {config.num_experts} experts in the layers {indices}, but {PARTITION_FILE} is of "
            f"{experts} experts in the layers {known}"
        )
    if mark is not None and (mark.config, mark.layers) != (config, indices):
        raise CheckpointError(
            f"{path} and config.json name other experts: the model was saved again without its sidecars; "
            f"save it by emoe.save_pretrained, or delete the {folder / 'emoe_*'} files to go by config.json"
        )
    return config, indices, tensors, extra


def _described(tensors: dict[str, Tensor], path: Path) -> tuple[int, list[int]]:
    """How many experts in which layers a partition file is of, once its tensors are of the right kind."""
    experts = tensors.get("num_experts", torch.tensor(0))
    if experts.numel() != 1 or experts.dtype != torch.int64:
        raise CheckpointError(f"{path} is damaged: 'num_experts' is no whole number")
    layers = []
    for name, tensor in tensors.items():
        if not (match := re.fullmatch(r"(key_norms|permutation)\.(\d{1,9})", name)):
            continue
        norms = match[1] == "key_norms"
        if norms:
            layers.append(int(match[2]))
        if (
            tensor.ndim != 1
            or not tensor.numel()
            or not (tensor.is_floating_point() if norms else tensor.dtype == torch.int64)
        ):
            raise CheckpointError(f"{path} is damaged: '{name}' is no list of one number a neuron")
    return int(experts), sorted(layers)
