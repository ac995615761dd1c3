"""Test atomic writes, and locks that one process holds at a time."""

from __future__ import annotations

import json
import os
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest
from filelock import FileLock
from pydantic import BaseModel

from benchmarks.harness.base import DataError, atomic_write, is_held, read_json, write_json
from tests.checkout import wait_for
from tests.forked import start as start_fork


class Receipt(BaseModel):
    rows: int


DAMAGE = {
    "invalid UTF-8": b'{"rows": "\xff"}',
    "truncated": b'{"rows": ',
    "a missing key": b"{}",
}


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    write_json(path, {"loss": 0.5})
    with suppress(ZeroDivisionError), atomic_write(path) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"loss": float("nan")})
    assert json.loads(path.read_text()) == {"loss": 0.5}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("content", [*DAMAGE.values(), None], ids=[*DAMAGE, "a folder"])
def test_a_damaged_file_is_one_line_that_names_it(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "receipt.json"
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(DataError) as error:
        read_json(path, Receipt, "delete it")
    assert str(error.value).startswith(f"{path} ")
    assert str(error.value).endswith("; delete it")
    assert "\n" not in str(error.value)


def hold_for_ever(file: Path) -> None:
    with FileLock(file):
        file.with_name("holds").touch()
        time.sleep(600)


def test_a_lock_is_held_by_one_process_until_it_ends(tmp_path: Path) -> None:
    file = tmp_path / ".lock"
    assert not is_held(file)
    with FileLock(file):
        assert is_held(file)
    assert not is_held(file)
    other = start_fork(hold_for_ever, file)
    wait_for(file.with_name("holds").exists, 60)
    assert is_held(file)
    assert other.pid
    os.kill(other.pid, signal.SIGKILL)
    other.join()
    assert not is_held(file)
