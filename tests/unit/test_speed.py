"""The speed benchmark: candidates do the same work, times are taken in turn, wrong grids are refused."""

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
from benchmarks.speed.ffn import FFN, SpeedNet
from tests import fake_runs


@pytest.fixture(params=[False, True])
def ffn(request: pytest.FixtureRequest) -> FFN:
    """A plain one without biases, which transformers' plain experts do not have, and a gated one."""
    torch.manual_seed(0)
    built = FFN(8, 32, gated=request.param)
    if not request.param:
        for module in (built.inner, built.outer):
            torch.nn.init.zeros_(module.bias)
    return built


@pytest.mark.usefixtures("always_sparse")
def test_candidates_are_the_dense_ffn_with_all_experts_and_choose_the_same_ones_with_some(ffn: FFN) -> None:
    x, others = torch.randn(10, 8), ["block_mask", "transformers_eager", "transformers_grouped"]
    settings = Settings(num_experts=4, candidates=["sparse", "masked", *others], threads=1)
    for net in pipeline.candidates(SpeedNet(ffn), settings).values():
        torch.testing.assert_close(net(x), ffn(x), atol=1e-5, rtol=1e-5)
    half = Settings(num_experts=4, candidates=others, threads=1, top_k_fraction=0.5)
    dense, expected, *alike = (net(x) for net in pipeline.candidates(SpeedNet(ffn), half).values())
    assert not torch.allclose(expected, dense, atol=1e-3)
    for output in alike:
        torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)


SMALL_LLAMA = {"model_type": "llama", "vocab_size": 50, "hidden_size": 16, "intermediate_size": 64}
SMALL_LLAMA |= {"num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.mark.usefixtures("always_sparse")
@pytest.mark.parametrize("measure", ["layer", "step", "decode", "prompt", "generate", "partition"])
def test_each_measure_gives_a_row_a_candidate(measure: str, tmp_path: Path) -> None:
    ffn = {"hidden": 16, "neurons": 64, "gated": True}
    models = {"layer": ffn, "partition": ffn, "step": {"config": SMALL_LLAMA | {"model_type": "bert"}}}
    usual = load_benchmark("speed").definition.measures[measure].settings
    small = {"num_experts": 8, "tokens": 20, "rounds": 2, "batch_size": 2, "length": 4, "starts": 1}
    settings = usual | {name: value for name, value in small.items() if name in usual}
    model = {"name": "small", **models.get(measure, {"config": SMALL_LLAMA})}
    spec = {"task": {"name": measure}, "model": model, "settings": settings, "seed": 0}
    threads = torch.get_num_threads()
    measured = pipeline.run(spec, tmp_path, cast(Any, SimpleNamespace(say=print)))["measured"]
    torch.set_num_threads(threads)
    assert set(settings["candidates"]) <= set(measured)
    assert all(row["ratio"] > 0 and row["seconds"] > 0 for row in measured.values())
    if measure == "layer":
        assert measured["sparse"]["memory_ratio"] < 1
    if measure == "partition":
        assert 0 < measured["emoe"]["inertia"] <= measured["kmeans_constrained"]["inertia"] + 0.05 < 1


def test_a_suite_with_one_measure_has_its_table_and_empty_ones_of_the_others(here: Path) -> None:
    runs = fake_runs.write(Path("results/runs"), "smoke", benchmarks=("speed",))
    shown = present(load_benchmark("speed"), [run for run in runs if run.spec["task"]["name"] == "step"])
    for table in shown.tables:
        table.write(here)
        assert len(table.texts()) == (1 if table.name == "speed_step" else 0)
