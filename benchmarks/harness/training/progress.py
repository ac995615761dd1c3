"""One line of progress at a time, for terminals and log files alike."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from benchmarks.harness.base.paths import PLAN, RUNS

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


def clock(seconds: float) -> str:
    """``75`` as ``1:15``; hours where needed."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


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
        seconds = _seconds(folders, done, plan.get("expected", {}))
        rest, worked = (sum(seconds[folder] for folder in some) for some in (set(folders) - done, since))
        left = f", {clock(rest / worked * (time.time() - plan['started']))} left"
    return f"{len(done)} of {len(folders)} runs done{left}; "


def _seconds(folders: Sequence[str], done: Collection[str], expected: Mapping[str, float]) -> dict[str, float]:
    """What each run takes: as long as one that differs in the seed alone, else as one of its benchmark, else as expected, at the pace of those that are done.

    Args:
        folders: of all runs.
        done: of the finished ones.
        expected: seconds of a run by benchmark, on the machine where the suite was blessed.
    """
    known = {_but_the_seed(folder): folder for folder in done}
    took = {kind: _job_seconds(folder) for kind, folder in known.items()}
    benchmarks: dict[str, list[float]] = {}
    for kind, seconds in took.items():
        benchmarks.setdefault(kind.partition("/")[0], []).append(seconds)
    usual = {name: sum(found) / len(found) for name, found in benchmarks.items()}
    any_run = sum(usual.values()) / len(usual)
    if both := set(usual) & set(expected):
        pace = sum(usual[name] for name in both) / sum(expected[name] for name in both)
        usual = {name: pace * seconds for name, seconds in expected.items()} | usual
    return {folder: took.get(_but_the_seed(folder), usual.get(folder.partition("/")[0], any_run)) for folder in folders}


def _but_the_seed(folder: str) -> str:
    return re.sub(r"-s\d+-[0-9a-f]{8}$", "", folder)


def _job_seconds(folder: str) -> float:
    return float(json.loads((RUNS / folder / "metrics.json").read_text())["cost"]["job_seconds"])
