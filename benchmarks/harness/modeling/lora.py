"""Low-rank adapters, by peft."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft import LoraConfig, LoraModel
from transformers import PreTrainedModel

from benchmarks.harness.base.errors import DefinitionError
from benchmarks.harness.base.seeds import derive_seed
from emoe.errors import did_you_mean


def inject_adapters_(model: PreTrainedModel, lora: Mapping[str, Any], seed: int) -> LoraModel:
    """Add adapters to a model, in place.

    Args:
        model: a classifier or language model, converted or dense.
        lora: ``training.lora`` of the spec.
        seed: the run's seed; adapters are the same for all methods.

    Returns:
        The adapters, as peft holds them.

    Raises:
        DefinitionError: no target layers for the model's type, or names that match nothing.
    """
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
