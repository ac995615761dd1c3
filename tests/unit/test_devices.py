"""Share made-up accelerators, from an environment variable, among jobs."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from benchmarks.harness.base import RunError
from benchmarks.harness.config.suite import plain_suite
from benchmarks.harness.run import devices
from benchmarks.harness.run.devices import VISIBLE, check_accelerators, reserve_devices
from tests.conftest import ROOT

ALL = "0,1,2,3"
# prints what it sees, and keeps it until its input ends
HOLD = """
import os, sys
from benchmarks.harness.run.devices import reserve_devices
with reserve_devices(int(sys.argv[1]), "a run"):
    print(os.environ["CUDA_VISIBLE_DEVICES"], flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def four(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VISIBLE, ALL)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(devices, "_PAUSE", 0.05)


@contextmanager
def held(count: int, **variables: str) -> Iterator[subprocess.Popen[str]]:
    """Start a process that holds some devices."""
    environment, pipe = {**os.environ, "PYTHONPATH": str(ROOT), **variables}, subprocess.PIPE
    command = [sys.executable, "-c", HOLD, str(count)]
    with subprocess.Popen(
        command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environment
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def seen(process: subprocess.Popen[str]) -> list[str]:
    assert process.stdout is not None
    return process.stdout.readline().strip().split(",")


def test_jobs_never_share_a_device_and_a_killed_job_frees_its_devices(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with held(1) as job, held(2) as other:
        first, second = seen(job), seen(other)
        assert (len(first), len(second)) == (1, 2)
        with reserve_devices(1, "third"):
            assert sorted([*first, *second, os.environ[VISIBLE]]) == ["0", "1", "2", "3"]
        monkeypatch.setenv(VISIBLE, ALL)
        job.kill()
        job.wait()
        with reserve_devices(1, "small"), held(3, CUDA_VISIBLE_DEVICES=ALL) as large:
            assert large.stderr is not None
            assert large.stderr.readline() == "[a run] waiting for 3 of 4 accelerators\n"
            time.sleep(0.1)
            assert large.poll() is None
            assert other.stdin is not None
            other.stdin.close()
            assert len(seen(large)) == 3


def test_a_run_that_asks_for_no_device_sees_all() -> None:
    with reserve_devices(0, "a run"):
        assert os.environ[VISIBLE] == ALL


def test_only_the_runs_of_one_scheduled_job_share_its_devices() -> None:
    """A scheduler may number the devices of every job from 0."""
    with (
        held(2, CUDA_VISIBLE_DEVICES="0,1") as other,
        held(1, CUDA_VISIBLE_DEVICES="0,1", SLURM_JOB_ID="7") as first,
        held(1, CUDA_VISIBLE_DEVICES="0,1", SLURM_JOB_ID="7") as second,
    ):
        assert seen(other) == ["0", "1"]
        assert sorted([*seen(first), *seen(second)]) == ["0", "1"]


@pytest.mark.parametrize(("count", "processes"), [(8, 1), (4, 8)])
def test_more_accelerators_than_visible_and_too_few_for_the_processes_are_refused(
    count: int, processes: int
) -> None:
    message = (
        rf"^llama asks for {count} accelerators for {processes} process\(es\), and 4 are visible;"
    )
    with pytest.raises(RunError, match=message):
        reserve_devices(count, "llama", processes)


def test_a_suite_of_gpus_does_not_start_on_a_machine_without_any(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    paper, smoke = (
        plain_suite("paper").runs_of("modularity"),
        plain_suite("smoke").runs_of("modularity"),
    )
    check_accelerators("paper", paper)
    monkeypatch.setenv(VISIBLE, "")
    check_accelerators("smoke", smoke)
    with pytest.raises(
        RunError,
        match=r"^the suite 'paper' .*'benchmarks\.modularity\.resources\.gpu: 0' in config",
    ):
        check_accelerators("paper", paper)


@pytest.mark.parametrize(
    ("value", "reserved"),
    [
        ("", ""),
        ("NoDevFiles", "NoDevFiles"),
        ("-1,0", "-1,0"),
        ("MIG-1/2,GPU-8f", "MIG-1/2"),
    ],
)
def test_devices_may_have_names_and_none_is_no_error(
    value: str, reserved: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VISIBLE, value)
    with reserve_devices(1, "a run"):
        assert os.environ[VISIBLE] == reserved


@pytest.mark.parametrize("value", ["0,0", "0, 0", "0,", "0,-1,1"])
def test_a_device_that_is_named_twice_and_those_that_cuda_ignores_are_not_counted(
    value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a device that is named twice, a process would wait for a lock that it holds itself."""
    monkeypatch.setenv(VISIBLE, value)
    with pytest.raises(RunError, match="and 1 are visible"):
        reserve_devices(2, "a run")
    with reserve_devices(1, "a run"):
        assert os.environ[VISIBLE] == "0"
