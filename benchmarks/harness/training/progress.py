"""Print progress lines to a terminal or a log file."""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, TextIO

from transformers import TrainerCallback, TrainerState

from benchmarks.harness.base import PLAN, RUNS

_SECONDS_BETWEEN_LINES = 15.0
_EARLY = 0.05  # share of work without an estimate of the time left


class Progress(TrainerCallback):
    """Print the number of the workflow's finished runs, the step of this run, and the time left.

    A terminal shows every line. Without a terminal only warnings and finished runs are shown; the log has the rest.

    Args:
        run_id: The id of the run.
        stream: The stream for the lines; by default the standard error.
    """

    def __init__(self, run_id: str, stream: TextIO | None = None) -> None:
        self._run_id, self._stream = run_id, stream or sys.stderr
        self._position = _workflow_progress()
        self._start = self._last = time.monotonic()
        self._first_step = 0

    def say(self, text: str) -> None:
        """Print a line to the terminal, or to the log if there is none."""
        self._print(text, self._stream if self._stream.isatty() or text.startswith("warning") else sys.stdout)

    def finish(self, seconds: float) -> None:
        """Print the duration of the finished run."""
        self._position = _workflow_progress()
        self._print(f"finished in {_clock(seconds)}", self._stream)

    def _print(self, text: str, stream: TextIO) -> None:
        with suppress(OSError):  # a closed terminal must not fail the run
            print(f"[{self._position}{self._run_id}] {text}", file=stream, flush=True)

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self._start, self._first_step = time.monotonic(), state.global_step
        resumed = f", resumed at step {state.global_step}" if state.global_step else ""
        self.say(f"training, {state.max_steps} steps{resumed}")

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        now = time.monotonic()
        if now - self._last < _SECONDS_BETWEEN_LINES or state.global_step >= state.max_steps:
            return
        self._last = now
        left = (now - self._start) / (state.global_step - self._first_step) * (state.max_steps - state.global_step)
        self.say(f"step {state.global_step}/{state.max_steps}, {_clock(left)} of training left")


def _clock(seconds: float) -> timedelta:
    return timedelta(seconds=round(seconds))


def _workflow_progress() -> str:
    """Return ``7 of 24 runs done, 0:09:10 left; `` from the files of runs; empty outside a workflow.

    The time left assumes the pace since the workflow started, in usual seconds of finished runs. It is omitted before
    5 % of the work is done.
    """
    file = Path(os.environ.get(PLAN, ""))
    if not file.is_file():
        return ""
    plan = json.loads(file.read_text())
    runs: dict[str, float] = plan["runs"]
    done = [seconds for folder, seconds in runs.items() if (RUNS / folder / "metrics.json").exists()]
    new, left = sum(done) - plan["before"], sum(runs.values()) - sum(done)
    is_early = new <= _EARLY * (new + left)
    text = "" if is_early else f", {_clock((time.time() - plan['started']) / new * left)} left"
    return f"{len(done)} of {len(runs)} runs done{text}; "
