"""Execute runs of the paper suite with tiny models under the real names and made-up rows in GLUE's files."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import emoe
from benchmarks.harness.base import DATA_ROOT, MODEL_ROOT
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
    result = recorded(run_from_spec({**spec, "training": {**spec["training"], "epochs": 1}}))
    assert result["scores"]["test"] == result["scores"]["dev"]  # the validation split is selected on and reported
    assert -1 <= result["scores"]["test"][task][spec["task"]["metric"]] <= 1
    # a model that is used as another method's is evaluated out of domain too
    assert set(result["scores"]["ood"]) == ({other["name"] for other in spec["ood"]} if method == "emoe" else set())
    assert result["model"]["active_neurons"] == pytest.approx((11 + 0.25) / 12)


def test_calibration_and_running_gates_reach_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = paper_spec("glue", task="rte", model="bert-base-cased", method="emoe_published")
    config = {**spec["method"]["config"], "partition": "coactivation", "gate_momentum": 0.9}
    spec = {**spec, "method": {**spec["method"], "config": config}, "training": {**spec["training"], "epochs": 1}}
    calls: list[object] = []
    monkeypatch.setattr(emoe, "update_gates_", calls.append)
    result = recorded(run_from_spec(spec))
    assert len(calls) == result["cost"]["steps"] > 0
    assert 0 <= result["routing"]["drop_rate"] < 1
