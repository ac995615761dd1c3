"""A folder that is written in many steps: what was begun in it, and that it is not finished."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from emoe.errors import CheckpointError

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None  # type: ignore[assignment]

_FOLDER, _PLAN = ".unfinished", "plan.json"


def refuse_unfinished(folder: Path) -> None:
    """Refuse to read a folder that is not whole (:class:`CheckpointError`)."""
    if _is_begun(folder):
        raise CheckpointError(f"{folder} is not finished: give the command that began it once more, and it goes on")


def check_free(out: Path) -> None:
    """Refuse to write into a folder that has something in it, unless that was begun (:class:`CheckpointError`)."""
    held = {path.name for path in out.iterdir()} if out.is_dir() else set()
    if not _is_begun(out) and (held - {_FOLDER} or (out.exists() and not out.is_dir())):
        raise CheckpointError(f"{out} exists and is not empty; name a new folder")


def check_begun(out: Path, plan: Mapping[str, Any]) -> bool:
    """Whether a folder was begun, and that by the same plan.

    Args:
        out: the folder.
        plan: what shapes the result, plain values.

    Raises:
        CheckpointError: it holds something else, or was begun by another plan.
    """
    check_free(out)
    if not _is_begun(out):
        return False
    begun, now = json.loads((out / _FOLDER / _PLAN).read_text()), json.loads(json.dumps(plan))
    if begun != now:
        raise CheckpointError(
            f"{out} was begun with {_difference(begun, now)}: give the command that began it, or delete the folder"
        )
    return True


@contextmanager
def unfinished(out: Path, plan: Mapping[str, Any]) -> Iterator[Path]:
    """Begin a folder, or go on with it; at the end of the block it is finished.

    Until then it holds a folder ``.unfinished``, by which its readers know it. An error leaves that there, to go on later.

    Args:
        out: the folder: new, empty, or begun by the same plan.
        plan: as in :func:`check_begun`.

    Yields:
        The folder for what is needed on the way, on the same disk.

    Raises:
        CheckpointError: as :func:`check_begun`, or another process is writing it.
    """
    scratch = out / _FOLDER
    scratch.mkdir(parents=True, exist_ok=True)
    lock = _lock(scratch, out)
    try:
        if not check_begun(out, plan):
            (scratch / "begun").write_text(json.dumps(plan, indent=1))
            (scratch / "begun").replace(scratch / _PLAN)
        yield scratch
        for file in scratch.iterdir():
            if file.name != _PLAN:
                file.unlink()
        (scratch / _PLAN).unlink()  # the last one: until now it would have gone on
        scratch.rmdir()
    finally:
        os.close(lock)


def _is_begun(folder: Path) -> bool:
    return (folder / _FOLDER / _PLAN).exists()


def _difference(begun: Any, now: Any, name: str = "") -> str:
    """The first thing that two plans do not agree in."""
    if isinstance(begun, dict) and isinstance(now, dict):
        other = next(key for key in [*begun, *now] if begun.get(key) != now.get(key))
        return _difference(begun.get(other), now.get(other), other)
    return f"{name} {json.dumps(begun)}, not {json.dumps(now)}"


def _lock(scratch: Path, out: Path) -> int:
    """Hold a folder for as long as the descriptor is open."""
    lock = os.open(scratch, os.O_RDONLY)
    try:
        if fcntl is not None:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno == errno.EWOULDBLOCK:
            os.close(lock)
            raise CheckpointError(f"{out} is being written by another process") from error
        # a file system without locks
    return lock
