"""Wrappers, offloaded models, adapters and quantisation around saving and loading."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import BertForSequenceClassification

import emoe
from tests.classifiers import METHODS, SOME, bert, logits


@pytest.mark.parametrize("wrap", ["compiled", "parallel"])
def test_a_wrapped_model_is_saved_as_the_model_inside(wrap: str, tmp_path: Path) -> None:
    model = bert(METHODS["emoe"])
    expected = logits(model)
    wrapped = torch.compile(model, backend="eager") if wrap == "compiled" else torch.nn.DataParallel(model)
    emoe.save_pretrained(wrapped, tmp_path)
    assert torch.equal(logits(emoe.from_pretrained(BertForSequenceClassification, tmp_path)), expected)


@pytest.mark.parametrize("method", METHODS)
def test_the_backend_is_not_saved(method: str, tmp_path: Path) -> None:
    model = bert(METHODS[method])
    emoe.save_pretrained(model, tmp_path / "masked")
    emoe.set_backend_(model, "sparse")
    emoe.save_pretrained(model, tmp_path / "sparse")
    for path in (tmp_path / "masked").iterdir():
        assert path.read_bytes() == (tmp_path / "sparse" / path.name).read_bytes()


OFFLOADED = {"device_map": "auto", "max_memory": {"cpu": "60KB"}}


def test_a_partly_offloaded_model_is_loaded_and_saved(tmp_path: Path) -> None:
    emoe.save_pretrained(bert(METHODS["emoe"]), tmp_path / "first")
    options = {**OFFLOADED, "offload_folder": tmp_path / "disk"}
    model = emoe.from_pretrained(BertForSequenceClassification, tmp_path / "first", **options)
    assert any(parameter.is_meta for parameter in model.parameters())
    emoe.save_pretrained(model, tmp_path / "again")
    again = emoe.from_pretrained(BertForSequenceClassification, tmp_path / "again")
    torch.testing.assert_close(logits(again), logits(model))
    emoe.save_pretrained(bert(METHODS["emoe-learn"]), tmp_path / "learned")
    with pytest.raises(emoe.CheckpointError, match="device_map offloads"):
        emoe.from_pretrained(BertForSequenceClassification, tmp_path / "learned", **options)


@pytest.mark.parametrize("method", ["gmoe", "emoe, momentum"])
def test_experts_that_need_their_weights_are_not_quantised(method: str, tmp_path: Path) -> None:
    emoe.save_pretrained(bert(METHODS[method]), tmp_path)
    eight_bits = transformers.BitsAndBytesConfig(load_in_8bit=True)
    with pytest.raises(emoe.CheckpointError, match="cannot be loaded quantised"):
        emoe.from_pretrained(BertForSequenceClassification, tmp_path, quantization_config=eight_bits)


def test_adapters_are_merged_before_saving(tmp_path: Path) -> None:
    adapted = get_peft_model(bert(METHODS["emoe"]), LoraConfig(target_modules=["query"]))
    with pytest.raises(emoe.ConversionError, match="merge_and_unload"):
        emoe.save_pretrained(adapted, tmp_path / "never")
    with pytest.raises(emoe.ConversionError, match="no routed FFN"):
        emoe.save_pretrained(bert(None), tmp_path / "never")
    assert not (tmp_path / "never").exists()


def test_a_copy_of_half_an_ffn_is_refused(tmp_path: Path) -> None:
    model = bert(emoe.EMoEConfig(**SOME, output_bias="per_expert"))
    adapted = get_peft_model(model, LoraConfig(target_modules=["query"], modules_to_save=["intermediate"]))
    with pytest.raises(RuntimeError, match="PEFT must train the whole FFN"):
        logits(adapted)
    with pytest.raises(emoe.ConversionError, match="half of the FFN"):
        emoe.save_pretrained(adapted.merge_and_unload(), tmp_path / "never")
    assert not (tmp_path / "never").exists()


def test_arguments_that_are_not_a_model_or_a_loader_are_refused(tmp_path: Path) -> None:
    with pytest.raises(emoe.ConversionError, match="the model is 'bert'"):
        emoe.convert_("bert", METHODS["emoe"])  # type: ignore[arg-type]
    with pytest.raises(emoe.CheckpointError, match="the loader is 'bert'"):
        emoe.from_pretrained("bert", tmp_path)
