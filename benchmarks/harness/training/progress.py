"""One line of progress at a time, for terminals and log files alike."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any, TextIO

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from benchmarks.harness.base.paths import PLAN, RUNS
from benchmarks.harness.results.durations import clock, estimate

_SECONDS_BETWEEN_LINES = 15.0


class Progress(TrainerCallback):
    """Says which run of how many, the step, and the time that is left.

    On a terminal it says everything; elsewhere one line a run, when it is finished, and warnings. What is not said stands in the run's log.

    Args:
        run_id: the run.
        stream: where lines go; by default the stderr the process started with.
    """

    def __init__(self, run_id: str, stream: TextIO | None = None) -> None:
        self._run_id = run_id
        self._stream = stream or sys.stderr
        self._position = _position(run_id)
        self._start = self._last = time.monotonic()
        self._first_step = 0

    def say(self, text: str) -> None:
        """Print one line; where nobody watches, into the log."""
        self._print(text, self._stream if self._stream.isatty() or text.startswith("warning") else sys.stdout)

    def finish(self, seconds: float) -> None:
        """Say that the run is finished."""
        self._position = _position(self._run_id)
        self._print(f"finished in {clock(seconds)}", self._stream)

    def _print(self, text: str, stream: TextIO) -> None:
        print(f"[{self._position}{self._run_id}] {text}", file=stream, flush=True)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._start, self._first_step = time.monotonic(), state.global_step
        resumed = f", resumed at step {state.global_step}" if state.global_step else ""
        self.say(f"training, {state.max_steps} steps{resumed}")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        now = time.monotonic()
        if now - self._last < _SECONDS_BETWEEN_LINES or state.global_step >= state.max_steps:
            return
        self._last = now
        left = (now - self._start) / (state.global_step - self._first_step) * (state.max_steps - state.global_step)
        self.say(f"step {state.global_step}/{state.max_steps}, {clock(left)} of training left")


def _position(run_id: str) -> str:
    """``7 of 24 runs done, 9:10 left; `` from the plan that the workflow wrote when it started.

    The time left is that of all runs: what runs like them took, at the pace since the start. There is none before the first
    run is done. Outside the workflow there is no plan and nothing to count.
    """
    path = os.environ.get(PLAN)
    if not path or not Path(path).exists():
        return ""
    plan = json.loads(Path(path).read_text())
    folders: list[str] = plan["runs"]
    if not any(folder.endswith(f"/{run_id}") for folder in folders):
        return ""
    done = {folder for folder in folders if (RUNS / folder / "metrics.json").exists()}
    since = done - set(plan["before"])
    left = ""
    if since:
        found = estimate(folders, done, plan.get("expected", {}))
        known = [found[folder] for folder in done]
        usual = sum(known) / len(known)  # what stands for a run of which nothing is known
        rest, worked = (sum(found.get(folder, usual) for folder in some) for some in (set(folders) - done, since))
        left = f", {clock(rest / worked * (time.time() - plan['started']))} left"
    return f"{len(done)} of {len(folders)} runs done{left}; "
