"""Register ways of tuning: functions that name the trained parameters."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from benchmarks.harness.base import DefinitionError
from benchmarks.harness.config.methods import Method, method_spec, register_tuning
from benchmarks.harness.models.tuning import tune_
from tests.planned import edited_benchmark, edited_part, specs

LORA = {"rank": 2, "alpha": 4, "dropout": 0.0, "targets": {"bert": ["query"]}}


def classifier() -> BertForSequenceClassification:
    return BertForSequenceClassification(
        BertConfig(vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    )


def biases(model: nn.Module, layers: Any) -> list[str]:
    return [name for name, _ in model.named_parameters() if name.endswith("bias")]


def spec(tune: str, **method: Any) -> dict[str, Any]:
    methods = {"mine": Method(title="Mine", kind="dense", tune=tune, **method)}
    return method_spec(methods, {"method": "mine", "layers": [2]}, 0, None, "b.yaml: 'grid'")


def test_it_trains_what_its_function_names_beside_head_and_adapters() -> None:
    register_tuning("bias", biases)
    model = classifier()
    adapters, groups = tune_(model, LORA, spec("bias")["tune"], 0)
    assert adapters is not None
    assert {"adapters", "bias"} <= set(groups)
    named = [name for group in groups.values() for name, _ in group]
    assert sorted(named) == sorted(name for name, parameter in model.named_parameters() if parameter.requires_grad)
    assert {name for name, _ in groups["bias"]} == set(biases(model, None)) - {"classifier.bias"}  # of the head


def test_layers_are_for_those_that_need_them() -> None:
    seen = []
    register_tuning("free", lambda model, layers: seen.append(layers) or [])
    register_tuning("bound", lambda model, layers: seen.append(layers) or [], needs_layers=True)
    # one run for all layers of a grid, or one for each
    assert [spec(name)["variant"] for name in ("free", "bound")] == ["", "L2"]
    for name in ("free", "bound"):
        tune_(classifier(), None, spec(name)["tune"], 0)
    assert seen == [None, [2]]
    with pytest.raises(DefinitionError, match="is dense and takes no 'layers'"):
        spec("free", layers=[1])


def test_language_models_are_tuned_by_it_too() -> None:
    edits = {"finetuning.bitfit": {"title": "BitFit", "train": "bias"}}
    block = {"model": ["tiny-llama"], "set": ["alpaca_demo"], "finetuning": ["bitfit"], "method": ["dense"]}
    grid = [{**block, "learning_rate": [1.0e-3], "seed": [0]}]
    with pytest.raises(DefinitionError, match=r"'finetuning\.bitfit\.train' is 'bias'; choose from all, adapters, "):
        edited_benchmark("llama", edits)
    register_tuning("bias", biases)
    (spec,) = specs(edited_benchmark("llama", edits), edited_part("llama", "smoke", {"grid": grid}))
    assert spec["method"]["tune"] == {"blocks": [], "also": [], "tuning": "bias", "head": False}
