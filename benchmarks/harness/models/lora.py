"""Low-rank adapters, by peft."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from peft import LoraConfig, LoraModel
from transformers import PreTrainedModel

from benchmarks.harness.base.errors import DefinitionError
from benchmarks.harness.base.seeds import derive_seed
from emoe.errors import did_you_mean


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
