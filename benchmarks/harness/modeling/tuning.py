"""What of a model a run trains: adapters, head, routers, and what its way of tuning adds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from benchmarks.harness.base.errors import DefinitionError
from benchmarks.harness.modeling.lora import adapt_
from benchmarks.harness.planning.tunings import TUNINGS
from emoe.errors import did_you_mean

Groups = dict[str, list[tuple[str, nn.Parameter]]]


def tune_(model: PreTrainedModel, lora: Mapping[str, Any] | None, tune: Mapping[str, Any], seed: int) -> Groups:
    """Freeze a model but for what a run trains.

    Args:
        model: a classifier or language model, converted or dense.
        lora: ``training.lora`` of the spec; None adds no adapters.
        tune: ``method.tune`` of the spec (:func:`~benchmarks.harness.planning.tunings.tuning_spec`). The head of a classifier is new and
            always trained; that of a language model stays as it is (``head: false``).
        seed: the run's seed; adapters are the same for all methods.

    Returns:
        What is trained: names and parameters by group. The groups are ``adapters``, ``head``, ``routers``, ``also``, and one with the name of the
        way of tuning; a parameter is in the first that claims it.

    Raises:
        DefinitionError: no target layers for the model's type, or names that match nothing.
    """
    adapters, groups = adapt_(model, lora, {**tune, "blocks": []}, seed)
    name, layers = ("blocks", tune["blocks"]) if tune["blocks"] else (tune.get("tuning"), tune.get("layers"))
    if name:
        parameters, taken = dict(model.named_parameters()), {other for group in groups.values() for other, _ in group}
        found = dict.fromkeys(TUNINGS[name].parameters(model, layers))
        if odd := [other for other in found if other not in parameters]:
            near = did_you_mean(odd[0], parameters)
            raise DefinitionError(f"the tuning '{name}' names '{odd[0]}', which is no parameter of the model{near}")
        groups[name] = [(other, parameters[other]) for other in found if other not in taken]
        for _, parameter in groups[name]:
            parameter.requires_grad_(True)
    return groups
