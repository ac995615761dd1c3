"""The speed benchmark: candidates do the same work, and each measure has its numbers and its table."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from benchmarks.harness.config.benchmark import load_benchmark
from benchmarks.harness.report.presentation import present
from benchmarks.speed import pipeline
from benchmarks.speed.definition import Settings
from tests import fake_runs

SIZES = {"hidden_size": 16, "intermediate_size": 64, "num_attention_heads": 2}
LLAMA = {"model_type": "llama", "vocab_size": 50, "num_hidden_layers": 2, **SIZES}
VIT = {"model_type": "vit", "num_hidden_layers": 1, **SIZES}


@pytest.mark.usefixtures("always_sparse")
@pytest.mark.parametrize("config", [LLAMA | {"num_hidden_layers": 1}, VIT])
def test_candidates_are_the_dense_ffn_with_all_experts_and_choose_the_same_ones_with_some(
    config: dict[str, Any],
) -> None:
    torch.manual_seed(0)
    names = ["masked", "sparse", "transformers_eager", "transformers_grouped_mm"]
    for share in (1.0, 0.5):
        settings = Settings(num_experts=4, candidates=names, threads=1, top_k_fraction=share)
        dense = pipeline.build({"config": config}, settings)  # its biases are 0, and transformers' experts have none
        x = torch.randn(10, 16)
        expected, *outputs = (net.layers[0].mlp(x) for net in pipeline.candidates(dense, settings).values())
        assert torch.allclose(outputs[0], expected, atol=1e-5) == (share == 1)
        for output in outputs[1:]:
            torch.testing.assert_close(output, outputs[0], atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("always_sparse")
@pytest.mark.parametrize("measure", ["layer", "step", "decode", "prompt", "generate", "partition"])
def test_each_measure_gives_numbers_of_each_candidate(
    measure: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "_MIN_SECONDS", 0.001)
    small = {"num_experts": 8, "tokens": 20, "rounds": 2, "batch_size": 2}
    usual = load_benchmark("speed").definition.measures[measure].settings.given()
    settings = usual | {name: value for name, value in small.items() if name in usual}
    config = LLAMA | {"model_type": "bert"} if measure == "step" else LLAMA
    spec = {"task": {"name": measure}, "model": {"name": "small", "config": config}, "settings": settings, "seed": 0}
    threads = torch.get_num_threads()
    measured = pipeline.run(spec, tmp_path, cast(Any, SimpleNamespace(say=print)))["measured"]
    torch.set_num_threads(threads)
    assert set(settings["candidates"]) <= set(measured)
    assert all(row["ratio"] > 0 and row["seconds"] > 0 for row in measured.values())
    if measure == "layer":
        assert measured["sparse"]["memory_ratio"] < 1
    if measure == "partition":
        assert 0 < measured["emoe"]["inertia"] <= measured["kmeans_constrained"]["inertia"] + 0.05 < 1


def test_tables_of_measures_without_runs_are_empty(here: Path) -> None:
    runs = fake_runs.write(Path("results/runs"), "smoke", benchmarks=("speed",))
    shown = present(load_benchmark("speed"), [run for run in runs if run.spec["task"]["name"] == "step"])
    for table in shown.tables:
        table.write(here)
        assert len(table.texts()) == (1 if table.name == "speed_step" else 0)
