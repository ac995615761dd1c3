"""The paper suite's own runs, end to end: tiny local models under the real names, made-up rows in GLUE's real files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, GPT2Config, GPT2Model, PreTrainedTokenizerFast

import emoe
from benchmarks.harness.definition import load_benchmark
from benchmarks.harness.execution import execute
from benchmarks.harness.packages import DataError
from benchmarks.harness.paths import DATA_ROOT, MODEL_ROOT
from benchmarks.harness.runs import plan, run_from_spec
from tests.unit.test_text import GLUE, TSV

WORDS = [
    "a",
    "the",
    "he",
    "she",
    "it",
    "rain",
    "sun",
    "dog",
    "cat",
    "ran",
    "won",
    "fell",
    "train",
    "man",
    "film",
    "fine",
    "dull",
    "when",
    "where",
    "who",
]


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model root with twelve-layer models as narrow as can be, and a data root with every task."""
    model_root, data_root = tmp_path_factory.mktemp("models"), tmp_path_factory.mktemp("data")
    vocabulary = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "[EOS]", *WORDS])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    size = {"vocab_size": len(vocabulary)}
    torch.manual_seed(0)
    bert = BertModel(
        BertConfig(**size, hidden_size=16, num_hidden_layers=12, num_attention_heads=2, intermediate_size=64)
    )
    bert.save_pretrained(model_root / "bert-base-cased")
    PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(
        model_root / "bert-base-cased"
    )
    gpt2 = GPT2Model(GPT2Config(**size, n_embd=16, n_layer=12, n_head=2, n_inner=64, bos_token_id=2, eos_token_id=2))
    gpt2.save_pretrained(model_root / "gpt2")
    PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="[EOS]", unk_token="[UNK]").save_pretrained(
        model_root / "gpt2"
    )

    for name in GLUE:
        file, lines = TSV[name]
        definition = load_benchmark("glue").tasks[name]
        folder = data_root / definition["source"]["folder"]
        folder.mkdir()
        header = lines[:1] if definition["tsv"]["header"] else []
        rows = lines[len(header) :] * 8
        for part in (file, "train.tsv"):
            (folder / part).write_text("\n".join([*header, *rows]) + "\n")
    return model_root, data_root


@pytest.mark.parametrize("model", ["bert-base-cased", "gpt2"])
@pytest.mark.parametrize("task", GLUE)
def test_every_task_trains_and_evaluates(
    roots, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str, model: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(MODEL_ROOT, str(roots[0]))
    monkeypatch.setenv(DATA_ROOT, str(roots[1]))
    method = "emoe" if (GLUE.index(task) + (model == "gpt2")) % 2 else "emoe_learn"
    spec = next(
        run.spec
        for run in plan(["glue"], "paper")
        if (run.spec["task"]["name"], run.spec["model"]["name"], run.spec["method"]["name"]) == (task, model, method)
    )
    assert spec["training"]["epochs"] == (3 if task in ("mnli", "qqp", "qnli") else 10)
    assert spec["method"]["config"]["num_experts"] == 64
    assert spec["method"]["config"]["top_k"] == 16
    run = run_from_spec({**spec, "training": {**spec["training"], "epochs": 1}})
    path = Path(run.id) / "run.json"
    path.parent.mkdir()
    path.write_text(run.to_json())
    found = json.loads(execute(path, threads=1, log=path.parent / "log.txt").read_text())
    metric = spec["task"]["metric"]
    assert found["scores"]["test"] == found["scores"]["dev"]  # GLUE's validation split is selected on and reported
    assert -1 <= found["scores"]["test"][task][metric] <= 1
    assert found["scores"]["ood"] == {}
    assert found["model"]["active_neurons"] == pytest.approx((11 + 0.25) / 12)


def test_calibration_and_running_gates_reach_the_library(roots, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(MODEL_ROOT, str(roots[0]))
    monkeypatch.setenv(DATA_ROOT, str(roots[1]))
    spec = next(
        run.spec
        for run in plan(["glue"], "paper")
        if (run.spec["task"]["name"], run.spec["model"]["name"]) == ("rte", "bert-base-cased")
        and run.spec["method"]["name"] == "emoe_published"
    )
    assert spec["method"]["config"]["capacity_factor"] == 1.5
    config = {**spec["method"]["config"], "partition": "coactivation", "gate_momentum": 0.9}
    spec = {**spec, "method": {**spec["method"], "config": config}, "training": {**spec["training"], "epochs": 1}}
    run = run_from_spec(spec)
    path = Path(run.id) / "run.json"
    path.parent.mkdir()
    path.write_text(run.to_json())
    calls: list[object] = []
    monkeypatch.setattr(emoe, "retie_gates_", calls.append)
    found = json.loads(execute(path, threads=1, log=path.parent / "log.txt").read_text())
    assert len(calls) == found["cost"]["steps"] > 0
    assert 0 <= found["routing"]["drop_rate"] < 1
    (layer,) = found["model"]["conversion"]
    assert layer["experts"] == 64


def test_a_model_that_is_nowhere_names_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, roots) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(DATA_ROOT, str(roots[1]))
    run = next(run for run in plan(["glue"], "paper") if run.spec["task"]["name"] == "cola")
    path = tmp_path / run.id / "run.json"
    path.parent.mkdir()
    path.write_text(run.to_json())
    with pytest.raises(DataError, match="could not load the model 'google-bert/bert-base-cased'") as caught:
        execute(path, threads=1, log=path.parent / "log.txt")
    assert "model_root" in str(caught.value)
    assert "Traceback" in (path.parent / "log.txt").read_text()
