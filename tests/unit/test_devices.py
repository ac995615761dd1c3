"""Jobs of one machine and its accelerators: made-up ones, which a variable of the environment names."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from benchmarks.harness.base import RunError
from benchmarks.harness.config.suite import plain_suite
from benchmarks.harness.run import devices
from benchmarks.harness.run.devices import VISIBLE, check_accelerators, reserved, visible
from tests.conftest import ROOT

# says what it sees, and keeps it until its input ends
HOLD = """
import os, sys
from benchmarks.harness.run.devices import reserved
with reserved(int(sys.argv[1]), "a run"):
    print(os.environ["CUDA_VISIBLE_DEVICES"], flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def four(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VISIBLE, "0,1,2,3")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(devices, "_PAUSE", 0.05)


@contextmanager
def held(count: int, **variables: str) -> Iterator[subprocess.Popen[str]]:
    """Another process with so many."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(count)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), **variables},
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def seen(process: subprocess.Popen[str]) -> list[str]:
    assert process.stdout is not None
    return process.stdout.readline().strip().split(",")


def test_no_two_jobs_see_the_same_and_what_a_killed_one_had_is_free() -> None:
    with held(1) as one, held(2) as two:
        first, second = seen(one), seen(two)
        assert (len(first), len(second)) == (1, 2)
        with reserved(1, "third") as third:
            assert os.environ[VISIBLE] == third[0]
            assert sorted([*first, *second, *third]) == ["0", "1", "2", "3"]
        one.kill()
        one.wait()
        with reserved(2, "fourth") as fourth:
            assert set(first) < set(fourth)
    assert os.environ[VISIBLE] == "0,1,2,3"


def test_a_job_waits_until_there_are_as_many_as_it_wants() -> None:
    with held(3) as other:
        seen(other)
        with reserved(1, "small"), held(2, CUDA_VISIBLE_DEVICES="0,1,2,3") as large:
            assert large.stderr is not None
            assert large.stderr.readline() == "[a run] waiting for 2 of 4 accelerators\n"
            time.sleep(0.1)
            assert large.poll() is None
            assert other.stdin is not None
            other.stdin.close()
            assert len(seen(large)) == 2


def test_what_a_scheduler_gave_a_job_is_taken_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may number those of every job from 0, so that a lock would part what has nothing to do with each other."""
    monkeypatch.setenv(VISIBLE, "0,1")
    with held(2, CUDA_VISIBLE_DEVICES="0,1") as other:
        assert seen(other) == ["0", "1"]
        monkeypatch.setenv("SLURM_JOB_ID", "7")
        with reserved(2, "a run") as found:
            assert found == ["0", "1"]
        with (
            reserved(1, "a run") as found,
            held(1, CUDA_VISIBLE_DEVICES="0,1") as beside,
        ):  # one job, several runs: they share what it has
            assert found == ["0"]
            assert seen(beside) == ["1"]


def test_it_is_refused_what_is_not_there_and_to_share_one_among_processes() -> None:
    for count, processes in ((8, 8), (8, 1), (4, 8)):
        with (
            pytest.raises(
                RunError,
                match=rf"^llama asks for {count} accelerators for {processes} process\(es\), and 4 are visible;",
            ),
            reserved(count, "llama", processes),
        ):
            pass


def test_on_a_machine_without_any_nothing_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VISIBLE, "")
    with reserved(1, "llama", 8) as found:
        assert found == []


def test_a_suite_of_gpus_does_not_start_on_a_machine_without_any(monkeypatch: pytest.MonkeyPatch) -> None:
    paper, smoke = plain_suite("paper").runs_of("modularity"), plain_suite("smoke").runs_of("modularity")
    check_accelerators("paper", paper)
    monkeypatch.setenv(VISIBLE, "")
    check_accelerators("smoke", smoke)
    with pytest.raises(
        RunError, match=r"^the suite 'paper' asks .*'suites\.paper\.resources\.gpu: 0' in benchmarks/modularity/"
    ):
        check_accelerators("paper", paper)


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("", []),
        ("-1", []),
        ("2", ["2"]),
        (" 1, 0 ", ["1", "0"]),
        ("0,-1,1", ["0"]),
        ("NoDevFiles", []),
        ("GPU-8f2a,MIG-1/2/0", ["GPU-8f2a", "MIG-1/2/0"]),
    ],
)
def test_what_is_visible_is_what_cuda_reads(given: str, found: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VISIBLE, given)
    assert visible() == found
    with reserved(0, "a run on the CPU") as nothing:
        assert nothing == []
        assert os.environ[VISIBLE] == given
    if found:
        with reserved(1, "a run") as one:
            assert one == found[:1]


def test_without_a_variable_torch_counts_and_an_error_gives_them_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VISIBLE)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ZeroDivisionError), reserved(2, "a run"):
        1 / (os.environ[VISIBLE] != "0,1")
    assert VISIBLE not in os.environ
    with reserved(2, "another"):
        pass
