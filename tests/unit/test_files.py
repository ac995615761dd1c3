"""Files that are there as a whole or not at all."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from unittest import mock

import pytest

from benchmarks.harness.base.files import atomic_write, write_json


def test_after_a_power_cut_a_name_has_its_content(tmp_path: Path) -> None:
    """A disk may take a file's name long before what it holds, unless it is asked to."""
    path, replace, synced = tmp_path / "metrics.json", Path.replace, {}

    def sync(handle: int) -> None:
        state = os.fstat(handle)
        synced[state.st_ino] = (state.st_size, state.st_mtime_ns)

    def name(temporary: Path, target: Path) -> Path:
        state = temporary.stat()
        if synced.get(state.st_ino) != (state.st_size, state.st_mtime_ns):
            os.truncate(temporary, 0)  # the cut comes right after
        return replace(temporary, target)

    with mock.patch.object(os, "fsync", sync), mock.patch.object(Path, "replace", name):
        write_json(path, {"loss": 0.5})
    assert json.loads(path.read_text()) == {"loss": 0.5}


def test_what_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    write_json(path, {"loss": 0.5})
    with suppress(ZeroDivisionError), atomic_write(path) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"loss": float("nan")})
    assert json.loads(path.read_text()) == {"loss": 0.5}
    assert list(tmp_path.iterdir()) == [path]
