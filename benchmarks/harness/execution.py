"""Execute one run: lock, seed, log, measure, write ``metrics.json``."""

from __future__ import annotations

import fcntl
import importlib
import json
import os
import resource
import shutil
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import environment
from benchmarks.harness.definition import DefinitionError
from benchmarks.harness.files import write_json
from benchmarks.harness.progress import Progress, clock
from benchmarks.harness.runs import Run, run_from_spec
from benchmarks.harness.seeds import derive_seed


def read_run(path: Path) -> Run:
    """Read a ``run.json``.

    Raises:
        DefinitionError: missing, not JSON, or not the spec that its folder is named after.
    """
    try:
        run = run_from_spec(json.loads(path.read_text()))
    except FileNotFoundError as error:
        raise DefinitionError(
            f"{path} does not exist; the workflow writes it (`snakemake --cores 1 {path}`)"
        ) from error
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise DefinitionError(f"{path} is no run specification: {error!r}") from error
    if path.parent.name != run.id:
        raise DefinitionError(f"{path} was changed by hand: its content belongs into a folder named {run.id}")
    return run


def execute(path: Path, *, threads: int, log: Path, started: float | None = None) -> Path:
    """Execute the run of a ``run.json`` and write ``metrics.json`` beside it.

    Two processes never work on one run: the second waits, and takes the first one's result.

    Args:
        path: the ``run.json``.
        threads: CPU threads.
        log: gets all output but the progress lines.
        started: when the process began (``time.time()``); now, where it did not begin for this run.

    Returns:
        The path of ``metrics.json``.
    """
    started = time.time() if started is None else started
    run = read_run(path)
    folder, output = path.parent, path.parent / "metrics.json"
    torch.set_num_threads(threads)
    with _exclusive(folder, run.id):
        if output.exists():
            return output
        with _logged(log) as terminal:
            progress = Progress(run.id, terminal)
            captured = environment.capture()
            torch.manual_seed(derive_seed("run", run.spec["seed"]))
            pipeline = importlib.import_module(run.spec["pipeline"])
            startup = time.time() - started
            metrics: dict[str, Any] = pipeline.run(run.spec, folder, progress)
            seconds = time.time() - started
            metrics["cost"] |= {
                "startup_seconds": startup,
                "job_seconds": seconds,
                "peak_memory_mb": _peak_memory_mb(),
            }
            write_json(output, {"run_id": run.id, **metrics, "environment": captured})
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
            progress.say(f"finished in {clock(seconds)}")
    return output


def _peak_memory_mb() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@contextmanager
def _exclusive(folder: Path, run_id: str) -> Iterator[None]:
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"[{run_id}] another process works on this run; waiting for it", file=sys.stderr, flush=True)  # noqa: T201
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def _logged(path: Path) -> Iterator[Any]:
    """Send all output of the process, native libraries included, to a log; yield the terminal's stream."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    terminal = os.fdopen(os.dup(2), "w")
    with path.open("a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        try:
            yield terminal
        except BaseException:
            traceback.print_exc(file=log)  # into the log; the terminal gets the message
            raise
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, copy in zip((1, 2), saved, strict=True):
                os.dup2(copy, number)
                os.close(copy)
            terminal.close()
