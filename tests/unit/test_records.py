from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import BertConfig, BertForSequenceClassification, CLIPConfig, CLIPModel

import emoe
from tests import converted, tiny_models
from tests.plain_net import SPECS, plain_net

T5_MASKS = {
    "attention_mask": (torch.arange(11) < 4).long().repeat(3, 1),
    "decoder_attention_mask": (torch.arange(7) < 5).long().repeat(3, 1),
}


def test_loads_count_every_token_and_leave_padding_out() -> None:
    model, values = converted.model("bert", layers=[1]), tiny_models.inputs("bert")
    with emoe.record_routing(model) as record:
        model(**values)
    found = record.layers[1]
    assert found.tokens == 33
    assert int(found.loads.sum()) == 66
    assert found.experts_per_token == 2
    assert float(found.shares.sum()) == pytest.approx(1)
    assert 0 < found.entropy <= 1 <= found.max_over_mean
    with pytest.raises(KeyError, match="layer 0 has no experts; the layers with experts are 1"):
        record.layers[0]

    mask = torch.ones(3, 11, dtype=torch.long)
    mask[1:, 5:] = 0
    with emoe.record_routing(model) as record:
        model(**values, attention_mask=mask)
    assert record.layers[1].tokens == int(mask.sum())


def test_padding_does_not_change_the_record_of_real_tokens() -> None:
    model = converted.model("bert", layers=[1])
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
    model, values = converted.model("bert", layers=[1]), tiny_models.inputs("bert")
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
    model = converted.model("bert", layers=[1, 2], capacity_factor=1.0)
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
    model, values = converted.model("vit", layers=[1]), tiny_models.inputs("vit")
    with emoe.record_routing(model) as record:
        record.set_labels(torch.tensor([2, 0, 2]))
        model(**values)
        record.set_labels(None)
        model(**values)
    found = record.layers[1]
    tokens = found.tokens // 6
    assert {label: int(loads.sum()) for label, loads in found.by_label.items()} == {0: 2 * tokens, 2: 4 * tokens}


def test_t5_counts_the_padding_of_each_stack() -> None:
    model, values = converted.model("t5"), tiny_models.inputs("t5")
    with emoe.record_routing(model) as record:
        model(**values, **T5_MASKS)
    assert [layer.tokens for layer in record.layers.values()] == [12, 12, 15, 15]


class Work(TorchDispatchMode):
    """Counts what is computed: elements of every result."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.elements += sum(tensor.numel() for tensor in tree_leaves(result) if isinstance(tensor, torch.Tensor))
        return result


def test_recording_is_cheap_enough_to_stay_on() -> None:
    """Of a training step of MiniLM's shape, all layers routed; counted, because a time depends on what runs beside."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=100,
        hidden_size=384,
        num_hidden_layers=2,
        num_attention_heads=12,
        intermediate_size=1536,
        num_labels=2,
    )
    model = BertForSequenceClassification(config)
    emoe.convert_(model, emoe.EMoEConfig(num_experts=64, top_k=16, layers="all", partition="random"))
    batch = {
        "input_ids": torch.randint(3, 100, (4, 64)),
        "attention_mask": torch.ones(4, 64, dtype=torch.long),
        "labels": torch.randint(2, (4,)),
    }

    def elements() -> int:
        with Work() as work:
            model(**batch).loss.backward()
        return work.elements

    plain = elements()
    with emoe.record_routing(model, window=100):
        recorded = elements()
    assert plain < recorded < 1.03 * plain, recorded / plain


def test_recording_follows_the_layer_through_wrappers() -> None:
    class Wrapper(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, **values: torch.Tensor) -> object:
            return self.inner(**values)

    model, values = converted.model("t5"), tiny_models.inputs("t5")
    for whole in (Wrapper(model), get_peft_model(model, LoraConfig(target_modules=["q"]))):
        with emoe.record_routing(whole) as record:
            whole(**values, **T5_MASKS)
        assert [layer.tokens for layer in record.layers.values()] == [12, 12, 15, 15]


def test_masks_of_other_tokens_are_not_taken() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = CLIPConfig(
        text_config={**sizes, "vocab_size": 60, "eos_token_id": 2},
        vision_config={**sizes, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    model = CLIPModel(config).eval()
    emoe.convert_(model.vision_model, emoe.EMoEConfig(num_experts=8, top_k=2, layers=[1]))
    mask = torch.tensor([[1] * 9, [1] * 4 + [0] * 5])
    with emoe.record_routing(model) as record:
        model(torch.randint(3, 60, (2, 9)), torch.randn(2, 3, 32, 32), attention_mask=mask)
    assert record.layers[1].tokens == 2 * 17


@pytest.mark.parametrize("batch_first", [True, False])
def test_padding_masks_of_torchs_own_encoder(batch_first: bool) -> None:
    layer = torch.nn.TransformerEncoderLayer(32, 4, 64, batch_first=batch_first)
    model = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    emoe.convert_(model, emoe.EMoEConfig(num_experts=8, top_k=2, layers=[0], capacity_factor=1.0))
    x, padding = torch.randn(3, 9, 32), torch.arange(9).repeat(3, 1) >= torch.tensor([[9], [5], [4]])
    noise = torch.where(padding.unsqueeze(-1), 30 * torch.randn(3, 9, 32), 0)
    outputs = []
    for rows in (x, x + noise):
        with emoe.record_routing(model) as record:
            y = model(rows if batch_first else rows.transpose(0, 1), src_key_padding_mask=padding)
        assert record.layers[0].tokens == 18
        outputs.append((y if batch_first else y.transpose(0, 1))[~padding])
    torch.testing.assert_close(*outputs)


def test_a_mask_that_does_not_fit_is_said_and_labels_below_zero_are_none() -> None:
    net, x = plain_net(6, 32), torch.randn(4, 5, 6)
    emoe.convert_(net, emoe.EMoEConfig(num_experts=8, top_k=2, layers=[0]))
    with emoe.record_routing(net) as record, pytest.warns(UserWarning, match="padding is counted: attention_mask"):
        net(x, attention_mask=torch.ones(4, 9))
    assert record.layers[0].tokens == 20
    with emoe.record_routing(net) as record:
        record.set_labels(torch.tensor([1, -100, 1, 0]))
        net(x)
    assert {label: int(loads.sum()) for label, loads in record.layers[0].by_label.items()} == {0: 10, 1: 20}


def test_parts_that_were_converted_apart_are_not_mixed_up(tmp_path) -> None:
    model = torch.nn.ModuleDict({"a": plain_net(4, 8), "b": plain_net(4, 8)})
    for name, top_k in (("a", 1), ("b", 3)):
        emoe.convert_(model[name], emoe.EMoEConfig(num_experts=4, top_k=top_k, layers=[0]))
    with pytest.raises(emoe.ConversionError, match="converted separately"), emoe.record_routing(model):
        pass
    with pytest.raises(emoe.ConversionError, match="converted separately"):
        emoe.save_pretrained(model, tmp_path)


def test_rows_may_come_second() -> None:
    """XLNet's layout: ``[tokens, rows, h]``, with a mask and labels by row."""
    x = torch.randn(5, 3, 8)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
    found = {}
    for rows_first in (True, False):
        specs = [dataclasses.replace(spec, rows_first=rows_first) for spec in SPECS]
        emoe.register_ffn("PlainNet", *specs)
        net = plain_net(8, 32)
        emoe.convert_(net, emoe.EMoEConfig(num_experts=4, top_k=1, layers=[0], capacity_factor=1.0))
        with emoe.record_routing(net) as record:
            record.set_labels(torch.tensor([0, 1, 2]))
            y = net(x.transpose(0, 1).contiguous() if rows_first else x, attention_mask=mask)
        found[rows_first] = (y if rows_first else y.transpose(0, 1), record.layers[0])
    (first, one), (second, other) = found[True], found[False]
    assert one.tokens == other.tokens == 9
    assert {label: int(loads.sum()) for label, loads in other.by_label.items()} == {0: 5, 1: 3, 2: 1}
    assert all(torch.equal(one.by_label[label], other.by_label[label]) for label in range(3))
    assert one.dropped == other.dropped
    assert first.shape == second.shape
