"""Cache partitions: the grouping of each FFN's neurons into experts.

A neuron is clustered by its key, a row of the FFN's in-projection.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from pydantic import TypeAdapter
from torch import nn

import emoe
from benchmarks.harness.base import PARTITIONS, atomic_write, print_warning, short_digest
from emoe.architectures import find_ffns
from emoe.config import EMoEConfig, resolve_layers
from emoe.errors import CheckpointError
from emoe.files import class_and_message, read_metadata, read_tensors, tensor_digest, write_tensors
from emoe.partitioning import Partition, is_permutation, join_partitions

# Part of every cache key. Increase it if the same settings give another partition.
_ALGORITHM_VERSION = 2
_NUMBERS = TypeAdapter(dict[int, float])
_LAYER = "layer."  # a tensor's name in a file begins with this; the layer number follows


def cached_partition(model: nn.Module, config: EMoEConfig, folder: Path = PARTITIONS) -> Partition:
    """Return the partition of a model's neurons, from the cache as far as possible.

    Layers that the cache lacks are computed and added to it. The cache depends on the content of
    the weights, never on the name of a model.
    """
    partitions = []
    for layer, key in partition_keys(model, config).items():
        path = folder / f"{key}.safetensors"
        cached = _read_cached(path, layer)
        if cached is None:
            config_of_layer = dataclasses.replace(config, layers=[layer])
            save_partition(emoe.partition(model, config_of_layer), path)
            # read again, so that a computed partition is the same as a cached one
            cached = load_partition(path)
        partitions.append(cached)
    return join_partitions(partitions)


def _read_cached(path: Path, layer: int) -> Partition | None:
    """Read the partition of a layer from the cache. None if it is missing or damaged.

    Prints a warning if it is damaged.
    """
    if not path.exists():
        return None
    try:
        cached = load_partition(path)
    except CheckpointError as error:
        print_warning(f"{error}; it is computed again")
        return None
    # each of these dictionaries must have this layer and no other
    for by_layer in (cached.permutations, cached.explained, cached.seconds):
        if list(by_layer) != [layer]:
            print_warning(f"{path} is not that of layer {layer}; it is computed again")
            return None
    return cached


def partition_keys(model: nn.Module, config: EMoEConfig) -> dict[int, str]:
    """Return the cache key of each layer to convert, by layer number.

    A cache key has 16 hex digits. It is a hash of the weights that are clustered, the layer number,
    and all settings that determine the partition.
    """
    ffns = find_ffns(model)
    settings = json.dumps(
        (_ALGORITHM_VERSION, config.num_experts, config.partition, config.partition_seed)
    )
    layers = resolve_layers(config.layers, len(ffns))
    cache_keys = {}
    for layer in layers:
        # the rows of the in-projection's weight, which the paper calls the keys of the neurons
        neuron_keys = ffns[layer].keys()  # [neurons, width]
        digest_of_keys = tensor_digest(neuron_keys)
        content = f"{settings}{layer}:{digest_of_keys}"
        cache_keys[layer] = short_digest(content, 16)
    return cache_keys


def save_partition(partition: Partition, path: Path) -> None:
    """Write a partition as safetensors. A reader sees the old file or the complete new one."""
    tensors = {}
    for layer, permutation in partition.items():
        tensors[f"{_LAYER}{layer}"] = permutation.contiguous()
    # safetensors holds only text besides tensors
    metadata = {
        "explained": json.dumps(partition.explained),
        "seconds": json.dumps(partition.seconds),
    }
    with atomic_write(path) as temporary:
        write_tensors(tensors, temporary, metadata)


def load_partition(path: Path) -> Partition:
    """Read a partition from a file that :func:`save_partition` wrote.

    Raises:
        CheckpointError: The file is missing or damaged.
    """
    tensors = read_tensors(path)
    permutations = {}
    for name, tensor in tensors.items():
        # the name of a tensor ends with the number of its layer
        layer = name.removeprefix(_LAYER)
        if not layer.isdecimal() or not is_permutation(tensor, tensor.numel()):
            raise CheckpointError(f"{path} is damaged: {name} is not the permutation of a layer")
        permutations[int(layer)] = tensor
    sorted_by_layer = dict(sorted(permutations.items()))

    metadata = read_metadata(path)
    try:
        explained = _numbers_by_layer(metadata.get("explained", "{}"))
        seconds = _numbers_by_layer(metadata.get("seconds", "{}"))
    except ValueError as error:  # from JSON or pydantic
        raise CheckpointError(
            f"{path} is damaged: its metadata: {class_and_message(error)}"
        ) from None
    return Partition(sorted_by_layer, explained, seconds)


def _numbers_by_layer(text: str) -> dict[int, float]:
    """Read a JSON object with a number for each layer. In JSON the layer numbers are strings."""
    return _NUMBERS.validate_python(json.loads(text))
