"""What of a model a run trains: adapters, head, routers, and what its way of tuning adds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft import LoraModel
from torch import nn
from transformers import PreTrainedModel

from benchmarks.harness.base.errors import DefinitionError
from benchmarks.harness.modeling.lora import adapt_
from benchmarks.harness.planning.tunings import TUNINGS
from emoe.errors import did_you_mean


def tune_(
    model: PreTrainedModel, lora: Mapping[str, Any] | None, tune: Mapping[str, Any], seed: int
) -> tuple[LoraModel | None, dict[str, list[tuple[str, nn.Parameter]]]]:
    """Freeze a model but for what a run trains.

    Args:
        model: a classifier or language model, converted or dense.
        lora: ``training.lora`` of the spec; None adds no adapters.
        tune: ``method.tune`` of the spec, as :func:`~benchmarks.harness.planning.tunings.tuning_spec` makes it; with ``head: false``
            the head stays as it is.
        seed: the run's seed; adapters are the same for all methods.

    Returns:
        The new adapters, as peft holds them, and what is trained: names and parameters by group. The groups are ``adapters``, ``head``,
        ``routers``, ``also``, and one with the name of the way of tuning, for what is in none of the others.

    Raises:
        DefinitionError: no target layers for the model's type, or names that match nothing.
    """
    adapters, groups = adapt_(model, lora, {**tune, "blocks": []}, seed)
    name, layers = ("blocks", tune["blocks"]) if tune["blocks"] else (tune.get("tuning"), tune.get("layers"))
    if name:
        parameters = dict(model.named_parameters())
        chosen = dict.fromkeys(TUNINGS[name].parameters(model, layers))
        if odd := [other for other in chosen if other not in parameters]:
            near = did_you_mean(odd[0], parameters)
            raise DefinitionError(f"the tuning '{name}' names '{odd[0]}', which is no parameter of the model{near}")
        taken = {other for group in groups.values() for other, _ in group}
        groups[name] = [(other, parameters[other]) for other in chosen if other not in taken]
        for _, parameter in groups[name]:
            parameter.requires_grad_(True)
    return adapters, groups
