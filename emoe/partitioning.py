"""Partitions of an FFN's neurons into experts.

A partition is a permutation of the neurons. After it, expert ``e`` is the block ``[e*s, (e+1)*s)`` with ``s = d / N``,
so a checkpoint keeps the dense model's keys, shapes and function.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from emoe.architectures import find_ffns
from emoe.calibration import Batch, record_activations
from emoe.checks import check_divisible, check_weights
from emoe.clustering import balanced_kmeans, explained_variance_ratio
from emoe.config import EMoEConfig, resolve_layers
from emoe.errors import ConfigError, ConversionError


@dataclass(frozen=True)
class Partition(Mapping[int, Tensor]):
    """Map layer numbers to permutations ``[d]`` int64. Neuron ``permutation[i]`` moves to position i.

    Attributes:
        permutations: the mapping itself.
        explained: share of the variance between normalised keys that the experts explain, by layer; 0 for one expert.
        seconds: build time by layer.
    """

    permutations: dict[int, Tensor]
    explained: dict[int, float] = field(default_factory=dict)
    seconds: dict[int, float] = field(default_factory=dict)

    def __getitem__(self, layer: int) -> Tensor:
        return self.permutations[layer]

    def __iter__(self) -> Iterator[int]:
        return iter(self.permutations)

    def __len__(self) -> int:
        return len(self.permutations)


def partition(
    model: nn.Module,
    config: EMoEConfig,
    *,
    calibration: Iterable[Batch] | None = None,
    progress: bool = False,
) -> Partition:
    """Group the neurons of each selected FFN into ``num_experts`` experts of equal size. The model is not changed.

    Keys are normalised to unit length. Biases are not part of the features.

    >>> layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    >>> model = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    >>> config = emoe.EMoEConfig(num_experts=4, top_k=1, layers=[1])
    >>> permutations = emoe.partition(model, config)
    >>> {layer: tuple(permutation.shape) for layer, permutation in permutations.items()}
    {1: (32,)}
    >>> report = emoe.convert_(model, config, partition=permutations)

    Args:
        model: a dense model of a registered architecture (see :func:`emoe.register_ffn`).
        config: the configuration; ``num_experts``, ``layers``, ``partition`` and ``partition_seed`` are used.
        calibration: input batches (dictionaries of arguments or tensors), only for ``partition="coactivation"``, which
            groups neurons that are active for the same tokens.
        progress: show a progress bar.

    Returns:
        The partition, for :func:`emoe.convert_`.

    Raises:
        ConversionError: an FFN cannot be split, or ``calibration`` is missing or unused.
        ConfigError: the configuration is not an :class:`emoe.EMoEConfig`.
    """
    if not isinstance(config, EMoEConfig):
        raise ConfigError(
            "partition needs an emoe.EMoEConfig; GMoE copies whole FFNs and groups no neurons"
        )
    ffns = find_ffns(model)
    chosen = [ffns[i] for i in resolve_layers(config.layers, len(ffns))]  # type: ignore[arg-type]
    check_weights(model, chosen)
    check_divisible(chosen, config.num_experts)
    if (config.partition == "coactivation") != (calibration is not None):
        raise ConversionError(
            "partition='coactivation' needs calibration=[...], and no other partition takes it"
        )
    features: dict[int, Tensor] = {}
    if calibration is not None:
        features = record_activations(model, chosen, calibration, seed=config.partition_seed)
    from tqdm.auto import tqdm  # `import emoe` imports only PyTorch and safetensors

    bar = tqdm(chosen, "Grouping neurons", unit="layer", disable=not progress)
    return join_partitions(
        group_neurons(ffn.keys(), config, ffn.index, features.get(ffn.index)) for ffn in bar
    )


def join_partitions(partitions: Iterable[Partition]) -> Partition:
    """Join partitions of different layers."""
    joined = Partition({})
    for single in partitions:
        joined.permutations.update(single.permutations)
        joined.explained.update(single.explained)
        joined.seconds.update(single.seconds)
    return joined


def group_neurons(
    keys: Tensor, config: EMoEConfig, layer: int, activations: Tensor | None = None
) -> Partition:
    """Group the neurons of one FFN. Return the partition of this layer.

    Args:
        keys: key vectors ``[d, h]``.
        config: configuration, as in :func:`partition`.
        layer: layer number, which seeds a random partition.
        activations: neurons' activations ``[d, tokens]`` for a co-activation partition.
    """
    start, num_experts, seed = time.perf_counter(), config.num_experts, config.partition_seed
    features = keys if config.partition == "kmeans" else activations
    if features is not None:
        labels = balanced_kmeans(features, num_experts, seed=seed)
    else:
        labels = torch.arange(num_experts).repeat_interleave(len(keys) // num_experts)
        if config.partition == "random":
            digest = hashlib.sha256(
                f"random partition, seed {seed}, layer {layer}".encode()
            ).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
            labels = labels[torch.randperm(len(keys), generator=generator)]
    explained = explained_variance_ratio(keys, labels, num_experts)
    permutation = torch.sort(labels, stable=True).indices
    return Partition({layer: permutation}, {layer: explained}, {layer: time.perf_counter() - start})


def is_permutation(tensor: Tensor | None, length: int) -> bool:
    """Check if a tensor is an int64 permutation of ``0 … length - 1``."""
    if not isinstance(tensor, Tensor) or tensor.dtype != torch.int64 or tensor.shape != (length,):
        return False
    return torch.equal(tensor.sort().values.cpu(), torch.arange(length))
