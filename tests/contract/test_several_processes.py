"""One run of instruction tuning on several processes (gloo, CPU): the same numbers, killed, resumed, on another number of them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.harness.base.errors import DefinitionError
from benchmarks.harness.base.paths import DATA_ROOT
from benchmarks.harness.planning.runs import Run
from benchmarks.harness.running.execution import RunError, launch_distributed
from benchmarks.llama.export import export
from tests.conftest import ROOT
from tests.executed import finish, numbers, prepare
from tests.instruction_runs import tiny_run, write_rows

pytestmark = pytest.mark.slow
WAIT = 120


@pytest.fixture(autouse=True)
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory with a data root."""
    write_rows(tmp_path / "data")
    monkeypatch.setenv(DATA_ROOT, str(tmp_path / "data"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def command(path: Path, processes: int, parallel: str) -> list[str]:
    return [
        *(sys.executable, "-m", "benchmarks", "run", str(path)),
        *("--processes", str(processes), "--parallel", parallel, "--threads", str(processes)),
    ]


def together(path: Path, processes: int, parallel: str) -> dict[str, Any]:
    """Run on several processes and give back what must be the same every time."""
    done = subprocess.run(command(path, processes, parallel), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return numbers(path)


def dropout_free(tuning: str, **training: Any) -> Run:
    """A run without dropout, whose draws are each process's own."""
    run = tiny_run("emoe", tuning)
    lora = run.spec["training"]["lora"]
    return tiny_run(
        "emoe",
        tuning,
        training={"per_device_train_batch_size": 2, "lora": {**lora, "dropout": 0.0} if lora else None, **training},
    )


def check_same(found: dict[str, Any], wanted: dict[str, Any], tolerance: float = 1e-4) -> None:
    """Equal but for the order of summation, whose effect grows with the steps."""
    assert found["curve"][:8] == pytest.approx(wanted["curve"][:8], abs=1e-4)
    assert found["curve"] == pytest.approx(wanted["curve"], abs=tolerance)
    ours, theirs = (one["scores"]["dev"]["own"]["loss"] for one in (found, wanted))
    assert ours == pytest.approx(theirs, abs=tolerance)
    for key in ("data", "model", "answers"):
        assert found[key] == wanted[key]


# the other two pairs: the runs below that are killed, whose first steps are compared as these are
@pytest.mark.parametrize(("tuning", "parallel"), [("full", "ddp"), ("lora", "fsdp")])
def test_two_processes_train_as_one_does(tuning: str, parallel: str) -> None:
    run = dropout_free(tuning)
    one, two = prepare(run, "one"), prepare(run, "two")
    check_same(together(two, 2, parallel), finish(one))
    assert not (two.parent / "checkpoints").exists()
    for path, folder in ((one, "out-one"), (two, "out-two")):
        export(path, Path(folder), "dense")
    first, second = (AutoModelForCausalLM.from_pretrained(folder) for folder in ("out-one", "out-two"))
    for (name, ours), theirs in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-3), name


def kill_one(path: Path, parallel: str, checkpoint: str) -> None:
    """Start two processes, and kill the second one as soon as a checkpoint is complete."""
    process = subprocess.Popen(command(path, 2, parallel), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    state = path.parent / "checkpoints" / checkpoint / "trainer_state.json"
    end = time.monotonic() + WAIT
    while not state.exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    assert state.exists()
    workers = [child for child in psutil.Process(process.pid).children(recursive=True) if _rank(child) == "1"]
    assert workers, "the run was over before it could be killed"
    os.kill(workers[0].pid, signal.SIGKILL)
    assert process.wait(WAIT) != 0
    assert not (path.parent / "metrics.json").exists()


def _rank(process: psutil.Process) -> str:
    try:
        return process.environ().get("RANK", "")
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return ""


def test_a_sharded_run_whose_worker_is_killed_goes_on_with_two_processes_or_with_one(
    capfd: pytest.CaptureFixture[str],
) -> None:
    run = dropout_free("full", epochs=16, save_steps=4)
    whole = finish(prepare(run, "whole"))
    killed = prepare(run, "killed")
    kill_one(killed, "fsdp", "checkpoint-4")
    shards = sorted((killed.parent / "checkpoints").glob("checkpoint-*/shards/*.safetensors"))
    assert len(shards) >= 2  # one a process
    for state in killed.parent.glob("checkpoints/*/trainer_state.json"):  # written last, by the first process
        assert all(zipfile.is_zipfile(state.with_name(f"rng_state_{rank}.pth")) for rank in range(2))
    other = Path("other") / killed.parent.relative_to("killed") / "run.json"
    shutil.copytree(killed.parent, other.parent)

    check_same(together(killed, 2, "fsdp"), whole, 0.02)
    assert "resumed at step" in (killed.parent / "log.txt").read_text()
    # as one process, which reads the shards
    capfd.readouterr()
    check_same(finish(other), whole, 0.02)
    assert "resumed at step" in "".join(capfd.readouterr())


def test_a_data_parallel_run_whose_worker_is_killed_goes_on_with_one_process(
    capfd: pytest.CaptureFixture[str],
) -> None:
    run = dropout_free("lora", epochs=16, save_steps=4)
    whole = finish(prepare(run, "whole"))
    killed = prepare(run, "killed")
    kill_one(killed, "ddp", "checkpoint-4")
    capfd.readouterr()
    check_same(finish(killed), whole, 0.02)
    assert "resumed at step" in "".join(capfd.readouterr())


def test_a_failing_worker_ends_the_run_with_one_clear_message() -> None:
    path = prepare(tiny_run("dense", "full", data={"held_out_rows": 39}))
    done = subprocess.run(command(path, 2, "ddp"), capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "one of its 2 processes failed, see" in done.stderr
    assert "what is left fills no step of 8" in (path.parent / "log.txt").read_text()


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
