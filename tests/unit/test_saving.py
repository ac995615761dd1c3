"""What is saved, loaded or converted is the model itself, and what is none is refused before any work is done."""

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
def test_a_wrapper_of_pytorchs_is_not_saved_along(wrap: str, tmp_path: Path) -> None:
    model = bert(METHODS["emoe"])
    expected = logits(model)
    wrapped = torch.compile(model, backend="eager") if wrap == "compiled" else torch.nn.DataParallel(model)
    emoe.save_pretrained(wrapped, tmp_path)
    assert torch.equal(logits(emoe.from_pretrained(BertForSequenceClassification, tmp_path)), expected)


def test_a_model_that_is_on_disk_in_part_is_saved_again(tmp_path: Path) -> None:
    emoe.save_pretrained(bert(METHODS["emoe"]), tmp_path / "first")
    model = emoe.from_pretrained(
        BertForSequenceClassification,
        tmp_path / "first",
        device_map="auto",
        max_memory={"cpu": "60KB"},
        offload_folder=tmp_path / "disk",
    )
    assert any(parameter.is_meta for parameter in model.parameters())
    emoe.save_pretrained(model, tmp_path / "again")
    again = emoe.from_pretrained(BertForSequenceClassification, tmp_path / "again")
    torch.testing.assert_close(logits(again), logits(model))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (METHODS["gmoe"], "GMoE.*not loaded quantised"),
        (METHODS["emoe, momentum"], "gate_momentum.*not loaded quantised"),
    ],
)
def test_what_needs_its_weights_is_not_loaded_quantised(
    config: emoe.EMoEConfig | emoe.GMoEConfig, message: str, tmp_path: Path
) -> None:
    emoe.save_pretrained(bert(config), tmp_path)
    eight_bits = transformers.BitsAndBytesConfig(load_in_8bit=True)
    with pytest.raises(emoe.CheckpointError, match=message):
        emoe.from_pretrained(BertForSequenceClassification, tmp_path, quantization_config=eight_bits)


def test_a_copy_of_a_half_of_the_ffn_is_refused(tmp_path: Path) -> None:
    model = bert(emoe.EMoEConfig(**SOME, output_bias="per_expert"))
    adapted = get_peft_model(model, LoraConfig(target_modules=["query"], modules_to_save=["intermediate"]))
    with pytest.raises(RuntimeError, match="modules_to_save name the whole FFN"):
        logits(adapted)
    with pytest.raises(emoe.ConversionError, match="half of its FFN"):
        emoe.save_pretrained(adapted.merge_and_unload(), tmp_path / "never")
    assert not (tmp_path / "never").exists()


def test_what_is_no_model_or_loader_is_refused(tmp_path: Path) -> None:
    with pytest.raises(emoe.ConversionError, match="the model is 'bert'"):
        emoe.convert_("bert", METHODS["emoe"])  # type: ignore[arg-type]
    emoe.save_pretrained(bert(METHODS["emoe"]), tmp_path)
    with pytest.raises(emoe.CheckpointError, match="the loader is 'bert'"):
        emoe.from_pretrained("bert", tmp_path)
    with pytest.raises(emoe.ConfigError, match="partition_seed"):
        emoe.EMoEConfig(**SOME, partition_seed=2**70)
