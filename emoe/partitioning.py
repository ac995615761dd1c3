"""Which neurons form which expert: a permutation of each FFN's hidden neurons.

After the permutation expert ``e`` is the contiguous block ``[e*s, (e+1)*s)`` with ``s = d / N``, so
that the checkpoint keeps the dense model's keys and shapes, and so does its function.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from emoe.architectures import find_ffns
from emoe.calibration import Batch, record_activations
from emoe.checks import check_distinct_keys, check_divisible, check_weights
from emoe.clustering import balanced_kmeans, explained_variance_ratio
from emoe.config import EMoEConfig, check_config
from emoe.errors import CheckpointError, ConfigError, ConversionError
from emoe.layer_numbers import resolve_layers
from emoe.permissions import sync
from emoe.weights import one_line, write_tensors

# Part of every cache key: raise it when the same settings would give another partition.
ALGORITHM_VERSION = 2


@dataclass(frozen=True)
class Partition(Mapping[int, Tensor]):
    """Layer number to permutation ``[d]`` (int64): place i is taken by neuron ``permutation[i]``.

    Attributes:
        permutations: the mapping itself.
        explained: layer number to the share of the variance between (normalised) keys that the
            experts explain; 0 for a single expert, about ``N / d`` for a random partition.
        seconds: time to build each layer.
    """

    permutations: dict[int, Tensor]
    explained: dict[int, float] = field(default_factory=dict)
    seconds: dict[int, float] = field(default_factory=dict)

    def __getitem__(self, layer: int) -> Tensor:
        return self.permutations[layer]

    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter(self.permutations)

    def __len__(self) -> int:
        return len(self.permutations)


def partition(
    model: nn.Module, config: EMoEConfig, *, calibration: Iterable[Batch] | None = None, progress: bool = False
) -> Partition:
    """Group the neurons of each chosen FFN into ``num_experts`` experts of equal size (the paper's expert construction).

    The model is not changed. Keys are brought to unit length, biases are not part of the features.

    >>> layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    >>> model = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    >>> config = emoe.EMoEConfig(num_experts=4, top_k=1, layers=[1])
    >>> found = emoe.partition(model, config)  # as often as is wanted; a file keeps it by save_partition
    >>> {layer: tuple(permutation.shape) for layer, permutation in found.items()}
    {1: (32,)}
    >>> report = emoe.convert_(model, config, partition=found)

    Args:
        model: any dense model with a row in the registry (see :func:`emoe.register_ffn`).
        config: uses ``num_experts``, ``layers``, ``partition`` and ``partition_seed``.
        calibration: batches to call the model with, dictionaries of arguments or tensors; for
            ``partition="coactivation"``, which groups neurons that fire for the same tokens.
        progress: show a progress bar.

    Returns:
        Layer number to permutation ``[d]``, for :func:`emoe.convert_`.

    Raises:
        ConversionError: unknown architecture, indivisible width, weights that are quantised, shared
            or not finite; with ``kmeans`` zero or equal keys; with ``coactivation`` no calibration.
        ConfigError: the configuration is none of an EMoE.
    """
    check_config(config, "partition")
    if not isinstance(config, EMoEConfig):
        raise ConfigError("partition: GMoE copies whole FFNs and groups no neurons")
    ffns = find_ffns(model)
    chosen = [ffns[i] for i in resolve_layers(config.layers, len(ffns))]  # type: ignore[arg-type]
    check_weights(model, chosen)
    check_divisible(chosen, config.num_experts)
    features: dict[int, Tensor] = {}
    if config.partition == "kmeans":
        check_distinct_keys(chosen)
    if config.partition != "coactivation" and calibration is not None:
        raise ConversionError(f"partition='{config.partition}' reads no calibration batches; 'coactivation' does")
    if config.partition == "coactivation":
        if calibration is None:
            raise ConversionError("partition='coactivation' needs calibration batches: pass calibration=[...]")
        features = record_activations(model, chosen, calibration, seed=config.partition_seed)
    if progress:
        from tqdm.auto import tqdm  # `import emoe` needs torch and safetensors alone

        chosen = tqdm(chosen, desc="Grouping neurons", unit="layer")
    return join_partitions(group_neurons(ffn.keys(), config, ffn.index, features.get(ffn.index)) for ffn in chosen)


def join_partitions(parts: Iterable[Partition]) -> Partition:
    """Put partitions of different layers together."""
    parts = list(parts)
    return Partition(
        {layer: permutation for part in parts for layer, permutation in part.items()},
        {layer: share for part in parts for layer, share in part.explained.items()},
        {layer: seconds for part in parts for layer, seconds in part.seconds.items()},
    )


def group_neurons(keys: Tensor, config: EMoEConfig, layer: int, activations: Tensor | None = None) -> Partition:
    """Group the neurons of one FFN.

    Args:
        keys: ``[d, h]``.
        config: as in :func:`partition`.
        layer: its number, which a random partition depends on.
        activations: ``[d, tokens]`` for a co-activation partition.

    Returns:
        The partition of this layer alone.
    """
    start = time.perf_counter()
    labels, share = _labels(keys, config, layer, activations)
    permutation = torch.sort(labels, stable=True).indices
    return Partition({layer: permutation}, {layer: share}, {layer: time.perf_counter() - start})


def _labels(keys: Tensor, config: EMoEConfig, layer: int, activations: Tensor | None) -> tuple[Tensor, float]:
    """Each neuron's expert ``[d]``, and the share of the variance between keys that this explains."""
    n, seed = config.num_experts, config.partition_seed
    if config.partition == "kmeans":
        found = balanced_kmeans(keys, n, seed=seed)
        return found.labels, found.explained
    if activations is not None:
        labels = balanced_kmeans(activations, n, seed=seed).labels
    else:
        labels = torch.arange(n).repeat_interleave(len(keys) // n)
        if config.partition == "random":
            text = f"random partition, seed {seed}, layer {layer}"
            digest = hashlib.sha256(text.encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
            labels = labels[torch.randperm(len(keys), generator=generator)]
    return labels, explained_variance_ratio(keys, labels, n)


def partition_key(model: nn.Module, config: EMoEConfig) -> str:
    """Content hash (16 hex digits) of the chosen keys and of every setting that shapes the partition.

    Two models share a cached partition only if their keys are equal to the bit.

    Raises:
        ConversionError: a co-activation partition, which also depends on its calibration set.
    """
    if config.partition == "coactivation":
        raise ConversionError("a co-activation partition has no key: it depends on the calibration set")
    ffns = find_ffns(model)
    digest = hashlib.sha256()
    settings = (ALGORITHM_VERSION, config.num_experts, config.partition, config.partition_seed)
    digest.update(json.dumps(settings).encode())
    for index in resolve_layers(config.layers, len(ffns)):  # type: ignore[arg-type]
        digest.update(f"{index}:{tensor_digest(ffns[index].keys())}".encode())
    return digest.hexdigest()[:16]


def tensor_digest(tensor: Tensor) -> str:
    """sha256 of a tensor's dtype, shape and bytes."""
    plain = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{plain.dtype}{tuple(plain.shape)}".encode())
    digest.update(plain.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def is_permutation(tensor: Tensor | None, length: int) -> bool:
    """Whether a tensor is an int64 permutation of ``0 … length - 1``."""
    return (
        isinstance(tensor, Tensor)
        and tensor.dtype == torch.int64
        and tensor.shape == (length,)
        and torch.equal(tensor.sort().values.cpu(), torch.arange(length))
    )


def save_partition(partition: Partition, path: str | os.PathLike[str]) -> None:
    """Write a partition as safetensors: a reader sees the old file or the new one, after a power cut too."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {f"layer.{layer}": permutation.contiguous() for layer, permutation in partition.items()}
    notes = {"explained": json.dumps(partition.explained), "seconds": json.dumps(partition.seconds)}
    notes["sha256"] = _digest(partition.permutations)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    write_tensors(tensors, temporary, notes)
    sync(temporary)
    temporary.replace(path)


def _digest(permutations: Mapping[int, Tensor]) -> str:
    text = "".join(f"{layer}:{tensor_digest(found)}" for layer, found in sorted(permutations.items()))
    return hashlib.sha256(text.encode()).hexdigest()


def load_partition(path: str | os.PathLike[str]) -> Partition:
    """Read what :func:`save_partition` wrote.

    Raises:
        CheckpointError: no such file, a truncated one, or one that holds others than were written, or no permutations.
    """
    path = Path(path)
    try:
        with safe_open(path, framework="pt") as file:
            notes = file.metadata() or {}
            permutations = {int(name.removeprefix("layer.")): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        numbers = {
            name: {int(layer): float(number) for layer, number in json.loads(notes.get(name, "{}")).items()}
            for name in ("explained", "seconds")
        }
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist") from error
    except (SafetensorError, OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {one_line(error)}") from error
    for layer, permutation in permutations.items():
        if not is_permutation(permutation, permutation.numel()):
            raise CheckpointError(f"{path}: layer.{layer} is not a permutation")
    if notes.get("sha256", digest := _digest(permutations)) != digest:  # files of older versions say none
        raise CheckpointError(f"{path} holds other permutations than were written; delete it")
    return Partition(dict(sorted(permutations.items())), **numbers)
