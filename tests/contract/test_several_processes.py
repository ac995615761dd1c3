"""Train one run on several processes (gloo, CPU): the numbers of one process, also after a kill."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks.harness.base import DefinitionError, RunError
from benchmarks.harness.config.runs import Run
from benchmarks.harness.run.execution import execute, launch_distributed
from benchmarks.harness.training.processes import exit_worker
from benchmarks.llama import pipeline  # noqa: F401  (processes that fork have imported it)
from tests import forked
from tests.checkout import wait_for
from tests.conftest import ROOT
from tests.executed import finish, killed_at, numbers, prepare
from tests.instruction_runs import tiny_run

pytestmark = pytest.mark.slow
WAIT = 600  # a loaded machine takes minutes to import twice


@pytest.fixture(autouse=True)
def python_path(hub_here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the processes import the suite from an empty working directory with a data root."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def dropout_free(tuning: str, **training: Any) -> Run:
    """Plan a run without dropout, which each process draws for itself."""
    lora = tiny_run("emoe", tuning).spec["training"]["lora"]
    without = {"lora": {**lora, "dropout": 0.0} if lora else None}
    return tiny_run(
        "emoe", tuning, training={"per_device_train_batch_size": 1, **without, **training}
    )


def check_same(numbers: dict[str, Any], expected: dict[str, Any], tolerance: float = 1e-4) -> None:
    """Compare two runs up to the order of summation, whose effect grows with the steps."""
    assert numbers["curve"][:8] == pytest.approx(expected["curve"][:8], abs=1e-4)
    assert numbers["curve"] == pytest.approx(expected["curve"], abs=tolerance)
    losses = [metrics["scores"]["dev"]["own"]["loss"] for metrics in (numbers, expected)]
    assert losses[0] == pytest.approx(losses[1], abs=tolerance)
    for key in ("data", "model", "answers"):
        assert numbers[key] == expected[key]


def work(rank: int, folder: Path, variables: dict[str, str], path: Path, parallel: str) -> None:
    """Execute a run as one of two processes, with the variables that torchrun sets."""
    os.chdir(folder)
    os.environ |= {**variables, "RANK": str(rank), "LOCAL_RANK": str(rank)}
    execute(path, threads=1, log=path.with_name(f"log-{rank}.txt"), parallel=parallel)
    exit_worker()


@pytest.mark.parametrize(("tuning", "parallel"), [("lora", "fsdp"), ("full", "ddp")])
def test_two_processes_finish_the_run_of_a_killed_one(
    tuning: str, parallel: str, hub_here: Path
) -> None:
    run = dropout_free(tuning, save_steps=1)
    whole = finish(prepare(run, "whole"))
    path = prepare(run, "killed")
    with killed_at(3):
        finish(path)
    damaged = path.parent / "checkpoints/checkpoint-2/optimizer.pt"
    damaged.write_bytes(b"")
    finish_on_two(path, parallel, hub_here)
    log = path.with_name("log-0.txt").read_text()
    assert (
        f"warning: {damaged} has changed since it was saved; the run goes on from checkpoint-1"
        in log
    )
    assert "resumed at step 1" in log
    # the main process alone checks the files
    logs = [file.read_text() for file in path.parent.glob("log-*.txt")]
    assert len(logs) == 2
    assert "".join(logs).count("] warning: ") == 1
    check_same(numbers(path), whole)
    assert not (path.parent / "checkpoints").exists()


def finish_on_two(path: Path, parallel: str, folder: Path) -> None:
    """Execute a run in two forks of this process, which work together."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    variables = {**os.environ, **group}
    processes = [forked.start(work, rank, folder, variables, path, parallel) for rank in range(2)]
    for process in processes:
        process.join(WAIT)
    assert [process.exitcode for process in processes] == [0, 0]


def test_processes_end_with_their_launcher_and_one_or_two_finish_the_run(
    hub_here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = dropout_free("full", epochs=8, save_steps=4)
    whole = finish(prepare(run, "whole"))
    path = prepare(run, "killed")
    words = ["run", path, "--processes", 2, "--parallel", "fsdp", "--threads", 2]
    with subprocess.Popen([sys.executable, "-m", "benchmarks", *map(str, words)]) as launcher:
        wait_for(lambda: any(path.parent.glob("checkpoints/*/complete")), WAIT)
        children = psutil.Process(launcher.pid).children(recursive=True)
        launcher.kill()
    wait_for(lambda: not any(map(_is_alive, children)), WAIT)
    assert not (path.parent / "metrics.json").exists()
    complete = next(path.parent.glob("checkpoints/*/complete"))
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= set(json.loads(complete.read_text()))
    other = Path("other") / path
    shutil.copytree(path.parent, other.parent)
    finish_on_two(other, "fsdp", hub_here)
    assert "resumed at step" in other.with_name("log-0.txt").read_text()
    check_same(numbers(other), whole, 0.02)
    capfd.readouterr()
    check_same(finish(path), whole, 0.02)
    assert "resumed at step" in "".join(capfd.readouterr())


def _is_alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


LARGE, QUANTIZED = (
    {"training": {"per_device_train_batch_size": 8}},
    {"model": {"quantize": "nf4", "whole": [3]}},
)


@pytest.mark.parametrize(
    ("run", "parallel", "message"),
    [
        (
            {"tuning": "full", **LARGE},
            "ddp",
            "not a multiple of training.per_device_train_batch_size 8 times 2 proc",
        ),
        ({"tuning": "base"}, "fsdp", "only training runs of instruction tuning"),
        (QUANTIZED, "fsdp", "weights in 4 bits cannot be sharded; use --parallel ddp"),
    ],
)
def test_runs_that_cannot_be_distributed_are_refused_before_any_process_starts(
    run: dict[str, Any], parallel: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        subprocess, "run", lambda *_args, **_options: pytest.fail("a process was started")
    )
    path = prepare(tiny_run("dense", **run))
    with pytest.raises((RunError, DefinitionError), match=message):
        launch_distributed(path, threads=2, log=Path("log.txt"), processes=2, parallel=parallel)


def test_a_failed_process_fails_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun ends the others and fails."""
    path = prepare(dropout_free("full"))
    monkeypatch.setattr(
        subprocess, "run", lambda *_arguments, **_options: subprocess.CompletedProcess([], 1)
    )
    with pytest.raises(RunError, match="one of its 2 processes failed"):
        launch_distributed(path, threads=2, log=Path("log.txt"), processes=2, parallel="fsdp")
