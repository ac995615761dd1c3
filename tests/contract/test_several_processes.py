"""Train one run on several processes (gloo, CPU): the numbers of one process, also after a kill."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks.harness.base import DefinitionError
from benchmarks.harness.config.runs import Run
from benchmarks.harness.run.execution import RunError, launch_distributed
from tests.checkout import wait_for
from tests.conftest import ROOT
from tests.executed import finish, numbers, prepare
from tests.instruction_runs import tiny_run
from tests.programs import call

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
    return tiny_run("emoe", tuning, training={"per_device_train_batch_size": 1, **without, **training})


def check_same(numbers: dict[str, Any], expected: dict[str, Any], tolerance: float = 1e-4) -> None:
    """Compare two runs up to the order of summation, whose effect grows with the steps."""
    assert numbers["curve"][:8] == pytest.approx(expected["curve"][:8], abs=1e-4)
    assert numbers["curve"] == pytest.approx(expected["curve"], abs=tolerance)
    losses = [metrics["scores"]["dev"]["own"]["loss"] for metrics in (numbers, expected)]
    assert losses[0] == pytest.approx(losses[1], abs=tolerance)
    for key in ("data", "model", "answers"):
        assert numbers[key] == expected[key]


def test_sharded_adapters_train_like_one_process() -> None:
    run = dropout_free("lora")
    alone, sharded = prepare(run, "alone"), prepare(run, "sharded")
    call("run", str(sharded), "--processes", "2", "--parallel", "fsdp", "--threads", "2")
    check_same(numbers(sharded), finish(alone))
    assert not (sharded.parent / "checkpoints").exists()


@pytest.mark.parametrize(("parallel", "victims"), [("ddp", ["1"]), ("fsdp", ["1", "launcher"])])
def test_a_killed_run_resumes_on_two_processes_and_on_one(
    parallel: str, victims: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    run = dropout_free("full", epochs=8, save_steps=4)
    whole = finish(prepare(run, "whole"))
    killed = prepare(run, "killed")
    words = ["run", killed, "--processes", 2, "--parallel", parallel, "--threads", 2]
    command = [sys.executable, "-m", "benchmarks", *map(str, words)]
    for victim in victims:
        before = _newest_checkpoint(killed)
        with subprocess.Popen(command) as launcher:
            wait_for(lambda before=before: _newest_checkpoint(killed) > before, WAIT)
            children = psutil.Process(launcher.pid).children(recursive=True)
            if victim == "launcher":
                launcher.kill()
            else:
                os.kill(next(child.pid for child in children if _rank(child) == victim), signal.SIGKILL)
        wait_for(lambda children=children: not any(map(_is_alive, children)), WAIT)
        assert not (killed.parent / "metrics.json").exists()
    capfd.readouterr()
    check_same(finish(killed), whole, 0.02)
    assert "resumed at step" in "".join(capfd.readouterr())


def _newest_checkpoint(path: Path) -> int:
    complete = path.parent.glob("checkpoints/*/complete")
    return max((int(file.parent.name.rpartition("-")[2]) for file in complete), default=0)


def _rank(process: psutil.Process) -> str:
    try:
        return process.environ().get("RANK", "")
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return ""


def _is_alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


LARGE, QUANTIZED = {"training": {"per_device_train_batch_size": 8}}, {"model": {"quantize": "nf4", "whole": [3]}}


@pytest.mark.parametrize(
    ("run", "parallel", "message"),
    [
        ({"tuning": "full", **LARGE}, "ddp", "not a multiple of training.per_device_train_batch_size 8 times 2 proc"),
        ({"tuning": "base"}, "fsdp", "only training runs of instruction tuning"),
        (QUANTIZED, "fsdp", "weights in 4 bits cannot be sharded; use --parallel ddp"),
    ],
)
def test_runs_that_cannot_be_distributed_are_refused_before_any_process_starts(
    run: dict[str, Any], parallel: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *_args, **_options: pytest.fail("a process was started"))
    path = prepare(tiny_run("dense", **run))
    with pytest.raises((RunError, DefinitionError), match=message):
        launch_distributed(path, threads=2, log=Path("log.txt"), processes=2, parallel=parallel)
