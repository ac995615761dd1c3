"""Build the model of a run, or reopen a trained one; cache partitions before the runs.

A builder loads a pre-trained model, converts its FFNs, adds adapters, and freezes the rest.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

import torch
from peft import LoraModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.harness.base import (
    TRAINED_FILE,
    DataError,
    derive_seed,
    short_digest,
    write_json,
)
from benchmarks.harness.config.catalogue import ModelSpec
from benchmarks.harness.config.method_specs import MethodSpec, check_frozen
from benchmarks.harness.models.conversion import apply_method_, use_sparse_
from benchmarks.harness.models.image import load_image_classifier, load_image_network
from benchmarks.harness.models.loading import (
    build_empty_language_model,
    load_backbone,
    load_classifier,
    load_language_model,
    load_language_model_to_cluster,
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
from emoe.architectures import FFN, find_ffns
from emoe.config import EMoEConfig
from emoe.convert import ConversionReport
from emoe.files import write_tensors
from emoe.layer import routed_layers
from emoe.partitioning import Partition

# the file with the partition, in the folder of a trained model
_PARTITION = "partition.safetensors"
# Loaders of the network whose neurons are clustered, by modality (None for text classifiers).
# Language models have a loader of their own, because they may be larger than the memory.
_NETWORK_LOADERS: dict[str | None, Callable[[ModelSpec], nn.Module]] = {
    None: load_backbone,
    "image": load_image_network,
    "seq2seq": load_seq2seq,
}


class TrainedSpec(Protocol):
    """The fields of a training run's spec that the builders read."""

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
        calibration: Batches of training rows, for a co-activation partition or fixed experts.
        partition: The saved partition of the neurons, to rebuild a trained model.
    """
    model = load_classifier(
        spec.model,
        num_labels=max(labels, 1),  # the head of a regression has one output
        seed=derive_seed("head", spec.seed),
        pad_token_id=tokenizer.pad_token_id,
    )
    source = source_of(spec.model, model)
    return _make_trainable(
        model,
        network=model,
        source=source,
        spec=spec,
        calibration=calibration,
        partition=partition,
    )


def build_image_classifier(
    spec: TrainedSpec, num_classes: int, size: int, *, drop_path: float, dropout: float
) -> Trainable:
    """Load, convert and adapt a classifier of images.

    Args:
        spec: The spec of a run that trains on images.
        num_classes: The number of classes of the data set.
        size: The width and height of the images in pixels.
        drop_path: The rate of stochastic depth.
        dropout: The dropout before the head.
    """
    model = load_image_classifier(
        spec.model,
        num_classes=num_classes,
        image_size=size,
        drop_path=drop_path,
        seed=derive_seed("head", spec.seed),
        dropout=dropout,
    )
    return _make_trainable(model, network=model.network, source=model.source, spec=spec)


def build_language_model(
    spec: TrainedSpec,
    calibration: Iterable[Mapping[str, Any]] = (),
    partition: Mapping[int, torch.Tensor] | None = None,
    *,
    empty: bool = False,
) -> Trainable:
    """Load, convert and adapt a language model. All trained parameters become float32.

    Args:
        spec: The spec of a run of instruction tuning.
        calibration: Batches of training rows, for a co-activation partition or fixed experts.
        partition: The saved partition of the neurons, to rebuild a trained model.
        empty: True to build the model without its weights, because another process sends them.

    Raises:
        EMoEError: The weights are missing or damaged, or the method does not fit the model.
    """
    if empty:
        config = spec.method.config or {}  # a dense model has none
        model = build_empty_language_model(spec.model, converted=config.get("layers"))
    else:
        model = load_language_model(spec.model)

    is_quantized = spec.model.quantize is not None
    # the digest of quantised weights depends on the machine; empty weights have none
    source = source_of(spec.model, model, with_digest=not is_quantized and not empty)
    trainable = _make_trainable(
        model,
        network=model,
        source=source,
        spec=spec,
        calibration=calibration,
        partition=partition,
    )
    # after the conversion, which clusters the weights in the type in which they were loaded
    _set_types_(model, is_quantized=is_quantized)
    if is_quantized:
        # Trainer refuses quantised weights unless transformers loaded the adapters
        cast(Any, model)._hf_peft_config_loaded = True
    return trainable


def _set_types_(model: PreTrainedModel, *, is_quantized: bool) -> None:
    """Set the type of a language model's weights for training.

    Trained parameters become float32, because small steps vanish in bfloat16. On a CPU, all weights
    become float32 unless they are quantised.
    """
    if not is_quantized and not torch.cuda.is_available():
        model.float()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def build_seq2seq(spec: TrainedSpec) -> Trainable:
    """Load and convert an encoder-decoder model. It has no adapters; all parameters are trained."""
    model = load_seq2seq(spec.model)
    source = source_of(spec.model, model)
    return _make_trainable(model, network=model, source=source, spec=spec)


def _make_trainable(
    model: nn.Module,
    network: nn.Module,
    source: Mapping[str, Any],
    spec: TrainedSpec,
    calibration: Iterable[Mapping[str, Any]] = (),
    partition: Mapping[int, torch.Tensor] | None = None,
) -> Trainable:
    """Convert a loaded model, add adapters, and freeze the parameters that are not trained.

    Args:
        model: The model that is called.
        network: The module that is converted: the model itself, or the network that it wraps.
        source: The source of the weights and their digest, for ``metrics.json``.
        spec: The spec of the training run.
        calibration: Batches of training rows, for a co-activation partition or fixed experts.
        partition: The saved partition of the neurons, to rebuild a trained model.
    """
    # counted and found before the conversion and the adapters change the model
    ffns = find_ffns(network)
    dense = _DenseSize(
        parameters=_count_parameters(model),
        embeddings=_embedding_parameters(model),
        ffns=_ffn_weights(ffns),
    )
    # the first layers, which are frozen and computed once; None if there are none
    prefix = _make_prefix(model, network, spec, num_layers=len(ffns))

    report = apply_method_(network, spec.method, spec.seed, calibration, partition)
    frozen_names = prefix.names if prefix is not None else frozenset()
    adapters, groups = _adapt_(network, spec, frozen_names)
    # after _adapt_, which decides for every parameter whether it is trained
    if prefix is not None:
        prefix.freeze_()
    # after _adapt_, because the sparse backend does not support adapters in FFNs
    use_sparse_(model)

    summary = {"source": dict(source), **_summarise(model, dense, report, groups)}
    return Trainable(
        model, summary, slow=_slow_parameters(model, groups), adapters=adapters, prefix=prefix
    )


def _adapt_(
    network: nn.Module, spec: TrainedSpec, frozen_names: frozenset[str]
) -> tuple[LoraModel | None, Groups]:
    """Add the adapters of a run, and freeze the parameters that it does not train.

    If the run trains the whole model, this changes nothing.

    Args:
        network: The converted network.
        spec: The spec of the training run.
        frozen_names: The names of the parameters of frozen layers.

    Returns:
        The adapters, or None; and the trained parameters by group, empty if all are trained.
    """
    if spec.method.tune is None:
        return None, {}
    return tune_(
        network,
        lora=getattr(spec.training, "lora", None),  # some kinds have no adapters
        tune=spec.method.tune,
        seed=spec.seed,
        frozen_names=frozen_names,
    )


class _DenseSize(NamedTuple):
    """The size of a model before its conversion."""

    parameters: int
    """All parameters."""
    embeddings: int
    """Parameters of embedding tables that are only looked up."""
    ffns: int
    """Weights of the FFNs, without biases."""


def _summarise(
    model: nn.Module, dense: _DenseSize, report: ConversionReport | None, groups: Groups
) -> dict[str, Any]:
    """Return the ``model`` section of ``metrics.json``, except the source of the weights.

    Args:
        model: The converted and adapted model.
        dense: The size of the model before its conversion.
        report: The report of the conversion; None for a dense model.
        groups: The trained parameters by group; empty if all are trained.
    """
    # the FFN neurons that a token uses, as a share of the dense model's
    if report is None:
        active_share = 1.0
        conversion = []
    else:
        active_share = report.active_neurons
        conversion = [dataclasses.asdict(layer) for layer in report.layers]
    routing_parameters = sum(_count_parameters(layer) for layer in routed_layers(model))

    # The number of FFN weights that a token uses, minus that of the dense model. It is negative for
    # EMoE with inactive neurons, and positive for GMoE with more than one active expert.
    additional_weights = (active_share - 1) * dense.ffns
    active_parameters = round(dense.parameters + additional_weights) + routing_parameters
    return {
        "parameters": _count_parameters(model),
        "dense_parameters": dense.parameters,
        "active_parameters": active_parameters,
        # each weight costs a multiplication and an addition; an embedding is only looked up
        "flops_per_token": 2 * (active_parameters - dense.embeddings),
        "trainable_parameters": _count_trainable(model),
        "trained": {group: _describe_group(members) for group, members in groups.items()},
        "active_neurons": active_share,
        "conversion": conversion,
    }


def _make_prefix(
    model: nn.Module, network: nn.Module, spec: TrainedSpec, num_layers: int
) -> Prefix | None:
    """Return the embeddings and first layers to freeze; None if the run freezes none."""
    frozen_layers = getattr(spec.training, "frozen_layers", None)  # some kinds cannot freeze layers
    if not frozen_layers:
        return None
    # planning made this check without the number of layers, so it could not resolve ``last:2``
    check_frozen(frozen_layers, spec.method, "the model", num_layers)
    return Prefix(model, network, frozen_layers)


def _slow_parameters(model: nn.Module, groups: Groups) -> frozenset[str]:
    """Return the names of the trained parameters that get a lower learning rate.

    These are all trained parameters except adapters and head. If the run trains the whole model,
    there are none.
    """
    # The groups have the parameters' names in the network. But the network may be a submodule of
    # the model, in which the same parameters have longer names. So this compares the parameters
    # themselves, by `id`.
    slow_ids = set()
    for group, members in groups.items():
        if group in FAST:
            continue
        for _, parameter in members:
            slow_ids.add(id(parameter))
    names = []
    for name, parameter in model.named_parameters():
        if id(parameter) in slow_ids:
            names.append(name)
    return frozenset(names)


def _describe_group(members: Sequence[tuple[str, nn.Parameter]]) -> dict[str, Any]:
    """Return the number of parameters in a group, and a digest of their names."""
    names = sorted(name for name, _ in members)
    return {
        "parameters": sum(parameter.numel() for _, parameter in members),
        # identifies runs with the same trained parameters
        "names": short_digest("\n".join(names), 16),
    }


def _count_parameters(model: nn.Module) -> int:
    """Count the parameters of a model. Packed 4-bit weights count as single weights."""
    if getattr(model, "is_quantized", False):
        return int(cast(PreTrainedModel, model).num_parameters())  # two weights per byte
    return sum(parameter.numel() for parameter in model.parameters())


def _count_trainable(model: nn.Module) -> int:
    """Count the parameters that training changes."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _ffn_weights(ffns: Sequence[FFN]) -> int:
    """Count the weights of FFNs without biases: ``d * h`` for each projection."""
    count = 0
    for ffn in ffns:
        # in-projection, out-projection, and the up-projection of a gated FFN, which may be fused
        # with the in-projection
        num_projections = 3 if ffn.gated else 2
        count += ffn.d * ffn.h * num_projections
    return count


def _embedding_parameters(model: nn.Module) -> int:
    """Count the parameters of embedding tables that are only looked up.

    If a table shares its weight with the output head, it is not counted, because the head
    multiplies by this weight.
    """
    output_head = None
    if isinstance(model, PreTrainedModel):
        output_head = model.get_output_embeddings()
    head_weight = getattr(output_head, "weight", None)
    # T5's encoder and decoder have modules of their own for the same table, which counts once
    tables: dict[int, torch.Tensor] = {}  # by id
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module.weight is not head_weight:
            tables[id(module.weight)] = module.weight
    return sum(table.numel() for table in tables.values())


def permutations(model: nn.Module) -> dict[int, torch.Tensor]:
    """Return the permutation of the neurons ``[neurons]`` of each EMoE layer, by layer number.

    The result is empty for a dense model and for GMoE, whose experts are copies of the FFN.
    """
    by_layer: dict[int, torch.Tensor] = {}
    for layer in routed_layers(model):
        if layer.permutation is not None:
            by_layer[layer.ffn.index] = layer.permutation
    return by_layer


def save_trained(model: nn.Module, folder: Path) -> None:
    """Write the trained tensors and the partition of the neurons, which :func:`reopen` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    partition = permutations(model)
    if partition:  # a dense model and GMoE have none
        save_partition(Partition(partition), folder / _PARTITION)
    write_tensors(trained_state(model), folder / TRAINED_FILE)


def reopen(
    build: Callable[..., Trainable], spec: TrainedSpec, weights_digest: str, folder: Path
) -> Trainable:
    """Build the model of a finished run with its trained weights.

    Args:
        build: The function that builds the model from ``spec`` and ``partition``.
        spec: The spec of the training run.
        weights_digest: The recorded digest of the pre-trained weights; empty if they were
            quantised.
        folder: The folder that :func:`save_trained` wrote.

    Raises:
        DataError: The trained tensors are missing or damaged, or the pre-trained weights have
            changed.
        CheckpointError: The partition is missing or damaged.
    """
    config = spec.method.config
    partition = None
    if config is not None and config["kind"] == "emoe":
        partition = load_partition(folder / _PARTITION)
    trainable = build(spec, partition=partition)
    # The folder has only the tensors that training changed. All others are the pre-trained ones, so
    # these must be the same as when the run was trained.
    present_digest = trainable.summary["source"]["weights"]
    if weights_digest and present_digest != weights_digest:
        raise DataError(
            f"the weights of '{spec.model.name}' changed since the run was trained: "
            f"{present_digest} instead of {weights_digest}"
        )
    load_trained_(trainable.model, folder / TRAINED_FILE)
    return trainable


def partition_to_cache(spec: str, output: Path, *, threads: int) -> None:
    """Cluster the neurons of a model, cache the partition, and write a receipt.

    A partition that is already in the cache is not computed again. The receipt is a JSON file with
    the cache keys and statistics of the partition.

    Args:
        spec: JSON with the ``model`` section of a run's spec, and the EMoE's ``config``.
        output: The path of the receipt.
        threads: The number of CPU threads.
    """
    content = json.loads(spec)
    torch.set_num_threads(threads)
    model_spec = ModelSpec(**content["model"])
    config = EMoEConfig.from_dict(content["config"])
    model: nn.Module
    if model_spec.modality == "language":
        model = load_language_model_to_cluster(model_spec, config.layers)
    else:
        load_network = _NETWORK_LOADERS[model_spec.modality]
        model = load_network(model_spec)
    partition = cached_partition(model, config)
    receipt = {
        "partitions": partition_keys(model, config),
        "explained": partition.explained,
        "seconds": partition.seconds,
        **content,  # the model and the configuration
    }
    write_json(output, receipt)
