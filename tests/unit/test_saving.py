"""Save and load converted models; damaged, incomplete and foreign folders raise one line and run no code."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, BertConfig, BertForMaskedLM, BertForSequenceClassification, BertModel

import emoe
from tests import tiny_models
from tests.classifiers import METHODS, SIZES, SOME, bert, logits
from tests.model_folders import assert_same, edit_json
from tests.plain_net import plain_net


@pytest.mark.parametrize("wrap", ["compiled", "parallel"])
def test_a_wrapped_model_is_saved_as_the_model_inside(wrap: str, tmp_path: Path) -> None:
    model = bert(METHODS["emoe"])
    expected = logits(model)
    wrapped = torch.compile(model, backend="eager") if wrap == "compiled" else torch.nn.DataParallel(model)
    emoe.save_pretrained(wrapped, tmp_path)
    assert torch.equal(logits(emoe.from_pretrained(BertForSequenceClassification, tmp_path)), expected)


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


CONFIG = emoe.EMoEConfig(num_experts=8, top_k=2, layers=[1, 3], gate_momentum=0.5)
MARK = {"config": {"kind": "emoe", "num_experts": 8, "top_k": 2, "gate_momentum": 0.5}, "layers": [1, 3], "ffns": 4}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = tiny_models.build("bert")
    emoe.convert_(model, CONFIG)
    emoe.save_pretrained(model, tmp_path / "folder")
    return tmp_path / "folder"


def assert_refused(folder: Path, message: str = "", loader: Any = BertModel) -> None:
    with pytest.raises(emoe.CheckpointError, match=message or None) as caught:
        emoe.from_pretrained(loader, folder)
    text = str(caught.value)
    assert str(folder) in text
    assert "\n" not in text
    assert len(text) < 600


def edit_tensors(path: Path, changes: dict[str, torch.Tensor | None]) -> None:
    tensors = {**load_file(path), **changes}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path, {"format": "pt"})


FILES = ["config.json", "emoe_partition.safetensors", "emoe_extra.safetensors", "model.safetensors"]


@pytest.mark.parametrize("name", FILES)
def test_files_that_are_cut_or_missing_are_named(folder: Path, name: str) -> None:
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])
    assert_refused(folder, name.replace(".", r"\."))
    if name != "config.json":  # whose mark is in emoe_config.json too
        (folder / name).unlink()
        assert_refused(folder, "lacks|exist|holds no")


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("partition", {"permutation.3": None}, r"no permutation of encoder\.layer\.3's 64 neurons"),
        ("partition", {"permutation.3": torch.zeros(64, dtype=torch.int64)}, "no permutation"),
        ("partition", {"key_norms.1": None}, r"8 experts in the layers 3, but the configuration 8 .* layers 1, 3"),
        ("partition", {"key_norms.1": torch.ones(64)}, "does not match the weights"),
        (
            "extra",
            {"1.routing.router.gate": None},
            "lacks encoder.layer.1.intermediate.intermediate_act_fn.router.gate",
        ),
        ("extra", {"1.routing.router.gate": torch.ones(4, 32)}, "does not fit"),
    ],
)
def test_small_files_that_do_not_fit_the_weights_are_named(
    folder: Path, file: str, change: dict[str, Any], message: str
) -> None:
    edit_tensors(folder / f"emoe_{file}.safetensors", change)
    assert_refused(folder, message)


@pytest.mark.parametrize(
    ("mark", "message"),
    [
        (3, "damaged"),
        ({"layers": [3, 1]}, "'layers' is not an ascending list"),
        ({"layers": [1]}, r"in the layers 1, 3, but the configuration 8 experts in the layers 1$"),
        ({"ffns": 2}, "the model has 4 FFNs, but the experts are numbered among 2"),
        ({"config": {"kind": "emoe", "num_experts": 4, "top_k": 2}}, "describes 8 experts"),
        ({"config": {"kind": "emoe", "num_experts": 8, "top_k": 2, "top_q": 3}}, "did you mean 'top_k'"),
        ({"config": {"kind": "emoe", "num_experts": 8, "top_k": 2, "version": 9, "new": 1}}, "newer release"),
    ],
)
def test_marks_that_do_not_fit_are_named(folder: Path, mark: Any, message: str) -> None:
    content = {**MARK, **mark} if isinstance(mark, dict) else mark
    edit_json(folder / "config.json", emoe=content)
    assert_refused(folder, message)
    if "ffns" not in str(mark):  # a folder without a mark in config.json
        (folder / "config.json").unlink()
        (folder / "emoe_config.json").write_text(json.dumps(content))
        assert_refused(folder, message, lambda: tiny_models.build("bert"))


def test_a_dense_folder_and_pickled_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    tiny_models.build("bert").save_pretrained(tmp_path / "dense")
    assert_refused(tmp_path / "dense", "holds no experts")
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    assert_refused(folder, r"holds no model\.safetensors")


@pytest.mark.parametrize(
    ("changes", "message", "loader"),
    [
        ({"attn_implementation": "kernels-community/flash-attn2"}, "code from a hub", "bert"),
        ({"vision_config": {"attn_implementation": "org/kernel"}}, "code from a hub", "bert"),
        ({"hidden_size": 0}, "", "bert"),
        ({"hidden_size": "x"}, "", "bert"),
        ({"model_type": "llama", "num_key_value_heads": 4}, "", "llama"),
    ],
)
def test_configurations_of_other_models_and_of_code_are_refused(
    folder: Path, changes: dict[str, Any], message: str, loader: str
) -> None:
    edit_json(folder / "config.json", **changes)
    assert_refused(folder, message, tiny_models.loader(loader))


def emoe_save(model: Any, folder: Path) -> None:
    emoe.save_pretrained(model, folder)


def library_save(model: Any, folder: Path) -> None:
    model.save_pretrained(folder)


# tensors of a classifier whose last two of four FFNs are experts
REQUIRED = ["bert.encoder.layer.3.attention.self.query.weight", "bert.pooler.dense.bias", "classifier.weight"]


@pytest.mark.parametrize("method", ["emoe", "gmoe", "emoe-learn"])
@pytest.mark.parametrize("save", [emoe_save, library_save])
def test_tensors_that_are_missing_or_of_another_shape_are_named(
    save: Callable[..., None], method: str, tmp_path: Path
) -> None:
    save(bert(METHODS[method]), tmp_path)
    file = tmp_path / "model.safetensors"
    content = file.read_bytes()
    for name in REQUIRED:
        for change in (None, torch.zeros(3, 5)):
            edit_tensors(file, {name: change})
            assert_refused(tmp_path, f"lack {name}, or", BertForSequenceClassification)
            file.write_bytes(content)


@pytest.mark.parametrize("method", ["emoe", "gmoe", "emoe-learn"])
@pytest.mark.parametrize("save", [emoe_save, library_save])
def test_a_new_head_may_be_missing(
    save: Callable[..., None], method: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The class that wrote the folder has no classifier, and its base model no pooler."""
    model = BertForMaskedLM(BertConfig(vocab_size=60, **SIZES))
    emoe.convert_(model, METHODS[method])
    save(model, tmp_path)
    again: Any = emoe.from_pretrained(BertForSequenceClassification, tmp_path)
    assert_same(again.bert.encoder.state_dict(), model.bert.encoder.state_dict())
    if method == "gmoe":
        assert "bert.pooler.dense.bias" in caplog.text
    state = emoe.from_pretrained(AutoModel, tmp_path, add_pooling_layer=False).state_dict()
    assert_same(state, model.bert.state_dict())
    edit_json(tmp_path / "config.json", architectures=["MyOwnClass"])  # its tensors are unknown
    assert_refused(tmp_path, "bert.pooler.dense", BertForSequenceClassification)


@pytest.mark.parametrize("config", [emoe.EMoEConfig(num_experts=4, top_k=2, layers=[0]), emoe.GMoEConfig(layers=[0])])
def test_a_plain_module_needs_all_its_tensors(config: Any, tmp_path: Path) -> None:
    def build(width: int = 16) -> nn.Module:
        return nn.Sequential(plain_net(4, width), nn.Linear(4, 4))

    emoe.register_ffn("Sequential", *emoe.architectures.registered_ffns()["PlainNet"])
    net = build()
    emoe.convert_(net, config)
    emoe.save_pretrained(net, tmp_path)
    assert_same(emoe.from_pretrained(build, tmp_path).state_dict(), net.state_dict())
    if isinstance(config, emoe.EMoEConfig):
        with pytest.raises(emoe.CheckpointError, match="not this model's"):
            emoe.from_pretrained(build, tmp_path, width=8)
    edit_tensors(tmp_path / "model.safetensors", {"1.weight": None})
    assert_refused(tmp_path, r"lack 1\.weight", build)
