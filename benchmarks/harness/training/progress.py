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
    """A callback that prints lines about a run: its step, and the time left for its training.

    On a terminal, ``stream`` gets every line. Otherwise it only gets warnings and the duration of
    the finished run, and the other lines go to the log. The log gets the warnings in both cases.

    Args:
        run_name: The readable name of the run, which begins each line.
        stream: A terminal or another stream; by default the standard error.
    """

    def __init__(self, run_name: str, stream: TextIO | None = None) -> None:
        self._run_name = run_name
        self._stream = stream or sys.stderr
        self._start = time.monotonic()
        self._time_of_last_line = self._start
        self._first_step = 0

    def say(self, text: str) -> None:
        """Print a line to the terminal, or to the log if there is no terminal."""
        # the standard output of a run is its log
        stream = self._stream if self._stream.isatty() else sys.stdout
        self._print(text, stream)

    def warn(self, text: str) -> None:
        """Print a warning to both the stream and the log."""
        line = f"warning: {text}"
        self._print(line, self._stream)
        self._print(line, sys.stdout)

    def finish(self, seconds: float) -> None:
        """Print the duration of the finished run."""
        self._print(f"finished in {_clock(seconds)}", self._stream)

    def _print(self, text: str, stream: TextIO) -> None:
        """Print a line that begins with the name of the run."""
        with suppress(OSError):  # a closed terminal must not fail the run
            print(f"[{self._run_name}] {text}", file=stream, flush=True)

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self._start = time.monotonic()
        self._first_step = state.global_step
        text = f"training, {state.max_steps} steps"
        if state.global_step > 0:
            text += f", resumed at step {state.global_step}"
        self.say(text)

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        now = time.monotonic()
        is_too_early = now - self._time_of_last_line < _SECONDS_BETWEEN_LINES
        is_last_step = state.global_step >= state.max_steps
        if is_too_early or is_last_step:
            return
        self._time_of_last_line = now
        # a resumed run computed its first steps earlier
        steps_done = state.global_step - self._first_step
        steps_left = state.max_steps - state.global_step
        seconds_per_step = (now - self._start) / steps_done
        left = _clock(seconds_per_step * steps_left)
        self.say(f"step {state.global_step}/{state.max_steps}, {left} of training left")


def _clock(seconds: float) -> timedelta:
    """Return a duration in whole seconds, which prints as ``h:mm:ss``."""
    return timedelta(seconds=round(seconds))
