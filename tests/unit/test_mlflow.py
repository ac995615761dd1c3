"""The mirror in MLflow: its content, SQLite's file, and refusals."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from benchmarks.harness.base import RUNS, RunError, without_passwords
from benchmarks.harness.config.runs import Run, plan, run_from_spec
from benchmarks.harness.results import mlflow
from benchmarks.harness.results.mlflow import mirror
from benchmarks.harness.results.records import read_metrics
from tests import fake_runs
from tests.conftest import ROOT
from tests.forked import start as start_fork

KEPT_QUIET = "S3cret"
ENDED = 1_700_000_000
SCORE = "test.tweets.balanced_accuracy"
PLANNED = [
    run
    for run in plan(["glue"], "mini")
    if run.spec["task"]["name"] == "tweets" and run.spec["method"]["name"] in ("vanilla", "emoe")
]


@pytest.fixture
def runs(here: Path) -> list[Run]:
    """Write two seeds of two methods; the first method has unusual settings."""
    runs = [run for run in PLANNED if run.spec["seed"] < 2]
    for spec in [run.spec for run in runs if run.spec["method"]["name"] == "vanilla"]:
        spec["remark"] = {"+90%": 1, "long": ["x" * 9000], "empty": {}, **dict.fromkeys(map(str, range(150)), 1)}
    runs = [run_from_spec(run.spec) for run in runs]
    fake_runs.write_runs(runs)
    for run in runs:
        path = RUNS / run.folder / "metrics.json"
        path.with_name("log.txt").write_text("trained")
        os.utime(path, (ENDED, ENDED + run.spec["seed"]))
    return runs


@pytest.fixture
def uri(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/m.db"


def mirrored(uri: str, benchmark: str = "glue") -> dict[str, Any]:
    """Return the stored runs by name; no name may occur twice."""
    client = MlflowClient(uri)
    stored = client.search_runs([client.get_experiment_by_name(benchmark).experiment_id], max_results=1000)
    assert len({run.info.run_name for run in stored}) == len(stored)
    return {run.info.run_name: run for run in stored}


def edit(run: Run, change: Any) -> None:
    fake_runs.edit(run, change)
    os.utime(RUNS / run.folder / "metrics.json", (ENDED, ENDED))


def test_runs_have_their_numbers_settings_and_files(runs: list[Run], uri: str) -> None:
    picture = Path("results/mini/figures/glue_scores.png")
    picture.parent.mkdir(parents=True)
    picture.write_bytes(b"a picture")

    def diverge(metrics: dict[str, Any]) -> None:
        metrics["curve"] = [0.5, None, 0.25]
        metrics["scores"]["dev"]["tweets"]["loss"] = None

    edit(runs[0], diverge)
    before = os.umask(0o002)
    try:
        counts = mirror(runs, uri, {"glue": [picture, picture.with_name("not_drawn.png")]})
    finally:
        os.umask(before)
    assert counts == {"added": len(runs), "replaced": 0, "unchanged": 0}
    assert Path(uri.removeprefix("sqlite:///")).stat().st_mode & 0o777 == 0o664  # the group goes on with it
    client = MlflowClient(uri)
    stored = mirrored(uri)
    assert set(stored) == {*(run.id for run in runs), "figures of glue"}
    drawn = stored["figures of glue"].info.run_id
    assert [file.path for file in client.list_artifacts(drawn)] == [picture.name]
    for run in runs:
        child = stored[run.id]
        assert (child.info.status, child.info.end_time) == ("FINISHED", 1000 * (ENDED + run.spec["seed"]))
        assert child.info.end_time - child.info.start_time == 2000  # cost.job_seconds
        assert {file.path for file in client.list_artifacts(child.info.run_id)} == {"metrics.json", "log.txt"}
        assert child.data.params["seed"] == str(run.spec["seed"])
        assert child.data.metrics[SCORE] == read_metrics(run)["scores"]["test"]["tweets"]["balanced_accuracy"]
    assert len({stored[run.id].data.tags["emoe.setting"] for run in runs}) == 2
    strange = stored[runs[0].id]
    history = client.get_metric_history(strange.info.run_id, "step.loss")
    assert [(point.step, point.value) for point in history] == [(1, 0.5), (3, 0.25)]
    assert strange.data.params["remark._90_"] == strange.data.params["remark.149"] == "1"
    assert strange.data.params["remark.long"].startswith("['xxx")


def test_a_second_mirror_does_nothing_and_a_new_number_replaces_its_run(runs: list[Run], uri: str) -> None:
    mirror(runs, uri)
    first = {name: run.info.run_id for name, run in mirrored(uri).items()}
    assert mirror(runs, uri) == {"added": 0, "replaced": 0, "unchanged": 4}
    assert {name: run.info.run_id for name, run in mirrored(uri).items()} == first

    edit(runs[0], lambda metrics: metrics["scores"]["test"]["tweets"].update(balanced_accuracy=0.25))
    assert mirror(runs, uri) == {"added": 0, "replaced": 1, "unchanged": 3}
    stored = mirrored(uri)
    assert stored[runs[0].id].data.metrics[SCORE] == 0.25

    client = MlflowClient(uri)
    client.delete_tag(first[runs[1].id], "emoe.digest")  # the mirror was interrupted
    other = stored[runs[2].id]
    client.create_run(other.info.experiment_id, tags=dict(other.data.tags), run_name=runs[2].id)  # a second folder's
    assert mirror(runs, uri) == {"added": 0, "replaced": 2, "unchanged": 2}
    assert len(mirrored(uri)) == 4


def mirror_from(folder: Path, runs: list[Run], uri: str) -> None:
    os.chdir(folder)
    mirror(runs, uri)


def test_two_folders_mirror_into_one_new_database_at_once(runs: list[Run], uri: str, tmp_path: Path) -> None:
    folders = [Path.cwd(), shutil.copytree(Path.cwd(), tmp_path / "other")]
    forks = [start_fork(mirror_from, folder, runs[2 * number :][:2], uri) for number, folder in enumerate(folders)]
    for fork in forks:
        fork.join(240)
    assert [fork.exitcode for fork in forks] == [0, 0]
    assert set(mirrored(uri)) == {run.id for run in runs}


NO_DRIVER, PASSWORD = ModuleNotFoundError("No module named 'psycopg2'"), f"no answer of http://lab:{KEPT_QUIET}@db\nx"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (NO_DRIVER, r"'psycopg2'; for PostgreSQL: pip install 'emoe\[postgres\]'"),
        (OSError(28, "No space left on device", "metrics.json"), r"No space left on device: 'metrics\.json'"),
        (MlflowException(PASSWORD), r"no answer of http://lab:\*\*\*@db$"),
    ],
)
def test_a_refusal_is_one_line_without_the_password(runs: list[Run], error: Exception, message: str) -> None:
    address = f"postgresql://lab:{KEPT_QUIET}@db/mlflow"
    with mock.patch.object(mlflow, "MlflowClient", side_effect=error), pytest.raises(RunError) as refused:
        mirror(runs, address)
    assert re.match(rf"MLflow at postgresql://lab:\*\*\*@db.*{message}", str(refused.value))
    assert KEPT_QUIET not in str(refused.value)
    assert "\n" not in str(refused.value)


def test_passwords_are_hidden() -> None:
    for rest in ("lab:{}@db:5432/mlflow", "db/mlflow?user=lab&password={}&sslmode=require", "lab:{}@/@db/mlflow"):
        text = without_passwords(f"no answer of postgresql://{rest.format(KEPT_QUIET)} today")
        assert KEPT_QUIET not in text
        assert "***" in text


def test_no_library_reports_usage_unless_asked_to(tmp_path: Path) -> None:
    code = (
        "import os, benchmarks.__main__; from huggingface_hub.constants import HF_HUB_DISABLE_TELEMETRY as hub;"
        "from mlflow.telemetry.utils import is_telemetry_disabled; print(is_telemetry_disabled(), hub)"
    )
    # no variable by which mlflow knows a test
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    assert subprocess.check_output([sys.executable, "-c", code], env=environment, text=True) == "True True\n"
