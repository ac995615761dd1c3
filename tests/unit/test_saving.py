"""Save and load converted models; damaged, incomplete and foreign folders raise one line and run no code."""

from __future__ import annotations

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
from tests import converted, tiny_models
from tests.classifiers import METHODS, SIZES, SOME, bert, load, logits
from tests.model_folders import assert_same, edit_json
from tests.plain_net import plain_net

BERT = BertForSequenceClassification


@pytest.mark.parametrize("wrap", [lambda model: torch.compile(model, backend="eager"), nn.DataParallel])
def test_a_wrapped_model_is_saved_as_the_model_inside(wrap: Any, tmp_path: Path) -> None:
    model = bert(METHODS["emoe"])
    expected = logits(model)
    emoe.save_pretrained(wrap(model), tmp_path)
    assert torch.equal(logits(load(tmp_path)), expected)


def test_a_partly_offloaded_model_is_loaded_and_saved(tmp_path: Path) -> None:
    emoe.save_pretrained(bert(METHODS["emoe"]), tmp_path / "first")
    options = {"device_map": "auto", "max_memory": {"cpu": "60KB"}, "offload_folder": tmp_path / "disk"}
    model = load(tmp_path / "first", **options)
    assert any(parameter.is_meta for parameter in model.parameters())
    emoe.save_pretrained(model, tmp_path / "again")
    torch.testing.assert_close(logits(load(tmp_path / "again")), logits(model))
    emoe.save_pretrained(bert(METHODS["emoe-learn"]), tmp_path / "learned")
    with pytest.raises(emoe.CheckpointError, match="device_map offloads"):
        load(tmp_path / "learned", **options)


@pytest.mark.parametrize("method", ["gmoe", "emoe, momentum"])
def test_experts_that_need_their_weights_are_not_quantised(method: str, tmp_path: Path) -> None:
    emoe.save_pretrained(bert(METHODS[method]), tmp_path)
    eight_bits = transformers.BitsAndBytesConfig(load_in_8bit=True)
    with pytest.raises(emoe.CheckpointError, match="cannot be loaded quantised"):
        load(tmp_path, quantization_config=eight_bits)


def test_adapters_are_merged_before_saving_and_do_not_copy_half_an_ffn(tmp_path: Path) -> None:
    adapted = get_peft_model(bert(METHODS["emoe"]), LoraConfig(target_modules=["query"]))
    with pytest.raises(emoe.ConversionError, match="merge_and_unload"):
        emoe.save_pretrained(adapted, tmp_path / "never")
    model = bert(emoe.EMoEConfig(**SOME, output_bias="per_expert"))
    adapted = get_peft_model(model, LoraConfig(target_modules=["query"], modules_to_save=["intermediate"]))
    with pytest.raises(RuntimeError, match="PEFT must train the whole FFN"):
        logits(adapted)
    with pytest.raises(emoe.ConversionError, match="half of the FFN"):
        emoe.save_pretrained(adapted.merge_and_unload(), tmp_path / "never")
    assert not (tmp_path / "never").exists()


# ---------------------------------------------------------------- damaged and foreign folders


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = emoe.EMoEConfig(num_experts=8, top_k=2, layers=[1, 3], gate_momentum=0.5)
    emoe.save_pretrained(converted.model("bert", config=config), tmp_path / "folder")
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


Change = Callable[[Path], Any]


def cut(name: str) -> Change:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:300])


def missing(name: str) -> Change:
    return lambda folder: (folder / name).unlink()


def tensors(file: str, name: str, value: torch.Tensor | None = None) -> Change:
    return lambda folder: edit_tensors(folder / f"emoe_{file}.safetensors", {name: value})


def settings(**changes: Any) -> Change:
    return lambda folder: edit_json(folder / "config.json", **changes)


def mark(**changes: Any) -> Change:
    config = {"kind": "emoe", "num_experts": 8, "top_k": 2, "gate_momentum": 0.5, **changes.pop("config", {})}
    return settings(emoe={"config": config, "layers": [1, 3], "ffns": 4, **changes})


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    missing("model.safetensors")(folder)


def without_mark(folder: Path) -> None:
    missing("config.json")(folder)
    missing("emoe_config.json")(folder)


DAMAGES: dict[str, tuple[Change, str]] = {
    "cut settings": (cut("config.json"), r"config\.json"),
    "cut partition": (cut("emoe_partition.safetensors"), r"emoe_partition\.safetensors"),
    "cut weights": (cut("model.safetensors"), r"model\.safetensors"),
    "no partition": (missing("emoe_partition.safetensors"), "does not exist"),
    "no extra": (missing("emoe_extra.safetensors"), "lacks"),
    "no weights": (missing("model.safetensors"), r"holds no model\.safetensors"),
    "pickled weights": (pickled, r"holds no model\.safetensors"),
    "no experts": (without_mark, "holds no experts"),
    "no permutation": (tensors("partition", "permutation.3"), r"no permutation of encoder\.layer\.3's 64 neurons"),
    "no norms": (tensors("partition", "key_norms.1"), "8 experts in the layers 3, but the configuration 8"),
    "other weights": (tensors("partition", "key_norms.1", torch.ones(64)), "does not match the weights"),
    "no gate": (tensors("extra", "1.routing.router.gate"), r"lacks encoder\.layer\.1.*router\.gate"),
    "other gate": (tensors("extra", "1.routing.router.gate", torch.ones(4, 32)), "does not fit"),
    "mark is no object": (settings(emoe=3), "damaged"),
    "layers descend": (mark(layers=[3, 1]), "'layers' is not an ascending list"),
    "other layers": (mark(layers=[1]), r"in the layers 1, 3, but the configuration 8 experts in the layers 1$"),
    "a part of the model": (mark(ffns=2), "the model has 4 FFNs, but the experts are numbered among 2"),
    "other experts": (mark(config={"num_experts": 4}), "describes 8 experts"),
    "newer release": (mark(config={"version": 9, "new": 1}), "newer release"),
    "code": (settings(attn_implementation="kernels-community/flash-attn2"), "code from a hub"),
    "code inside": (settings(vision_config={"attn_implementation": "org/kernel"}), "code from a hub"),
    "no object": (lambda folder: (folder / "config.json").write_text("3"), r"config\.json is damaged"),
    "no number": (settings(hidden_size="x"), ""),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_damaged_and_foreign_folders_are_one_line(folder: Path, case: str) -> None:
    change, message = DAMAGES[case]
    change(folder)
    assert_refused(folder, message)


def test_folders_without_a_mark_beside_the_weights_use_the_small_file(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "emoe_config.json").write_text('{"config": {}, "layers": [1]}')
    assert_refused(folder, r"emoe_config\.json: kind", lambda: tiny_models.build("bert"))


SAVES = [emoe.save_pretrained, BertModel.save_pretrained]
# tensors of a classifier whose last two of four FFNs are experts
REQUIRED = ["bert.encoder.layer.3.attention.self.query.weight", "bert.pooler.dense.bias", "classifier.weight"]


@pytest.mark.parametrize("method", ["emoe", "gmoe", "emoe-learn"])
@pytest.mark.parametrize("save", SAVES)
def test_tensors_that_are_missing_or_of_another_shape_are_named(
    save: Callable[..., None], method: str, tmp_path: Path
) -> None:
    save(bert(METHODS[method]), tmp_path)
    file = tmp_path / "model.safetensors"
    content = file.read_bytes()
    for name in REQUIRED:
        for change in (None, torch.zeros(3, 5)):
            edit_tensors(file, {name: change})
            assert_refused(tmp_path, f"lack {name}, or", BERT)
            file.write_bytes(content)


@pytest.mark.parametrize("method", ["emoe", "gmoe", "emoe-learn"])
@pytest.mark.parametrize("save", SAVES)
def test_a_new_head_may_be_missing(
    save: Callable[..., None], method: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The class that wrote the folder has no classifier, and its base model no pooler."""
    model = BertForMaskedLM(BertConfig(vocab_size=60, **SIZES))
    emoe.convert_(model, METHODS[method])
    save(model, tmp_path)
    again = load(tmp_path)
    assert_same(again.bert.encoder.state_dict(), model.bert.encoder.state_dict())
    if method == "gmoe":
        assert "bert.pooler.dense.bias" in caplog.text
    state = emoe.from_pretrained(AutoModel, tmp_path, add_pooling_layer=False).state_dict()
    assert_same(state, model.bert.state_dict())
    edit_json(tmp_path / "config.json", architectures=["MyOwnClass"])  # its tensors are unknown
    assert_refused(tmp_path, "bert.pooler.dense", BERT)


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
