from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertForSequenceClassification, CLIPConfig, CLIPModel

import emoe
from tests import converted, tiny_models
from tests.plain_net import plain_net

T5_MASKS = {
    "attention_mask": (torch.arange(11) < 4).long().repeat(3, 1),
    "decoder_attention_mask": (torch.arange(7) < 5).long().repeat(3, 1),
}


def test_loads_count_every_token_and_leave_padding_out() -> None:
    model, values = converted.model("bert", layers=[1]), tiny_models.inputs("bert")
    with emoe.record_routing(model) as record:
        model(**values)
    layer = record.layers[1]
    assert layer.tokens == 33
    assert int(layer.loads.sum()) == 66
    assert layer.experts_per_token == 2
    assert float(layer.shares.sum()) == pytest.approx(1)
    assert 0 < layer.entropy <= 1 <= layer.max_over_mean
    with pytest.raises(KeyError, match="layer 0 has no experts; the layers with experts are 1"):
        record.layers[0]

    mask = torch.ones(3, 11, dtype=torch.long)
    mask[1:, 5:] = 0
    with emoe.record_routing(model) as record:
        model(**values, attention_mask=mask)
    assert record.layers[1].tokens == int(mask.sum())


def test_loads_by_label() -> None:
    torch.manual_seed(0)
    config = BertConfig(vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    model = BertForSequenceClassification(config).eval()
    emoe.convert_(model, emoe.EMoEConfig(num_experts=8, top_k=2, layers=[1]))
    ids, labels = torch.randint(3, 60, (4, 6)), torch.tensor([0, 1, 1, -100])
    for given in (True, False):
        with emoe.record_routing(model) as record:
            if given:
                record.set_labels(labels)
            model(input_ids=ids, labels=None if given else labels)
        layer = record.layers[1]
        assert {label: int(loads.sum()) for label, loads in layer.by_label.items()} == {0: 12, 1: 24}
        assert int(layer.loads.sum()) == 48


def test_recording_ends_and_needs_a_routed_model() -> None:
    model, values = tiny_models.build("bert"), tiny_models.inputs("bert")
    with pytest.raises(emoe.ConversionError, match="convert it first"), emoe.record_routing(model):
        pass
    emoe.convert_(model, emoe.EMoEConfig(num_experts=8, top_k=2, layers=[1]))
    refused = pytest.raises(emoe.ConversionError, match="already")
    with emoe.record_routing(model) as record, refused, emoe.record_routing(model):
        pass
    model(**values)
    assert record.layers[1].tokens == 0


def test_drops_windows_and_the_table() -> None:
    model = converted.model("bert", layers=[1, 2], capacity_factor=1.0)
    with emoe.record_routing(model, window=2) as record:
        for seed in range(5):
            model(**tiny_models.inputs("bert", rows=8, seed=seed))
    layer = record.layers[1]
    assert layer.tokens == 5 * 88
    assert 0 < layer.drop_rate < 1
    assert layer.dropped == round(layer.drop_rate * 2 * layer.tokens)
    assert layer.active_neurons == pytest.approx(0.25 * (1 - layer.drop_rate))
    assert [int(loads.sum()) for loads in layer.windows] == [2 * 2 * 88] * 2
    assert 0 < layer.change < 2
    summary = record.summary()
    assert summary["drop_rate"] == pytest.approx((layer.drop_rate + record.layers[2].drop_rate) / 2)
    assert set(summary) >= {"load_change", "active_neurons", "load_entropy"}
    assert len(str(record).splitlines()) == 4


class Wrapper(torch.nn.Module):
    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, **values: torch.Tensor) -> object:
        return self.inner(**values)


@pytest.mark.parametrize(
    "wrap", [lambda model: model, Wrapper, lambda model: get_peft_model(model, LoraConfig(target_modules=["q"]))]
)
def test_wrapped_encoder_decoders_count_the_padding_of_each_stack(wrap) -> None:
    whole = wrap(converted.model("t5"))
    with emoe.record_routing(whole) as record:
        whole(**tiny_models.inputs("t5"), **T5_MASKS)
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
            record.set_labels(torch.tensor([0, 1, 2]))
            y = model(rows if batch_first else rows.transpose(0, 1), src_key_padding_mask=padding)
        loads = {label: int(loads.sum()) for label, loads in record.layers[0].by_label.items()}
        assert (record.layers[0].tokens, loads) == (18, {0: 18, 1: 10, 2: 8})
        outputs.append((y if batch_first else y.transpose(0, 1))[~padding])
    torch.testing.assert_close(*outputs)


def test_a_mask_that_does_not_fit_is_a_warning() -> None:
    net, x = plain_net(6, 32), torch.randn(4, 5, 6)
    emoe.convert_(net, emoe.EMoEConfig(num_experts=8, top_k=2, layers=[0]))
    with emoe.record_routing(net) as record, pytest.warns(UserWarning, match="padding is counted: attention_mask"):
        net(x, attention_mask=torch.ones(4, 9))
    assert record.layers[0].tokens == 20


def test_parts_that_were_converted_apart_are_not_mixed_up(tmp_path) -> None:
    model = torch.nn.ModuleDict({"a": plain_net(4, 8), "b": plain_net(4, 8)})
    for name, top_k in (("a", 1), ("b", 3)):
        emoe.convert_(model[name], emoe.EMoEConfig(num_experts=4, top_k=top_k, layers=[0]))
    with pytest.raises(emoe.ConversionError, match="converted separately"), emoe.record_routing(model):
        pass
    with pytest.raises(emoe.ConversionError, match="converted separately"):
        emoe.save_pretrained(model, tmp_path)
