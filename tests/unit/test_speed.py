"""The speed benchmark: candidates do the same work, and each measure has its numbers and its table."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from transformers import AutoConfig, AutoModel

from benchmarks.harness.base import RUNS, DefinitionError
from benchmarks.harness.config.benchmark import load_benchmark
from benchmarks.harness.report.presentation import present
from benchmarks.speed import pipeline
from benchmarks.speed.definition import MEASURES, MeasurementSpec, Settings
from tests import fake_runs
from tests.planned import edited_part, plan

SIZES = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 2,
}
LLAMA = {"model_type": "llama", "vocab_size": 50, **SIZES}
VIT = {"model_type": "vit", "image_size": 32, "patch_size": 16, **SIZES}


@pytest.mark.usefixtures("always_sparse")
@pytest.mark.parametrize("config", [LLAMA, VIT])
def test_candidates_compute_the_same_experts(config: dict[str, Any]) -> None:
    torch.manual_seed(0)
    settings = Settings(num_experts=4, top_k_fraction=0.5, candidates=["sparse"], threads=1)
    dense = AutoModel.from_config(AutoConfig.for_model(**config)).eval()
    x = torch.randn(1, 10, 32)
    outputs = [
        pipeline.make_candidate(name, dense, settings).eval().layers[0].mlp(x)
        for name in ("masked", "sparse")
    ]
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(outputs[0], dense.layers[0].mlp(x), atol=1e-5)


def test_the_experts_of_mixtral_have_the_sizes_of_the_dense_ffn() -> None:
    settings = Settings(num_experts=4, top_k_fraction=0.5, candidates=["sparse"], threads=1)
    dense = AutoModel.from_config(AutoConfig.for_model(**LLAMA))
    layer = pipeline.make_candidate("mixtral_eager", dense, settings).layers[0].mlp
    assert (layer.experts.num_experts, layer.top_k) == (4, 2)
    counts = [
        sum(weight.numel() for weight in part.parameters())
        for part in (layer.experts, dense.layers[0].mlp)
    ]
    assert counts[0] == counts[1]


@pytest.mark.usefixtures("always_sparse")
@pytest.mark.parametrize(
    ("measure", "config"),
    [
        *((measure, LLAMA) for measure in MEASURES),
        ("step", LLAMA | {"model_type": "bert"}),
        ("step", VIT),
    ],
)
def test_each_measure_gives_numbers_of_each_candidate(
    measure: str, config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "_MIN_SECONDS", 0.001)
    small = {"num_experts": 8, "tokens": 20, "batch_size": 2}
    usual = load_benchmark("speed").definition.measures[measure].settings.given()
    settings = usual | {name: value for name, value in small.items() if name in usual}
    if measure == "layer":
        settings["candidates"] = ["sparse", "masked", "mixtral_eager", "mixtral_grouped_mm"]
    small_model = {"name": "small", "config": config}
    planned = plan(["speed"], "smoke")[0].spec
    changed = {**planned, "task": {"name": measure}, "model": small_model, "settings": settings}
    spec = MeasurementSpec.model_validate(changed)
    threads = torch.get_num_threads()
    measured = pipeline.run(spec, tmp_path, cast(Any, SimpleNamespace(say=print)))["measured"]
    torch.set_num_threads(threads)
    assert set(settings["candidates"]) == set(measured) - {"dense"}
    assert all(row["seconds"] > 0 for row in measured.values())
    if measure == "partition":
        assert (
            0 < measured["emoe"]["inertia"] <= measured["kmeans_constrained"]["inertia"] + 0.05 < 1
        )
    else:
        assert all(
            0 < row["ratio_low"] <= row["ratio"] <= row["ratio_high"] for row in measured.values()
        )


@pytest.mark.parametrize(
    ("measure", "candidate", "others"),
    [
        ("partition", "sparse", "emoe, kmeans_constrained"),
        ("layer", "emoe", "sparse, inference, masked"),
    ],
)
def test_candidates_of_other_measures_are_refused(
    measure: str, candidate: str, others: str
) -> None:
    block = {"measure": measure, "model": ["minilm"], "settings": {"candidates": [[candidate]]}}
    part = edited_part("speed", "speed", {"grid": [block]})
    message = f"candidates' is '{candidate}', which does not exist; choose from {others}"
    with pytest.raises(DefinitionError, match=message):
        list(load_benchmark("speed").specs(part, (), ()))


def test_tables_of_measures_without_runs_are_empty(here: Path) -> None:
    runs = fake_runs.write(RUNS, "smoke", benchmarks=("speed",))
    steps = [run for run in runs if run.spec["task"]["name"] == "step"]
    shown = present(load_benchmark("speed"), fake_runs.records(steps))
    for table in shown.tables:
        table.write(here)
        assert len(table.texts()) == (1 if table.name == "speed_step" else 0)
