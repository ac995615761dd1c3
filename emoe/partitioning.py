"""Which neurons form which expert: a permutation of each FFN's hidden neurons.

After the permutation expert ``e`` is the contiguous block ``[e*s, (e+1)*s)`` with ``s = d / N``, so
that the checkpoint keeps the dense model's keys and shapes, and so does its function.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from emoe.architectures import FFN, find_ffns, resolve_layers
from emoe.clustering import balanced_kmeans, inertia
from emoe.config import EMoEConfig
from emoe.errors import CheckpointError, ConversionError

# Part of every cache key: raise it when the same settings would give another partition.
ALGORITHM_VERSION = 1


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


def check_divisible(ffns: Iterable[FFN], num_experts: int) -> None:
    """Raise :class:`ConversionError` unless ``num_experts`` divides the width of every FFN."""
    for ffn in ffns:
        d = ffn.keys().shape[0]
        if d % num_experts:
            near = [n for n in range(1, d + 1) if d % n == 0]
            best = min(near, key=lambda n: abs(n - num_experts))
            raise ConversionError(
                f"{ffn.name}: {d} neurons cannot be split into {num_experts} equal experts; the nearest number that can is {best}"
            )


def check_keys(ffns: Iterable[FFN]) -> None:
    """Raise :class:`ConversionError` for keys that are quantised or not finite."""
    for ffn in ffns:
        for path, module in [*ffn.inputs(), (ffn.spec.proj_out, ffn.proj_out)]:
            weight = getattr(module, "weight", None)
            if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.ndim != 2:
                raise ConversionError(
                    f"{ffn.name}.{path} ({type(module).__name__}) has no plain floating-point weight; convert before quantising or adding adapters"
                )
            if not torch.isfinite(weight).all():
                raise ConversionError(f"{ffn.name}.{path}.weight holds values that are not finite")


def partition(model: nn.Module, config: EMoEConfig) -> Partition:
    """Group the neurons of each chosen FFN into ``num_experts`` experts of equal size (the paper's expert construction).

    The model is not changed. Biases are not part of the features.

    Args:
        model: any model with a row in the registry (see :func:`emoe.register_ffn`).
        config: uses ``num_experts``, ``layers``, ``partition`` and ``partition_seed``.

    Raises:
        ConversionError: unknown architecture, indivisible width, non-finite or quantised keys.
    """
    ffns = find_ffns(model)
    chosen = [ffns[i] for i in resolve_layers(config.layers, len(ffns))]  # type: ignore[arg-type]
    check_keys(chosen)
    check_divisible(chosen, config.num_experts)
    permutations, explained, seconds = {}, {}, {}
    for ffn in chosen:
        start = time.perf_counter()
        labels = _labels(ffn, config)
        rows = torch.nn.functional.normalize(ffn.keys().detach().float(), dim=1)
        total = inertia(rows, torch.zeros_like(labels), 1)
        permutations[ffn.index] = torch.sort(labels, stable=True).indices
        explained[ffn.index] = 1 - inertia(rows, labels, config.num_experts) / total if total else 0.0
        seconds[ffn.index] = time.perf_counter() - start
    return Partition(permutations, explained, seconds)


def _labels(ffn: FFN, config: EMoEConfig) -> Tensor:
    keys = ffn.keys()
    d = keys.shape[0]
    if config.partition == "kmeans":
        return balanced_kmeans(keys, config.num_experts, seed=config.partition_seed).labels
    blocks = torch.arange(config.num_experts).repeat_interleave(d // config.num_experts)
    if config.partition == "contiguous":
        return blocks
    digest = hashlib.sha256(f"random partition, seed {config.partition_seed}, layer {ffn.index}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return blocks[torch.randperm(d, generator=generator)]


def partition_key(model: nn.Module, config: EMoEConfig) -> str:
    """Content hash (16 hex digits) of the chosen keys and of every setting that shapes the partition.

    Two models share a cached partition only if their keys are equal to the bit.
    """
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


def save_partition(partition: Partition, path: str | os.PathLike[str]) -> None:
    """Write a partition as safetensors, atomically."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {f"layer.{layer}": permutation.contiguous() for layer, permutation in partition.items()}
    notes = {"explained": json.dumps(partition.explained), "seconds": json.dumps(partition.seconds)}
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    save_file(tensors, temporary, metadata=notes)
    temporary.replace(path)


def load_partition(path: str | os.PathLike[str]) -> Partition:
    """Read what :func:`save_partition` wrote.

    Raises:
        CheckpointError: no such file, a truncated one, or one that holds no permutations.
    """
    path = Path(path)
    try:
        with safe_open(path, framework="pt") as file:
            notes = file.metadata() or {}
            permutations = {int(name.removeprefix("layer.")): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist") from error
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    for layer, permutation in permutations.items():
        if permutation.dtype != torch.int64 or not torch.equal(
            permutation.sort().values, torch.arange(len(permutation))
        ):
            raise CheckpointError(f"{path}: layer.{layer} is not a permutation")
    numbers = {
        name: {int(k): float(v) for k, v in json.loads(notes.get(name, "{}")).items()}
        for name in ("explained", "seconds")
    }
    return Partition(dict(sorted(permutations.items())), **numbers)
