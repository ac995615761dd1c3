"""Folders converted and folded back from disk to disk: the same result as in memory, with little memory."""

from __future__ import annotations

import json
import re
import resource
import sys
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaModel

import emoe
from emoe.__main__ import main
from emoe.streaming import NotStreamedError, convert_folder, fold_folder
from tests.forked import start as start_fork
from tests.model_folders import assert_same, dense, edit_json, loaded, save, tensors
from tests.tiny_models import BUILDERS, build, build_generator

NAMES = [name for name in BUILDERS if not name.startswith("Transformer") and name != "VisionTransformer"]
CONFIG = emoe.EMoEConfig(num_experts=8, top_k=2, layers="all")
GMOE = emoe.GMoEConfig(num_experts=3, top_k=2, layers=[1, 2])
CONFIGS = {
    "cosine": emoe.EMoEConfig(num_experts=4, top_k=2, layers="all", router="cosine", weighting="softmax"),
    "published": emoe.EMoEConfig.as_published("tutel", num_experts=4, top_k=2, layers=[1, 3]),
    "running gate": emoe.EMoEConfig(num_experts=4, top_k=2, layers="last:2", gate_momentum=0.9),
    "random": emoe.EMoEConfig(num_experts=4, top_k=1, layers="1:3", partition="random", partition_seed=3),
}


def in_memory(source: Path, out: Path, config: Any) -> Path:
    """Convert a folder's model in memory, with learned routers from seed 0."""
    model = dense(source)
    torch.manual_seed(0)
    emoe.convert_(model, config)
    emoe.save_pretrained(model, out)
    return out


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("Beit", "SwinTransformer")])
def test_a_streamed_folder_is_the_folder_of_the_model_in_memory(name: str, tmp_path: Path) -> None:
    source, config = save(name, tmp_path / "source"), emoe.EMoEConfig(num_experts=8, top_k=2, layers="last-half:1")
    report = convert_folder(source, tmp_path / "streamed", config)
    expected = in_memory(source, tmp_path / "expected", config)
    assert len(report.layers) == len(json.loads((expected / "emoe_config.json").read_text())["layers"])
    assert_same(tensors(tmp_path / "streamed"), tensors(expected))
    assert_same(loaded(tmp_path / "streamed").state_dict(), loaded(expected).state_dict())
    fold_folder(tmp_path / "streamed", tmp_path / "dense", restore_order=True)
    assert_same(tensors(tmp_path / "dense"), tensors(source))
    assert {path.name for path in (tmp_path / "dense").iterdir()} == {path.name for path in source.iterdir()}
    assert json.loads((tmp_path / "dense" / "config.json").read_text()) == json.loads(
        (source / "config.json").read_text()
    )


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("name", ["bert", "gpt2", "phi3"])
def test_every_kind_of_router_and_bias(name: str, config: Any, tmp_path: Path) -> None:
    source = save(name, tmp_path / "source")
    convert_folder(source, tmp_path / "streamed", config)
    expected = in_memory(source, tmp_path / "expected", config)
    assert_same(tensors(tmp_path / "streamed"), tensors(expected))
    fold_folder(tmp_path / "streamed", tmp_path / "dense")
    assert_same(dense(tmp_path / "dense").state_dict(), emoe.to_dense_(loaded(expected)).state_dict())


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2"])
def test_the_layers_of_an_ffn_may_lie_in_several_shards(name: str, tmp_path: Path) -> None:
    source = save(name, tmp_path / "source", shard_size="20KB")
    convert_folder(source, tmp_path / "streamed", CONFIG)
    expected = in_memory(source, tmp_path / "expected", CONFIG)
    shards = [path.name for path in sorted(source.glob("*.safetensors"))]
    assert len(shards) > 6
    assert shards == [path.name for path in sorted((tmp_path / "streamed").glob("model*.safetensors"))]
    assert_same(loaded(tmp_path / "streamed").state_dict(), loaded(expected).state_dict())


@pytest.mark.parametrize(("stored", "computed"), [("float16", "float16"), ("float32", "bfloat16")])
def test_the_stored_precision_stays(stored: str, computed: str, tmp_path: Path) -> None:
    source = save("llama", tmp_path / "source", getattr(torch, stored))
    edit_json(source / "config.json", dtype=computed)
    convert_folder(source, tmp_path / "streamed", CONFIG)
    expected = in_memory(source, tmp_path / "expected", CONFIG)
    assert_same(loaded(tmp_path / "streamed").state_dict(), loaded(expected).state_dict())
    assert {t.dtype for t in tensors(tmp_path / "streamed", "model*").values()} == {getattr(torch, stored)}


def test_unknown_tensors_and_metadata_are_kept_and_the_prefix_of_the_base_model_may_be_missing(tmp_path: Path) -> None:
    """GPT-2 on the hub has names without ``transformer.``."""
    source = tmp_path / "source"
    build_generator("gpt2").save_pretrained(source)
    state = {name.removeprefix("transformer."): tensor for name, tensor in tensors(source).items()}
    state["old.flags"] = torch.tensor([True, False])
    save_file(state, source / "model.safetensors", metadata={"format": "pt", "from": "elsewhere"})
    convert_folder(source, tmp_path / "streamed", CONFIG)
    expected = in_memory(source, tmp_path / "expected", CONFIG)
    assert_same(loaded(tmp_path / "streamed").state_dict(), loaded(expected).state_dict())
    assert tensors(tmp_path / "streamed", "model*").keys() == state.keys()
    with safe_open(tmp_path / "streamed" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "from": "elsewhere"}


def test_folders_that_are_not_streamed(tmp_path: Path) -> None:
    model: Any = build("bert")
    emoe.convert_(model, CONFIGS["published"])
    model.save_pretrained(tmp_path / "library")
    plain = build("bert")
    emoe.convert_(plain, CONFIG)
    plain.save_pretrained(tmp_path / "plain")
    for call in (
        lambda: convert_folder(save("VisionTransformer", tmp_path / "timm"), tmp_path / "out", CONFIG),
        lambda: convert_folder(save("bert", tmp_path / "bert"), tmp_path / "out", GMOE),
        lambda: fold_folder(tmp_path / "library", tmp_path / "out"),
        lambda: fold_folder(tmp_path / "plain", tmp_path / "out", restore_order=True),
    ):
        with pytest.raises(NotStreamedError):
            call()
    edit_json(tmp_path / "bert" / "config.json", quantization_config={"quant_method": "fp8"})
    with pytest.raises(emoe.EMoEError, match="quantised"):
        convert_folder(tmp_path / "bert", tmp_path / "out", CONFIG)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state["layers.2.mlp.up_proj.weight"].fill_(torch.nan), r"layers.2.mlp.up_proj.weight"),
        (lambda state: state["layers.3.mlp.gate_proj.weight"][5].zero_(), "layers.3.mlp.gate_proj"),
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


def exit_code(work: Callable[..., None], *arguments: Any) -> int | None:
    """Run a function in a process, and return its exit status."""
    process = start_fork(work, *arguments)
    process.join()
    return process.exitcode


def with_little_room(words: list[str], room: int, report: Path) -> None:
    """Run the command line with a limit on the size of files."""
    sys.argv[1:] = words
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, most))
    with report.open("w") as stream, redirect_stderr(stream):
        try:
            main()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))


@pytest.mark.parametrize("kind", ["emoe", "gmoe"])
def test_a_full_disk_is_one_line_that_names_the_new_folder(kind: str, tmp_path: Path) -> None:
    source, out, report = save("bert", tmp_path / "source"), tmp_path / "out", tmp_path / "report.txt"
    words = ["convert", str(source), str(out), "--num-experts", "8", "--top-k", "2", "--kind", kind]
    assert exit_code(with_little_room, words, (source / "model.safetensors").stat().st_size // 2, report) == 1
    last = report.read_text().splitlines()[-1]
    assert re.fullmatch(rf"Error: {tmp_path}/\.out\..*File too large.*", last)
    assert {path.name for path in tmp_path.iterdir()} == {"source", "report.txt"}


def convert_and_report_peak(source: Path, out: Path, peak: Path) -> None:
    convert_folder(source, out, CONFIG)
    # not ru_maxrss, which includes the parent's memory at the fork
    peak.write_text(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def test_memory_does_not_grow_with_the_layers(tmp_path: Path) -> None:
    """Peak resident memory of the process, mapped files included."""
    peaks, sizes = [], []
    for layers in (2, 12):
        source = tmp_path / str(layers)
        config = LlamaConfig(
            vocab_size=64, hidden_size=512, intermediate_size=2048, num_hidden_layers=layers, num_attention_heads=4
        )
        LlamaModel(config).save_pretrained(source, max_shard_size="20MB")
        sizes.append(sum(path.stat().st_size for path in source.iterdir()))
        assert exit_code(convert_and_report_peak, source, tmp_path / f"out{layers}", tmp_path / "peak.txt") == 0
        peaks.append(1024 * int((tmp_path / "peak.txt").read_text()))
    assert sizes[1] - sizes[0] > 150e6
    assert peaks[1] - peaks[0] < 30e6
