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
from emoe.architectures import find_ffns
from emoe.config import EMoEConfig, resolve_layers

_NAMES_OF_HEADS = {"classifier", "score"}  # heads that transformers adds to a pre-trained model


def apply_method_(
    model: nn.Module,
    method: MethodSpec,
    seed: int,
    calibration: Iterable[Mapping[str, Any]] = (),
    partition: Mapping[int, torch.Tensor] | None = None,
) -> emoe.ConversionReport | None:
    """Apply a method to a dense model in place: add noise to the weights, then convert the FFNs.

    A method may do both, one, or neither.

    Args:
        model: The pre-trained model.
        method: The ``method`` section of a run's spec.
        seed: The seed of the run; it determines the noise.
        calibration: Batches of training rows, for a co-activation partition or fixed experts.
        partition: The saved partition of the neurons, to rebuild a trained model. By default it is
            computed, or read from the cache.

    Returns:
        The report of the conversion; None for a dense model.
    """
    if method.noise:
        noise_seed = derive_seed("noise", seed)
        noisy_tuning_(model, intensity=method.noise, seed=noise_seed)
    if method.config is None:
        return None
    return _convert_(model, method.config, calibration, partition)


def _convert_(
    model: nn.Module,
    settings: Mapping[str, Any],
    calibration: Iterable[Mapping[str, Any]] = (),
    partition: Mapping[int, torch.Tensor] | None = None,
) -> emoe.ConversionReport:
    """Convert a dense model to EMoE or GMoE in place, and return the report of the conversion.

    Args:
        model: The dense model.
        settings: The configuration of the experts as plain values.
        calibration: Batches of training rows, for a co-activation partition or fixed experts.
        partition: The saved partition of the neurons, to rebuild a trained model. By default it is
            computed, or read from the cache.
    """
    config = emoe.config_from_dict(settings)
    if not isinstance(config, EMoEConfig):
        return emoe.convert_(model, config)

    if config.router != "fixed":
        return _convert_to_emoe_(model, config, calibration, partition)

    # The fixed experts are those that the router avg-k uses most. So the model is first converted
    # with avg-k, to count how often it uses each expert.
    avg_k_config = dataclasses.replace(config, router="avg_k")
    report = _convert_to_emoe_(model, avg_k_config, calibration, partition)
    if partition is None:
        usage = _count_usage(model, calibration)
    else:
        # a placeholder for every layer: the real counts are loaded later, with the trained tensors
        equal = torch.ones(config.num_experts, dtype=torch.int64)
        usage = dict.fromkeys(partition, equal)
    emoe.fix_experts_(model, usage)
    return report


def _convert_to_emoe_(
    model: nn.Module,
    config: EMoEConfig,
    calibration: Iterable[Mapping[str, Any]],
    partition: Mapping[int, torch.Tensor] | None,
) -> emoe.ConversionReport:
    """Convert a dense model to EMoE in place. The arguments are those of :func:`_convert_`."""
    if partition is not None:  # the partition of a trained model
        return emoe.convert_(model, config, partition=partition)
    if config.partition == "kmeans":
        return emoe.convert_(model, config, partition=cached_partition(model, config))
    if config.partition == "coactivation":
        return emoe.convert_(model, config, calibration=calibration)
    return emoe.convert_(model, config)


def check_layers(model: nn.Module, config: Mapping[str, Any]) -> None:
    """Check that a dense model has the layers of a configuration of experts.

    A model that is converted after the training needs this check before it.

    Raises:
        ConfigError: A layer does not exist.
    """
    layers = emoe.config_from_dict(config).layers
    resolve_layers(layers, count=len(find_ffns(model)))


def convert_trained_(model: nn.Module, config: Mapping[str, Any] | None) -> None:
    """Convert a trained dense model to ``config``, or a trained EMoE to a dense model, in place.

    Args:
        model: The trained model.
        config: The configuration of the experts; None to make the model dense.
    """
    if config is None:
        emoe.to_dense_(model)
    else:
        _convert_(model, config)
        use_sparse_(model)


def use_sparse_(model: nn.Module) -> None:
    """On a CPU, set the sparse backend of a converted model, which computes only chosen experts.

    If this backend does not support the model, the model stays unchanged. For example, the backend
    does not support adapters in FFNs.
    """
    if torch.cuda.is_available() or not emoe.is_converted(model):
        return
    with suppress(emoe.ConversionError):
        emoe.set_backend_(model, "sparse")


@torch.no_grad()
def _count_usage(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> dict[int, torch.Tensor]:
    """Run a model on batches, and count how often each layer uses each of its experts.

    The model stays in eval mode.

    Returns:
        The counts ``[num_experts]``, by layer number.
    """
    model.eval()
    use_sparse_(model)
    with emoe.record_routing(model) as record:
        for batch in batches:
            model(**batch)
    # undoes use_sparse_(): a converted model has the masked backend
    emoe.set_backend_(model, "masked")
    return {number: layer.loads for number, layer in record.layers.items()}


@torch.no_grad()
def noisy_tuning_(model: nn.Module, intensity: float, *, seed: int) -> None:
    """Add uniform noise to the pre-trained weights in place, before fine-tuning.

    Each parameter gets ``U(-1/2, 1/2) * intensity * std(parameter)``. A new head of transformers
    stays unchanged, and so does a parameter with one element, which has no standard deviation.

    Args:
        model: The model.
        intensity: The factor of the noise. The authors of noisy tuning call it lambda.
        seed: The seed of the noise.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        is_head = any(module in _NAMES_OF_HEADS for module in name.split("."))
        if is_head or parameter.numel() <= 1:
            continue
        # drawn on the CPU, so that the noise is equal on all devices
        noise = torch.rand(parameter.shape, generator=generator) - 0.5
        deviation = parameter.float().std().cpu()
        scaled_noise = noise * intensity * deviation
        # the type and device of the parameter
        parameter.add_(scaled_noise.to(parameter))
