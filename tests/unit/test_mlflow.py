"""Mirror runs in MLflow."""

from __future__ import annotations

import json
import os
import re
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import sqlalchemy
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from benchmarks.harness.base import RUNS, RunError
from benchmarks.harness.config.runs import Run
from benchmarks.harness.config.suite import plain_suite
from benchmarks.harness.results import mlflow
from benchmarks.harness.results.mlflow import mirror, name_in_mlflow, run_links
from benchmarks.harness.results.records import read_record
from tests import fake_runs
from tests.conftest import ROOT
from tests.fake_runs import records
from tests.planned import plan, smoke_run
from tests.programs import call

KEPT_QUIET = "S3cret"
ENDED = 1_700_000_000
SCORE = "test.tweets.balanced_accuracy"


@pytest.fixture
def runs(here: Path) -> list[Run]:
    """Write two seeds of two methods."""
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


def mirrored(uri: str) -> dict[str, Any]:
    """Return the stored runs by name; no name may occur twice."""
    client = MlflowClient(uri)
    stored = client.search_runs(
        [client.get_experiment_by_name("glue").experiment_id], max_results=1000
    )
    assert len({run.info.run_name for run in stored}) == len(stored)
    return {run.info.run_name: run for run in stored}


def curve(uri: str, run: Run, name: str) -> list[tuple[int, float]]:
    """Return the steps and the values of a number of a stored run."""
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name(run.benchmark)
    (stored,) = client.search_runs([experiment.experiment_id])
    history = client.get_metric_history(stored.info.run_id, name)
    return [(point.step, point.value) for point in history]


def edit(run: Run, change: Any) -> None:
    fake_runs.edit(run, change)
    os.utime(RUNS / run.folder / "metrics.json", (ENDED, ENDED))


def test_runs_have_their_numbers_and_a_second_mirror_changes_only_new_numbers(
    runs: list[Run], tmp_path: Path
) -> None:
    uri = f"sqlite:///{tmp_path}/m.db"
    edit(
        runs[0], lambda metrics: metrics.update(curve=[0.5, None, 0.25])
    )  # None: the loss diverged
    assert mirror(records(runs), uri) == {"added": len(runs), "replaced": 0, "unchanged": 0}
    client, stored = MlflowClient(uri), mirrored(uri)
    assert set(stored) == {name_in_mlflow(run) for run in runs}
    for run in runs:
        copy, scores = stored[name_in_mlflow(run)], read_record(run).metrics.scores or {}
        assert (copy.info.status, copy.info.end_time) == (
            "FINISHED",
            1000 * (ENDED + run.spec["seed"]),
        )
        assert copy.info.end_time - copy.info.start_time == 2000  # cost.job_seconds
        assert {file.path for file in client.list_artifacts(copy.info.run_id)} == {
            "metrics.json",
            "log.txt",
        }
        assert copy.data.params["seed"] == str(run.spec["seed"])
        assert copy.data.metrics[SCORE] == scores["test"]["tweets"]["balanced_accuracy"]
    settings = Counter(copy.data.tags["setting"] for copy in stored.values())
    assert sorted(settings.values()) == [2, 2]  # two seeds of two methods
    history = client.get_metric_history(stored[name_in_mlflow(runs[0])].info.run_id, "step.loss")
    assert [(point.step, point.value) for point in history] == [(1, 0.5), (3, 0.25)]

    assert mirror(records(runs), uri) == {"added": 0, "replaced": 0, "unchanged": 4}
    assert {run.info.run_id for run in mirrored(uri).values()} == {
        run.info.run_id for run in stored.values()
    }
    edit(
        runs[0], lambda metrics: metrics["scores"]["test"]["tweets"].update(balanced_accuracy=0.25)
    )
    assert mirror(records(runs), uri) == {"added": 0, "replaced": 1, "unchanged": 3}
    stored = mirrored(uri)
    assert (len(stored), stored[name_in_mlflow(runs[0])].data.metrics[SCORE]) == (4, 0.25)
    client.delete_tag(
        stored[name_in_mlflow(runs[0])].info.run_id, "emoe.digest"
    )  # the mirror was interrupted
    assert mirror(records(runs), uri)["replaced"] == 1
    assert len(mirrored(uri)) == 4


def test_a_named_pipe_beside_the_numbers_is_left_out(runs: list[Run], tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/m.db"
    log = RUNS / runs[0].folder / "log.txt"
    log.unlink(missing_ok=True)
    os.mkfifo(log)
    mirror(records(runs[:1]), uri)
    (copy,) = mirrored(uri).values()
    files = MlflowClient(uri).list_artifacts(copy.info.run_id)
    assert [file.path for file in files] == ["metrics.json"]


def test_dev_scores_of_several_tasks_and_held_out_losses_have_their_steps(
    here: Path, tmp_path: Path
) -> None:
    uri = f"sqlite:///{tmp_path}/m.db"
    several_tasks = smoke_run("multitask", "emoe")
    instructions = smoke_run("llama", "emoe")
    fake_runs.write_runs([several_tasks, instructions])
    dev_curve = [{"epoch": 1.0, "mean_score": 0.5}, {"epoch": 2.0, "mean_score": 0.75}]
    edit(several_tasks, lambda metrics: metrics.update(dev_curve=dev_curve))
    # None: the loss diverged
    losses = [{"step": 2, "loss": 0.5}, {"step": 4, "loss": None}, {"step": 6, "loss": 0.25}]
    edit(instructions, lambda metrics: metrics.update(held_out_curve=losses))
    mirror(records([several_tasks, instructions]), uri)
    assert curve(uri, several_tasks, "epoch.mean_score") == [(1, 0.5), (2, 0.75)]
    assert curve(uri, instructions, "held_out.loss") == [(2, 0.5), (6, 0.25)]


def test_a_link_opens_the_runs_with_their_score(runs: list[Run], tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/m.db"
    mirror(records(runs), uri)
    client = MlflowClient(uri)
    client.create_experiment("another")  # is not listed
    experiment = client.get_experiment_by_name("glue")
    assert run_links(uri, "http://here:1/") == [
        f"glue: http://here:1/#/experiments/{experiment.experiment_id}/runs"
        "?workflowType=machine_learning&viewStateShareKey=scores"
    ]
    columns = json.loads(experiment.tags["mlflow.sharedViewState.scores"])["selectedColumns"]
    assert columns[0] == f"metrics.`{SCORE}`"


def test_the_command_prints_the_links_and_opens_the_page(
    runs: list[Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = f"sqlite:///{tmp_path}/m.db"
    mirror(records(runs), uri)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with mock.patch("os.execve") as started:
        text = call("ui", "--suite", "mini", "--port", "5123")
    assert text.splitlines()[1:] == run_links(uri, "http://127.0.0.1:5123")
    _program, arguments, environment = started.call_args.args
    # `ps` shows arguments to other users, and a store may have a password
    assert arguments[1:] == ["-m", "mlflow", "ui", "--port", "5123"]
    assert environment["MLFLOW_BACKEND_STORE_URI"] == uri
    assert environment.items() >= os.environ.items()


def test_links_to_a_server_have_no_password(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"https://lab:{KEPT_QUIET}@mlflow.org/team")
    monkeypatch.setattr(mlflow, "run_links", lambda _uri, server: [f"glue: {server}"])
    text = call("ui", "--suite", "mini")
    assert text.splitlines()[1:] == ["glue: https://mlflow.org/team"]


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("foo://lab:{password}@db/mlflow", "MLflow at foo://lab:***@db/mlflow: .*unsupported URI"),
        ("sqlite:///{folder}/no.db", "MLflow at sqlite:.*/no.db: .*file is not a database$"),
        ("http://lab:{password}@127.0.0.1:1", "MLflow at http://lab:***@127.*refused"),
        (
            "postgresql://lab:{password}@127.0.0.1:1/mlflow",
            "MLflow at postgresql://lab:***@127.*[Cc]onnection refused",
        ),
    ],
)
def test_links_of_an_unusable_store_are_one_line_without_the_password(
    uri: str, message: str, here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    (tmp_path / "no.db").write_text("This is no database, only a text of some length.")
    store = uri.format(password=KEPT_QUIET, folder=tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    with pytest.raises(RunError, match=message.replace("*" * 3, r"\*\*\*")) as refused:
        call("ui", "--suite", "mini")
    assert "\n" not in str(refused.value)
    assert KEPT_QUIET not in str(refused.value)


def test_a_run_with_the_name_of_an_older_mirror_is_replaced(
    runs: list[Run], tmp_path: Path
) -> None:
    uri = f"sqlite:///{tmp_path}/m.db"
    mirror(records(runs), uri)
    stored = mirrored(uri)[name_in_mlflow(runs[0])]
    MlflowClient(uri).update_run(stored.info.run_id, name=runs[0].name)
    assert mirror(records(runs), uri) == {"added": 0, "replaced": 1, "unchanged": 3}
    assert set(mirrored(uri)) == {name_in_mlflow(run) for run in runs}


def test_a_deleted_experiment_is_restored_without_the_runs_that_were_replaced(
    runs: list[Run], tmp_path: Path
) -> None:
    uri = f"sqlite:///{tmp_path}/m.db"
    mirror(records(runs), uri)
    edit(
        runs[0], lambda metrics: metrics["scores"]["test"]["tweets"].update(balanced_accuracy=0.25)
    )
    os.utime(runs[0].metrics_file, (ENDED, ENDED + 60))
    mirror(records(runs), uri)
    stored = mirrored(uri)
    client = MlflowClient(uri)
    client.delete_experiment(client.get_experiment_by_name("glue").experiment_id)
    assert mirror(records(runs), uri) == {"added": 0, "replaced": 0, "unchanged": 4}
    restored = mirrored(uri)
    assert {run.info.run_id for run in restored.values()} == {
        run.info.run_id for run in stored.values()
    }


@pytest.mark.parametrize("suite", ["smoke", "mini"])
def test_names_differ_in_the_letters_that_mlflow_shows(suite: str) -> None:
    planned = plain_suite(suite).runs
    names = {name_in_mlflow(run)[:30] for run in planned}
    assert len(names) == len(planned)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            OSError(28, "No space left on device", "metrics.json"),
            r"No space left on device: 'metrics\.json'",
        ),
        (
            MlflowException(f"no answer of http://lab:{KEPT_QUIET}@db\nx"),
            r"no answer of http://lab:\*\*\*@db$",
        ),
    ],
)
def test_a_refusal_is_one_line_without_the_password(
    runs: list[Run], error: Exception, message: str
) -> None:
    address = f"https://lab:{KEPT_QUIET}@db/mlflow"
    with (
        mock.patch.object(mlflow, "MlflowClient", side_effect=error),
        pytest.raises(RunError) as refused,
    ):
        mirror(records(runs), address)
    assert re.match(rf"MLflow at https://lab:\*\*\*@db.*{message}", str(refused.value))
    assert "\n" not in str(refused.value)


def test_a_postgresql_that_does_not_answer_is_one_line_without_the_password(
    runs: list[Run],
) -> None:
    with pytest.raises(RunError) as refused:
        mirror(records(runs), f"postgresql://lab:{KEPT_QUIET}@127.0.0.1:1/mlflow")
    assert re.match(
        r"MLflow at postgresql://lab:\*\*\*@127.*[Cc]onnection refused", str(refused.value)
    )
    assert "\n" not in str(refused.value)


def test_the_page_of_an_empty_store_says_how_runs_get_there(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/m.db")
    with pytest.raises(RunError, match=r"no run is in MLflow yet: `python -m benchmarks mirror "):
        call("ui", "--suite", "mini")


@pytest.mark.slow
def test_a_server_that_refuses_connections_is_one_line_within_a_minute(runs: list[Run]) -> None:
    start = time.monotonic()
    with pytest.raises(RunError) as refused:
        mirror(records(runs), "http://127.0.0.1:9")
    assert time.monotonic() - start < 60
    assert str(refused.value).startswith("MLflow at http://127.0.0.1:9: ")
    assert "\n" not in str(refused.value)


def test_the_options_of_a_sqlite_address_are_no_part_of_its_file(
    runs: list[Run], tmp_path: Path
) -> None:
    folder = tmp_path / "store"
    uri = f"sqlite:///{folder}/m.db?timeout=30"
    assert mirror(records(runs), uri)["added"] == len(runs)
    assert {file.name for file in folder.iterdir()} == {"m.db", ".m.db.lock"}


@pytest.mark.slow
def test_a_locked_file_is_one_line_with_the_way_out(runs: list[Run], tmp_path: Path) -> None:
    file = tmp_path / "m.db"
    other = sqlite3.connect(file, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(
        RunError, match=r"the database is locked; end the other process that uses it, and repeat$"
    ):
        mirror(records(runs), f"sqlite:///{file}")
    other.close()
    assert mirror(records(runs), f"sqlite:///{file}")["added"] == len(runs)


def test_a_postgresql_store_is_locked_before_its_tables_are_created_until_the_last_run(
    runs: list[Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mirrors of two results folders then wait for each other. SQLite stands in for the database."""
    steps = []

    class Connection(sqlite3.Connection):
        def close(self) -> None:
            steps.append("freed")
            super().close()

    class Client(MlflowClient):
        def __init__(self, _uri: str) -> None:
            steps.append("opened")
            super().__init__(f"sqlite:///{tmp_path}/m.db")

        def set_terminated(self, *arguments: Any, **options: Any) -> None:
            steps.append("wrote")
            super().set_terminated(*arguments, **options)

    def connect() -> Connection:
        connection = sqlite3.connect(tmp_path / "lock.db", factory=Connection)
        connection.create_function("pg_advisory_lock", 1, lambda _number: steps.append("locked"))
        return connection

    def create_engine(_uri: str, **options: Any) -> sqlalchemy.Engine:
        return sqlalchemy.create_engine("sqlite://", creator=connect, **options)

    monkeypatch.setattr(mlflow, "create_engine", create_engine)
    monkeypatch.setattr(mlflow, "MlflowClient", Client)
    assert mirror(records(runs), "postgresql://lab@db/mlflow")["added"] == len(runs)
    assert steps == ["locked", "opened", *["wrote"] * len(runs), "freed"]


def test_no_library_reports_usage_unless_asked_to(tmp_path: Path) -> None:
    code = (
        "import os, benchmarks.__main__; from huggingface_hub.constants import HF_HUB_DISABLE_TELEMETRY as hub;"
        "from mlflow.telemetry.utils import is_telemetry_disabled; print(is_telemetry_disabled(), hub)"
    )
    # mlflow must not detect a test
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    assert (
        subprocess.check_output([sys.executable, "-c", code], env=environment, text=True)
        == "True True\n"
    )
