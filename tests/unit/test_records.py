from __future__ import annotations

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

import emoe
from tests import tiny_models


def test_loads_count_every_token_and_leave_padding_out() -> None:
    model, values = tiny_models.build("bert"), tiny_models.inputs("bert")
    emoe.convert_(model, emoe.EMoEConfig(num_experts=8, top_k=2, layers=[1]))
    with emoe.record_routing(model) as record:
        model(**values)
    found = record.layers[1]
    assert found.tokens == 33
    assert int(found.loads.sum()) == 66
    assert found.experts_per_token == 2
    assert float(found.shares.sum()) == pytest.approx(1)
    assert 0 < found.entropy <= 1 <= found.max_over_mean

    mask = torch.ones(3, 11, dtype=torch.long)
    mask[1:, 5:] = 0
    with emoe.record_routing(model) as record:
        model(**values, attention_mask=mask)
    assert record.layers[1].tokens == int(mask.sum())


def test_padding_does_not_change_the_record_of_real_tokens() -> None:
    model = tiny_models.build("bert")
    emoe.convert_(model, emoe.EMoEConfig(num_experts=8, top_k=2, layers=[1]))
    ids = tiny_models.inputs("bert")["input_ids"]
    padded = torch.cat([ids, torch.zeros(3, 9, dtype=torch.long)], 1)
    mask = (torch.arange(20) < 11).long().repeat(3, 1)
    loads = []
    for values in (
        {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
        {"input_ids": padded, "attention_mask": mask},
    ):
        with emoe.record_routing(model) as record:
            model(**values)
        loads.append(record.layers[1].loads)
    assert torch.equal(*loads)


def test_usage_by_label() -> None:
    torch.manual_seed(0)
    config = BertConfig(vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    model = BertForSequenceClassification(config).eval()
    emoe.convert_(model, emoe.EMoEConfig(num_experts=8, top_k=2, layers=[1]))
    with emoe.record_routing(model) as record:
        model(input_ids=torch.randint(3, 60, (4, 6)), labels=torch.tensor([0, 1, 1, 1]))
    found = record.layers[1]
    assert {label: int(loads.sum()) for label, loads in found.by_label.items()} == {0: 12, 1: 36}
    assert torch.equal(found.by_label[0] + found.by_label[1], found.loads)


def test_recording_ends_and_needs_a_routed_model() -> None:
    model, values = tiny_models.build("bert"), tiny_models.inputs("bert")
    with pytest.raises(emoe.ConversionError, match="convert it first"), emoe.record_routing(model):
        pass
    emoe.convert_(model, emoe.EMoEConfig(num_experts=8, top_k=2, layers=[1]))
    with (
        emoe.record_routing(model) as record,
        pytest.raises(emoe.ConversionError, match="already"),
        emoe.record_routing(model),
    ):
        pass
    model(**values)
    assert record.layers[1].tokens == 0


def test_aux_loss_only_where_asked_for_and_in_training() -> None:
    model, values = tiny_models.build("bert"), tiny_models.inputs("bert")
    emoe.convert_(
        model, emoe.EMoEConfig(num_experts=8, top_k=2, layers=[1], aux_loss_coefficient=0.5, router_noise=1.0)
    )
    model(**values)
    assert emoe.aux_loss(model) == 0.0
    model.train()(**values)
    loss = emoe.aux_loss(model)
    assert loss.requires_grad
    assert float(loss.detach()) > 0
