"""Apply a method to a freshly loaded model."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

import emoe
from benchmarks.harness.base.files import write_json
from benchmarks.harness.base.paths import PARTITIONS
from benchmarks.harness.base.seeds import derive_seed
from benchmarks.harness.modeling.image import is_image_model, load_image_network
from benchmarks.harness.modeling.language import is_language_model, load_language_model
from benchmarks.harness.modeling.loading import load_backbone
from emoe.architectures import find_ffns, resolve_layers
from emoe.config import EMoEConfig
from emoe.partitioning import Partition, load_partition, partition_key, save_partition


def apply_method_(
    model: nn.Module,
    method: Mapping[str, Any],
    seed: int,
    calibration: Iterable[Mapping[str, Any]] = (),
    partition: Mapping[int, torch.Tensor] | None = None,
) -> emoe.ConversionReport | None:
    """Turn a dense model into what the method trains, in place.

    Args:
        model: the pre-trained model.
        method: the ``method`` part of a run's spec.
        seed: the run's seed, for noisy tuning.
        calibration: batches of training rows, read for a co-activation partition only.
        partition: of a model that is built again; made, or taken from the cache, where None.

    Returns:
        The conversion's report; None for a dense model.
    """
    if method["noise"]:
        emoe.noisy_tuning_(model, method["noise"], seed=derive_seed("noise", seed))
    if method["config"] is None:
        return None
    config = emoe.config_from_dict(method["config"])
    if isinstance(config, EMoEConfig) and partition is not None:
        return emoe.convert_(model, config, partition=partition)
    if isinstance(config, EMoEConfig) and config.partition == "kmeans":
        return emoe.convert_(model, config, partition=cached_partition(model, config))
    if isinstance(config, EMoEConfig) and config.partition == "coactivation":
        return emoe.convert_(model, config, calibration=calibration)
    return emoe.convert_(model, config)


def partition_to_cache(spec: str, output: Path, *, threads: int) -> None:
    """Cluster ahead of the runs, and write a receipt that says where the partition is.

    Args:
        spec: JSON with a resolved ``model`` and the ``config`` of the EMoE.
        output: the receipt.
        threads: CPU threads.
    """
    content = json.loads(spec)
    torch.set_num_threads(threads)
    model, config = _load_dense(content["model"]), EMoEConfig.from_dict(content["config"])
    found = cached_partition(model, config)
    receipt = {
        "partitions": {layer: partition_key(model, single) for layer, single in _by_layer(model, config)},
        "explained": found.explained,
        "seconds": found.seconds,
        **content,
    }
    write_json(output, receipt)


def _load_dense(model: Mapping[str, Any]) -> nn.Module:
    if is_image_model(model):
        return load_image_network(model)
    return load_language_model(model) if is_language_model(model) else load_backbone(model)


def cached_partition(model: nn.Module, config: EMoEConfig, folder: Path = PARTITIONS) -> Partition:
    """The model's partition, each layer from the cache where the same keys were clustered before.

    The cache is keyed by content (see :func:`emoe.partitioning.partition_key`), never by name.
    """
    parts = []
    for _, single in _by_layer(model, config):
        path = folder / f"{partition_key(model, single)}.safetensors"
        if not path.exists():
            save_partition(emoe.partition(model, single), path)
        parts.append(load_partition(path))
    return Partition(
        {layer: permutation for part in parts for layer, permutation in part.items()},
        {layer: share for part in parts for layer, share in part.explained.items()},
        {layer: seconds for part in parts for layer, seconds in part.seconds.items()},
    )


def _by_layer(model: nn.Module, config: EMoEConfig) -> list[tuple[int, EMoEConfig]]:
    """The chosen layers, each with a configuration of its own."""
    layers = resolve_layers(config.layers, len(find_ffns(model)))  # type: ignore[arg-type]
    return [(layer, dataclasses.replace(config, layers=[layer])) for layer in layers]
