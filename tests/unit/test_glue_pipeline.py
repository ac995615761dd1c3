"""Execute runs of the paper suite with tiny models under the real names and made-up rows in GLUE's files."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import emoe
from benchmarks.harness.base import DATA_ROOT, MODEL_ROOT, RUNS, DataError
from benchmarks.harness.config.runs import run_from_spec
from tests.executed import recorded
from tests.planned import paper_spec
from tests.text_sets import GLUE
from tests.tiny_hub import write_data, write_glue_x, write_models

pytestmark = pytest.mark.usefixtures("here", "roots")


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Write a model root, and a data root with GLUE and GLUE-X."""
    model_root, data_root = tmp_path_factory.mktemp("models"), tmp_path_factory.mktemp("data")
    write_models(model_root, ["bert-base-cased", "gpt2"])
    write_data(data_root)
    write_glue_x(data_root)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(MODEL_ROOT, str(model_root))
        patch.setenv(DATA_ROOT, str(data_root))
        yield


@pytest.mark.parametrize("task", GLUE)
def test_every_task_trains_and_evaluates(task: str) -> None:
    place = GLUE.index(task)
    model, method = ("bert-base-cased", "gpt2")[place % 2], ("emoe", "emoe_learn")[place // 2 % 2]
    spec = paper_spec("glue", task=task, model=model, method=method)
    assert spec["training"]["epochs"] == (3 if task in ("mnli", "qqp", "qnli") else 10)
    assert spec["method"]["config"]["num_experts"] == 64
    assert spec["method"]["config"]["top_k"] == 16
    found = recorded(run_from_spec({**spec, "training": {**spec["training"], "epochs": 1}}))
    metric = spec["task"]["metric"]
    assert found["scores"]["test"] == found["scores"]["dev"]  # GLUE's validation split is selected on and reported
    assert -1 <= found["scores"]["test"][task][metric] <= 1
    # what is used as it was not trained is evaluated out of domain too
    assert set(found["scores"]["ood"]) == ({other["name"] for other in spec["ood"]} if method == "emoe" else set())
    assert found["model"]["active_neurons"] == pytest.approx((11 + 0.25) / 12)


def test_calibration_and_running_gates_reach_the_library(monkeypatch, capfd) -> None:
    spec = paper_spec("glue", task="rte", model="bert-base-cased", method="emoe_published")
    assert spec["method"]["config"]["capacity_factor"] == 1.5
    config = {**spec["method"]["config"], "partition": "coactivation", "gate_momentum": 0.9}
    spec = {**spec, "method": {**spec["method"], "config": config}, "training": {**spec["training"], "epochs": 1}}
    calls: list[object] = []
    monkeypatch.setattr(emoe, "update_gates_", calls.append)
    found = recorded(run_from_spec(spec))
    assert len(calls) == found["cost"]["steps"] > 0
    assert 0 <= found["routing"]["drop_rate"] < 1
    (layer,) = found["model"]["conversion"]
    assert layer["experts"] == 64
    said = capfd.readouterr().err
    assert said.count("warning: rte (train): 16 rows, its makers count 2,490: another version, or not all of it") == 1
    assert said.count("warning: rte (dev): ") == 1


def test_a_model_that_is_nowhere_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(MODEL_ROOT)
    run = run_from_spec(paper_spec("glue", task="cola"))
    with pytest.raises(DataError, match="could not load the model 'google-bert/bert-base-cased'") as caught:
        recorded(run)
    assert "model_root" in str(caught.value)
    assert "Traceback" in (RUNS / run.folder / "log.txt").read_text()
