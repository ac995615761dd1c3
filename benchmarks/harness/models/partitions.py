"""Cache partitions by the content of the keys that they group."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

from torch import nn

import emoe
from benchmarks.harness.base import PARTITIONS, atomic_write
from emoe.architectures import find_ffns
from emoe.config import EMoEConfig, resolve_layers
from emoe.errors import CheckpointError
from emoe.files import read_metadata, read_tensors, tensor_digest, write_tensors
from emoe.partitioning import Partition, is_permutation, join_partitions

# Part of every cache key. Increase it if the same settings give another partition.
_ALGORITHM_VERSION = 2


def cached_partition(model: nn.Module, config: EMoEConfig, folder: Path = PARTITIONS) -> Partition:
    """Return the model's partition; read each layer from the cache if its keys were clustered before.

    The cache is keyed by content, never by name.
    """
    partitions = []
    for layer, key in partition_keys(model, config).items():
        path = folder / f"{key}.safetensors"
        try:
            partitions.append(load_partition(path))
        except CheckpointError:  # missing or damaged
            save_partition(emoe.partition(model, dataclasses.replace(config, layers=[layer])), path)
            partitions.append(load_partition(path))
    return join_partitions(partitions)


def partition_keys(model: nn.Module, config: EMoEConfig) -> dict[int, str]:
    """Hash each converted FFN's keys and all settings that determine its partition, to 16 hex digits by layer."""
    ffns = find_ffns(model)
    settings = json.dumps(
        (_ALGORITHM_VERSION, config.num_experts, config.partition, config.partition_seed)
    )
    layers = resolve_layers(config.layers, len(ffns))  # type: ignore[arg-type]
    contents = {layer: f"{settings}{layer}:{tensor_digest(ffns[layer].keys())}" for layer in layers}
    return {
        layer: hashlib.sha256(content.encode()).hexdigest()[:16]
        for layer, content in contents.items()
    }


def save_partition(partition: Partition, path: Path) -> None:
    """Write a partition as safetensors. A reader sees the old file or the complete new one."""
    tensors = {
        f"layer.{layer}": permutation.contiguous() for layer, permutation in partition.items()
    }
    metadata = {
        "explained": json.dumps(partition.explained),
        "seconds": json.dumps(partition.seconds),
    }
    with atomic_write(path) as temporary:
        write_tensors(tensors, temporary, metadata)


def load_partition(path: Path) -> Partition:
    """Read a partition from a file (raises :class:`CheckpointError` if the file is missing or damaged)."""
    tensors, metadata = read_tensors(path), read_metadata(path)
    for name, tensor in tensors.items():
        if not is_permutation(tensor, tensor.numel()):
            raise CheckpointError(f"{path}: {name} is not a permutation")
    permutations = {int(name.removeprefix("layer.")): tensor for name, tensor in tensors.items()}
    explained, seconds = (
        _by_layer(metadata.get("explained", "{}")),
        _by_layer(metadata.get("seconds", "{}")),
    )
    return Partition(dict(sorted(permutations.items())), explained, seconds)


def _by_layer(text: str) -> dict[int, float]:
    """Read a JSON object of numbers by layer, whose keys are strings in JSON."""
    return {int(layer): number for layer, number in json.loads(text).items()}
