from __future__ import annotations

import time

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


def test_aux_loss_only_where_asked_for() -> None:
    model, values = tiny_models.build("bert"), tiny_models.inputs("bert")
    emoe.convert_(model, emoe.EMoEConfig(num_experts=8, top_k=2, layers=[1]))
    model.train()(**values)
    assert emoe.aux_loss(model) == 0.0
    emoe.to_dense_(model)
    emoe.convert_(
        model, emoe.EMoEConfig(num_experts=8, top_k=2, layers=[1], aux_loss_coefficient=0.5, router_noise=1.0)
    )
    model(**values)
    loss = emoe.aux_loss(model)
    assert loss.requires_grad
    assert float(loss.detach()) > 0


def test_drops_windows_and_the_table() -> None:
    model = tiny_models.build("bert")
    emoe.convert_(model, emoe.EMoEConfig(num_experts=8, top_k=2, layers=[1, 2], capacity_factor=1.0))
    with emoe.record_routing(model, window=2) as record:
        for seed in range(5):
            model(**tiny_models.inputs("bert", rows=8, seed=seed))
    found = record.layers[1]
    assert found.tokens == 5 * 88
    assert 0 < found.drop_rate < 1
    assert found.dropped == round(found.drop_rate * 2 * found.tokens)
    assert found.active_neurons == pytest.approx(0.25 * (1 - found.drop_rate))
    assert [int(loads.sum()) for loads in found.windows] == [2 * 2 * 88] * 2
    assert 0 < found.change < 2
    summary = record.summary()
    assert summary["drop_rate"] == pytest.approx((found.drop_rate + record.layers[2].drop_rate) / 2)
    assert set(summary) >= {"load_change", "active_neurons", "load_entropy"}
    assert len(str(record).splitlines()) == 4


def test_labels_can_be_given_to_models_that_are_not_called_with_them() -> None:
    model, values = tiny_models.build("vit"), tiny_models.inputs("vit")
    emoe.convert_(model, emoe.EMoEConfig(num_experts=8, top_k=2, layers=[1]))
    with emoe.record_routing(model) as record:
        record.set_labels(torch.tensor([2, 0, 2]))
        model(**values)
        record.set_labels(None)
        model(**values)
    found = record.layers[1]
    tokens = found.tokens // 6
    assert {label: int(loads.sum()) for label, loads in found.by_label.items()} == {0: 2 * tokens, 2: 4 * tokens}


def test_t5_counts_the_padding_of_each_stack() -> None:
    model, values = tiny_models.build("t5"), tiny_models.inputs("t5")
    emoe.convert_(model, emoe.EMoEConfig(num_experts=8, top_k=2, layers="all"))
    masks = {
        "attention_mask": (torch.arange(11) < 4).long().repeat(3, 1),
        "decoder_attention_mask": (torch.arange(7) < 5).long().repeat(3, 1),
    }
    with emoe.record_routing(model) as record:
        model(**values, **masks)
    assert [layer.tokens for layer in record.layers.values()] == [12, 12, 15, 15]


@pytest.mark.slow
def test_recording_is_cheap_enough_to_stay_on(capsys: pytest.CaptureFixture[str]) -> None:
    """Training steps of MiniLM's shape, all layers routed, with and without recording in turn; process time."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=100,
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
        num_labels=2,
    )
    model = BertForSequenceClassification(config)
    emoe.convert_(model, emoe.EMoEConfig(num_experts=64, top_k=16, layers="all", partition="random"))
    batch = {
        "input_ids": torch.randint(3, 100, (16, 64)),
        "attention_mask": torch.ones(16, 64, dtype=torch.long),
        "labels": torch.randint(2, (16,)),
    }

    def step() -> float:
        start = time.process_time()
        model(**batch).loss.backward()
        model.zero_grad()
        return time.process_time() - start

    seconds: dict[bool, list[float]] = {False: [], True: []}
    step()
    for _ in range(12):
        seconds[False].append(step())
        with emoe.record_routing(model, window=100):
            seconds[True].append(step())
    ratio = min(seconds[True]) / min(seconds[False])
    with capsys.disabled():
        print(f"\nrecording: {ratio:.3f} of the time of a step without it")  # noqa: T201 -- the figure of docs/library.md
    assert ratio < 1.10  # measured when nothing else runs: see docs/library.md
