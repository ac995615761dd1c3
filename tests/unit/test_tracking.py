"""The mirror in MLflow: what it holds, SQLite's file, and PostgreSQL behind a real server."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from benchmarks.harness.base.errors import RunError
from benchmarks.harness.base.paths import RUNS
from benchmarks.harness.base.secrets import without_passwords
from benchmarks.harness.config.runs import Run, plan
from benchmarks.harness.results import mlflow_store, tracking
from benchmarks.harness.results.tracking import mirror
from tests import fake_runs
from tests.checkout import wait_for
from tests.conftest import ROOT
from tests.forked import start as start_fork

KEPT_QUIET = "S3cret"


@pytest.fixture
def runs(here: Path) -> list[Run]:
    """Two seeds of two methods."""
    planned = [run for run in plan(["glue"], "mini") if run.spec["task"]["name"] == "tweets"]
    found = [
        run
        for method in ("vanilla", "emoe")
        for run in [run for run in planned if run.spec["method"]["name"] == method and run.spec["seed"] < 2]
    ]
    fake_runs.write_runs(found)
    return found


def children_and_parents(uri: str) -> tuple[dict, dict]:
    client = MlflowClient(uri)
    found = client.search_runs([client.get_experiment_by_name("glue").experiment_id], max_results=1000)
    children = [run for run in found if "mlflow.parentRunId" in run.data.tags]
    parents = [run for run in found if "mlflow.parentRunId" not in run.data.tags]
    by_id = {run.data.tags["emoe.run_id"]: run for run in children}
    assert len(by_id) == len(children)  # none twice
    return by_id, {run.info.run_id: run for run in parents}


def test_parents_carry_the_means_of_their_seeds_and_runs_their_times_and_files(runs: list[Run], tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/m.db"
    ended = 1_700_000_000
    for run in runs:
        os.utime(RUNS / run.folder / "metrics.json", (ended, ended + run.spec["seed"]))
        (RUNS / run.folder / "log.txt").write_text("trained")
    picture = Path("results/mini/figures/glue_scores.png")
    picture.parent.mkdir(parents=True)
    picture.write_bytes(b"a picture")
    mirror(runs, uri, {"glue": [picture, picture.with_name("not_drawn.png")]})
    children, parents = children_and_parents(uri)
    assert set(children) == {run.id for run in runs}
    seconds = 1000 * json.loads((RUNS / runs[0].folder / "metrics.json").read_text())["cost"]["job_seconds"]
    by_parent: dict[str, list] = {}
    for run in runs:
        child = children[run.id]
        assert child.info.end_time == 1000 * (ended + run.spec["seed"])
        assert child.info.end_time - child.info.start_time == seconds
        assert child.info.status == "FINISHED"
        assert (Path(child.info.artifact_uri.removeprefix("file://")) / "log.txt").read_text() == "trained"
        names = {file.path for file in MlflowClient(uri).list_artifacts(child.info.run_id)}
        assert names == {"metrics.json", "log.txt"}  # a made-up run has no run.json
        by_parent.setdefault(child.data.tags["mlflow.parentRunId"], []).append(child)
    assert len(by_parent) == 2
    name = "test.tweets.balanced_accuracy"
    for parent, seeds in by_parent.items():
        assert len(seeds) == 2
        found = parents.pop(parent)
        values = [seed.data.metrics[name] for seed in seeds]
        assert found.data.metrics[name] == pytest.approx(sum(values) / 2)
        assert found.data.metrics[f"{name}.std"] == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
        assert found.data.metrics["seeds"] == 2
        assert (found.info.start_time, found.info.end_time) == (1000 * ended - seconds, 1000 * (ended + 1))
    (figures,) = parents.values()
    assert [file.path for file in MlflowClient(uri).list_artifacts(figures.info.run_id)] == [picture.name]
    experiment = MlflowClient(uri).get_experiment_by_name("glue")
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"

    # another number, and the mean follows
    path = RUNS / runs[0].folder / "metrics.json"
    content = json.loads(path.read_text())
    content["scores"]["test"]["tweets"]["balanced_accuracy"] = 0.25
    path.write_text(json.dumps(content))
    assert mirror(runs, uri) == {"added": 0, "replaced": 1, "unchanged": 3}
    children, parents = children_and_parents(uri)
    changed = parents[children[runs[0].id].data.tags["mlflow.parentRunId"]]
    siblings = [c for c in children.values() if c.data.tags["mlflow.parentRunId"] == changed.info.run_id]
    assert changed.data.metrics[name] == pytest.approx(sum(c.data.metrics[name] for c in siblings) / 2)
    assert 0.25 in {c.data.metrics[name] for c in siblings}


def test_a_database_holds_what_mlflows_client_would_write(
    runs: list[Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def written(uri: str) -> dict[str, dict]:
        mirror(runs, uri)
        client = MlflowClient(uri)
        found = client.search_runs([client.get_experiment_by_name("glue").experiment_id])
        names = {run.info.run_id: run.info.run_name for run in found}
        return {
            run.info.run_name: {
                "info": {
                    key: value
                    for key, value in dict(run.info).items()
                    if key not in ("run_id", "run_uuid", "artifact_uri")
                },
                "tags": {key: names.get(value, value) for key, value in run.data.tags.items()},
                "params": run.data.params,
                "metrics": run.data.metrics,
                "points": {
                    key: [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, key)]
                    for key in run.data.metrics
                },
                "files": [file.path for file in client.list_artifacts(run.info.run_id)],
            }
            for run in found
        }

    path = RUNS / runs[0].folder / "metrics.json"
    content = json.loads(path.read_text())
    content["curve"] = [0.5, 0.25, 0.25]
    path.write_text(json.dumps(content))
    at_once = written(f"sqlite:///{tmp_path}/at_once.db")
    monkeypatch.setattr(tracking, "open_store", mlflow_store.Store)
    assert at_once == written(f"sqlite:///{tmp_path}/by_client.db")
    assert at_once[runs[0].id]["points"]["step.loss"] == [(1, 0.5), (2, 0.25), (3, 0.25)]
    assert at_once[runs[0].id]["metrics"]["step.loss"] == 0.25


def test_a_value_that_is_too_long_for_mlflow_says_where_it_is_whole(runs: list[Run], tmp_path: Path) -> None:
    whole = [f"a task of many {number:04}" for number in range(500)]
    long = dataclasses.replace(runs[0], spec={**runs[0].spec, "remark": whole})
    (RUNS / long.folder / "run.json").write_text(json.dumps(long.spec))
    mirror([long], uri := f"sqlite:///{tmp_path}/m.db")
    (child,) = children_and_parents(uri)[0].values()
    value = child.data.params["remark"]
    assert str(whole).startswith(value.removesuffix("… (whole in run.json, among the files)"))
    assert 5900 < len(value) <= 6000
    kept = Path(child.info.artifact_uri.removeprefix("file://")) / "run.json"
    assert json.loads(kept.read_text())["remark"] == whole
    assert child.data.params["seed"] == "0"


def test_a_kill_while_the_file_is_created_breaks_no_later_mirror(runs: list[Run], tmp_path: Path) -> None:
    file = tmp_path / "m.db"
    code = f"from benchmarks.harness.results.tracking import mirror; mirror([], 'sqlite:///{file}')"
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}) as process:
        wait_for(lambda: [path for path in tmp_path.glob(".m.db.*") if not path.name.endswith("-journal")], 120)
        process.send_signal(signal.SIGKILL)
    assert not file.exists()
    before = os.umask(0o002)
    try:
        assert mirror(runs, f"sqlite:///{file}")["added"] == len(runs)
    finally:
        os.umask(before)
    assert file.stat().st_mode & 0o777 == 0o664  # others of the group go on with it


@pytest.mark.parametrize(
    "uri",
    [
        f"postgresql://lab:{KEPT_QUIET}@db:5432/mlflow",
        f"https://lab:{KEPT_QUIET}@lab.org",
        f"postgresql://db/mlflow?user=lab&password={KEPT_QUIET}&sslmode=require",
        f"mysql://lab:{KEPT_QUIET}@/@db/mlflow",
    ],
)
def test_passwords_are_hidden(uri: str) -> None:
    assert KEPT_QUIET not in without_passwords(f"no answer of {uri} today")
    assert "***" in without_passwords(uri)


# PostgreSQL

_BINARIES = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
_INITDB = shutil.which("initdb") or (str(_BINARIES[-1]) if _BINARIES else None)
postgres_present = pytest.mark.skipif(
    _INITDB is None or importlib.util.find_spec("psycopg2") is None,
    reason="wants Debian's postgresql, and pip's psycopg2-binary",
)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.fixture
def postgres() -> Iterator[str]:
    """A server of this test alone, which root starts as another user, as PostgreSQL demands; the address with its password."""
    assert _INITDB
    programs = Path(_INITDB).resolve().parent
    user = {"user": "nobody"} if os.geteuid() == 0 else {}
    folder = Path(tempfile.mkdtemp(prefix="emoe-postgres-"))
    secret, port = folder / "secret", free_port()
    secret.write_text(KEPT_QUIET)
    if user:
        for path in (folder, secret):
            shutil.chown(path, "nobody")
    options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder} -c fsync=off"

    def call(name: str, *words: str, check: bool = True) -> None:
        command = [programs / name, "-D", folder / "data", *words]
        subprocess.run(command, check=check, cwd=folder, stdout=subprocess.DEVNULL, **user)

    try:
        call("initdb", "-U", "lab", "-A", "scram-sha-256", "--pwfile", str(secret))
        call("pg_ctl", "-w", "-l", str(folder / "log"), "-o", options, "start")
        yield f"postgresql://lab:{KEPT_QUIET}@127.0.0.1:{port}/postgres"
    finally:
        call("pg_ctl", "-m", "immediate", "stop", check=False)
        shutil.rmtree(folder)


def test_no_library_tells_its_makers_what_is_done_here_unless_asked_to(tmp_path: Path) -> None:
    asks = (
        "from huggingface_hub.constants import HF_HUB_DISABLE_TELEMETRY as hub;"
        "from mlflow.telemetry.utils import is_telemetry_disabled; print(is_telemetry_disabled(), hub)"
    )
    # nothing by which mlflow would know a test
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}

    def said(code: str, **variables: str) -> str:
        command = [sys.executable, "-c", f"import os, benchmarks.__main__; {code}"]
        return subprocess.check_output(command, env={**environment, **variables}, text=True)

    assert said(asks) == "True True\n"
    shown = "print(*(os.environ[name] for name in ('MLFLOW_DISABLE_TELEMETRY', 'HF_HUB_DISABLE_TELEMETRY')))"
    assert said(shown, MLFLOW_DISABLE_TELEMETRY="false", HF_HUB_DISABLE_TELEMETRY="0") == "false 0\n"


@pytest.mark.slow
@postgres_present
def test_many_mirrors_at_once_lose_no_run_and_make_none_twice(
    runs: list[Run],
    postgres: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    port = free_port()
    server = f"http://127.0.0.1:{port}"
    words = ["server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    words += ["--artifacts-destination", str(tmp_path / "artifacts")]
    # without its nine processes for jobs of other kinds, which import for two minutes of a core
    environment = {**os.environ, "MLFLOW_BACKEND_STORE_URI": postgres, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    MlflowClient(postgres).search_experiments()  # the tables
    with subprocess.Popen(
        [sys.executable, "-m", "mlflow", *words], env=environment, cwd=tmp_path, start_new_session=True
    ) as process:
        try:

            def answers() -> bool:
                with socket.socket() as found:
                    return found.connect_ex(("127.0.0.1", port)) == 0

            wait_for(answers, 120)
            # the first mirror says where files are kept; those that a server keeps could not be reached around it
            mirror(runs[:1], postgres)
            # each has a run that another one has, too
            parts = [(runs[place : place + 2], uri) for place in range(3) for uri in (server, postgres)]
            started = [start_fork(mirror, part, uri) for part, uri in parts]
            for one in started:
                one.join(240)
            assert [one.exitcode for one in started] == [0] * len(parts)
            for uri in (server, postgres):
                assert mirror(runs, uri) == {"added": 0, "replaced": 0, "unchanged": len(runs)}
                children, parents = children_and_parents(uri)
                assert set(children) == {run.id for run in runs}
                assert len(parents) == 2
            stored = MlflowClient(server).list_artifacts(children[runs[0].id].info.run_id)
            assert [file.path for file in stored] == ["metrics.json"]
        finally:
            os.killpg(process.pid, signal.SIGKILL)
    monkeypatch.setattr("mlflow.store.db.utils.MAX_RETRY_COUNT", 2)  # of ten, which take two minutes
    with pytest.raises(RunError, match=r"MLflow at postgresql://lab:\*\*\*@") as refused:
        mirror(runs, postgres.replace("/postgres", "/none").replace(f":{KEPT_QUIET}@", f":x{KEPT_QUIET}@"))
    assert KEPT_QUIET not in str(refused.value)
    assert "\n" not in str(refused.value)
    assert KEPT_QUIET not in "".join(capfd.readouterr())
