"""Folders converted and folded back from disk to disk: the same result as in memory, with little memory."""

from __future__ import annotations

import json
import re
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaModel

import emoe
from emoe.__main__ import cli
from emoe.streaming import NotStreamedError, convert_folder, fold_folder
from tests import forked
from tests.model_folders import assert_same, dense, edit_json, loaded, save, tensors
from tests.tiny_models import BUILDERS, build_generator

NAMES = [name for name in BUILDERS if name[0].islower()]  # of transformers
CONFIG = emoe.EMoEConfig(num_experts=8, top_k=2, layers="all")
CONFIGS = {
    "cosine": emoe.EMoEConfig(num_experts=4, top_k=2, layers="all", router="cosine", weighting="softmax"),
    "published": emoe.EMoEConfig.as_published("tutel", num_experts=4, top_k=2, layers=[1, 3]),
    "running gate": emoe.EMoEConfig(num_experts=4, top_k=2, layers="last:2", gate_momentum=0.9),
    "random": emoe.EMoEConfig(num_experts=4, top_k=1, layers="1:3", partition="random", partition_seed=3),
}


def assert_streamed_as_in_memory(source: Path, config: Any) -> None:
    """Convert a folder to ``streamed`` beside it, and compare it with the conversion in memory."""
    streamed, expected = source.parent / "streamed", source.parent / "expected"
    convert_folder(source, streamed, config)
    model = dense(source)
    torch.manual_seed(0)  # for learned routers
    emoe.convert_(model, config)
    emoe.save_pretrained(model, expected)
    assert_same(tensors(streamed, "emoe*.safetensors"), tensors(expected, "emoe*.safetensors"))
    assert_same(loaded(streamed).state_dict(), loaded(expected).state_dict())


@pytest.mark.parametrize("name", NAMES)
def test_every_architecture(name: str, tmp_path: Path) -> None:
    source = save(name, tmp_path / "source")
    assert_streamed_as_in_memory(source, emoe.EMoEConfig(num_experts=8, top_k=2, layers="last-half:1"))
    fold_folder(tmp_path / "streamed", tmp_path / "dense", restore_order=True)
    assert_same(tensors(tmp_path / "dense"), tensors(source))
    settings = [json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "dense")]
    assert settings[0] == settings[1]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("name", ["bert", "gpt2", "phi3"])
def test_every_kind_of_router_and_bias_in_several_shards(name: str, config: Any, tmp_path: Path) -> None:
    assert_streamed_as_in_memory(save(name, tmp_path / "source", shard_size="20KB"), config)
    assert len(list((tmp_path / "streamed").glob("model*.safetensors"))) > 6
    fold_folder(tmp_path / "streamed", tmp_path / "dense")
    assert_same(dense(tmp_path / "dense").state_dict(), emoe.to_dense_(loaded(tmp_path / "expected")).state_dict())


@pytest.mark.parametrize(("stored", "computed"), [("float16", "float16"), ("float32", "bfloat16")])
def test_the_stored_precision_stays(stored: str, computed: str, tmp_path: Path) -> None:
    source = save("llama", tmp_path / "source", getattr(torch, stored))
    edit_json(source / "config.json", dtype=computed)
    assert_streamed_as_in_memory(source, CONFIG)
    assert {t.dtype for t in tensors(tmp_path / "streamed", "model*.safetensors").values()} == {getattr(torch, stored)}


def test_unknown_tensors_and_metadata_are_kept_and_the_prefix_of_the_base_model_may_be_missing(tmp_path: Path) -> None:
    """GPT-2 on the hub has names without ``transformer.``."""
    source, metadata = tmp_path / "source", {"format": "pt", "from": "elsewhere"}
    build_generator("gpt2").save_pretrained(source)
    state = {name.removeprefix("transformer."): tensor for name, tensor in tensors(source).items()}
    state["old.flags"] = torch.tensor([True, False])
    save_file(state, source / "model.safetensors", metadata)
    assert_streamed_as_in_memory(source, CONFIG)
    assert tensors(tmp_path / "streamed", "model*.safetensors").keys() == state.keys()
    with safe_open(tmp_path / "streamed" / "model.safetensors", "pt") as file:
        assert file.metadata() == metadata


def test_folders_that_are_not_streamed(tmp_path: Path) -> None:
    bert, timm, out = save("bert", tmp_path / "bert"), save("VisionTransformer", tmp_path / "timm"), tmp_path / "out"
    for folder, config in ((timm, CONFIG), (bert, emoe.GMoEConfig())):
        with pytest.raises(NotStreamedError):
            convert_folder(folder, out, config)
    edit_json(bert / "config.json", quantization_config={"quant_method": "fp8"})
    with pytest.raises(emoe.EMoEError, match="quantised"):
        convert_folder(bert, out, CONFIG)
    assert not out.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state["layers.2.mlp.up_proj.weight"].fill_(torch.nan), r"layers.2.mlp.up_proj.weight"),
        (lambda state: state.pop("layers.1.mlp.down_proj.weight"), "lack layers.1.mlp.down_proj.weight"),
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
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("kind", ["emoe", "gmoe"])  # streamed and in memory
def test_a_full_disk_is_one_line_and_leaves_nothing(kind: str, tmp_path: Path) -> None:
    source, limits = save("bert", tmp_path / "source"), resource.getrlimit(resource.RLIMIT_FSIZE)
    words = f"convert {source} --output {tmp_path / 'out'} --num-experts 8 --top-k 2 --kind {kind}".split()
    resource.setrlimit(resource.RLIMIT_FSIZE, ((source / "model.safetensors").stat().st_size // 2, limits[1]))
    try:
        result = CliRunner().invoke(cli, words)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert result.exit_code == 1
    assert re.match(r"error: .*File too large", result.output.splitlines()[-1])
    assert list(tmp_path.iterdir()) == [source]


def convert_and_report_peak(source: Path, out: Path, peak: Path) -> None:
    convert_folder(source, out, emoe.EMoEConfig(num_experts=8, top_k=2, layers="all", partition="random"))  # fast
    # not ru_maxrss, which includes the parent's memory at the fork
    peak.write_text(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def test_memory_does_not_grow_with_the_layers(tmp_path: Path) -> None:
    """Compare the peak resident memory of two processes, including mapped files."""
    peaks, weights = [], []
    for layers in (2, 12):
        source = tmp_path / str(layers)
        sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 4, "vocab_size": 64}
        LlamaModel(LlamaConfig(num_hidden_layers=layers, **sizes)).save_pretrained(source, max_shard_size="20MB")
        weights.append(sum(path.stat().st_size for path in source.iterdir()))
        process = forked.start(convert_and_report_peak, source, tmp_path / f"out{layers}", tmp_path / "peak.txt")
        process.join()
        assert process.exitcode == 0
        peaks.append(1024 * int((tmp_path / "peak.txt").read_text()))
    assert weights[1] - weights[0] > 150e6
    assert peaks[1] - peaks[0] < 30e6
