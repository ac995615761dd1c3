"""Choose the trained parameters of a model: adapters, head, routers, and the parameters of its tuning."""

from __future__ import annotations

from collections.abc import Collection
from typing import cast

import torch
from peft import LoraConfig, LoraModel
from torch import nn
from transformers import PreTrainedModel

from benchmarks.harness.base import DefinitionError, derive_seed
from benchmarks.harness.config.method_specs import TuneSpec
from benchmarks.harness.config.methods import TUNINGS, LoRA, is_below
from emoe.errors import did_you_mean
from emoe.layer import RoutedActivation

# groups with the run's learning rate; the others get a share of it
FAST = ("adapters", "head")
Groups = dict[str, list[tuple[str, nn.Parameter]]]


def tune_(
    model: PreTrainedModel,
    lora: LoRA | None,
    tune: TuneSpec,
    seed: int,
    frozen: Collection[str] = (),
) -> tuple[LoraModel | None, Groups]:
    """Add adapters, and freeze all parameters that a run does not train.

    All rows of a comparison train the same adapters and head, and only the further parameters of ``tune`` (``also``:
    BERT's pooler or GPT-2's last norm, which the authors' code trains in some rows).

    Args:
        model: The classifier or language model, converted or dense.
        lora: The ``training.lora`` of the spec; None adds no adapters.
        tune: The ``method.tune`` of the spec (:func:`~benchmarks.harness.config.methods.tuning_spec`); ``head: false``
            freezes the head.
        seed: The seed of the run; adapters are the same for all methods.
        frozen: The frozen parameters; their layers get no adapters.

    Returns:
        The new adapters, and the groups of :func:`trained_groups`.

    Raises:
        DefinitionError: The model's type has no target layers, or names match nothing.
    """
    adapters = None if lora is None else _add_adapters_(model, lora, seed, frozen)
    groups = trained_groups(model, tune, frozen)
    model.requires_grad_(False)
    for parameters in groups.values():
        for _, parameter in parameters:
            parameter.requires_grad_(True)
    return adapters, groups


def trained_groups(model: PreTrainedModel, tune: TuneSpec, frozen: Collection[str] = ()) -> Groups:
    """Return the names and parameters that an adapted model trains, by group, without empty groups.

    The groups are ``adapters``, ``head``, ``routers``, ``also``, and the name of the tuning for all others.
    """
    tuning, layers = ("blocks", tune.blocks) if tune.blocks else (tune.tuning, tune.layers)
    parameters = dict(model.named_parameters())
    chosen = set(TUNINGS[tuning](model, layers)) if tuning else set()
    if unknown := sorted(chosen - parameters.keys()):
        near = did_you_mean(unknown[0], parameters)
        raise DefinitionError(
            f"the tuning '{tuning}' names '{unknown[0]}', which is not a parameter of the model{near}"
        )
    routers = [
        f"{path}.router"
        for path, module in model.named_modules()
        if isinstance(module, RoutedActivation)
    ]
    also = _find_modules(model, tune.also)

    def group_of(name: str) -> str | None:
        if ".lora_" in name:
            return "adapters"
        if tune.head and not name.startswith(f"{model.base_model_prefix}."):
            return "head"
        if is_below(name, routers):
            return "routers"
        if is_below(name, also):
            return "also"
        return tuning if name in chosen else None

    groups: Groups = {}
    for name, parameter in parameters.items():
        if name not in frozen and (group := group_of(name)):
            groups.setdefault(group, []).append((name, parameter))
    return groups


def _find_modules(model: PreTrainedModel, names: list[str]) -> list[str]:
    """Return the paths of the modules whose last component is one of the names."""
    ends = {path: path.rpartition(".")[2] for path, _ in model.named_modules()}
    paths = [path for path, end in ends.items() if end in names]
    if names and not paths:
        near = did_you_mean(names[0], ends.values())
        raise DefinitionError(
            f"'also_train' names {', '.join(names)}, none of which the model has{near}"
        )
    return paths


def _add_adapters_(
    model: PreTrainedModel, lora: LoRA, seed: int, frozen: Collection[str]
) -> LoraModel:
    """Add adapters to a model in place, except to frozen layers, and return peft's model."""
    kind = model.config.model_type
    if kind not in lora.targets:
        raise DefinitionError(
            f"training.lora.targets has no layers for '{kind}'{did_you_mean(kind, lora.targets)}"
        )
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=cast(int, lora.alpha),  # peft takes fractions, too
        lora_dropout=lora.dropout,
        target_modules=list(lora.targets[kind]),
        exclude_modules=sorted({name.rpartition(".")[0] for name in frozen}),
        fan_in_fan_out=kind == "gpt2",  # its layers are Conv1D
    )
    torch.manual_seed(derive_seed("adapters", seed))
    try:
        return LoraModel(model, config, "default")
    except ValueError as error:  # targets are missing or all frozen
        raise DefinitionError(f"training.lora.targets.{kind}: {error}") from error
