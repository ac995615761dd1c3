"""``record_routing`` counts every token's experts, by label and window, and leaves padding out."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModel

import emoe
from tests import classifiers, converted, tiny_models


def test_loads_count_every_token_and_leave_padding_out() -> None:
    model, values = converted.model("bert", layers=[1]), tiny_models.inputs("bert")
    with emoe.record_routing(model) as record:
        model(**values)
    model(**values)  # not recorded
    layer = record.layers[1]
    assert layer.tokens == 33
    assert int(layer.loads.sum()) == 66
    assert layer.experts_per_token == 2
    assert float(layer.shares.sum()) == pytest.approx(1)
    assert 0 < layer.entropy <= 1 <= layer.max_over_mean
    mask = (torch.arange(11) < torch.tensor([[11], [5], [5]])).long()
    with emoe.record_routing(model) as record:
        model(**values, attention_mask=mask)
    assert record.layers[1].tokens == int(mask.sum())


def test_loads_by_label() -> None:
    model = classifiers.bert(classifiers.METHODS["emoe"])
    ids, labels = torch.randint(3, 60, (4, 6)), torch.tensor([0, 1, 1, -100])
    for given in (True, False):
        with emoe.record_routing(model) as record:
            if given:
                record.set_labels(labels)
            model(input_ids=ids, labels=None if given else labels)
        layer = record.layers[2]
        assert {label: int(loads.sum()) for label, loads in layer.by_label.items()} == {
            0: 12,
            1: 24,
        }
        assert int(layer.loads.sum()) == 48


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.bool])
def test_labels_may_be_small_integers(dtype: torch.dtype) -> None:
    model = classifiers.bert(classifiers.METHODS["emoe"])
    with emoe.record_routing(model) as record:
        record.set_labels(torch.tensor([0, 1, 1, 0], dtype=dtype))
        model(input_ids=torch.randint(3, 60, (4, 6)))
    by_label = record.layers[2].by_label
    assert {label: int(loads.sum()) for label, loads in by_label.items()} == {0: 24, 1: 24}


def test_empty_labels_are_no_labels() -> None:
    model = classifiers.bert(classifiers.METHODS["emoe"])
    with emoe.record_routing(model) as record:
        record.set_labels(torch.zeros(0, dtype=torch.int64))
        model(input_ids=torch.randint(3, 60, (4, 6)))
    assert record.layers[2].tokens == 24
    assert record.layers[2].by_label == {}


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
    assert record.summary()["drop_rate"] == pytest.approx(
        (layer.drop_rate + record.layers[2].drop_rate) / 2
    )


@pytest.mark.parametrize("window", [0, -2, 1.5])
def test_a_window_that_no_pass_could_end_is_rejected(window: Any) -> None:
    model = converted.model("bert", layers=[1])
    message = "window is .*; it must be a whole number >= 1"
    with (
        pytest.raises(emoe.ConversionError, match=message),
        emoe.record_routing(model, window=window),
    ):
        pass
    with emoe.record_routing(model, window=1):  # nothing is left of the rejected record
        model(**tiny_models.inputs("bert"))


def test_a_mask_that_a_static_cache_prepares_gives_a_warning() -> None:
    model = tiny_models.build_generator("llama")
    emoe.convert_(model, emoe.EMoEConfig(**converted.USUAL))
    ids = torch.tensor([[0, 0, 5, 8], [3, 4, 5, 6]])
    values = {"attention_mask": (ids > 0).long(), "max_new_tokens": 3, "min_new_tokens": 3}
    tokens = {}
    for cache in ("dynamic", "static"):
        with warnings.catch_warnings(record=True) as caught, emoe.record_routing(model) as record:
            warnings.simplefilter("always")
            model.generate(ids, do_sample=False, cache_implementation=cache, **values)
        messages = {str(warning.message) for warning in caught}
        is_warned = any("padding is counted: LlamaModel" in message for message in messages)
        assert is_warned == (cache == "static")
        tokens[cache] = record.layers[0].tokens
    # the last new token of each row is not passed to the model
    assert tokens == {"dynamic": 6 + 2 * 2, "static": 8 + 2 * 2}


def test_a_capacity_counts_the_padding_of_an_unknown_mask_with_a_warning() -> None:
    model, values = converted.model("bert", capacity_factor=1.0), tiny_models.inputs("bert")
    mask = (torch.arange(11) < 6).repeat(3, 1, 11, 1)  # [rows, 1, queries, keys]
    with pytest.warns(UserWarning, match="padding is counted: BertModel got an attention_mask"):
        model(**values, attention_mask=mask)


@pytest.mark.parametrize("name", ["bert", "distilbert", "electra", "roberta", "xlm-roberta"])
def test_a_model_that_passes_its_tokens_in_chunks_is_not_recorded(name: str) -> None:
    config = tiny_models.build(name).config
    config.chunk_size_feed_forward = 4
    model = AutoModel.from_config(config)
    emoe.convert_(model, emoe.EMoEConfig(**converted.USUAL))
    num_hooks = len(model._forward_hooks)
    with pytest.raises(emoe.ConversionError, match="build it with chunk_size_feed_forward=0"):
        emoe.record_routing(model).__enter__()
    assert len(model._forward_hooks) == num_hooks


@pytest.mark.parametrize("wrapped", [False, True])
def test_each_stack_of_an_encoder_decoder_has_its_own_padding(wrapped: bool) -> None:
    model, values = converted.model("t5"), tiny_models.inputs("t5")
    if wrapped:
        model = get_peft_model(model, LoraConfig(target_modules=["q"]))
    values["attention_mask"] = (torch.arange(11) < 4).long().repeat(3, 1)
    values["decoder_attention_mask"] = (torch.arange(7) < 5).long().repeat(3, 1)
    with emoe.record_routing(model) as record:
        model(**values)
    assert [layer.tokens for layer in record.layers.values()] == [12, 12, 15, 15]


@pytest.mark.parametrize("batch_first", [True, False])
def test_padding_masks_of_torchs_own_encoder(batch_first: bool) -> None:
    layer = torch.nn.TransformerEncoderLayer(32, 4, 64, batch_first=batch_first)
    model = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    emoe.convert_(model, emoe.EMoEConfig(num_experts=8, top_k=2, layers=[0], capacity_factor=1.0))
    x, padding = (
        torch.randn(3, 9, 32),
        torch.arange(9).repeat(3, 1) >= torch.tensor([[9], [5], [4]]),
    )
    noise = torch.where(padding.unsqueeze(-1), 30 * torch.randn(3, 9, 32), 0)
    outputs = []
    for rows in (x, x + noise):
        with emoe.record_routing(model) as record:
            record.set_labels(torch.tensor([0, 1, 2]))
            y = model(rows if batch_first else rows.transpose(0, 1), src_key_padding_mask=padding)
        loads = {label: int(loads.sum()) for label, loads in record.layers[0].by_label.items()}
        assert (record.layers[0].tokens, loads) == (18, {0: 18, 1: 10, 2: 8})
        outputs.append((y if batch_first else y.transpose(0, 1))[~padding])
    torch.testing.assert_close(*outputs)  # padding takes no places
