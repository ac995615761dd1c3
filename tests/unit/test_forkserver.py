"""Commands that share their imports have the same numbers, streams and exit codes as alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import psutil
import pytest
from transformers.trainer import TRAINER_STATE_NAME

from benchmarks.harness.config.runs import Run, run_from_spec
from benchmarks.harness.config.suite import load_suite
from benchmarks.harness.run.forkserver import ADDRESS, ONE_THREAD, Server
from benchmarks.harness.training.checkpoints import keep_complete_checkpoints
from tests import executed
from tests.checkout import Checkout, wait_for
from tests.executed import numbers, prepare

pytestmark = pytest.mark.slow
Process = subprocess.Popen[str]
Forks = Callable[[], list[psutil.Process]]
_OF_PYTEST = "PYTEST_CURRENT_TEST"  # another value in a fixture than in its test
RUNS = {run.spec["method"]["name"]: run for run in load_suite({"suite": "smoke"}).runs_of("glue")}


# starts a server that has the text pipeline, whose import takes long, and shows the environment of its commands
STARTER = """
import json, os, time
from benchmarks.harness.run.forkserver import Server
Server(["glue"]).start()
print(json.dumps(dict(os.environ)), flush=True)
time.sleep(600)
"""


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy the working tree, because an edit of the tree itself would end the forks."""
    folder = tmp_path_factory.mktemp("copy")
    return Checkout(folder).folder


@pytest.fixture(scope="module")
def starter(copy: Path) -> Iterator[Process]:
    """Start a process that starts a server, as Snakemake does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(copy))
        patch.chdir(copy)
        process = start(program=("-c", STARTER))
        assert process.stdout
        for name, value in json.loads(process.stdout.readline()).items():
            patch.setenv(name, value)
        yield process
        process.kill()
        process.communicate()


@pytest.fixture
def forks(starter: Process, workdir: Path) -> Forks:
    """Return a function that lists the working forks; change to an empty folder with the real sentences."""

    def working() -> list[psutil.Process]:
        (server,) = psutil.Process(starter.pid).children()
        return server.children()

    wait_for(lambda: not working())  # a fork lives a moment longer than the command that it did
    return working


def start(
    *arguments: object, program: tuple[str, str] = ("-m", "benchmarks"), **variables: str
) -> Process:
    """Start ``python -m benchmarks …`` as Snakemake starts a job."""
    environment = {**os.environ, **ONE_THREAD, **variables}
    environment.pop(_OF_PYTEST, None)
    command = [sys.executable, *program, *map(str, arguments)]
    return Process(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def has_saved_since(path: Path, since: Path | None) -> bool:
    # keep_complete_checkpoints would remove the checkpoint that is being written
    written = path.parent.glob(f"checkpoints/checkpoint-*/{TRAINER_STATE_NAME}")
    return any(state.parent != since for state in written)


def small(run: Run, folder: str, **training: object) -> Path:
    spec = {
        **run.spec,
        "training": {**run.spec["training"], "train_rows": 48, "eval_rows": 30, **training},
    }
    return prepare(run_from_spec(spec), folder)


def finish(path: Path, **variables: str) -> dict[str, object]:
    process = start("run", path, **variables)
    _, shown = process.communicate()
    assert process.returncode == 0, shown
    return numbers(path)


def test_forks_have_the_numbers_of_a_process_without_a_server_in_any_order(forks: Forks) -> None:
    alone = finish(small(RUNS["emoe"], "alone"), **{ADDRESS: ""})
    first, other, second = (
        finish(small(RUNS[method], folder))
        for method, folder in (("emoe", "first"), ("gmoe_published", "first"), ("emoe", "second"))
    )
    assert first == second == alone
    # in this process, whose environment is another one from then on
    assert other == executed.finish(small(RUNS["gmoe_published"], "alone"))
    paths = [small(RUNS["emoe"], folder) for folder in ("alone", "second")]
    seconds = [
        json.loads(path.with_name("metrics.json").read_text())["cost"]["startup_seconds"]
        for path in paths
    ]
    assert seconds[0] > 3 * seconds[1]  # the server has imported all by then


ASK = "from benchmarks.harness.run.forkserver import run_in_fork; print(run_in_fork(['check', '--sweet']))"


def ask(**variables: str) -> str:
    """Return the exit status of a command that is forked, or ``None`` if it is not forked."""
    process = start(program=("-c", ASK), **variables)
    return process.communicate()[0].splitlines()[-1]


def test_a_command_with_another_environment_or_no_server_is_not_forked(forks: Forks) -> None:
    """Variables that a shell keeps for itself do not count."""
    assert ask(PS1="(.venv) ") == "2"
    assert ask(OMP_NUM_THREADS="2") == "None"
    assert ask(**{ADDRESS: "/nowhere/socket"}) == "None"


def test_a_command_after_an_edit_of_code_or_settings_is_not_forked(
    forks: Forks, copy: Path
) -> None:
    """The server has read the files before the edit, and a fork would write tables from them."""
    for name in ("benchmarks/metrics.yaml", "emoe/config.py", "config/smoke.yaml"):
        file = copy / name
        text, times = file.read_text(), file.stat()
        file.write_text(text + "# edited\n")
        assert ask() == "None", name
        file.write_text(text)
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
        assert ask() == "2", name
    added = copy / "benchmarks/harness/report/added.py"
    added.write_text("")
    assert ask() == "None"
    added.unlink()


def test_without_a_short_folder_for_its_socket_the_workflow_goes_on_without_a_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / ("long" * 30)
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.delenv(ADDRESS, raising=False)
    server = Server([])
    server.start()
    assert ADDRESS not in os.environ
    server.stop()
    assert not list(folder.iterdir())
    warning = capsys.readouterr().err
    assert warning.startswith(f"warning: no server for imports in {folder}, so every run imports")
    assert "AF_UNIX path too long (TMPDIR sets the folder)\n" in warning


def test_a_killed_caller_ends_its_fork_and_the_run_resumes(forks: Forks) -> None:
    whole = finish(small(RUNS["vanilla"], "whole", epochs=12))
    path = small(RUNS["vanilla"], "killed", epochs=12)
    for number in (signal.SIGKILL, signal.SIGTERM):
        steps = keep_complete_checkpoints(path.parent / "checkpoints", print)
        process = start("run", path)
        wait_for(partial(has_saved_since, path, steps))
        process.send_signal(number)
        assert process.wait() == -number
        wait_for(lambda: not forks(), 10)
        assert not (path.parent / "metrics.json").exists()
    assert finish(path) == whole
    # a command whose fork is killed has failed
    path = small(RUNS["vanilla"], "runs", epochs=200)
    process = start("run", path)
    wait_for(partial(has_saved_since, path, None))
    forks()[0].kill()
    assert "was killed, perhaps because memory ran out" in process.communicate()[1]
    assert process.returncode == 1


def test_an_interrupted_caller_prints_nothing_and_ends_its_fork(forks: Forks) -> None:
    process = start("run", small(RUNS["vanilla"], "interrupted", epochs=200))
    wait_for(lambda: bool(forks()))
    process.send_signal(signal.SIGINT)
    assert process.communicate()[1] == ""
    assert process.returncode == 130
    wait_for(lambda: not forks(), 10)


def test_a_server_ends_with_the_process_that_started_it(starter: Process) -> None:
    """This is the last test, because the others use the server."""
    (server,) = psutil.Process(starter.pid).children()
    starter.kill()
    wait_for(lambda: not psutil.pid_exists(server.pid) and not Path(os.environ[ADDRESS]).exists())
