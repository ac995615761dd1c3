"""LoRA by peft, and what else a row of the comparison trains."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft import LoraConfig, LoraModel
from torch import nn
from transformers import PreTrainedModel

from benchmarks.harness.base.errors import DefinitionError
from benchmarks.harness.base.seeds import derive_seed
from emoe.architectures import find_ffns, resolve_layers
from emoe.errors import did_you_mean
from emoe.layer import RoutedActivation

# groups whose learning rate is the run's own; the others get a share of it
FAST = ("adapters", "head")


def adapt_(
    model: PreTrainedModel, lora: Mapping[str, Any] | None, tune: Mapping[str, Any], seed: int
) -> tuple[LoraModel | None, dict[str, list[tuple[str, nn.Parameter]]]]:
    """Freeze a model but for new adapters, its head, its routers, and what the method trains beside them.

    Every row of a comparison trains the same adapters and the same head; the rest is what the row's name says and
    nothing else (the authors' code also trains BERT's pooler or GPT-2's last norm in some rows: ``also``).

    Args:
        model: a classifier or language model, converted or dense.
        lora: ``training.lora`` of the spec; None adds no adapters.
        tune: ``method.tune`` of the spec. The head of a classifier is new and always trained; that of a language model stays
            as it is (``head: false``).
        seed: the run's seed; adapters are the same for all methods.

    Returns:
        The new adapters, as peft holds them, and what is trained, as :func:`trainable_groups` says.

    Raises:
        DefinitionError: no target layers for the model's type, or names that match nothing.
    """
    adapters = None if lora is None else _inject_adapters_(model, lora, seed)
    groups = trainable_groups(model, tune)
    model.requires_grad_(False)
    for parameters in groups.values():
        for _, parameter in parameters:
            parameter.requires_grad_(True)
    return adapters, groups


def _inject_adapters_(model: PreTrainedModel, lora: Mapping[str, Any], seed: int) -> LoraModel:
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if kind not in lora["targets"]:
        raise DefinitionError(f"training.lora.targets has no layers for '{kind}'{did_you_mean(kind, lora['targets'])}")
    config = LoraConfig(
        r=lora["rank"],
        lora_alpha=lora["alpha"],
        lora_dropout=lora["dropout"],
        target_modules=list(lora["targets"][kind]),
        fan_in_fan_out=kind == "gpt2",  # its layers are Conv1D
    )
    torch.manual_seed(derive_seed("adapters", seed))
    try:
        return LoraModel(model, config, "default")
    except ValueError as error:  # no such layer
        raise DefinitionError(f"training.lora.targets.{kind}: {error}") from error


def trainable_groups(model: PreTrainedModel, tune: Mapping[str, Any]) -> dict[str, list[tuple[str, nn.Parameter]]]:
    """What an adapted model shall train: ``adapters``, ``head``, ``routers``, ``blocks``, ``also``; names and parameters."""
    found = _grouped(model, _blocks(model, tune["blocks"]), _modules(model, tune["also"]))
    left = {"frozen"} if tune.get("head", True) else {"frozen", "head"}
    return {group: parameters for group, parameters in found.items() if parameters and group not in left}


def _grouped(model: PreTrainedModel, blocks: list[str], also: list[str]) -> dict[str, list[tuple[str, nn.Parameter]]]:
    """Every parameter by the group that it belongs to."""
    base = f"{model.base_model_prefix}."
    routers = [f"{name}.router" for name, module in model.named_modules() if isinstance(module, RoutedActivation)]
    found: dict[str, list[tuple[str, nn.Parameter]]] = {
        group: [] for group in ("adapters", "head", "routers", "blocks", "also", "frozen")
    }
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            group = "adapters"
        elif not name.startswith(base):
            group = "head"
        elif _below(name, routers):
            group = "routers"
        elif _below(name, blocks):
            group = "blocks"
        elif _below(name, also):
            group = "also"
        else:
            group = "frozen"
        found[group].append((name, parameter))
    return found


def _below(name: str, modules: list[str]) -> bool:
    return any(name.startswith(f"{module}.") for module in modules)


def _blocks(model: PreTrainedModel, layers: Any) -> list[str]:
    """Paths of the transformer blocks whose FFNs are named."""
    if not layers:
        return []
    ffns = find_ffns(model)
    return [_block(ffns[i].name) for i in resolve_layers(layers, len(ffns))]


def _block(ffn: str) -> str:
    """The block of an FFN: its path up to the last number."""
    parts = ffn.split(".")
    last = max(place for place, part in enumerate(parts) if part.isdigit())
    return ".".join(parts[: last + 1])


def _modules(model: PreTrainedModel, names: list[str]) -> list[str]:
    """Paths of the modules whose last part is one of the names."""
    found = [path for path, _ in model.named_modules() if path.rpartition(".")[2] in names]
    if names and not found:
        parts = {path.rpartition(".")[2] for path, _ in model.named_modules()}
        raise DefinitionError(
            f"'also_train' names {', '.join(names)}, none of which the model has{did_you_mean(names[0], parts)}"
        )
    return found
