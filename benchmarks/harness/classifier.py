"""A run's classifier: loaded, converted and adapted as its spec says, for training or to evaluate what was trained."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.harness.adapters import FAST, adapt_
from benchmarks.harness.image_models import load_image_classifier
from benchmarks.harness.methods import apply_method_
from benchmarks.harness.models import describe, load_classifier, read_tensors, weights_digest
from benchmarks.harness.packages import DataError
from benchmarks.harness.seeds import derive_seed
from emoe.layer import routed_layers
from emoe.partitioning import Partition, load_partition, save_partition

_TRAINED, _PARTITION = "trained.safetensors", "partition.safetensors"


@dataclasses.dataclass(frozen=True)
class Classifier:
    """A classifier and what is known of it.

    Attributes:
        model: as it is trained; called with ``labels`` it also gives the loss.
        summary: the ``model`` part of ``metrics.json``.
        trained: names of the parameters that shall be trained.
        slow: those of them that take a share of the learning rate (:data:`~benchmarks.harness.adapters.FAST`).
    """

    model: nn.Module
    summary: dict[str, Any]
    trained: frozenset[str]
    slow: frozenset[str]


def build_classifier(
    spec: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    calibration: Iterable[Mapping[str, Any]] = (),
    partition: Mapping[int, torch.Tensor] | None = None,
) -> Classifier:
    """Load, convert and adapt.

    Args:
        spec: of a training run.
        tokenizer: the model's.
        calibration: batches of training rows, for a co-activation partition.
        partition: of a classifier that is built again.
    """
    model = load_classifier(
        spec["model"], max(len(spec["task"]["labels"]), 1), derive_seed("head", spec["seed"]), tokenizer.pad_token_id
    )
    source = {"from": describe(spec["model"], model), "weights": weights_digest(model.base_model)}
    return _converted(model, model, source, spec, calibration, partition)


def build_image_classifier(spec: Mapping[str, Any], num_classes: int) -> Classifier:
    """Load, convert and adapt a classifier of images.

    Args:
        spec: of a run that trains on images.
        num_classes: classes of the set.
    """
    training = spec["training"]
    model = load_image_classifier(
        spec["model"], num_classes, training["image_size"], training["drop_path"], derive_seed("head", spec["seed"])
    )
    return _converted(model, model.network, model.source, spec)


def _converted(
    model: nn.Module,
    network: nn.Module,
    source: Mapping[str, Any],
    spec: Mapping[str, Any],
    calibration: Iterable[Mapping[str, Any]] = (),
    partition: Mapping[int, torch.Tensor] | None = None,
) -> Classifier:
    """Convert and adapt a classifier's network, which is the classifier itself or a part of it."""
    seed, lora, tune = spec["seed"], spec["training"]["lora"], spec["method"]["tune"]
    dense_parameters = _count(model)
    report = apply_method_(network, spec["method"], seed, calibration, partition)
    slow: list[str] = []
    names = [name for name, _ in network.named_parameters()]
    trained: dict[str, Any] = {}
    if lora is not None:
        groups = adapt_(cast(PreTrainedModel, network), lora, tune, seed)
        names = [name for found in groups.values() for name, _ in found]
        slow = [name for group, found in groups.items() if group not in FAST for name, _ in found]
        trained = {
            group: {
                "parameters": sum(parameter.numel() for _, parameter in found),
                "names": _digest(name for name, _ in found),
            }
            for group, found in groups.items()
        }
    summary = {
        "source": dict(source),
        "parameters": _count(model),
        "dense_parameters": dense_parameters,
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "trained": trained,
        "active_neurons": report.active_neurons if report else 1.0,
        "conversion": [dataclasses.asdict(layer) for layer in report.layers] if report else [],
    }
    prefix = next(f"{name}." if name else "" for name, module in model.named_modules() if module is network)
    return Classifier(
        model, summary, frozenset(prefix + name for name in names), frozenset(prefix + name for name in slow)
    )


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def trained_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The part of a model's state that training changes: trained parameters, and buffers such as running gates."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in _trained(model).items()}


def _trained(model: nn.Module) -> dict[str, torch.Tensor]:
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in frozen}


def load_trained_(model: nn.Module, file: Path) -> None:
    """Put what :func:`trained_state` saved back into a model that was built the same way.

    Raises:
        DataError: the file is missing, damaged, or of another model.
    """
    state = read_tensors(file)
    wanted = {name: tensor.shape for name, tensor in _trained(model).items()}
    if {name: tensor.shape for name, tensor in state.items()} != wanted:
        odd = sorted(set(state) ^ set(wanted)) or sorted(n for n in wanted if state[n].shape != wanted[n])
        raise DataError(f"{file} belongs to another model: they differ in '{odd[0]}'")
    model.load_state_dict(state, strict=False)


def save_trained(model: nn.Module, folder: Path) -> None:
    """Keep what training made of a classifier: its trained tensors, and the grouping of its neurons."""
    folder.mkdir(parents=True, exist_ok=True)
    found = {layer.ffn_index: layer.permutation for layer in routed_layers(model) if layer.permutation is not None}
    if found:
        save_partition(Partition(found), folder / _PARTITION)
    save_file(trained_state(model), folder / _TRAINED)


def reopen_classifier(
    spec: Mapping[str, Any], weights: str, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> Classifier:
    """The classifier of a finished run, routed as it was trained.

    Args:
        spec: of the training run.
        weights: digest of the pre-trained weights that the run recorded.
        tokenizer: the model's.
        folder: what :func:`save_trained` wrote.

    Raises:
        DataError: trained tensors are missing or damaged, or the pre-trained weights are other ones now.
        CheckpointError: the grouping is missing or damaged.
    """
    config = spec["method"]["config"]
    partition = load_partition(folder / _PARTITION) if config and config["kind"] == "emoe" else None
    found = build_classifier(spec, tokenizer, partition=partition)
    now = found.summary["source"]["weights"]
    if now != weights:
        raise DataError(
            f"the weights of '{spec['model']['name']}' changed since the run was trained: {now} instead of {weights}"
        )
    load_trained_(found.model, folder / _TRAINED)
    return found


def _digest(names: Iterable[str]) -> str:
    """To tell whether two rows train the same."""
    return hashlib.sha256("\n".join(sorted(names)).encode()).hexdigest()[:16]
