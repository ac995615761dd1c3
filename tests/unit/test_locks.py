"""One process holds a lock at a time, on file systems with and without locks."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest import mock

import pytest
from filelock import Timeout

from benchmarks.harness.base import hold, is_held
from tests.checkout import wait_for
from tests.forked import start as start_fork

SYSTEMS = {"flock": None, "no lock server": errno.ENOLCK}  # errors of flock: none, and NFS without its lock server


@contextmanager
def system(name: str) -> Iterator[None]:
    refusal = SYSTEMS[name]
    patch = mock.patch.object(fcntl, "flock", side_effect=OSError(refusal, "no flock"))
    with patch if refusal else nullcontext():
        yield


def hold_for_ever(file: Path, name: str) -> None:
    with system(name), hold(file):
        file.with_name("holds").touch()
        time.sleep(600)


@pytest.mark.filterwarnings("ignore:flock not supported")
@pytest.mark.parametrize("name", SYSTEMS)
def test_one_process_holds_it_until_it_ends(name: str, tmp_path: Path) -> None:
    file = tmp_path / ".lock"
    with system(name):
        assert not is_held(file)
        with hold(file):
            assert is_held(file)
        assert not is_held(file)

        other = start_fork(hold_for_ever, file, name)
        wait_for(file.with_name("holds").exists, 60)
        assert is_held(file)
        with pytest.raises(Timeout):
            hold(file, blocking=False)
        assert other.pid
        os.kill(other.pid, signal.SIGKILL)
        other.join()
        with hold(file):
            assert is_held(file)


def test_another_fault_of_the_file_system_is_told(tmp_path: Path) -> None:
    fault = OSError(errno.EIO, "a broken disk")
    with mock.patch.object(fcntl, "flock", side_effect=fault), pytest.raises(OSError, match="a broken disk"):
        hold(tmp_path / ".lock")
