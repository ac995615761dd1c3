"""Apply a method to a freshly loaded model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import nn

import emoe
from benchmarks.harness.base import derive_seed
from benchmarks.harness.config.method_specs import MethodSpec
from benchmarks.harness.models.partitions import cached_partition
from emoe.config import EMoEConfig

_HEADS = {"classifier", "score"}  # transformers' names of new heads


def apply_method_(
    model: nn.Module,
    method: MethodSpec,
    seed: int,
    calibration: Iterable[Mapping[str, Any]] = (),
    partition: Mapping[int, torch.Tensor] | None = None,
) -> emoe.ConversionReport | None:
    """Convert a dense model or add noise to it, according to the method, in place.

    Args:
        model: The pre-trained model.
        method: The ``method`` part of a run's spec.
        seed: The seed of the run, for noisy tuning.
        calibration: Batches of training rows, for a co-activation partition and for fixed experts.
        partition: The saved partition of a model that is rebuilt; by default it is computed or cached.

    Returns:
        The report of the conversion; None for a dense model.
    """
    if method.noise:
        noisy_tuning_(model, method.noise, seed=derive_seed("noise", seed))
    if method.config is None:
        return None
    return _convert_(model, method.config, calibration, partition)


def _convert_(
    model: nn.Module,
    settings: Mapping[str, Any],
    calibration: Iterable[Mapping[str, Any]] = (),
    partition: Mapping[int, torch.Tensor] | None = None,
) -> emoe.ConversionReport:
    config = emoe.config_from_dict(settings)
    if not isinstance(config, EMoEConfig):
        return emoe.convert_(model, config)
    saved, is_fixed = partition, config.router == "fixed"
    if is_fixed:  # fix the experts that avg-k uses most
        config = dataclasses.replace(config, router="avg_k")
    if partition is None and config.partition == "kmeans":
        partition = cached_partition(model, config)
    needs_rows = partition is None and config.partition == "coactivation"
    report = emoe.convert_(
        model, config, partition=partition, calibration=calibration if needs_rows else None
    )
    if is_fixed:
        # a rebuilt model loads its counts later
        unknown = torch.ones(config.num_experts, dtype=torch.int64)
        emoe.fix_experts_(
            model,
            _count_usage(model, calibration) if saved is None else dict.fromkeys(saved, unknown),
        )
    return report


def convert_trained_(model: nn.Module, config: Mapping[str, Any] | None) -> None:
    """Convert a trained dense model to experts, or fold a trained EMoE back if ``config`` is None, in place."""
    if config is None:
        emoe.to_dense_(model)
    else:
        _convert_(model, config)
        use_sparse_(model)


def use_sparse_(model: nn.Module) -> None:
    """Use the sparse backend on a CPU. FFNs with adapters, or with scores that need every neuron, stay masked."""
    if torch.cuda.is_available() or not emoe.is_converted(model):
        return
    with suppress(emoe.ConversionError):
        emoe.set_backend_(model, "sparse")


@torch.no_grad()
def _count_usage(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> dict[int, torch.Tensor]:
    """Count how often avg-k uses each expert, by layer."""
    use_sparse_(model.eval())
    with emoe.record_routing(model) as record:
        for batch in batches:
            model(**batch)
    emoe.set_backend_(model, "masked")
    return {number: layer.loads for number, layer in record.layers.items()}


@torch.no_grad()
def noisy_tuning_(model: nn.Module, intensity: float, *, seed: int) -> None:
    """Add uniform noise to the pre-trained weights in place, before fine-tuning.

    Each parameter gets ``U(-1/2, 1/2) * intensity * std(parameter)``. Parameters with one element have no standard
    deviation and stay unchanged, as does the new head.

    Args:
        model: The model.
        intensity: The authors' lambda, 0.15.
        seed: The seed of the noise.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.numel() > 1 and _HEADS.isdisjoint(name.split(".")):
            noise = torch.rand(parameter.shape, generator=generator) - 0.5
            parameter.add_((noise * intensity * parameter.float().std().cpu()).to(parameter))
