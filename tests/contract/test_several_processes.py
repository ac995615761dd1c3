"""One run of instruction tuning on several processes (gloo, CPU): the same numbers, killed, resumed, on another number of them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM

from benchmarks.__main__ import cli
from benchmarks.harness.base.errors import DefinitionError
from benchmarks.harness.config.runs import Run
from benchmarks.harness.run.execution import RunError, launch_distributed
from benchmarks.llama.export import export
from tests.checkout import wait_for
from tests.conftest import ROOT
from tests.executed import finish, numbers, prepare
from tests.instruction_runs import enter, tiny_run

pytestmark = pytest.mark.slow
WAIT = 600  # a loaded machine takes minutes to import twice


@pytest.fixture(autouse=True)
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory with a data root."""
    enter(tmp_path, monkeypatch)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return tmp_path


def launch(path: Path) -> None:
    """Two processes that share a run's model; what starts them is this one, which has imported all that they wait for."""
    launch_distributed(path, threads=2, log=path.parent / "log.txt", processes=2, parallel="fsdp")


def dropout_free(tuning: str, **training: Any) -> Run:
    """A run without dropout, whose draws are each process's own."""
    run = tiny_run("emoe", tuning)
    lora = run.spec["training"]["lora"]
    return tiny_run(
        "emoe",
        tuning,
        training={"per_device_train_batch_size": 1, "lora": {**lora, "dropout": 0.0} if lora else None, **training},
    )


def check_same(found: dict[str, Any], wanted: dict[str, Any], tolerance: float = 1e-4) -> None:
    """Equal but for the order of summation, whose effect grows with the steps."""
    assert found["curve"][:8] == pytest.approx(wanted["curve"][:8], abs=1e-4)
    assert found["curve"] == pytest.approx(wanted["curve"], abs=tolerance)
    ours, theirs = (one["scores"]["dev"]["own"]["loss"] for one in (found, wanted))
    assert ours == pytest.approx(theirs, abs=tolerance)
    for key in ("data", "model", "answers"):
        assert found[key] == wanted[key]


# the whole model on two processes, and two of all that is sharded: the runs below that are killed
def test_two_processes_train_as_one_does() -> None:
    run = dropout_free("lora")
    one, two = prepare(run, "one"), prepare(run, "two")
    words = ["run", str(two), "--processes", "2", "--parallel", "fsdp", "--threads", "2"]
    done = CliRunner().invoke(cli, words, obj=time.time())
    assert done.exit_code == 0, (two.parent / "log.txt").read_text()[-3000:]
    check_same(numbers(two), finish(one))
    assert not (two.parent / "checkpoints").exists()
    for path, folder in ((one, "out-one"), (two, "out-two")):
        export(path, Path(folder), "dense")
    first, second = (AutoModelForCausalLM.from_pretrained(folder) for folder in ("out-one", "out-two"))
    for (name, ours), theirs in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-3), name


def kill_one(path: Path) -> None:
    """Start two processes, and kill the second one as soon as a checkpoint is complete; the run ends with one clear message."""
    state = path.parent / "checkpoints/checkpoint-4/trainer_state.json"
    with ThreadPoolExecutor(1) as thread:
        ended = thread.submit(launch, path)
        wait_for(lambda: state.exists() or ended.done(), WAIT)
        assert state.exists()
        workers = [child for child in psutil.Process().children(recursive=True) if _rank(child) == "1"]
        assert workers, "the run was over before it could be killed"
        os.kill(workers[0].pid, signal.SIGKILL)
        with pytest.raises(RunError, match=r"one of its 2 processes failed, see .*log\.txt"):
            ended.result(WAIT)
    assert not (path.parent / "metrics.json").exists()


def _rank(process: psutil.Process) -> str:
    try:
        return process.environ().get("RANK", "")
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return ""


def test_a_sharded_run_whose_worker_is_killed_goes_on_with_two_processes_or_with_one(
    capfd: pytest.CaptureFixture[str],
) -> None:
    run = dropout_free("full", epochs=8, save_steps=4)
    whole = finish(prepare(run, "whole"))
    killed = prepare(run, "killed")
    kill_one(killed)
    shards = sorted((killed.parent / "checkpoints").glob("checkpoint-*/shards/*.safetensors"))
    assert len(shards) >= 2  # one a process
    for state in killed.parent.glob("checkpoints/*/trainer_state.json"):  # written last, by the first process
        assert all(zipfile.is_zipfile(state.with_name(f"rng_state_{rank}.pth")) for rank in range(2))
    other = Path("other") / killed.parent.relative_to("killed") / "run.json"
    shutil.copytree(killed.parent, other.parent)

    launch(killed)
    check_same(numbers(killed), whole, 0.02)
    assert "resumed at step" in (killed.parent / "log.txt").read_text()
    # as one process, which reads the shards
    capfd.readouterr()
    check_same(finish(other), whole, 0.02)
    assert "resumed at step" in "".join(capfd.readouterr())


def test_data_parallel_processes_end_with_what_launched_them_and_the_run_goes_on_with_one(
    capfd: pytest.CaptureFixture[str],
) -> None:
    run = dropout_free("lora", epochs=8, save_steps=4)
    whole = finish(prepare(run, "whole"))
    killed = prepare(run, "killed")
    words = ["run", killed, "--processes", 2, "--parallel", "ddp", "--threads", 2, "--log", killed.parent / "log.txt"]
    with subprocess.Popen([sys.executable, "-m", "benchmarks", *map(str, words)]) as launcher:
        wait_for((killed.parent / "checkpoints/checkpoint-4/trainer_state.json").exists, WAIT)
        started = psutil.Process(launcher.pid).children(recursive=True)
        assert {_rank(one) for one in started} >= {"0", "1"}
        launcher.kill()
    wait_for(lambda: not any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in started), WAIT)
    assert not (killed.parent / "metrics.json").exists()
    capfd.readouterr()
    check_same(finish(killed), whole, 0.02)
    assert "resumed at step" in "".join(capfd.readouterr())


def test_what_cannot_be_spread_is_refused_before_any_process_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_process(*args: object, **kwargs: object) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(subprocess, "run", no_process)
    options: dict[str, Any] = {"threads": 2, "log": Path("log.txt"), "processes": 2}
    uneven = prepare(tiny_run("dense", "full", training={"per_device_train_batch_size": 8}))
    with pytest.raises(
        DefinitionError, match=r"no multiple of training.per_device_train_batch_size 8 times 2 processes"
    ):
        launch_distributed(uneven, parallel="ddp", **options)
    with pytest.raises(RunError, match="only runs of instruction tuning that train"):
        launch_distributed(prepare(tiny_run("dense", "base")), parallel="fsdp", **options)
    quantised = tiny_run("dense", "lora")
    model = {**quantised.spec["model"], "quantize": "nf4", "whole": [3]}
    with pytest.raises(RunError, match="weights in 4 bits are not sharded; take --parallel ddp"):
        launch_distributed(prepare(tiny_run("dense", "lora", model=model)), parallel="fsdp", **options)
