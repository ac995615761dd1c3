"""Cache partitions by the content of the keys that they group."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import uuid
from pathlib import Path

from torch import nn

import emoe
from benchmarks.harness.base import PARTITIONS
from emoe.architectures import find_ffns
from emoe.config import EMoEConfig, resolve_layers
from emoe.errors import CheckpointError, ConversionError
from emoe.files import read_metadata, read_tensors, tensor_digest, write_tensors
from emoe.partitioning import Partition, is_permutation, join_partitions

# Part of every cache key. Increase it if the same settings give another partition.
ALGORITHM_VERSION = 2


def cached_partition(model: nn.Module, config: EMoEConfig, folder: Path = PARTITIONS) -> Partition:
    """Return the model's partition, with each layer from the cache if its keys were clustered before.

    The cache is keyed by content, never by name.
    """
    partitions = []
    for _, single in split_by_layer(model, config):
        path = folder / f"{partition_key(model, single)}.safetensors"
        try:
            partitions.append(load_partition(path))
        except CheckpointError:  # missing or damaged
            save_partition(emoe.partition(model, single), path)
            partitions.append(load_partition(path))
    return join_partitions(partitions)


def split_by_layer(model: nn.Module, config: EMoEConfig) -> list[tuple[int, EMoEConfig]]:
    """Return the converted layers, each with its own configuration."""
    layers = resolve_layers(config.layers, len(find_ffns(model)))  # type: ignore[arg-type]
    return [(layer, dataclasses.replace(config, layers=[layer])) for layer in layers]


def partition_key(model: nn.Module, config: EMoEConfig) -> str:
    """Hash the selected FFNs' keys and all settings that determine the partition, to 16 hex digits."""
    if config.partition == "coactivation":
        raise ConversionError("a co-activation partition has no key: it depends on the calibration set")
    ffns = find_ffns(model)
    settings = (ALGORITHM_VERSION, config.num_experts, config.partition, config.partition_seed)
    digest = hashlib.sha256(json.dumps(settings).encode())
    for index in resolve_layers(config.layers, len(ffns)):  # type: ignore[arg-type]
        digest.update(f"{index}:{tensor_digest(ffns[index].keys())}".encode())
    return digest.hexdigest()[:16]


def save_partition(partition: Partition, path: str | os.PathLike[str]) -> None:
    """Write a partition as safetensors. A reader sees the old file or the complete new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {f"layer.{layer}": permutation.contiguous() for layer, permutation in partition.items()}
    metadata = {"explained": json.dumps(partition.explained), "seconds": json.dumps(partition.seconds)}
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    write_tensors(tensors, temporary, metadata)
    temporary.replace(path)


def load_partition(path: str | os.PathLike[str]) -> Partition:
    """Read a partition from a file (raises :class:`CheckpointError` if the file is missing or damaged)."""
    tensors, metadata = read_tensors(Path(path)), read_metadata(Path(path))
    for name, tensor in tensors.items():
        if not is_permutation(tensor, tensor.numel()):
            raise CheckpointError(f"{path}: {name} is not a permutation")
    permutations = {int(name.removeprefix("layer.")): tensor for name, tensor in tensors.items()}
    explained, seconds = _by_layer(metadata.get("explained", "{}")), _by_layer(metadata.get("seconds", "{}"))
    return Partition(dict(sorted(permutations.items())), explained, seconds)


def _by_layer(text: str) -> dict[int, float]:
    """Read a JSON object of numbers by layer, whose keys are strings in JSON."""
    return {int(layer): number for layer, number in json.loads(text).items()}
