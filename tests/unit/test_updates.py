"""What training does to the FFNs: how far their weights move, and whether gradients agree."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

import emoe
from benchmarks.harness.config.definition import load_benchmark
from benchmarks.harness.training.updates import WeightChange, ffn_weights, gradient_agreement
from benchmarks.text.outcomes import TextOutcomes
from benchmarks.text.updates import update_table
from tests import fake_runs


def bert(layers: int = 4) -> BertForSequenceClassification:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=60, hidden_size=16, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=32
    )
    return BertForSequenceClassification(config)


def batches(label: int | None, *, seed: int = 0, count: int = 2) -> list[dict[str, Any]]:
    source = torch.Generator().manual_seed(seed)
    return [
        {
            "input_ids": torch.randint(60, (4, 6), generator=source),
            "attention_mask": torch.ones(4, 6, dtype=torch.long),
            "labels": torch.full((4,), label) if label is not None else torch.tensor([0, 1, 0, 1]),
        }
        for _ in range(count)
    ]


def test_the_change_is_the_norm_of_what_was_added_over_the_norm_before() -> None:
    model = bert()
    change = WeightChange(model)
    assert change.summary() == dict.fromkeys("0123", 0.0)
    with torch.no_grad():
        for weight in ffn_weights(model)[2]:
            weight *= 1.5
    assert change.summary() == {"0": 0.0, "1": 0.0, "2": pytest.approx(0.5), "3": 0.0}


@pytest.mark.parametrize(
    "config",
    [None, emoe.EMoEConfig(num_experts=4, top_k=1, layers=[3]), emoe.GMoEConfig(num_experts=2, top_k=1, layers=[3])],
)
def test_every_form_of_an_ffn_has_its_trained_matrices(config: Any) -> None:
    model = bert()
    if config:
        emoe.convert_(model, config)
    copies = 2 if isinstance(config, emoe.GMoEConfig) else 1
    sizes = {layer: [weight.numel() for weight in found] for layer, found in ffn_weights(model).items()}
    assert sizes == {0: [512, 512], 1: [512, 512], 2: [512, 512], 3: [512 * copies, 512 * copies]}


def test_what_is_not_trained_has_neither() -> None:
    model = bert()
    model.requires_grad_(requires_grad=False)
    assert WeightChange(model).summary() == {}
    assert gradient_agreement(model, batches(0), {"other": batches(1)}) == {}


def test_the_same_rows_agree_and_rows_with_the_other_label_disagree() -> None:
    model = bert()
    nn.init.zeros_(model.classifier.bias)
    same = batches(0)
    found = gradient_agreement(model, same, {"own": batches(0), "other": batches(1)})
    assert set(found) == {"3"}  # the last quarter of four layers
    assert found["3"]["own"] == pytest.approx(1)
    assert found["3"]["other"] == pytest.approx(
        -1
    )  # two classes: the gradients by the logits are each other's opposite


def test_it_is_the_gradient_of_the_mean_over_rows_of_batches_of_any_size() -> None:
    model = bert().eval()
    rows = batches(None, count=3)
    whole = {name: torch.cat([batch[name] for batch in rows]) for name in rows[0]}
    uneven = [{name: value[:5] for name, value in whole.items()}, {name: value[5:] for name, value in whole.items()}]
    found = gradient_agreement(model, uneven, {"whole": [whole]})
    assert found["3"]["whole"] == pytest.approx(1, abs=1e-6)


def test_the_model_stays_as_it_was() -> None:
    model = bert().train()
    emoe.convert_(model, emoe.EMoEConfig(num_experts=4, top_k=1, layers=[3]))
    before, state = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
    gradient_agreement(model, batches(0), {"other": batches(1)})
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_table_pairs_by_seed_and_leaves_out_what_was_not_measured(here: Path, monkeypatch) -> None:
    runs = fake_runs.write(Path("results/runs"), "mini")
    outcomes = TextOutcomes(load_benchmark("glue"), runs)
    for record, found in outcomes.training:
        found["model"] = {"conversion": [] if record.method == "vanilla" else [{"index": 1}]}
        found["updates"]["change"]["1"] = 0.01 + 0.001 * record.seed * (record.method == "emoe")
    table = update_table(outcomes)
    frame = table.frame[table.frame["task"] == "tweets"]
    assert list(frame["what"].drop_duplicates()) == [
        "weights of all FFNs",
        "weights of FFN 1, which methods convert",
        "gradients of other rows of the task",
        *(f"gradients of {name}" for name in ("Amazon", "Movie", "NYT")),
    ]
    by_seed = {
        (record.method, record.seed): sum(found["updates"]["change"].values()) / 2
        for record, found in outcomes.training
        if record.task == "tweets"
    }
    row = frame[(frame["method"] == "emoe") & (frame["on"] == "")].iloc[0]
    differences = [by_seed["emoe", seed] - by_seed["vanilla", seed] for seed in range(8)]
    assert row["delta"] == pytest.approx(sum(differences) / 8)
    converted = frame[frame["on"] == "converted"].set_index("method")
    alone = {
        (record.method, record.seed): found["updates"]["change"]["1"]
        for record, found in outcomes.training
        if record.task == "tweets"
    }
    assert converted.loc["vanilla", "weight_change_mean"] == pytest.approx(
        sum(alone["vanilla", seed] for seed in range(8)) / 8
    )
    assert converted.loc["emoe", "delta"] == pytest.approx(
        sum(alone["emoe", seed] - alone["vanilla", seed] for seed in range(8)) / 8
    )
    assert frame[frame["method"] == "vanilla"]["delta"].isna().all()
    # of two models that convert other layers, each has its own
    twice = [
        (record._replace(model="bert-large-cased"), {**found, "model": {"conversion": [{"index": 0}]}})
        for record, found in outcomes.training
        if record.method == "emoe"
    ]
    monkeypatch.setattr(outcomes, "training", [*outcomes.training, *twice])
    words = update_table(outcomes).frame
    words = words[words["on"] == "converted"].groupby("model")["what"].first()
    assert words["minilm"] == "weights of FFN 1, which methods convert"
    assert words["bert-large-cased"] == "weights of FFN 0, which methods convert"
    empty = SimpleNamespace(
        training=[(record, {"updates": {}, "model": {"conversion": []}}) for record, _ in outcomes.training]
    )
    monkeypatch.setattr(outcomes, "training", empty.training)
    assert update_table(outcomes).frame.empty
