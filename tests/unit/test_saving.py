"""Test folders and state dicts; damaged and foreign ones raise one-line errors and run no code."""

from __future__ import annotations

import copy
import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub import PyTorchModelHubMixin
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModel,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
)

import emoe
from emoe.layer import routed_layers
from tests import converted, tiny_models
from tests.classifiers import METHODS, SIZES, SOME, bert, load, logits
from tests.model_folders import assert_same, edit_json
from tests.plain_net import FFN, PlainNet, plain_net

BERT = BertForSequenceClassification


@pytest.mark.parametrize(
    "wrap", [lambda model: torch.compile(model, backend="eager"), nn.DataParallel]
)
def test_a_wrapped_model_is_saved_as_the_model_inside(wrap: Any, tmp_path: Path) -> None:
    model = bert(METHODS["emoe"])
    expected = logits(model)
    emoe.save_pretrained(wrap(model), tmp_path)
    assert torch.equal(logits(load(tmp_path)), expected)


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
    assert not (tmp_path / "never").exists()
    half_an_ffn = LoraConfig(target_modules=["query"], modules_to_save=["intermediate"])
    model = bert(emoe.EMoEConfig(**SOME, output_bias="per_expert"))
    with pytest.raises(RuntimeError, match="PEFT must train the whole FFN"):
        logits(get_peft_model(model, half_an_ffn))


def test_a_checkpoint_loads_in_another_precision(tmp_path: Path) -> None:
    emoe.save_pretrained(bert(METHODS["emoe"]), tmp_path)
    model = load(tmp_path, dtype=torch.bfloat16)
    assert next(model.parameters()).dtype == torch.bfloat16
    assert len(routed_layers(model)) == 2


def permissions(path: Path) -> int:
    """Return the permissions of a file, or of the file that a link names."""
    return stat.S_IMODE(path.stat().st_mode)


def test_new_files_have_ordinary_permissions_and_older_files_keep_theirs(tmp_path: Path) -> None:
    model = bert(METHODS["emoe"])
    folder = tmp_path / "model"
    emoe.save_pretrained(model, folder)
    ordinary = tmp_path / "ordinary"
    ordinary.touch()
    weights = folder / "model.safetensors"
    partition = folder / "emoe_partition.safetensors"
    for file in (weights, partition):
        assert permissions(file) == permissions(ordinary)

    others = folder / "adapter_model.safetensors"
    others.touch()
    elsewhere = tmp_path / "blob"
    elsewhere.touch()
    (folder / "linked.safetensors").symlink_to(elsewhere)
    (folder / "broken.safetensors").symlink_to(tmp_path / "missing")
    private = (weights, partition, others, elsewhere)
    for file in private:
        file.chmod(0o600)
    emoe.save_pretrained(model, folder)
    for file in private:
        assert permissions(file) == 0o600, file


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a converted BERT that has running gates."""
    config = emoe.EMoEConfig(num_experts=8, top_k=2, layers=[1, 3], gate_momentum=0.5)
    emoe.save_pretrained(converted.model("bert", config=config), tmp_path / "folder")
    return tmp_path / "folder"


def assert_refused(folder: Path, message: str = "", loader: Any = BertModel) -> None:
    """Assert that loading a folder raises a one-line error that names it and matches a message."""
    with pytest.raises(emoe.CheckpointError, match=message or None) as error:
        emoe.from_pretrained(loader, folder)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


def edit_tensors(path: Path, changes: dict[str, torch.Tensor | None]) -> None:
    """Replace or add tensors of a safetensors file. None removes a tensor."""
    tensors = {**load_file(path), **changes}
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, path, {"format": "pt"})


# a function that damages a folder
Change = Callable[[Path], Any]


def cut(name: str) -> Change:
    """Cut a file after 300 bytes."""

    def change(folder: Path) -> None:
        path = folder / name
        beginning = path.read_bytes()[:300]
        path.write_bytes(beginning)

    return change


def missing(name: str) -> Change:
    """Delete a file."""
    return lambda folder: (folder / name).unlink()


def with_dense_weights(folder: Path) -> None:
    """Replace the weights by those of the dense model."""
    dense_state = tiny_models.build("bert").state_dict()
    save_file(dense_state, folder / "model.safetensors", {"format": "pt"})


def settings(**changes: Any) -> Change:
    """Change keys of ``config.json``."""
    return lambda folder: edit_json(folder / "config.json", **changes)


def edited(content: Any) -> Change:
    """Replace the content of ``emoe_config.json``."""
    return lambda folder: (folder / "emoe_config.json").write_text(json.dumps(content))


def pickled(folder: Path) -> None:
    """Store the weights in torch's pickle format instead of safetensors."""
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def without_gate(folder: Path) -> None:
    """Remove the running gates from the weights."""
    weights = load_file(folder / "model.safetensors")
    gates = [name for name in weights if name.endswith("router.gate")]
    edit_tensors(folder / "model.safetensors", dict.fromkeys(gates))


EXPERTS = {"kind": "emoe", "num_experts": 8, "top_k": 2, "gate_momentum": 0.5}


def described(layers: Any, **experts: Any) -> Change:
    """Describe other experts in ``config.json``."""
    content = {"quant_method": "emoe", "experts": {**EXPERTS, **experts}, "layers": layers}
    return settings(quantization_config=content)


def pipe(name: str) -> Change:
    """Put a named pipe, on which a reader would wait for ever, in the place of a file."""

    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return change


def piped_shard(folder: Path) -> None:
    """Replace the weights by an index whose only shard is a named pipe."""
    pipe("model.safetensors")(folder)
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    index = {"metadata": {}, "weight_map": {"a": "part.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def piped_index(folder: Path) -> None:
    """Replace the weights by a named pipe in the place of an index of shards."""
    (folder / "model.safetensors").unlink()
    pipe("model.safetensors.index.json")(folder)


DAMAGES: dict[str, tuple[Change, str]] = {
    "cut settings": (cut("config.json"), r"config\.json"),
    "cut partition": (cut("emoe_partition.safetensors"), r"emoe_partition\.safetensors"),
    "cut weights": (cut("model.safetensors"), r"model\.safetensors"),
    "no gate": (without_gate, r"lacks .*router\.gate"),
    "pickled weights": (pickled, r"holds no model\.safetensors"),
    "no experts": (settings(quantization_config=None), "holds no experts"),
    "dense weights": (with_dense_weights, "lacks .*router"),
    "newer release": (described([1, 3], version=9, new=1), "newer release"),
    "huge number": (described([1, 3], num_experts=10**400), "num_experts"),
    "code": (settings(attn_implementation="kernels-community/flash-attn2"), "code from a hub"),
    "code of a part": (
        settings(text_config={"attn_implementation": {"": "org/kernel"}}),
        "code from a hub",
    ),
    "architectures": (settings(architectures=3), "not a list of names"),
    "no layers": (described([]), "not a list of layer numbers"),
    "text as a layer": (described(["3"]), "not a list of layer numbers"),
    "negative layer": (described([-1]), "not a list of layer numbers"),
    "layer that does not exist": (described([1, 9]), "layer 9"),
    "text as experts": (described([1, 3], selection=3), "selection"),
    "piped settings": (pipe("config.json"), "not a file"),
    "piped weights": (pipe("model.safetensors"), "not a file"),
    "piped partition": (pipe("emoe_partition.safetensors"), "not a file"),
    "piped tokenizer": (pipe("tokenizer.json"), "not a file"),
    "piped shard": (piped_shard, "not a file"),
    "piped index": (piped_index, "not a file"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_damaged_and_foreign_folders_are_one_line(folder: Path, case: str) -> None:
    change, message = DAMAGES[case]
    change(folder)
    assert_refused(folder, message)


PARTITION = "emoe_partition.safetensors"


@pytest.mark.parametrize("name", ["key_norms.x", "key_norms.0"])
def test_a_partition_of_other_layers_is_refused(folder: Path, name: str) -> None:
    edit_tensors(folder / PARTITION, {name: torch.ones(64)})
    assert_refused(folder, "describes other layers")


def test_a_partition_of_other_weights_is_refused(tmp_path: Path) -> None:
    model = bert(METHODS["emoe"])
    emoe.save_pretrained(model, tmp_path)
    model.bert.encoder.layer[3].intermediate.dense.weight.data += 1
    model.save_pretrained(tmp_path)
    assert_refused(
        tmp_path, "does not match the weights of .*without this file the model loads", BERT
    )
    (tmp_path / PARTITION).unlink()
    again = load(tmp_path)
    with pytest.raises(emoe.ConversionError, match=r"order.*unknown"):
        emoe.to_dense_(again, restore_order=True)


def build_net() -> nn.Module:
    """Build the plain module of the folders below."""
    return plain_net(16, 64, gated=True)


PLAIN_DAMAGES: dict[str, tuple[Change, str]] = {
    "piped settings": (pipe("emoe_config.json"), "not a file"),
    "settings without a configuration": (edited({"layers": [0]}), "is damaged: KeyError"),
    "settings without layers": (
        edited({"config": EXPERTS, "layers": []}),
        "not a list of layer numbers",
    ),
    "no partition": (missing(PARTITION), "is missing"),
    "no extra": (missing("emoe_extra.safetensors"), "lacks"),
}


@pytest.mark.parametrize("case", PLAIN_DAMAGES)
def test_damaged_folders_of_plain_modules_are_one_line(case: str, tmp_path: Path) -> None:
    net = converted.net(gate_momentum=0.5)
    emoe.save_pretrained(net, tmp_path)
    change, message = PLAIN_DAMAGES[case]
    change(tmp_path)
    assert_refused(tmp_path, message, build_net)


# tensors of a classifier whose last two of four FFNs are experts
REQUIRED = [
    "bert.encoder.layer.3.attention.self.query.weight",
    "bert.pooler.dense.bias",
    "classifier.weight",
]
both_saves = pytest.mark.parametrize("save", [emoe.save_pretrained, BertModel.save_pretrained])
methods = pytest.mark.parametrize("method", ["emoe", "gmoe", "emoe-learn"])


@methods
@both_saves
def test_tensors_that_are_missing_or_of_another_shape_are_named(
    save: Any, method: str, tmp_path: Path
) -> None:
    save(bert(METHODS[method]), tmp_path)
    file = tmp_path / "model.safetensors"
    content = file.read_bytes()
    for name in REQUIRED:
        for change in (None, torch.zeros(3, 5)):
            edit_tensors(file, {name: change})
            assert_refused(tmp_path, f"lack {name}, or", BERT)
            file.write_bytes(content)


@methods
@both_saves
def test_a_new_head_may_be_missing(save: Any, method: str, tmp_path: Path) -> None:
    """The class that wrote the folder has no classifier, and its base model no pooler."""
    model = BertForMaskedLM(BertConfig(vocab_size=60, **SIZES))
    emoe.convert_(model, METHODS[method])
    save(model, tmp_path)
    assert_same(load(tmp_path).bert.encoder.state_dict(), model.bert.encoder.state_dict())
    state = emoe.from_pretrained(AutoModel, tmp_path, add_pooling_layer=False).state_dict()
    assert_same(state, model.bert.state_dict())


class HubNet(PlainNet, PyTorchModelHubMixin):
    """A plain module with ``from_pretrained`` and ``save_pretrained``, but not of transformers."""

    def __init__(self) -> None:
        super().__init__(FFN(4, 16))


class ModuleWithConfig(nn.Module):
    """A plain module around a transformers model, whose configuration it also has."""

    def __init__(self) -> None:
        super().__init__()
        self.bert = bert(None).bert
        self.config = self.bert.config


@pytest.mark.parametrize("kind", [HubNet, ModuleWithConfig])
def test_a_plain_module_that_resembles_a_transformers_model(kind: Any, tmp_path: Path) -> None:
    emoe.register_ffn("HubNet", *emoe.architectures.REGISTRY["PlainNet"])
    net = kind()
    emoe.convert_(net, emoe.EMoEConfig(num_experts=4, top_k=2, layers=[0], gate_momentum=0.5))
    emoe.save_pretrained(net, tmp_path)
    again = emoe.from_pretrained(kind, tmp_path)
    assert_same(again.state_dict(), net.state_dict())
    assert emoe.config_of(again) == emoe.config_of(net)
    assert "library_name: pytorch" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(
    "config", [emoe.EMoEConfig(num_experts=4, top_k=2, layers=[0]), emoe.GMoEConfig(layers=[0])]
)
def test_a_plain_module_needs_all_its_tensors(config: Any, tmp_path: Path) -> None:
    def build() -> nn.Module:
        return nn.Sequential(plain_net(4, 16), nn.Linear(4, 4))

    emoe.register_ffn("Sequential", *emoe.architectures.REGISTRY["PlainNet"])
    net = build()
    emoe.convert_(net, config)
    emoe.save_pretrained(net, tmp_path)
    assert_same(emoe.from_pretrained(build, tmp_path).state_dict(), net.state_dict())
    edit_tensors(tmp_path / "model.safetensors", {"1.weight": None})
    assert_refused(tmp_path, r"lack 1\.weight", build)


def trained(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Change weights much more than fine-tuning does, and round them."""
    torch.manual_seed(1)
    changed = {}
    for name, tensor in state.items():
        if tensor.ndim == 2:
            noise = torch.randn(tensor.shape)
            tensor = tensor + 0.2 * tensor.std() * noise
        changed[name] = tensor.bfloat16()
    return changed


def assert_state_rejected(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Assert that a converted model refuses a dense state dict, and stays as it is."""
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(emoe.CheckpointError, match=r"dense.*emoe\.convert_"):
        model.load_state_dict(state)
    assert_same(model.state_dict(), before)


def test_a_dense_state_is_rejected_by_each_part_that_holds_experts() -> None:
    dense, model = bert(None), bert(METHODS["emoe"])
    paths = [
        "bert",
        "bert.encoder",
        "bert.encoder.layer",
        "bert.encoder.layer.3",
        "bert.encoder.layer.3.intermediate",
    ]
    for path in paths:
        part = model.get_submodule(path)
        dense_state = dense.get_submodule(path).state_dict()
        assert_state_rejected(part, dense_state)
        part.load_state_dict(part.state_dict())
    model.bert.embeddings.load_state_dict(dense.bert.embeddings.state_dict())


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "phi3", "VisionTransformer"])
def test_a_dense_state_dict_is_rejected_and_a_converted_one_is_not(name: str) -> None:
    model = converted.model(name)
    assert_state_rejected(model, tiny_models.build(name).state_dict())
    assert_state_rejected(model, trained(tiny_models.build(name).state_dict()))
    model.load_state_dict(trained(model.state_dict()))
    emoe.to_dense_(model, restore_order=True)


def test_sparse_models_and_adapters_are_checked_too() -> None:
    dense, model = tiny_models.build("bert"), converted.model("bert", "sparse")
    assert_state_rejected(model, dense.state_dict())
    emoe.set_backend_(model, "masked")
    adapters = LoraConfig(target_modules=["intermediate.dense"])
    adapted_model = get_peft_model(model, adapters)
    adapted_dense = get_peft_model(dense, adapters)
    assert_state_rejected(adapted_model, adapted_dense.state_dict())


def test_a_dense_state_is_named_if_the_original_order_is_unknown(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dense, model = tiny_models.build("bert"), converted.model("bert")
    model.save_pretrained(tmp_path)  # without the partition file
    loaded = tiny_models.loader("bert").from_pretrained(tmp_path)
    loaded.load_state_dict(trained(model.state_dict()))
    loaded.load_state_dict(tiny_models.build("bert", seed=1).state_dict())  # another model's
    assert not caplog.messages
    loaded.load_state_dict(model.state_dict())
    loaded.load_state_dict(dense.state_dict())
    assert len(caplog.messages) == len(routed_layers(loaded))
    assert all("another order" in message for message in caplog.messages)


@pytest.mark.parametrize("folded_part", ["", "encoder"])
def test_a_state_is_checked_once_after_a_second_conversion(
    folded_part: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = converted.model("bert")
    config = emoe.config_of(model)
    emoe.to_dense_(model.get_submodule(folded_part), restore_order=True)
    emoe.convert_(model, config)
    # after the first check the order is unknown, and a second one would warn of another order
    model.load_state_dict(converted.model("bert", partition="random").state_dict())
    assert not caplog.messages
    model.load_state_dict(tiny_models.build("bert").state_dict())
    assert len(caplog.messages) == len(routed_layers(model))


def test_a_part_is_not_folded_if_the_configuration_describes_experts_elsewhere(
    tmp_path: Path,
) -> None:
    model = converted.model("bert")
    num_layers = len(routed_layers(model))
    message = (
        f"BertLayer holds 1 of the {num_layers} FFNs with experts that its configuration describes: "
        "call to_dense_ for the whole model"
    )
    with pytest.raises(emoe.ConversionError, match=message):
        emoe.to_dense_(model.encoder.layer[0])
    # nothing has changed: it is saved and loaded with all its experts
    emoe.save_pretrained(model, tmp_path)
    loaded = tiny_models.loader("bert").from_pretrained(tmp_path)
    assert len(routed_layers(loaded)) == num_layers


LOAD_WITHOUT_EMOE = """
import sys
import torch

sys.modules["emoe"] = None  # an import raises an error
torch.load(sys.argv[1], weights_only=False)
"""


def test_a_folded_model_is_pickled_without_emoe(tmp_path: Path) -> None:
    model = emoe.to_dense_(converted.model("TransformerEncoder"))
    torch.save(model, tmp_path / "model.pt")
    command = [sys.executable, "-c", LOAD_WITHOUT_EMOE, str(tmp_path / "model.pt")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


# PyTorch numbers the hooks of a process from 0. New hooks must not get a number of an older hook.
ADD_HOOKS = """
import sys
import torch
import emoe

net, x, mask, expected, dense_state = torch.load(sys.argv[1], weights_only=False)
net.register_load_state_dict_pre_hook(lambda *_: None)
for _ in range(20):
    net.register_forward_pre_hook(lambda *_: None)
torch.testing.assert_close(net(x, attention_mask=mask), expected)
try:
    net.load_state_dict(dense_state)
except emoe.CheckpointError:
    pass
else:
    raise SystemExit("a dense state was loaded")
"""


def test_new_hooks_on_an_unpickled_model_replace_none_of_its_own(tmp_path: Path) -> None:
    net = converted.net(capacity_factor=1.0, gated=False)
    dense_state = plain_net(16, 64).state_dict()
    x = converted.inputs(12).view(3, 4, 16)
    mask = torch.ones(3, 4)
    mask[1:, 2:] = 0
    pickled_net = tmp_path / "net.pt"
    torch.save((net, x, mask, net(x, attention_mask=mask), dense_state), pickled_net)
    command = [sys.executable, "-c", ADD_HOOKS, str(pickled_net)]
    root = Path(__file__).resolve().parents[2]  # the pickled net is a class of the tests
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root)
    assert result.returncode == 0, result.stderr


def test_the_weights_of_another_model_leave_the_first_order_unknown() -> None:
    """A model is built and converted anew, and then loads trained weights from a state dict."""
    model, other = converted.model("bert"), tiny_models.build("bert", seed=1)
    emoe.convert_(other, routed_layers(model)[0].config)
    model.load_state_dict(other.state_dict())
    with pytest.raises(emoe.ConversionError, match=r"order.*unknown"):
        emoe.to_dense_(model, restore_order=True)
    emoe.to_dense_(model)


def test_a_dense_state_of_the_same_order_is_loaded() -> None:
    converted.model("bert", partition="contiguous").load_state_dict(
        tiny_models.build("bert").state_dict()
    )
