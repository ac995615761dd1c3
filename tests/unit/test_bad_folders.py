"""Damaged, foreign and unfinished folders of converted models are refused in one line that names the file."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import emoe
from tests import tiny_models
from tests.plain_net import plain_net

CONFIG = emoe.EMoEConfig(num_experts=8, top_k=2, layers=[1, 3])


@pytest.fixture
def folder(tmp_path):
    model = tiny_models.build("bert")
    emoe.convert_(model, emoe.EMoEConfig(num_experts=8, top_k=2, layers=[1, 3], gate_momentum=0.5))
    emoe.save_pretrained(model, tmp_path)
    return tmp_path


def load(folder) -> nn.Module:
    return emoe.from_pretrained(type(tiny_models.build("bert")), folder)


def test_a_folder_without_settings_is_none_of_ours(folder) -> None:
    (folder / "emoe_config.json").unlink()
    with pytest.raises(emoe.CheckpointError, match="not a folder that"):
        load(folder)


@pytest.mark.parametrize(
    "name", ["emoe_config.json", "emoe_partition.safetensors", "emoe_extra.safetensors", "model.safetensors"]
)
@pytest.mark.parametrize("keep", [0, 0.3, 0.9])
def test_truncated_files_are_named(folder, name: str, keep: float) -> None:
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(emoe.CheckpointError, match=name.replace(".", r"\.")):
        load(folder)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("emoe_partition", {"permutation.3": None}, r"has no permutation of encoder\.layer\.3's 64 neurons"),
        ("emoe_partition", {"permutation.3": torch.zeros(64, dtype=torch.int64)}, "has no permutation"),
        ("emoe_partition", {"permutation.3": torch.arange(32)}, "has no permutation"),
        ("emoe_partition", {"key_norms.1": None}, r"in the layers \[1, 3\], but .* in the layers \[3\]"),
        ("emoe_partition", {"key_norms.1": torch.ones(64)}, "does not match the weights"),
        ("emoe_partition", {"key_norms.1": torch.ones(())}, "'key_norms.1' is no list of one number a neuron"),
        ("emoe_partition", {"key_norms.1": torch.ones(0)}, "'key_norms.1' is no list of one number a neuron"),
        ("emoe_partition", {"key_norms.1": torch.ones(64).bool()}, "'key_norms.1' is no list"),
        ("emoe_partition", {"permutation.1": torch.ones(64) * 1j}, "'permutation.1' is no list"),
        ("emoe_partition", {"num_experts": torch.ones(2)}, "'num_experts' is no whole number"),
        ("emoe_partition", {"num_experts": torch.tensor(float("nan"))}, "'num_experts' is no whole number"),
        ("emoe_extra", {"1.routing.router.gate": None}, r"does not hold '1\.routing\.\*'"),
        ("emoe_extra", {"1.routing.router.gate": torch.ones(4, 32)}, r"does not hold '1\.routing\.\*'"),
    ],
)
def test_sidecars_that_do_not_fit_are_named(folder, file: str, change: dict, message: str) -> None:
    path = folder / f"{file}.safetensors"
    tensors = load_file(path)
    for key, value in change.items():
        tensors.pop(key) if value is None else tensors.__setitem__(key, value)
    save_file(tensors, path)
    with pytest.raises(emoe.CheckpointError, match=message):
        load(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"layers": []}, r"names 8 experts in the layers \[\], but .* in the layers \[1, 3\]"),
        ({"layers": [1]}, r"in the layers \[1\], but"),
        ({"layers": [1, 1, 3]}, r"in the layers \[1, 1, 3\], but"),
        ({"layers": ["x"]}, "is damaged"),
        ({"layers": "13"}, "'layers' is no list of layer numbers"),
        ({"ffns": "4"}, "'ffns' is no number"),
        ({"layers": [1.0, 3.0]}, "'layers' is no list of layer numbers"),
        ({"layers": [True, 3]}, "'layers' is no list of layer numbers"),
        ({"config": {"kind": {}}}, "kind is {}"),
        ({"config": {"kind": "emoe", "num_experts": 10**400, "top_k": 2}}, "names 1000"),
        ({"config": {"kind": "emoe", "num_experts": 8, "top_k": "x" * 5000}}, "top_k is 'xxxx"),
        ({"config": None}, "is damaged: .*no object"),
        ({"config": {"kind": "emoe", "num_experts": 4, "top_k": 2}}, r"names 4 experts .* is of 8 experts"),
        ({"config": {"kind": "emoe", "num_experts": 8, "top_k": 2, "top_q": 3}}, "did you mean 'top_k'"),
        ({"config": {"kind": "emoe", "num_experts": 8, "top_k": 2, "version": 2}}, "version is 2.*newer release"),
        ({"config": {"kind": "emoe", "num_experts": 8, "top_k": 2, "version": 9, "new": 1}}, "newer release"),
    ],
)
def test_settings_that_are_not_those_of_the_partition(folder, content: dict, message: str) -> None:
    text = json.loads((folder / "emoe_config.json").read_text())
    (folder / "emoe_config.json").write_text(json.dumps({**text, **content}))
    with pytest.raises(emoe.CheckpointError, match=message) as caught:
        load(folder)
    assert "emoe_config.json" in str(caught.value)


@pytest.mark.parametrize("name", ["config.json", "emoe_config.json"])
@pytest.mark.parametrize("text", ["[" * 100_000, "3", "null", '{"a": ' + "9" * 5000 + "}", "\x00", "{", ""])
def test_odd_json_is_one_line_that_names_the_file(folder, name: str, text: str) -> None:
    (folder / name).write_text(text)
    with pytest.raises(emoe.CheckpointError, match=rf"^[^\n]*{name}[^\n]*is damaged[^\n]*$"):
        load(folder)


@pytest.mark.parametrize("name", ["config.json", "emoe_config.json", "emoe_partition.safetensors", "model.safetensors"])
def test_a_folder_in_the_place_of_a_file_is_named(folder, name: str) -> None:
    (folder / name).unlink()
    (folder / name).mkdir()
    with pytest.raises(emoe.CheckpointError, match=rf"^[^\n]*{name}[^\n]*is damaged[^\n]*$"):
        load(folder)


def test_weights_that_lack_a_part_of_a_layer_are_refused(folder) -> None:
    state = load_file(folder / "model.safetensors")
    name = "encoder.layer.0.attention.self.query.weight"
    save_file(
        {key: tensor for key, tensor in state.items() if key != name}, folder / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(emoe.CheckpointError, match=r"lacks encoder\.layer\.0\.attention\.self\.query\.weight"):
        load(folder)


def test_calibration_of_modes_and_of_partitions_that_read_none() -> None:
    net = plain_net(4, 16, layers=2).train()
    net.layers[1].eval()
    config = emoe.EMoEConfig(num_experts=4, top_k=2, layers=[0], partition="coactivation")
    emoe.partition(net, config, calibration=[torch.randn(9, 4)])
    assert [layer.training for layer in net.layers] == [True, False]
    with pytest.raises(emoe.ConversionError, match="'kmeans' reads no calibration"):
        emoe.convert_(net, emoe.EMoEConfig(num_experts=4, top_k=2, layers=[0]), calibration=[torch.randn(9, 4)])


def test_pickled_weights_are_never_read(folder) -> None:
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    with pytest.raises(emoe.CheckpointError, match=r"holds no model\.safetensors"):
        load(folder)


def test_a_plain_module_is_saved_and_loaded_by_what_builds_it(tmp_path) -> None:
    net, x = plain_net(4, 16), torch.randn(5, 4)
    emoe.convert_(net, emoe.EMoEConfig(num_experts=4, top_k=2, layers=[0], output_bias="per_expert"))
    emoe.save_pretrained(net, tmp_path)
    again = emoe.from_pretrained(plain_net, tmp_path, hidden=4, width=16, seed=5)
    torch.testing.assert_close(again(x), net(x))
    with pytest.raises(emoe.CheckpointError, match="are not those of this model"):
        emoe.from_pretrained(plain_net, tmp_path, hidden=4, width=8)


def test_saving_again_without_extra_state_leaves_none_behind(folder) -> None:
    model = emoe.to_dense_(load(folder))
    emoe.convert_(model, CONFIG)
    emoe.save_pretrained(model, folder)
    assert not (folder / "emoe_extra.safetensors").exists()
    copy.deepcopy(load(folder))
