"""Damaged, incomplete and foreign folders of converted models raise one line. Nothing in a folder runs code."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, BertConfig, BertForMaskedLM, BertForSequenceClassification, BertModel

import emoe
from tests import tiny_models
from tests.classifiers import METHODS, SIZES, bert
from tests.model_folders import assert_same, edit_json
from tests.plain_net import plain_net

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
@pytest.mark.parametrize("damage", ["empty", "cut", "folder", "pipe"])
def test_damaged_files_are_named(folder: Path, name: str, damage: str) -> None:
    content = (folder / name).read_bytes()
    (folder / name).unlink()
    if damage == "pipe":
        os.mkfifo(folder / name)
    elif damage == "folder":
        (folder / name).mkdir()
    else:
        (folder / name).write_bytes(content[: len(content) // 2] if damage == "cut" else b"")
    assert_refused(folder, name.replace(".", r"\."))


@pytest.mark.parametrize("text", ["[" * 100_000, "3", "null", '{"a": ' + "9" * 5000 + "}", "\x00", "{"])
def test_json_that_is_not_an_object_is_named(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    assert_refused(folder, r"config\.json is damaged")


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("partition", {"permutation.3": None}, r"no permutation of encoder\.layer\.3's 64 neurons"),
        ("partition", {"permutation.3": torch.zeros(64, dtype=torch.int64)}, "no permutation"),
        ("partition", {"permutation.3": torch.arange(32)}, "no permutation"),
        ("partition", {"key_norms.1": None}, r"8 experts in the layers 3, but the configuration 8 .* layers 1, 3"),
        ("partition", {"num_experts": torch.ones(2)}, r"describes \[1.0, 1.0\] experts"),
        ("partition", {"key_norms.1": torch.ones(64)}, "does not match the weights"),
        ("partition", {"key_norms.1": torch.ones(())}, "does not match the weights"),
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
        ({"layers": []}, "'layers' is not an ascending list"),
        ({"layers": [3, 1]}, "'layers' is not an ascending list"),
        ({"layers": [-1, 3]}, "'layers' is not an ascending list"),
        ({"layers": [1]}, r"in the layers 1, 3, but the configuration 8 experts in the layers 1$"),
        ({"layers": list(range(100_000))}, "and 99997 more"),
        ({"layers": "13"}, "damaged"),
        ({"ffns": 2}, "the model has 4 FFNs, but the experts are numbered among 2"),
        ({"config": None}, "damaged"),
        ({"config": {"kind": {}}}, "kind is {}"),
        ({"config": {"kind": "emoe", "num_experts": 8, "top_k": "x" * 5000}}, "top_k is 'xxxx"),
        ({"config": {"kind": "emoe", "num_experts": 4, "top_k": 2}}, "describes 8 experts"),
        ({"config": {"kind": "emoe", "num_experts": 8, "top_k": 2, "top_q": 3}}, "did you mean 'top_k'"),
        ({"config": {"kind": "emoe", "num_experts": 8, "top_k": 2, "version": 9, "new": 1}}, "newer release"),
    ],
)
@pytest.mark.parametrize("library", ["transformers", "none"])
def test_marks_that_do_not_fit_are_named(folder: Path, library: str, mark: Any, message: str) -> None:
    content = {**MARK, **mark} if isinstance(mark, dict) else mark
    if library == "transformers":
        edit_json(folder / "config.json", emoe=content)
    else:  # a folder without a mark in config.json
        (folder / "config.json").unlink()
        (folder / "emoe_config.json").write_text(json.dumps(content))
    if library == "transformers" or "ffns" not in str(mark):
        assert_refused(folder, message, BertModel if library == "transformers" else lambda: tiny_models.build("bert"))


def test_a_dense_folder_and_pickled_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    tiny_models.build("bert").save_pretrained(tmp_path / "dense")
    assert_refused(tmp_path / "dense", "holds no experts")
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    assert_refused(folder, r"holds no model\.safetensors")


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation_internal", "vision_config"])
def test_attention_from_a_hub_is_not_reached(folder: Path, key: str) -> None:
    value: Any = "kernels-community/flash-attn2"
    edit_json(folder / "config.json", **{key: {"attn_implementation": value} if key == "vision_config" else value})
    assert_refused(folder, "code from a hub")


@pytest.mark.parametrize(
    "changes", [{"hidden_size": 0}, {"num_attention_heads": 0}, {"hidden_size": "x"}, {"vocab_size": -1}]
)
def test_sizes_that_no_model_has_are_one_line(folder: Path, changes: dict[str, Any]) -> None:
    edit_json(folder / "config.json", **changes)
    assert_refused(folder)


def test_folders_of_older_releases_load(folder: Path) -> None:
    expected = emoe.from_pretrained(BertModel, folder).state_dict()
    for name in ("config.json", "emoe_config.json"):
        content = json.loads((folder / name).read_text())
        config = content["emoe"]["config"] if name == "config.json" else content["config"]
        config |= {"backend": "auto", "decode_cache": True, "score_threshold": None, "normalize_gate": False}
        (folder / name).write_text(json.dumps(content))
    assert_same(emoe.from_pretrained(BertModel, folder).state_dict(), expected)


def emoe_save(model: Any, folder: Path) -> None:
    emoe.save_pretrained(model, folder)


def library_save(model: Any, folder: Path) -> None:
    model.save_pretrained(folder)


# tensors of a classifier whose last two of four FFNs are experts
REQUIRED = [
    "bert.embeddings.word_embeddings.weight",
    "bert.encoder.layer.3.attention.self.query.weight",
    "bert.encoder.layer.0.output.dense.weight",
    "bert.pooler.dense.bias",
    "classifier.weight",
]


@pytest.mark.parametrize("name", REQUIRED)
@pytest.mark.parametrize("is_missing", [True, False])
@pytest.mark.parametrize("method", ["emoe", "gmoe", "emoe-learn"])
@pytest.mark.parametrize("save", [emoe_save, library_save])
def test_tensors_that_are_missing_or_of_another_shape_are_named(
    save: Callable[..., None], method: str, is_missing: bool, name: str, tmp_path: Path
) -> None:
    save(bert(METHODS[method]), tmp_path)
    edit_tensors(tmp_path / "model.safetensors", {name: None if is_missing else torch.zeros(3, 5)})
    for _ in range(2):
        assert_refused(tmp_path, f"lack {name}, or", BertForSequenceClassification)


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


def test_another_number_of_labels_is_the_users_choice(tmp_path: Path) -> None:
    model = bert(METHODS["gmoe"])
    emoe.save_pretrained(model, tmp_path)
    options = {"num_labels": 5, "ignore_mismatched_sizes": True}
    again: Any = emoe.from_pretrained(BertForSequenceClassification, tmp_path, **options)
    assert again.classifier.weight.shape == (5, 32)
    assert_same(again.bert.state_dict(), model.bert.state_dict())


def test_weights_of_another_architecture_are_refused(folder: Path) -> None:
    edit_json(folder / "config.json", model_type="llama", num_key_value_heads=4)
    assert_refused(folder, "", type(tiny_models.build("llama")))


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
