"""Commands that share their imports: the same numbers, streams and endings as by themselves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import psutil
import pytest
from transformers.trainer import TRAINER_STATE_NAME

from benchmarks.harness.config.runs import Run, run_from_spec
from benchmarks.harness.config.suite import load_suite
from benchmarks.harness.run.forkserver import ADDRESS, ONE_THREAD, Server
from benchmarks.harness.training.checkpoints import last_complete_checkpoint
from tests import executed
from tests.checkout import wait_for
from tests.conftest import ROOT
from tests.executed import numbers, prepare

MODULES = ["benchmarks.glue.pipeline", "benchmarks.harness.run.execution"]
_OF_PYTEST = "PYTEST_CURRENT_TEST"  # another value in a fixture than in its test
RUNS = {run.spec["method"]["name"]: run for run in load_suite({"suite": "smoke"}).runs_of("glue")}


@pytest.fixture(scope="module")
def started() -> Iterator[Server]:
    """A server that has the text pipeline; to import that takes longer than what is asked of it."""
    found = Server(MODULES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        with pytest.MonkeyPatch.context() as meanwhile:
            meanwhile.delenv(_OF_PYTEST)
            found.start()
        yield found
        found.stop()


@pytest.fixture
def server(started: Server, workdir: Path) -> Server:
    """The server, and an empty working directory with the real sentences."""
    wait_for(lambda: not forks())  # a fork lives a moment longer than the command that it did
    return started


def start(
    *arguments: object, program: tuple[str, str] = ("-m", "benchmarks"), **variables: str
) -> subprocess.Popen[str]:
    """``python -m benchmarks …`` as Snakemake starts a job."""
    environment = {**os.environ, **ONE_THREAD, **variables}
    return subprocess.Popen(
        [sys.executable, *program, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={name: value for name, value in environment.items() if name != _OF_PYTEST},
    )


def forks() -> list[psutil.Process]:
    """What the server of this process has started and still works."""
    found: list[psutil.Process] = []
    for child in psutil.Process().children():
        with suppress(psutil.Error):  # one that has ended, and that nobody has waited for, says nothing of the others
            found += child.children() if "serve" in child.cmdline() else []
    return found


def has_gone_on(path: Path, since: Path | None) -> bool:
    # looking for the last complete one would remove the one that is being written
    written = path.parent.glob(f"checkpoints/checkpoint-*/{TRAINER_STATE_NAME}")
    return any(state.parent != since for state in written)


def small(run: Run, place: str, **training: object) -> Path:
    spec = {**run.spec, "training": {**run.spec["training"], "train_rows": 48, "eval_rows": 30, **training}}
    return prepare(run_from_spec(spec), place)


def finish(path: Path, **variables: str) -> dict[str, object]:
    process = start("run", path, **variables)
    _, shown = process.communicate()
    assert process.returncode == 0, shown
    assert "finished in" in shown
    return numbers(path)


def test_numbers_are_those_of_a_process_of_ones_own_in_any_order(server: Server) -> None:
    methods = ["emoe", "gmoe_published"]
    alone = {"emoe": finish(small(RUNS["emoe"], "alone"), **{ADDRESS: ""})}
    shared = [
        {method: finish(small(RUNS[method], place)) for method in order}
        for place, order in (("first", methods), ("second", methods[::-1]))
    ]
    # in this process, whose environment is another one from then on
    alone["gmoe_published"] = executed.finish(small(RUNS["gmoe_published"], "alone"))
    assert shared == [alone, alone]
    cost = [json.loads(path.read_text())["cost"] for path in sorted(Path().glob("*/glue/*emoe-*/metrics.json"))]
    assert cost[0]["startup_seconds"] > 3 * cost[-1]["startup_seconds"]  # the server has imported all by then


def test_a_command_has_its_own_folder_streams_and_exit_status(server: Server, tmp_path: Path) -> None:
    found = start("run", "nowhere/run.json")
    assert found.communicate() == (
        "",
        "error: nowhere/run.json does not exist; the workflow writes it when it runs `nowhere/metrics.json`\n",
    )
    assert found.returncode == 1
    found = start("check", "--sweet", "mini")
    assert "No such option" in found.communicate()[1]
    assert found.returncode == 2
    wait_for(lambda: not forks())


def test_another_environment_or_no_server_is_no_fork(server: Server) -> None:
    """What a shell keeps for itself does not count: the shell of a job drops the prompt of an activated environment."""
    ask = "from benchmarks.harness.run.forkserver import ask; print(ask(['check', '--sweet']))"
    for variables, status in (
        ({}, "2"),
        ({"PS1": "(.venv) ", "PS2": "> ", "PS4": "+ ", "IFS": ":", "OPTIND": "2", "SHELLOPTS": "braceexpand"}, "2"),
        ({"OMP_NUM_THREADS": "2"}, "None"),
        ({ADDRESS: "/nowhere/socket"}, "None"),
    ):
        process = start(program=("-c", ask), **variables)
        assert process.communicate()[0].splitlines()[-1] == status


def test_what_ends_the_caller_ends_the_fork_and_the_run_goes_on_from_there(server: Server) -> None:
    whole = finish(small(RUNS["vanilla"], "whole", epochs=12))
    path = small(RUNS["vanilla"], "killed", epochs=12)
    for number in (signal.SIGKILL, signal.SIGTERM):
        steps = last_complete_checkpoint(path.parent / "checkpoints")
        process = start("run", path)
        wait_for(partial(has_gone_on, path, steps))
        process.send_signal(number)
        assert process.wait() == -number
        wait_for(lambda: not forks(), 10)
        assert not (path.parent / "metrics.json").exists()
    assert finish(path) == whole


def test_a_fork_that_is_killed_is_a_command_that_failed(server: Server) -> None:
    path = small(RUNS["vanilla"], "runs", epochs=200)
    process = start("run", path)
    wait_for(partial(has_gone_on, path, None))  # one that is killed before it took the command leaves it to the caller
    forks()[0].kill()
    assert "was killed; was there memory enough?" in process.communicate()[1]
    assert process.returncode == 1


def test_a_server_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    code = (
        "import os, time\n"
        "from benchmarks.harness.run.forkserver import ADDRESS, Server\n"
        "server = Server(['json'])\n"
        "server.start()\n"
        "print(server._process.pid, os.environ[ADDRESS], flush=True)\n"
        "time.sleep(600)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    pid, address = process.stdout.readline().split()
    process.kill()
    wait_for(lambda: not psutil.pid_exists(int(pid)) and not Path(address).exists())
    process.wait()


def test_what_cannot_be_imported_leaves_commands_to_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server(["no_such_module"])
    server.start()
    process = start("run", "nowhere/run.json")
    assert "nowhere/run.json does not exist" in process.communicate()[1]
    server.stop()
