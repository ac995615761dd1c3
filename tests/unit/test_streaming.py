"""Folders converted and folded back from disk to disk: what the model in memory gives, in little memory, and after any interruption."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import emoe
from emoe.__main__ import cli
from emoe.folders import load_dense
from emoe.layer import routed_layers
from emoe.streaming import convert_folder, fold_folder
from tests.model_folders import digests, loaded, save
from tests.tiny_models import BUILDERS, build, build_generator

FOLDERS = [name for name in BUILDERS if not name.startswith("Transformer")]


# those that timm builds by options that a folder does not tell are for Python
SHOWN = [name for name in FOLDERS if name not in ("Beit", "SwinTransformer")]


def in_memory(source: Path, out: Path, config: Any) -> Path:
    """What the library makes of a folder, on one thread, learned routers from seed 0."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model = load_dense(source)
    torch.manual_seed(0)
    emoe.convert_(model, config)
    emoe.save_pretrained(model, out)
    torch.set_num_threads(threads)
    return out


def tensors(folder: Path, pattern: str = "*.safetensors") -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob(pattern)) for name, tensor in load_file(file).items()}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert torch.equal(tensor, other[name]), name


def assert_same_folders(one: Path, other: Path) -> None:
    assert_same(tensors(one), tensors(other))
    for name in ("config.json", "emoe_config.json"):
        assert (one / name).read_bytes() == (other / name).read_bytes()


@pytest.mark.parametrize("name", SHOWN)
def test_a_folder_becomes_what_the_model_in_memory_becomes(name: str, tmp_path: Path) -> None:
    source = save(name, tmp_path / "source")
    config = emoe.EMoEConfig(num_experts=8, top_k=2, layers="last-half:1")
    report, _ = convert_folder(source, tmp_path / "streamed", config)
    assert len(report.layers) == len(json.loads((tmp_path / "streamed" / "emoe_config.json").read_text())["layers"])
    expected = in_memory(source, tmp_path / "expected", config)
    assert_same_folders(tmp_path / "streamed", expected)
    assert_same(loaded(tmp_path / "streamed").state_dict(), loaded(expected).state_dict())
    fold_folder(tmp_path / "streamed", tmp_path / "dense", restore_order=True)
    assert_same(tensors(tmp_path / "dense"), tensors(source))
    assert {path.name for path in (tmp_path / "dense").iterdir()} == {path.name for path in source.iterdir()}
    assert (tmp_path / "dense" / "config.json").read_bytes() == (source / "config.json").read_bytes()


CONFIGS = {
    "cosine": emoe.EMoEConfig(num_experts=4, top_k=2, layers="all", router="cosine", weighting="softmax"),
    "published": emoe.EMoEConfig.as_published("tutel", num_experts=4, top_k=2, layers=[1, 3]),
    "running gate": emoe.EMoEConfig(num_experts=4, top_k=2, layers="last:2", gate_momentum=0.9),
    "weighted by values": emoe.EMoEConfig(num_experts=4, top_k=1, layers=[0], value_norm_weighted=True),
    "random": emoe.EMoEConfig(num_experts=4, top_k=1, layers="1:3", partition="random", partition_seed=3),
    "contiguous": emoe.EMoEConfig(num_experts=4, top_k=1, layers="all", partition="contiguous"),
    "gmoe": emoe.GMoEConfig(num_experts=3, top_k=2, layers=[1, 2]),
    "gmoe, biases": emoe.GMoEConfig(num_experts=2, top_k=1, layers=[3], output_bias="per_expert_whole"),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("name", ["bert", "gpt2", "phi3", "vit", "llama"])
def test_every_kind_of_experts(name: str, config: Any, tmp_path: Path) -> None:
    source = save(name, tmp_path / "source")
    report, _ = convert_folder(source, tmp_path / "streamed", config)
    expected = in_memory(source, tmp_path / "expected", config)
    assert_same_folders(tmp_path / "streamed", expected)
    assert_same(loaded(tmp_path / "streamed").state_dict(), loaded(expected).state_dict())
    model = load_dense(source)
    assert report.added_parameters == emoe.convert_(model, config).added_parameters
    if config.kind == "gmoe":
        with pytest.raises(emoe.ConversionError, match="no dense equal"):
            fold_folder(tmp_path / "streamed", tmp_path / "dense")
        assert not (tmp_path / "dense").exists()
    else:
        fold_folder(tmp_path / "streamed", tmp_path / "dense")
        model = loaded(expected)
        emoe.to_dense_(model)
        assert_same(load_dense(tmp_path / "dense").state_dict(), model.state_dict())


SETTINGS = ("--num-experts", 8, "--top-k", 2, "--layers", "all")
CONFIG = emoe.EMoEConfig(num_experts=8, top_k=2, layers="all")


@pytest.mark.parametrize("config", [CONFIG, CONFIGS["gmoe"]], ids=["emoe", "gmoe"])
@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2", "vit"])
def test_layers_that_lie_in_two_shards(name: str, config: Any, tmp_path: Path) -> None:
    source = save(name, tmp_path / "source", shard_size="20KB")
    shards = sorted(path.name for path in source.glob("*.safetensors"))
    assert len(shards) > 6
    convert_folder(source, tmp_path / "streamed", config)
    expected = in_memory(source, tmp_path / "expected", config)
    assert_same_folders(tmp_path / "streamed", expected)
    assert shards == sorted(path.name for path in (tmp_path / "streamed").glob("model*.safetensors"))
    index = json.loads((tmp_path / "streamed" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(
        tensor.nbytes for tensor in tensors(tmp_path / "streamed", "model*.safetensors").values()
    )
    assert_same(loaded(tmp_path / "streamed").state_dict(), loaded(expected).state_dict())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays(dtype: torch.dtype, tmp_path: Path) -> None:
    source = save("llama", tmp_path / "source", dtype)
    convert_folder(source, tmp_path / "streamed", CONFIG)
    assert_same_folders(tmp_path / "streamed", in_memory(source, tmp_path / "expected", CONFIG))
    assert tensors(tmp_path / "streamed", "model*.safetensors")["layers.0.mlp.up_proj.weight"].dtype is dtype


def test_where_it_cannot_stream_the_command_says_so_and_holds_the_model_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save("llama", tmp_path / "source")
    convert_folder(source, tmp_path / "streamed", CONFIG)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    for arguments in (
        ("convert", source, tmp_path / "out", *SETTINGS),
        ("to-dense", tmp_path / "out", tmp_path / "dense", "--restore-order"),
    ):
        result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
        assert result.exit_code == 0
        assert "Held in memory, and not to be resumed: the package 'accelerate' is not installed" in result.output
    assert_same_folders(tmp_path / "out", tmp_path / "streamed")
    assert_same(tensors(tmp_path / "dense"), tensors(source))


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("stored", [torch.float8_e5m2, torch.float32], ids=str)
def test_weights_of_another_precision_than_the_configurations(stored: torch.dtype, tmp_path: Path) -> None:
    """The library casts them when it loads; so experts are those of the cast weights, and the file keeps what it had."""
    source = save("llama", tmp_path / "source")
    state = {name: tensor.to(stored) for name, tensor in tensors(source).items()}
    save_file(state, source / "model.safetensors", metadata={"format": "pt"})
    edit(source / "config.json", dtype="bfloat16")
    convert_folder(source, tmp_path / "streamed", CONFIG)
    expected = in_memory(source, tmp_path / "expected", CONFIG)
    assert_same(loaded(tmp_path / "streamed").state_dict(), loaded(expected).state_dict())
    assert_same(tensors(tmp_path / "streamed", "emoe*.safetensors"), tensors(expected, "emoe*.safetensors"))
    assert {tensor.dtype for tensor in tensors(tmp_path / "streamed", "model*.safetensors").values()} == {stored}


def test_quantised_weights_are_refused_by_name(tmp_path: Path) -> None:
    source = save("llama", tmp_path / "source")
    edit(source / "config.json", quantization_config={"quant_method": "fp8"})
    with pytest.raises(emoe.ConversionError, match="is quantised, says its"):
        convert_folder(source, tmp_path / "out", CONFIG)
    assert not (tmp_path / "out").exists()


def test_tensors_that_the_model_does_not_know_are_kept_and_its_prefix_may_be_missing(tmp_path: Path) -> None:
    """GPT-2 on the hub has no ``transformer.`` before its names."""
    source = tmp_path / "source"
    build_generator("gpt2").save_pretrained(source)
    state = {name.removeprefix("transformer."): tensor for name, tensor in tensors(source).items()}
    odd = {"old.flags": torch.tensor([True, False]), "old.nothing": torch.empty(0, 3)}
    save_file({**state, **odd}, source / "model.safetensors", metadata={"format": "pt", "from": "elsewhere"})
    convert_folder(source, tmp_path / "streamed", CONFIG)
    expected = in_memory(source, tmp_path / "expected", CONFIG)
    assert_same(loaded(tmp_path / "streamed").state_dict(), loaded(expected).state_dict())
    found = tensors(tmp_path / "streamed", "model*.safetensors")
    assert found.keys() == {*state, *odd}
    assert_same({name: found[name] for name in odd}, odd)
    with safe_open(tmp_path / "streamed" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "from": "elsewhere"}


def test_what_a_models_own_library_saved_is_folded_back(tmp_path: Path) -> None:
    """Routers and biases of experts stand among its weights; none of them is left, and the biases are one again."""
    model: Any = build("bert")
    emoe.convert_(model, CONFIGS["published"])
    with torch.no_grad():
        for layer in routed_layers(model):
            layer.output_bias.normal_()
    model.save_pretrained(tmp_path / "own")
    assert any("output_bias" in name for name in tensors(tmp_path / "own"))
    fold_folder(tmp_path / "own", tmp_path / "dense")
    emoe.to_dense_(model)
    assert_same(tensors(tmp_path / "dense"), model.state_dict())
    with pytest.raises(emoe.ConversionError, match="leave restore_order out"):
        fold_folder(tmp_path / "own", tmp_path / "again", restore_order=True)
    assert not (tmp_path / "again").exists()


def test_any_number_of_jobs_gives_the_same_bytes(tmp_path: Path) -> None:
    source = save("llama", tmp_path / "source", shard_size="40KB")
    for jobs in (1, 2, 5):
        convert_folder(source, tmp_path / str(jobs), CONFIG, jobs=jobs)
    assert digests(tmp_path / "1") == digests(tmp_path / "2") == digests(tmp_path / "5")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda state: state["layers.2.mlp.up_proj.weight"].fill_(torch.nan),
            "layers.2.mlp.up_proj.weight holds values",
        ),
        (lambda state: state["layers.3.mlp.gate_proj.weight"][5].zero_(), "keys of neurons 5 are all zero"),
        (lambda state: state.pop("layers.1.mlp.down_proj.weight"), "lacks layers.1.mlp.down_proj.weight"),
    ],
)
def test_weights_that_cannot_be_converted_are_named_before_anything_is_written(
    change: Any, message: str, tmp_path: Path
) -> None:
    source = save("llama", tmp_path / "source")
    state = tensors(source)
    change(state)
    save_file(state, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(emoe.EMoEError, match=message):
        convert_folder(source, tmp_path / "out", CONFIG)
    assert not (tmp_path / "out").exists()


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    source = save("bert", tmp_path / "source")
    before = os.umask(0o027)
    try:
        convert_folder(source, tmp_path / "out", CONFIGS["cosine"])
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == {0o640}
