"""A run's model: loaded, converted and adapted as its spec says, for training or to evaluate what was trained."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraModel
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.harness.base.errors import DataError
from benchmarks.harness.base.seeds import derive_seed
from benchmarks.harness.models.conversion import apply_method_, use_sparse_
from benchmarks.harness.models.image import load_image_classifier
from benchmarks.harness.models.loading import (
    describe,
    load_classifier,
    load_language_model,
    load_seq2seq,
    read_tensors,
    weights_digest,
)
from benchmarks.harness.models.prefix import Prefix
from benchmarks.harness.models.tuning import FAST, tune_
from emoe.architectures import find_ffns
from emoe.files import write_tensors
from emoe.layer import routed_layers
from emoe.partitioning import Partition, load_partition, save_partition

_TRAINED, _PARTITION = "trained.safetensors", "partition.safetensors"


@dataclasses.dataclass(frozen=True)
class Trainable:
    """A classifier or language model and what is known of it.

    Attributes:
        model: as it is trained; called with ``labels`` it also gives the loss.
        summary: the ``model`` part of ``metrics.json``.
        trained: names of the parameters that shall be trained.
        slow: those of them that take a share of the learning rate (:data:`~benchmarks.harness.models.tuning.FAST`).
        adapters: those that were added, which peft merges.
        prefix: its embeddings and first layers, where they are frozen.
    """

    model: nn.Module
    summary: dict[str, Any]
    trained: frozenset[str]
    slow: frozenset[str]
    adapters: LoraModel | None
    prefix: Prefix | None = None

    def prefix_cost(self) -> dict[str, float]:
        """What this process spent on the frozen layers; nothing where none is frozen, little where the cache had everything."""
        return {"prefix_seconds": self.prefix.seconds} if self.prefix else {}


def build_classifier(
    spec: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    calibration: Iterable[Mapping[str, Any]] = (),
    partition: Mapping[int, torch.Tensor] | None = None,
) -> Trainable:
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


def build_image_classifier(spec: Mapping[str, Any], num_classes: int) -> Trainable:
    """Load, convert and adapt a classifier of images.

    Args:
        spec: of a run that trains on images.
        num_classes: classes of the set.
    """
    training = spec["training"]
    model = load_image_classifier(
        spec["model"],
        num_classes,
        training["image_size"],
        training["drop_path"],
        derive_seed("head", spec["seed"]),
        spec["hparams"].get("vit_dropout", 0.0),  # not every registry has it
    )
    return _converted(model, model.network, model.source, spec)


def build_language_model(
    spec: Mapping[str, Any],
    calibration: Iterable[Mapping[str, Any]] = (),
    partition: Mapping[int, torch.Tensor] | None = None,
    *,
    empty: bool = False,
) -> Trainable:
    """Load, convert and adapt a language model.

    Args:
        spec: of a run of instruction tuning.
        calibration: batches of training rows, for a co-activation partition.
        partition: of a model that is built again.
        empty: the weights come from another process.

    Raises:
        DataError: the weights are not there or are other ones.
        DefinitionError: 4 bits without the package that makes them, or adapters for layers that the model does not have.
        EMoEError: the model cannot be converted as asked.
    """
    config = spec["method"]["config"]
    model = load_language_model(spec["model"], config["layers"] if config else (), empty=empty)
    # quantised weights have no digest that another machine would find
    known = not empty and "quantize" not in spec["model"]
    source = {"from": describe(spec["model"], model), "weights": weights_digest(model.base_model) if known else ""}
    found = _converted(model, model, source, spec, calibration, partition)
    if "quantize" in spec["model"]:
        cast(Any, model)._hf_peft_config_loaded = True  # Trainer asks whether quantised weights have adapters
    elif not torch.cuda.is_available():
        model.float()  # in which a CPU computes; grouped by the weights as they were asked for, as on an accelerator
    for parameter in model.parameters():
        if parameter.requires_grad:  # small steps vanish in bf16
            parameter.data = parameter.data.float()
    return found


def build_seq2seq(spec: Mapping[str, Any]) -> Trainable:
    """Load and convert an encoder-decoder model, all of which is trained.

    Args:
        spec: of a run on several tasks.

    Raises:
        DataError: the weights are not there.
        EMoEError: the model cannot be converted as asked.
    """
    model = load_seq2seq(spec["model"])
    source = {"from": describe(spec["model"], model), "weights": weights_digest(model)}
    return _converted(model, model, source, spec)


def _converted(
    model: nn.Module,
    network: nn.Module,
    source: Mapping[str, Any],
    spec: Mapping[str, Any],
    calibration: Iterable[Mapping[str, Any]] = (),
    partition: Mapping[int, torch.Tensor] | None = None,
) -> Trainable:
    """Convert and adapt a model's network, which is the model itself or a part of it."""
    seed, lora, tune = spec["seed"], spec["training"].get("lora"), spec["method"]["tune"]
    dense_parameters = _count(model)
    in_ffns, in_tables = _ffn_parameters(network), _looked_up(model)
    prefix = Prefix(model, network, layers) if (layers := spec["training"].get("frozen_layers")) else None
    if prefix:
        prefix.check(spec["method"])
    report = apply_method_(network, spec["method"], seed, calibration, partition)
    slow: list[str] = []
    frozen = prefix.names if prefix else frozenset()
    names = [name for name, _ in network.named_parameters() if name not in frozen]
    trained: dict[str, Any] = {}
    adapters = None
    if tune is not None:
        adapters, groups = tune_(cast(PreTrainedModel, network), lora, tune, seed, frozen)
        names = [name for found in groups.values() for name, _ in found]
        slow = [name for group, found in groups.items() if group not in FAST for name, _ in found]
        trained = {
            group: {
                "parameters": sum(parameter.numel() for _, parameter in found),
                "names": _digest(name for name, _ in found),
            }
            for group, found in groups.items()
        }
    if prefix:
        prefix.freeze_()
    use_sparse_(model)
    share = report.active_neurons if report else 1.0
    routers = sum(parameter.numel() for layer in routed_layers(network) for parameter in layer.parameters())
    active = round(dense_parameters + (share - 1) * in_ffns) + routers
    summary = {
        "source": dict(source),
        "parameters": _count(model),
        "dense_parameters": dense_parameters,
        "active_parameters": active,
        "flops_per_token": 2 * (active - in_tables),
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "trained": trained,
        "active_neurons": share,
        "conversion": [dataclasses.asdict(layer) for layer in report.layers] if report else [],
    }
    around = next(f"{name}." if name else "" for name, module in model.named_modules() if module is network)
    return Trainable(
        model,
        summary,
        frozenset(around + name for name in names),
        frozenset(around + name for name in slow),
        adapters,
        prefix,
    )


def _count(model: nn.Module) -> int:
    if getattr(model, "is_quantized", False):
        return int(cast(PreTrainedModel, model).num_parameters())  # two of four bits stand in one byte
    return sum(parameter.numel() for parameter in model.parameters())


def _ffn_parameters(network: nn.Module) -> int:
    """Weights in the matrices of a dense model's FFNs."""
    return sum(ffn.d * ffn.h * (len(ffn.inputs()) + 1) for ffn in find_ffns(network))


def _looked_up(model: nn.Module) -> int:
    """Weights of tables that are looked up and not multiplied with, as the vocabulary's is where the head shares it."""
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    shared = getattr(head, "weight", None)
    tables = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
    return sum(table.numel() for table in tables if table is not shared)


def trained_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the part of a model's state that training changes: trained parameters, and buffers such as running gates."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in _trained(model).items()}


def _trained(model: nn.Module) -> dict[str, torch.Tensor]:
    # tied weights under their first name; what quantised weights put into a state is neither
    kept = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    kept |= {name for name, _ in model.named_buffers()}
    return {name: tensor for name, tensor in model.state_dict().items() if name in kept}


def load_trained_(model: nn.Module, file: Path) -> None:
    """Put what :func:`trained_state` saved back into a model that was built the same way.

    Raises:
        DataError: the file is missing, damaged, or of another model.
    """
    set_trained_(model, read_tensors(file), str(file))


def set_trained_(model: nn.Module, state: Mapping[str, torch.Tensor], where: str) -> None:
    """Give a model what another one, built the same way, had in :func:`trained_state`.

    Raises:
        DataError: the tensors are of another model; names where they are from.
    """
    wanted = {name: tensor.shape for name, tensor in _trained(model).items()}
    if {name: tensor.shape for name, tensor in state.items()} != wanted:
        odd = sorted(set(state) ^ set(wanted)) or sorted(n for n in wanted if state[n].shape != wanted[n])
        raise DataError(f"{where} belongs to another model: they differ in '{odd[0]}'")
    # a sharded model takes its part of each tensor
    set_model_state_dict(model, dict(state), options=StateDictOptions(full_state_dict=True, strict=False))


def permutations(model: nn.Module) -> dict[int, torch.Tensor]:
    """How a converted model's neurons are grouped, by layer; empty for a dense model."""
    return {layer.ffn_index: layer.permutation for layer in routed_layers(model) if layer.permutation is not None}


def save_trained(model: nn.Module, folder: Path) -> None:
    """Keep what training made of a model: its trained tensors, and the grouping of its neurons."""
    folder.mkdir(parents=True, exist_ok=True)
    if found := permutations(model):
        save_partition(Partition(found), folder / _PARTITION)
    write_tensors(trained_state(model), folder / _TRAINED)


def reopen_classifier(
    spec: Mapping[str, Any], weights: str, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> Trainable:
    """The classifier of a finished run, routed as it was trained; see :func:`reopen_language_model`.

    Args:
        spec: of the training run.
        weights: digest of the pre-trained weights that the run recorded.
        tokenizer: the model's.
        folder: what :func:`save_trained` wrote.
    """
    return _reopened(lambda partition: build_classifier(spec, tokenizer, partition=partition), spec, weights, folder)


def reopen_language_model(spec: Mapping[str, Any], weights: str, folder: Path) -> Trainable:
    """The language model of a finished run, routed as it was trained.

    Args:
        spec: of the training run.
        weights: digest of the pre-trained weights that the run recorded; empty where they were quantised.
        folder: what :func:`save_trained` wrote.

    Raises:
        DataError: trained tensors are missing or damaged, or the pre-trained weights are other ones now.
        CheckpointError: the grouping is missing or damaged.
    """
    return _reopened(lambda partition: build_language_model(spec, partition=partition), spec, weights, folder)


def _reopened(
    build: Callable[[Partition | None], Trainable], spec: Mapping[str, Any], weights: str, folder: Path
) -> Trainable:
    config = spec["method"]["config"]
    found = build(load_partition(folder / _PARTITION) if config and config["kind"] == "emoe" else None)
    now = found.summary["source"]["weights"]
    if weights and now != weights:
        raise DataError(
            f"the weights of '{spec['model']['name']}' changed since the run was trained: {now} instead of {weights}"
        )
    load_trained_(found.model, folder / _TRAINED)
    return found


def _digest(names: Iterable[str]) -> str:
    """To tell whether two rows train the same."""
    return hashlib.sha256("\n".join(sorted(names)).encode()).hexdigest()[:16]
