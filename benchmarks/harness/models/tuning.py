"""What of a model a run trains: adapters, head, routers, and what its way of tuning adds."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from peft import LoraConfig, LoraModel
from torch import nn
from transformers import PreTrainedModel

from benchmarks.harness.base.errors import DefinitionError
from benchmarks.harness.base.seeds import derive_seed
from benchmarks.harness.config.tunings import TUNINGS, is_below
from emoe.errors import did_you_mean
from emoe.layer import RoutedActivation

# groups whose learning rate is the run's own; the others get a share of it
FAST = ("adapters", "head")
Groups = dict[str, list[tuple[str, nn.Parameter]]]


def tune_(
    model: PreTrainedModel,
    lora: Mapping[str, Any] | None,
    tune: Mapping[str, Any],
    seed: int,
    frozen: Collection[str] = (),
) -> tuple[LoraModel | None, Groups]:
    """Freeze a model but for what a run trains.

    Every row of a comparison trains the same adapters and the same head; the rest is what the row's name says and nothing
    else (the authors' code also trains BERT's pooler or GPT-2's last norm in some rows: ``also``).

    Args:
        model: a classifier or language model, converted or dense.
        lora: ``training.lora`` of the spec; None adds no adapters.
        tune: ``method.tune`` of the spec, as :func:`~benchmarks.harness.config.tunings.tuning_spec` makes it; with ``head: false``
            the head stays as it is.
        seed: the run's seed; adapters are the same for all methods.
        frozen: parameters that stay as they are, and whose layers get no adapters.

    Returns:
        The new adapters, as peft holds them, and what is trained, as :func:`trained_groups` says.

    Raises:
        DefinitionError: no target layers for the model's type, or names that match nothing.
    """
    adapters = None if lora is None else inject_adapters_(model, lora, seed, frozen)
    groups = trained_groups(model, tune, frozen)
    model.requires_grad_(False)
    for parameters in groups.values():
        for _, parameter in parameters:
            parameter.requires_grad_(True)
    return adapters, groups


def trained_groups(model: PreTrainedModel, tune: Mapping[str, Any], frozen: Collection[str] = ()) -> Groups:
    """Find what an adapted model shall train: names and parameters by group.

    The groups are ``adapters``, ``head``, ``routers``, ``also``, and one with the name of the way of tuning, for what is in none of the
    others; those that are empty are left out.
    """
    name, layers = ("blocks", tune["blocks"]) if tune["blocks"] else (tune.get("tuning"), tune.get("layers"))
    chosen = _chosen(model, name, layers) if name else ()
    routers = [f"{path}.router" for path, module in model.named_modules() if isinstance(module, RoutedActivation)]
    also = _modules(model, tune["also"])
    found: Groups = {}
    for parameter, values in model.named_parameters():
        if parameter in frozen:
            continue
        if ".lora_" in parameter:
            group = "adapters"
        elif tune.get("head", True) and not parameter.startswith(f"{model.base_model_prefix}."):
            group = "head"
        elif is_below(parameter, routers):
            group = "routers"
        elif is_below(parameter, also):
            group = "also"
        elif name and parameter in chosen:
            group = name
        else:
            continue
        found.setdefault(group, []).append((parameter, values))
    return found


def _chosen(model: PreTrainedModel, name: str, layers: Any) -> Collection[str]:
    """The parameters that a way of tuning trains."""
    known, chosen = dict(model.named_parameters()), set(TUNINGS[name].parameters(model, layers))
    if odd := sorted(chosen - known.keys()):
        near = did_you_mean(odd[0], known)
        raise DefinitionError(f"the tuning '{name}' names '{odd[0]}', which is no parameter of the model{near}")
    return chosen


def _modules(model: PreTrainedModel, names: list[str]) -> list[str]:
    """Paths of the modules whose last part is one of the names."""
    found = [path for path, _ in model.named_modules() if path.rpartition(".")[2] in names]
    if names and not found:
        parts = {path.rpartition(".")[2] for path, _ in model.named_modules()}
        raise DefinitionError(
            f"'also_train' names {', '.join(names)}, none of which the model has{did_you_mean(names[0], parts)}"
        )
    return found


def inject_adapters_(
    model: PreTrainedModel, lora: Mapping[str, Any], seed: int, frozen: Collection[str] = ()
) -> LoraModel:
    """Add adapters to a model, in place.

    Args:
        model: a classifier or language model, converted or dense.
        lora: ``training.lora`` of the spec.
        seed: the run's seed; adapters are the same for all methods.
        frozen: parameters of layers that get none.

    Returns:
        The adapters, as peft holds them.

    Raises:
        DefinitionError: no target layers for the model's type, or names that match nothing.
    """
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if kind not in lora["targets"]:
        raise DefinitionError(f"training.lora.targets has no layers for '{kind}'{did_you_mean(kind, lora['targets'])}")
    targets = list(lora["targets"][kind])
    if frozen:
        targets = [
            name
            for name, module in model.named_modules()
            if any(name == target or name.endswith(f".{target}") for target in targets)
            and not any(f"{name}.{own}" in frozen for own, _ in module.named_parameters())
        ]
        if not targets:
            raise DefinitionError(f"training.lora.targets.{kind} has no layers above the frozen ones")
    config = LoraConfig(
        r=lora["rank"],
        lora_alpha=lora["alpha"],
        lora_dropout=lora["dropout"],
        target_modules=targets,
        fan_in_fan_out=kind == "gpt2",  # its layers are Conv1D
    )
    torch.manual_seed(derive_seed("adapters", seed))
    try:
        return LoraModel(model, config, "default")
    except ValueError as error:  # no such layer
        raise DefinitionError(f"training.lora.targets.{kind}: {error}") from error
