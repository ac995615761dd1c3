"""Where the runs of a suite stand: done, being run, failed, or waiting. Looks, and changes nothing."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from benchmarks.harness.base.locks import is_held
from benchmarks.harness.base.paths import LOCK, LOG, RUNS
from benchmarks.harness.config.runs import Run

State = Literal["done", "running", "failed", "waiting"]
_TAIL = 8192


@dataclass(frozen=True)
class Standing:
    """Where a run stands.

    Attributes:
        run: which.
        state: ``done`` has its numbers; ``running`` has a process that holds its lock; ``failed`` was begun and has neither; ``waiting`` was not begun.
        last: the last line of the log of a run that runs or failed.
        silent: seconds since that line was written.
    """

    run: Run
    state: State
    last: str = ""
    silent: float | None = None


def standing_of(run: Run, root: Path = RUNS) -> Standing:
    """Where a run stands."""
    folder = root / run.folder
    if (folder / "metrics.json").exists():
        return Standing(run, "done")
    log = folder / LOG
    if is_held(folder / LOCK):
        state: State = "running"
    elif log.exists() or (folder / LOCK).exists():
        # its numbers are written before its lock is let go, so that a run that ended meanwhile has them
        state = "done" if (folder / "metrics.json").exists() else "failed"
    else:
        state = "waiting"
    if state not in ("running", "failed") or not log.exists():
        return Standing(run, state)
    return Standing(run, state, last_line(log), time.time() - log.stat().st_mtime)


def count(standings: Iterable[Standing]) -> dict[str, int]:
    """How many runs are in each state."""
    found = {"done": 0, "running": 0, "failed": 0, "waiting": 0}
    for one in standings:
        found[one.state] += 1
    return found


def last_line(log: Path) -> str:
    """The last line of a log that says something; a bar of progress counts as it stands."""
    with log.open("rb") as file:
        file.seek(max(file.seek(0, os.SEEK_END) - _TAIL, 0))
        text = file.read().decode(errors="replace")
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")
