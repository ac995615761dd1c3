"""Mirror runs in MLflow."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from benchmarks.harness.base import RUNS, RunError
from benchmarks.harness.config.runs import Run
from benchmarks.harness.results import mlflow
from benchmarks.harness.results.mlflow import mirror
from tests import fake_runs
from tests.conftest import ROOT
from tests.planned import plan

KEPT_QUIET = "S3cret"
ENDED = 1_700_000_000
SCORE = "test.tweets.balanced_accuracy"


@pytest.fixture
def runs(here: Path, monkeypatch: pytest.MonkeyPatch) -> list[Run]:
    """Write two seeds of two methods."""
    monkeypatch.setattr(mlflow, "_WAIT_SECONDS", 0.1)
    runs = [
        run
        for run in plan(["glue"], "mini")
        if run.spec["method"]["name"] in ("vanilla", "emoe")
        and (run.spec["task"]["name"], run.spec["seed"] < 2) == ("tweets", True)
    ]
    fake_runs.write_runs(runs)
    for run in runs:
        path = RUNS / run.folder / "metrics.json"
        path.with_name("log.txt").write_text("trained")
        os.utime(path, (ENDED, ENDED + run.spec["seed"]))
    return runs


@pytest.fixture
def uri(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/m.db"


def mirrored(uri: str, benchmark: str = "glue") -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the children by name and the parents by id; no name may occur twice."""
    client = MlflowClient(uri)
    stored = client.search_runs([client.get_experiment_by_name(benchmark).experiment_id], max_results=1000)
    assert len({run.info.run_name for run in stored}) == len(stored)
    children = {run.info.run_name: run for run in stored if "mlflow.parentRunId" in run.data.tags}
    return children, {run.info.run_id: run for run in stored if run.info.run_name not in children}


def edit(run: Run, change: Any) -> None:
    fake_runs.edit(run, change)
    os.utime(RUNS / run.folder / "metrics.json", (ENDED, ENDED))


def test_runs_have_their_numbers_and_parents_the_means_of_their_seeds(runs: list[Run], uri: str) -> None:
    picture = Path("results/mini/figures/glue_scores.png")
    picture.parent.mkdir(parents=True)
    picture.write_bytes(b"a picture")
    edit(runs[0], lambda metrics: metrics.update(curve=[0.5, None, 0.25]))  # None: the loss diverged
    counts = mirror(runs, uri, {"glue": [picture, picture.with_name("not_drawn.png")]})
    assert counts == {"added": len(runs), "replaced": 0, "unchanged": 0}
    client = MlflowClient(uri)
    children, parents = mirrored(uri)
    assert set(children) == {run.id for run in runs}
    for run in runs:
        child = children[run.id]
        assert (child.info.status, child.info.end_time) == ("FINISHED", 1000 * (ENDED + run.spec["seed"]))
        assert child.info.end_time - child.info.start_time == 2000  # cost.job_seconds
        assert {file.path for file in client.list_artifacts(child.info.run_id)} == {"metrics.json", "log.txt"}
        assert child.data.params["seed"] == str(run.spec["seed"])
    assert len(parents) == 3
    for identifier, parent in parents.items():
        seeds = [run for run in children.values() if run.data.tags["mlflow.parentRunId"] == identifier]
        if not seeds:
            assert [file.path for file in client.list_artifacts(identifier)] == [picture.name]
            continue
        values = [run.data.metrics[SCORE] for run in seeds]
        assert parent.data.metrics["seeds"] == len(values) == 2
        assert parent.data.metrics[SCORE] == pytest.approx(sum(values) / 2)
        assert parent.data.metrics[f"{SCORE}.std"] == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
    history = client.get_metric_history(children[runs[0].id].info.run_id, "step.loss")
    assert [(point.step, point.value) for point in history] == [(1, 0.5), (3, 0.25)]


def test_a_second_mirror_does_nothing_and_a_new_number_replaces_its_setting(runs: list[Run], uri: str) -> None:
    mirror(runs, uri)
    children, parents = mirrored(uri)
    assert mirror(runs, uri) == {"added": 0, "replaced": 0, "unchanged": 4}
    again = mirrored(uri)
    assert {run.info.run_id for run in again[0].values()} == {run.info.run_id for run in children.values()}

    edit(runs[0], lambda metrics: metrics["scores"]["test"]["tweets"].update(balanced_accuracy=0.25))
    assert mirror(runs, uri) == {"added": 0, "replaced": 2, "unchanged": 2}
    children, parents = mirrored(uri)
    assert (len(children), len(parents)) == (4, 2)
    assert children[runs[0].id].data.metrics[SCORE] == 0.25
    identifier = children[runs[0].id].data.tags["mlflow.parentRunId"]
    MlflowClient(uri).delete_tag(identifier, "emoe.digest")  # the mirror was interrupted
    assert mirror(runs, uri)["replaced"] == 2
    assert [len(stored) for stored in mirrored(uri)] == [4, 2]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ModuleNotFoundError("No module named 'psycopg2'"), r"for PostgreSQL: pip install 'emoe\[postgres\]'"),
        (OSError(28, "No space left on device", "metrics.json"), r"No space left on device: 'metrics\.json'"),
        (MlflowException(f"no answer of http://lab:{KEPT_QUIET}@db\nx"), r"no answer of http://lab:\*\*\*@db$"),
    ],
)
def test_a_refusal_is_one_line_without_the_password(runs: list[Run], error: Exception, message: str) -> None:
    address = f"postgresql://lab:{KEPT_QUIET}@db/mlflow"
    with mock.patch.object(mlflow, "MlflowClient", side_effect=error), pytest.raises(RunError) as refused:
        mirror(runs, address)
    assert re.match(rf"MLflow at postgresql://lab:\*\*\*@db.*{message}", str(refused.value))
    assert "\n" not in str(refused.value)


def test_no_library_reports_usage_unless_asked_to(tmp_path: Path) -> None:
    code = (
        "import os, benchmarks.__main__; from huggingface_hub.constants import HF_HUB_DISABLE_TELEMETRY as hub;"
        "from mlflow.telemetry.utils import is_telemetry_disabled; print(is_telemetry_disabled(), hub)"
    )
    # no variable by which mlflow knows a test
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    assert subprocess.check_output([sys.executable, "-c", code], env=environment, text=True) == "True True\n"
