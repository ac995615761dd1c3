"""A finished suite in MLflow: mirrored again, changed, and diverged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from benchmarks.harness.config.runs import run_from_spec
from benchmarks.harness.config.suite import Suite
from benchmarks.harness.results import tracking
from tests import fake_runs


@pytest.fixture
def finished(here: Path) -> Suite:
    """The mini suite, finished with made-up numbers, in an empty working directory."""
    return fake_runs.text_suite()


def test_mirroring_twice_adds_nothing_and_a_new_number_replaces(finished: Suite, tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    runs = [run for run in finished.runs_of("glue") if run.spec["task"]["name"] == "tweets"]
    runs = [
        run
        for name in ("vanilla", "emoe")
        for run in runs
        if run.spec["method"]["name"] == name and run.spec["seed"] < 2
    ]
    assert tracking.mirror(runs, uri) == {"added": 4, "replaced": 0, "unchanged": 0}
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("glue").experiment_id
    # two seeds of two methods, each method with a parent
    assert len(client.search_runs([experiment])) == 4 + 2
    assert tracking.mirror(runs, uri) == {"added": 0, "replaced": 0, "unchanged": 4}
    assert len(client.search_runs([experiment])) == 4 + 2

    path = Path("results/runs") / runs[0].folder / "metrics.json"
    content = json.loads(path.read_text())
    content["scores"]["test"]["tweets"]["balanced_accuracy"] = 0.123
    path.write_text(json.dumps(content))
    assert tracking.mirror(runs, uri) == {"added": 0, "replaced": 1, "unchanged": 3}
    found = client.search_runs([experiment], filter_string=f"tags.`emoe.run_id` = '{runs[0].id}'")
    assert [run.data.metrics["test.tweets.balanced_accuracy"] for run in found] == [0.123]
    assert found[0].data.params["learning_rate"] == "0.0001"
    assert len(client.search_runs([experiment])) == 4 + 2

    # a mirror that was killed between making a run and writing its numbers
    client.delete_tag(found[0].info.run_id, "emoe.content")
    assert tracking.mirror(runs, uri) == {"added": 0, "replaced": 1, "unchanged": 3}


def test_a_run_that_diverged_is_mirrored_with_all_its_settings(finished: Suite, tmp_path: Path) -> None:
    trained, evaluated = finished.runs[0], next(run for run in finished.runs if "candidates" in run.spec)
    path = Path("results/runs") / trained.folder / "metrics.json"
    content = json.loads(path.read_text())
    content["epochs"][1]["loss"] = content["scores"]["dev"]["tweets"]["loss"] = None
    path.write_text(json.dumps(content))
    many = run_from_spec(
        {
            **evaluated.spec,
            "candidates": evaluated.spec["candidates"] * 20,
            "more": dict.fromkeys(["+90%", *map(str, range(150))], 1),
        }
    )
    fake_runs.write_runs([many])

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    assert tracking.mirror([trained, many], uri)["added"] == 2
    client = MlflowClient(uri)
    ids = {
        found.data.tags["emoe.run_id"]: found.info.run_id
        for name in ("glue", "glue_ood")
        for found in client.search_runs([client.get_experiment_by_name(name).experiment_id])
    }
    assert [point.step for point in client.get_metric_history(ids[trained.id], "epoch.loss")] == [1]
    assert len(client.get_metric_history(ids[trained.id], "epoch.balanced_accuracy")) == 2
    parameters = client.get_run(ids[many.id]).data.params
    assert {"more._90_", *(f"more.{number}" for number in range(150))} < set(parameters)
    assert parameters["candidates"] == str(many.spec["candidates"])
    assert "tweets" in client.get_run(ids[trained.id]).data.params["task.name"]
    assert set(parameters) >= {"ood", "seed"}
