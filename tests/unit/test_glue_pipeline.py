"""The paper suite's own runs, end to end: tiny local models under the real names, made-up rows in GLUE's real files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import emoe
from benchmarks.harness.base.errors import DataError
from benchmarks.harness.base.paths import DATA_ROOT, MODEL_ROOT
from benchmarks.harness.planning.runs import run_from_spec
from benchmarks.harness.running.execution import execute
from tests.planned import paper_runs
from tests.text_sets import GLUE
from tests.tiny_hub import write_data, write_glue_x, write_models


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model root, and a data root with GLUE and GLUE-X."""
    model_root, data_root = tmp_path_factory.mktemp("models"), tmp_path_factory.mktemp("data")
    write_models(model_root, ["bert-base-cased", "gpt2"])
    write_data(data_root)
    write_glue_x(data_root)
    return model_root, data_root


@pytest.mark.parametrize("task", GLUE)
def test_every_task_trains_and_evaluates(roots, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(MODEL_ROOT, str(roots[0]))
    monkeypatch.setenv(DATA_ROOT, str(roots[1]))
    place = GLUE.index(task)
    model, method = ("bert-base-cased", "gpt2")[place % 2], ("emoe", "emoe_learn")[place // 2 % 2]
    spec = next(
        run.spec
        for run in paper_runs("glue")
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
    # what is used as it was not trained is evaluated out of domain too
    assert set(found["scores"]["ood"]) == ({other["name"] for other in spec["ood"]} if method == "emoe" else set())
    assert found["model"]["active_neurons"] == pytest.approx((11 + 0.25) / 12)


def test_calibration_and_running_gates_reach_the_library(roots, tmp_path: Path, monkeypatch, capfd) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(MODEL_ROOT, str(roots[0]))
    monkeypatch.setenv(DATA_ROOT, str(roots[1]))
    spec = next(
        run.spec
        for run in paper_runs("glue")
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
    monkeypatch.setattr(emoe, "update_gates_", calls.append)
    found = json.loads(execute(path, threads=1, log=path.parent / "log.txt").read_text())
    assert len(calls) == found["cost"]["steps"] > 0
    assert 0 <= found["routing"]["drop_rate"] < 1
    (layer,) = found["model"]["conversion"]
    assert layer["experts"] == 64
    said = capfd.readouterr().err
    assert said.count("warning: rte (train): 16 rows, its makers count 2,490: another version, or not all of it") == 1
    assert said.count("warning: rte (dev): ") == 1


def test_a_model_that_is_nowhere_names_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, roots) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(DATA_ROOT, str(roots[1]))
    run = next(run for run in paper_runs("glue") if run.spec["task"]["name"] == "cola")
    path = tmp_path / run.id / "run.json"
    path.parent.mkdir()
    path.write_text(run.to_json())
    with pytest.raises(DataError, match="could not load the model 'google-bert/bert-base-cased'") as caught:
        execute(path, threads=1, log=path.parent / "log.txt")
    assert "model_root" in str(caught.value)
    assert "Traceback" in (path.parent / "log.txt").read_text()
