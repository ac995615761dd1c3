"""Print progress lines to a terminal or a log file."""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from datetime import timedelta
from typing import Any, TextIO

from transformers import TrainerCallback, TrainerState

_SECONDS_BETWEEN_LINES = 15.0


class Progress(TrainerCallback):
    """Lines about a run: its step, and the time left for its training.

    A terminal shows every line. Without a terminal only warnings and finished runs are shown; the log has the rest, and
    the warnings too.

    Args:
        run_name: The readable name of the run, which begins each line.
        stream: The stream for the lines; by default the standard error.
    """

    def __init__(self, run_name: str, stream: TextIO | None = None) -> None:
        self._run_name = run_name
        self._stream = stream or sys.stderr
        self._start = self._last = time.monotonic()
        self._first_step = 0

    def say(self, text: str) -> None:
        """Print a line to the terminal, or to the log if there is none; print a warning to both."""
        is_warning = text.startswith("warning")
        has_terminal = self._stream.isatty()
        if is_warning or has_terminal:
            self._print(text, self._stream)
        if is_warning or not has_terminal:
            self._print(text, sys.stdout)

    def finish(self, seconds: float) -> None:
        """Print the duration of the finished run."""
        self._print(f"finished in {_clock(seconds)}", self._stream)

    def _print(self, text: str, stream: TextIO) -> None:
        with suppress(OSError):  # a closed terminal must not fail the run
            print(f"[{self._run_name}] {text}", file=stream, flush=True)

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self._start, self._first_step = time.monotonic(), state.global_step
        resumed = f", resumed at step {state.global_step}" if state.global_step else ""
        self.say(f"training, {state.max_steps} steps{resumed}")

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        now = time.monotonic()
        if now - self._last < _SECONDS_BETWEEN_LINES or state.global_step >= state.max_steps:
            return
        self._last = now
        left = (
            (now - self._start)
            / (state.global_step - self._first_step)
            * (state.max_steps - state.global_step)
        )
        self.say(f"step {state.global_step}/{state.max_steps}, {_clock(left)} of training left")


def _clock(seconds: float) -> timedelta:
    return timedelta(seconds=round(seconds))
