"""Partitions of an FFN's neurons into experts.

A partition is a permutation of the neurons. After it, expert ``e`` is the block
``[e*s, (e+1)*s)`` with ``s = d / N``, so a checkpoint keeps the dense model's keys, shapes and
function.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from emoe.architectures import find_ffns
from emoe.calibration import Batch, record_activations
from emoe.checks import check_convertible, check_divisible
from emoe.clustering import balanced_kmeans, explained_variance_ratio
from emoe.config import EMoEConfig, resolve_layers
from emoe.errors import ConfigError, ConversionError


@dataclass(frozen=True)
class Partition(Mapping[int, Tensor]):
    """A mapping from layer numbers to permutations ``[d]`` int64 of the neurons.

    Neuron ``permutation[i]`` moves to position i.

    Attributes:
        permutations: permutation of each layer, by layer number.
        explained: share of the normalised keys' variance that the experts explain, by layer; 0 for
            one expert.
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
    """Group the neurons of each selected FFN into ``num_experts`` experts of equal size.

    The model is not changed. A neuron's key is its vector of weights in the in-projection. Keys are
    used without biases, and normalised to unit length.

    >>> layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    >>> model = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    >>> config = emoe.EMoEConfig(num_experts=4, top_k=1, layers=[1])
    >>> permutations = emoe.partition(model, config)
    >>> {layer: tuple(permutation.shape) for layer, permutation in permutations.items()}
    {1: (32,)}
    >>> report = emoe.convert_(model, config, partition=permutations)

    Args:
        model: a dense model of a registered architecture (see :func:`emoe.register_ffn`).
        config: the configuration. Only ``num_experts``, ``layers``, ``partition`` and
            ``partition_seed`` are used.
        calibration: input batches (dictionaries or sequences of arguments, or tensors), only for
            ``partition="coactivation"``, which groups neurons that are active for the same tokens.
        progress: show a progress bar.

    Returns:
        The partition, for :func:`emoe.convert_`.

    Raises:
        ConversionError: the architecture is unknown, an FFN cannot be split, or ``calibration`` is
            missing, unused or without tokens.
        ConfigError: the configuration is not an :class:`emoe.EMoEConfig`, or the model lacks a
            layer that it names.
    """
    if not isinstance(config, EMoEConfig):
        raise ConfigError(
            "partition needs an emoe.EMoEConfig; GMoE copies whole FFNs and groups no neurons"
        )
    ffns = find_ffns(model)
    numbers = resolve_layers(config.layers, len(ffns))
    chosen = [ffns[number] for number in numbers]
    check_convertible(model, chosen)
    check_divisible(chosen, config.num_experts)
    needs_calibration = config.partition == "coactivation"
    has_calibration = calibration is not None
    if needs_calibration != has_calibration:
        raise ConversionError(
            "partition='coactivation' needs calibration=[...], and no other partition takes it"
        )
    activations_of_layer: dict[int, Tensor] = {}
    if calibration is not None:
        seed = config.partition_seed
        activations_of_layer = record_activations(model, chosen, calibration, seed=seed)
    from tqdm.auto import tqdm  # `import emoe` imports only PyTorch and safetensors

    partitions = []
    for ffn in tqdm(chosen, "Grouping neurons", unit="layer", disable=not progress):
        keys = ffn.keys()
        # None unless neurons are grouped by co-activation
        activations = activations_of_layer.get(ffn.index)
        partitions.append(group_neurons(keys, config, ffn.index, activations))
    return join_partitions(partitions)


def join_partitions(partitions: Iterable[Partition]) -> Partition:
    """Join partitions of different layers into one."""
    joined = Partition({})
    for single in partitions:
        joined.permutations.update(single.permutations)
        joined.explained.update(single.explained)
        joined.seconds.update(single.seconds)
    return joined


def group_neurons(
    keys: Tensor, config: EMoEConfig, layer: int, activations: Tensor | None = None
) -> Partition:
    """Group the neurons of one FFN. Return a partition that has only this layer.

    Args:
        keys: key vectors ``[d, h]``.
        config: configuration. Only ``num_experts``, ``partition`` and ``partition_seed`` are used.
        layer: layer number, which seeds a random partition.
        activations: activations of the neurons ``[d, tokens]``, for a co-activation partition.
    """
    start = time.perf_counter()
    labels = _group(keys, config, layer, activations)
    explained = explained_variance_ratio(keys, labels, config.num_experts)
    # neurons of the same expert become adjacent and keep their order
    permutation = torch.sort(labels, stable=True).indices
    seconds = time.perf_counter() - start
    return Partition(
        permutations={layer: permutation}, explained={layer: explained}, seconds={layer: seconds}
    )


def _group(keys: Tensor, config: EMoEConfig, layer: int, activations: Tensor | None) -> Tensor:
    """Choose the expert of each neuron: ``[d]`` int64.

    The arguments are those of :func:`group_neurons`.
    """
    num_experts = config.num_experts
    seed = config.partition_seed
    if config.partition == "kmeans":
        return balanced_kmeans(keys, num_experts, seed=seed)
    if config.partition == "coactivation":
        return balanced_kmeans(cast(Tensor, activations), num_experts, seed=seed)
    num_neurons = len(keys)
    # the first s neurons get expert 0, the next s neurons expert 1, and so on
    experts_in_order = torch.arange(num_experts).repeat_interleave(num_neurons // num_experts)
    if config.partition == "random":
        generator = _random_generator(seed, layer)
        shuffled = torch.randperm(num_neurons, generator=generator)
        return experts_in_order[shuffled]
    return experts_in_order


def _random_generator(seed: int, layer: int) -> torch.Generator:
    """Make the generator of a layer's random partition.

    Layers get different partitions from the same seed.
    """
    text = f"random partition, seed {seed}, layer {layer}"
    digest = hashlib.sha256(text.encode()).digest()
    # seven bytes fit into PyTorch's seed
    number = int.from_bytes(digest[:7], "big")
    return torch.Generator().manual_seed(number)


def is_permutation(tensor: Tensor | None, length: int) -> bool:
    """Check if a tensor is an int64 permutation of ``0 … length - 1``."""
    if not isinstance(tensor, Tensor):
        return False
    if tensor.dtype != torch.int64 or tensor.shape != (length,):
        return False
    sorted_values = tensor.sort().values.cpu()
    return torch.equal(sorted_values, torch.arange(length))
