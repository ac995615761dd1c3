"""Choose the trained parameters of a model: adapters, head, routers, and those of a tuning.

A tuning is a named rule that selects further parameters, such as some transformer blocks.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, cast

import torch
from peft import LoraConfig, LoraModel
from torch import nn
from transformers import PreTrainedModel

from benchmarks.harness.base import DefinitionError, derive_seed
from benchmarks.harness.config.method_specs import TuneSpec
from benchmarks.harness.config.methods import TUNINGS, LoRA, is_below
from benchmarks.harness.models.loading import architecture_of
from emoe.errors import did_you_mean
from emoe.layer import RoutedActivation

# groups that are trained with the run's learning rate; the others get a share of it
FAST = ("adapters", "head")
# Layers whose weight the model reads without calling the layer, by architecture. An adapter of such
# a layer would never run. The last names of their paths.
_NEVER_CALLED = {"Beit": ("qkv",)}
Groups = dict[str, list[tuple[str, nn.Parameter]]]  # names and parameters by group


def tune_(
    model: nn.Module,
    lora: LoRA | None,
    tune: TuneSpec,
    seed: int,
    frozen_names: Collection[str] = (),
) -> tuple[LoraModel | None, Groups]:
    """Add adapters, and freeze all parameters that a run does not train.

    All methods train the same adapters and head. ``tune`` names the other parameters that a method
    trains. For example, the authors' code also trains BERT's pooler or GPT-2's last norm for some
    methods.

    Args:
        model: The model of transformers or timm, converted or dense.
        lora: The ``training.lora`` of the spec; None adds no adapters.
        tune: The ``method.tune`` of the spec; ``head: false`` freezes the head.
        seed: The seed of the run. It determines the first weights of the adapters.
        frozen_names: The names of frozen parameters; their layers get no adapters.

    Returns:
        The new adapters (None without ``lora``), and the trained parameters by group, from
        :func:`trained_groups`.

    Raises:
        DefinitionError: ``lora`` has no layers for the model's type, all of them are frozen, or the
            model never calls one of them. Or ``tune`` has a name that the model does not have.
    """
    adapters = None
    if lora is not None:
        adapters = _add_adapters_(model, lora, seed, frozen_names)
    groups = trained_groups(model, tune, frozen_names)
    model.requires_grad_(False)
    for names_and_parameters in groups.values():
        for _, parameter in names_and_parameters:
            parameter.requires_grad_(True)
    return adapters, groups


def trained_groups(model: nn.Module, tune: TuneSpec, frozen_names: Collection[str] = ()) -> Groups:
    """Return the names and parameters that a model with adapters trains, by group.

    The groups are ``adapters``, ``head``, ``routers``, ``also``, and the name of the tuning for all
    other trained parameters. Empty groups are left out.

    Raises:
        DefinitionError: The tuning or ``also`` has a name that the model does not have.
    """
    parameters = dict(model.named_parameters())
    tuning = tune.selecting_tuning
    tuned_names = _names_of_tuning(model, tuning, tune.selected_layers, parameters)
    head_names = _names_of_head(model, parameters)
    router_paths = _find_routers(model)
    also_paths = _find_modules(model, tune.also)

    def group_of(name: str) -> str | None:
        """Return the first group that fits a parameter; None if the parameter is not trained."""
        if ".lora_" in name:
            return "adapters"
        if name in head_names and tune.head:
            return "head"
        if is_below(name, router_paths):
            return "routers"
        if is_below(name, also_paths):
            return "also"
        if name in tuned_names:
            return tuning
        return None

    groups: Groups = {}
    for name, parameter in parameters.items():
        if name in frozen_names:
            continue
        group = group_of(name)
        if group is not None:
            groups.setdefault(group, []).append((name, parameter))
    return groups


def _names_of_head(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> set[str]:
    """Return the names of the parameters of a model's head.

    ``parameters`` has all parameters of the model by name.
    """
    if isinstance(model, PreTrainedModel):
        # the head is everything outside the base model
        base = f"{model.base_model_prefix}."
        return {name for name in parameters if not name.startswith(base)}
    head = cast(Any, model).get_classifier()  # the method of timm's models
    ids_in_head = {id(parameter) for parameter in head.parameters()}
    return {name for name, parameter in parameters.items() if id(parameter) in ids_in_head}


def _names_of_tuning(
    model: nn.Module, tuning: str | None, layers: Any, parameters: Collection[str]
) -> set[str]:
    """Return the names of the parameters that a tuning selects; empty if ``tuning`` is None.

    Raises:
        DefinitionError: A selected name is not among the model's ``parameters``.
    """
    if tuning is None:
        return set()
    select = TUNINGS[tuning]
    names = set(select(model, layers))
    unknown = sorted(names.difference(parameters))
    if unknown:
        near = did_you_mean(unknown[0], parameters)
        raise DefinitionError(
            f"the tuning '{tuning}' names '{unknown[0]}', "
            f"which is not a parameter of the model{near}"
        )
    return names


def _find_routers(model: nn.Module) -> list[str]:
    """Return the paths of the routers of all converted FFNs."""
    paths = []
    for path, module in model.named_modules():
        if isinstance(module, RoutedActivation):
            paths.append(f"{path}.router")
    return paths


def _find_modules(model: nn.Module, names: list[str]) -> list[str]:
    """Return the paths of the modules that have one of the names as the last part of their path.

    Raises:
        DefinitionError: There are names, but none of them is in the model.
    """
    last_names = {}
    for path, _ in model.named_modules():
        last_names[path] = path.split(".")[-1]
    paths = [path for path, last_name in last_names.items() if last_name in names]
    if names and not paths:
        near = did_you_mean(names[0], last_names.values())
        raise DefinitionError(
            f"'also_train' names {', '.join(names)}, none of which the model has{near}"
        )
    return paths


def _add_adapters_(
    model: nn.Module, lora: LoRA, seed: int, frozen_names: Collection[str]
) -> LoraModel:
    """Add adapters to a model in place, except to frozen layers, and return peft's wrapper of it.

    Raises:
        DefinitionError: ``lora`` has no layers for the model's type, all of them are frozen, or the
            model never calls one of them.
    """
    architecture = architecture_of(model)
    if architecture not in lora.targets:
        near = did_you_mean(architecture, lora.targets)
        raise DefinitionError(f"training.lora.targets has no layers for '{architecture}'{near}")
    # peft can exclude modules but not parameters, so take the module of each frozen parameter
    frozen_modules = set()
    for name in frozen_names:
        module_path, _, _ = name.rpartition(".")
        frozen_modules.add(module_path)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=cast(int, lora.alpha),  # peft also accepts fractions
        lora_dropout=lora.dropout,
        target_modules=list(lora.targets[architecture]),
        exclude_modules=sorted(frozen_modules),
        fan_in_fan_out=architecture == "gpt2",  # its Conv1D layers store transposed weights
    )
    # all methods start with equal adapters
    torch.manual_seed(derive_seed("adapters", seed))
    try:
        adapters = LoraModel(model, config, "default")
    except ValueError as error:  # targets are missing or all frozen
        raise DefinitionError(f"training.lora.targets.{architecture}: {error}") from error
    _refuse_never_called(architecture, adapters.targeted_module_names)
    return adapters


def _refuse_never_called(architecture: str, adapted_paths: Sequence[str]) -> None:
    """Refuse adapters of layers that the model never calls.

    Args:
        architecture: The model's type, or its class if it is of timm.
        adapted_paths: The paths of the layers with adapters.

    Raises:
        DefinitionError: One of these layers is never called.
    """
    never_called = _NEVER_CALLED.get(architecture, ())
    for path in adapted_paths:
        last_name = path.split(".")[-1]
        if last_name in never_called:
            raise DefinitionError(
                f"training.lora.targets.{architecture} names '{last_name}', but the model reads "
                "the weight of this layer without calling it, so an adapter has no effect; choose "
                "other layers, such as attn.proj"
            )
