"""Build the model of a run: load, convert and adapt it, or reopen a trained one. Cache partitions before the runs."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.harness.base import DataError, derive_seed, write_json
from benchmarks.harness.config.catalogue import ModelSpec
from benchmarks.harness.config.method_specs import MethodSpec, check_frozen
from benchmarks.harness.models.conversion import apply_method_, use_sparse_
from benchmarks.harness.models.image import load_image_classifier, load_image_network
from benchmarks.harness.models.loading import (
    build_empty_language_model,
    load_backbone,
    load_classifier,
    load_language_model,
    load_seq2seq,
    source_of,
)
from benchmarks.harness.models.partitions import (
    cached_partition,
    load_partition,
    partition_keys,
    save_partition,
)
from benchmarks.harness.models.prefix import Prefix
from benchmarks.harness.models.trainable import Trainable, load_trained_, trained_state
from benchmarks.harness.models.tuning import FAST, Groups, tune_
from emoe.architectures import find_ffns
from emoe.config import EMoEConfig
from emoe.files import write_tensors
from emoe.layer import routed_layers
from emoe.partitioning import Partition

_TRAINED, _PARTITION = "trained.safetensors", "partition.safetensors"
# by the modality of the model; text classifiers have none
_NETWORKS: dict[str | None, Callable[[ModelSpec], nn.Module]] = {
    None: load_backbone,
    "image": load_image_network,
    "language": load_language_model,
    "seq2seq": load_seq2seq,
}


class TrainedSpec(Protocol):
    """The part of a training run's spec that all models are built from."""

    @property
    def model(self) -> ModelSpec: ...
    @property
    def method(self) -> MethodSpec: ...
    @property
    def seed(self) -> int: ...
    @property
    def training(self) -> Any: ...  # each kind has its own settings


def build_classifier(
    spec: TrainedSpec,
    labels: int,
    tokenizer: PreTrainedTokenizerBase,
    calibration: Iterable[Mapping[str, Any]] = (),
    partition: Mapping[int, torch.Tensor] | None = None,
) -> Trainable:
    """Load, convert and adapt a text classifier.

    Args:
        spec: The spec of a training run.
        labels: The number of classes; 0 for a regression.
        tokenizer: The model's tokenizer.
        calibration: Batches of training rows, for a co-activation partition.
        partition: The saved partition of a model that is rebuilt.
    """
    model = load_classifier(
        spec.model, max(labels, 1), derive_seed("head", spec.seed), tokenizer.pad_token_id
    )
    return _make_trainable(model, model, source_of(spec.model, model), spec, calibration, partition)


def build_image_classifier(
    spec: TrainedSpec, num_classes: int, size: int, *, drop_path: float, dropout: float
) -> Trainable:
    """Load, convert and adapt a classifier of images.

    Args:
        spec: The spec of a run that trains on images.
        num_classes: The number of classes of the set.
        size: The width and height of the images in pixels.
        drop_path: The rate of stochastic depth.
        dropout: The dropout of the ViT; the fork does not have it.
    """
    head_seed = derive_seed("head", spec.seed)
    model = load_image_classifier(spec.model, num_classes, size, drop_path, head_seed, dropout)
    return _make_trainable(model, model.network, model.source, spec)


def build_language_model(
    spec: TrainedSpec,
    calibration: Iterable[Mapping[str, Any]] = (),
    partition: Mapping[int, torch.Tensor] | None = None,
    *,
    empty: bool = False,
) -> Trainable:
    """Load, convert and adapt a language model.

    Args:
        spec: The spec of a run of instruction tuning.
        calibration: Batches of training rows, for a co-activation partition.
        partition: The saved partition, to rebuild a trained model.
        empty: Leave the weights uninitialised: another process sends them.

    Raises:
        EMoEError: The weights are missing or damaged, or the method does not fit the model.
    """
    layers = (spec.method.config or {}).get("layers")
    model = (
        build_empty_language_model(spec.model, layers) if empty else load_language_model(spec.model)
    )
    # the digest of quantised weights depends on the machine
    source = source_of(spec.model, model, with_digest=not empty and spec.model.quantize is None)
    trainable = _make_trainable(model, model, source, spec, calibration, partition)
    if spec.model.quantize is not None:
        cast(
            Any, model
        )._hf_peft_config_loaded = True  # Trainer requires adapters on quantised weights
    elif not torch.cuda.is_available():
        model.float()  # after clustering the weights in their own type, as on an accelerator
    for parameter in model.parameters():
        if parameter.requires_grad:  # small steps vanish in bf16
            parameter.data = parameter.data.float()
    return trainable


def build_seq2seq(spec: TrainedSpec) -> Trainable:
    """Load and convert an encoder-decoder model for a run on several tasks, and train all of it."""
    model = load_seq2seq(spec.model)
    return _make_trainable(model, model, source_of(spec.model, model), spec)


def _make_trainable(
    model: nn.Module,
    network: nn.Module,
    source: Mapping[str, Any],
    spec: TrainedSpec,
    calibration: Iterable[Mapping[str, Any]] = (),
    partition: Mapping[int, torch.Tensor] | None = None,
) -> Trainable:
    """Convert and adapt a model's network, which is the model itself or one of its modules."""
    tune = spec.method.tune
    # some kinds have neither
    frozen_layers = getattr(spec.training, "frozen_layers", None)
    lora = getattr(spec.training, "lora", None)
    dense, embeddings, ffns = _count(model), _embedding_parameters(model), find_ffns(network)
    dense_ffns = sum(ffn.d * ffn.h * (len(ffn.in_projections()) + 1) for ffn in ffns)
    prefix = None
    if frozen_layers:
        check_frozen(
            frozen_layers, spec.method, "the model", len(ffns)
        )  # planning cannot resolve ``last:2``
        prefix = Prefix(model, network, frozen_layers)
    report = apply_method_(network, spec.method, spec.seed, calibration, partition)
    adapters, groups = None, cast(Groups, {})
    if tune is not None:
        names = prefix.names if prefix else frozenset()
        adapters, groups = tune_(cast(PreTrainedModel, network), lora, tune, spec.seed, names)
    if prefix:
        prefix.freeze_()
    use_sparse_(model)
    share = report.active_neurons if report else 1.0
    routers = sum(
        parameter.numel() for layer in routed_layers(network) for parameter in layer.parameters()
    )
    active = round(dense + (share - 1) * dense_ffns) + routers
    slow_ids = {
        id(values)
        for group, members in groups.items()
        if group not in FAST
        for _, values in members
    }
    slow = frozenset(
        name for name, parameter in model.named_parameters() if id(parameter) in slow_ids
    )
    summary = {
        "source": dict(source),
        "parameters": _count(model),
        "dense_parameters": dense,
        "active_parameters": active,
        "flops_per_token": 2 * (active - embeddings),
        "trainable_parameters": sum(
            parameter.numel() for parameter in model.parameters() if parameter.requires_grad
        ),
        "trained": {
            group: {
                "parameters": sum(values.numel() for _, values in members),
                # identifies runs with the same trained parameters
                "names": hashlib.sha256(
                    "\n".join(sorted(name for name, _ in members)).encode()
                ).hexdigest()[:16],
            }
            for group, members in groups.items()
        },
        "active_neurons": share,
        "conversion": [dataclasses.asdict(layer) for layer in report.layers] if report else [],
    }
    return Trainable(model, summary, slow, adapters, prefix)


def _count(model: nn.Module) -> int:
    if getattr(model, "is_quantized", False):
        return int(cast(PreTrainedModel, model).num_parameters())  # counts packed 4-bit weights too
    return sum(parameter.numel() for parameter in model.parameters())


def _embedding_parameters(model: nn.Module) -> int:
    """Count the parameters of embedding tables, without a table that the output head shares."""
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    shared = getattr(head, "weight", None)
    tables = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
    return sum(table.numel() for table in tables if table is not shared)


def permutations(model: nn.Module) -> dict[int, torch.Tensor]:
    """Return the permutations of a converted model's neurons by layer; empty for a dense model."""
    return {
        layer.ffn.index: layer.permutation
        for layer in routed_layers(model)
        if layer.permutation is not None
    }


def save_trained(model: nn.Module, folder: Path) -> None:
    """Save the trained tensors of a model, and the partition of its neurons."""
    folder.mkdir(parents=True, exist_ok=True)
    if partition := permutations(model):
        save_partition(Partition(partition), folder / _PARTITION)
    write_tensors(trained_state(model), folder / _TRAINED)


def reopen(
    build: Callable[..., Trainable], spec: TrainedSpec, weights: str, folder: Path
) -> Trainable:
    """Build the model of a finished run with its trained weights.

    Args:
        build: The function that builds the model from ``spec`` and ``partition``.
        spec: The spec of the training run.
        weights: The recorded digest of the pre-trained weights; empty if they were quantised.
        folder: The folder that :func:`save_trained` wrote.

    Raises:
        DataError: The trained tensors are missing or damaged, or the pre-trained weights have changed.
        CheckpointError: The partition is missing or damaged.
    """
    config = spec.method.config
    partition = load_partition(folder / _PARTITION) if config and config["kind"] == "emoe" else None
    trainable = build(spec, partition=partition)
    now = trainable.summary["source"]["weights"]
    if weights and now != weights:
        raise DataError(
            f"the weights of '{spec.model.name}' changed since the run was trained: {now} instead of {weights}"
        )
    load_trained_(trainable.model, folder / _TRAINED)
    return trainable


def partition_to_cache(spec: str, output: Path, *, threads: int) -> None:
    """Cluster the neurons of a model, cache the partition, and write a receipt.

    Args:
        spec: The resolved ``model`` and the ``config`` of the EMoE as JSON.
        output: The file of the receipt.
        threads: The number of CPU threads.
    """
    content = json.loads(spec)
    torch.set_num_threads(threads)
    model_spec = ModelSpec(**content["model"])
    model = _NETWORKS[model_spec.modality](model_spec)
    config = EMoEConfig.from_dict(content["config"])
    partition = cached_partition(model, config)
    receipt = {
        "partitions": partition_keys(model, config),
        "explained": partition.explained,
        "seconds": partition.seconds,
        **content,
    }
    write_json(output, receipt)
