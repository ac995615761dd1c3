"""Execute one run: lock, seed, log, measure, write ``metrics.json``."""

from __future__ import annotations

import importlib
import os
import resource
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from filelock import AcquireReturnProxy, Timeout

from benchmarks.harness.base.errors import DefinitionError, RunError
from benchmarks.harness.base.files import write_json
from benchmarks.harness.base.locks import hold
from benchmarks.harness.base.paths import LOCK
from benchmarks.harness.base.seeds import derive_seed
from benchmarks.harness.config.benchmark import kind_of, load_benchmark
from benchmarks.harness.config.runs import Run, read_run
from benchmarks.harness.results.records import check_content
from benchmarks.harness.run import environment
from benchmarks.harness.training import processes as group
from benchmarks.harness.training.progress import Progress

_LAUNCHER = "EMOE_LAUNCHER"  # process id of what has started several processes for a run


def execute(path: Path, *, threads: int, log: Path, started: float | None = None, parallel: str = "ddp") -> Path:
    """Execute the run of a ``run.json`` and write ``metrics.json`` beside it.

    Two processes never work on one run: the second waits, and takes the first one's result. Processes that torchrun started for it
    work on it together: the first one locks and writes.

    Args:
        path: the ``run.json``.
        threads: CPU threads.
        log: gets all output but the progress lines that the terminal gets.
        started: when the process began (``time.time()``); now, where it did not begin for this run.
        parallel: how processes that torchrun started share the work: ``ddp`` or ``fsdp``.

    Returns:
        The path of ``metrics.json``.
    """
    started = time.time() if started is None else started
    _end_with_launcher()
    run = read_run(path)
    folder, output = path.parent, path.parent / "metrics.json"
    torch.set_num_threads(threads)
    group.share_by(parallel)
    _check_processes(run, group.world_size(), parallel)
    if not group.is_main():
        _run_worker(run, folder, log.with_name(f"{log.stem}-{group.rank()}{log.suffix}"))
        return output
    with _exclusive(folder, run.id):
        group.init_process_group()
        if group.broadcast(output.exists()):
            return output
        with _logged(log) as terminal:
            progress = Progress(run.id, terminal)
            captured = environment.capture()
            pipeline = _pipeline(run)
            startup = time.time() - started
            metrics: dict[str, Any] = pipeline.run(run.spec, folder, progress)
            seconds = time.time() - started
            metrics["cost"] |= {
                "startup_seconds": startup,
                "job_seconds": seconds,
                "peak_memory_mb": _peak_memory_mb(),
            }
            captured["fingerprint"] = environment.fingerprint(captured["packages"], captured["gpus"])
            content = {"run_id": run.id, **metrics, "environment": captured}
            check_content(run, content, output)
            write_json(output, content)
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
            progress.finish(seconds)
    return output


def launch_distributed(path: Path, *, threads: int, log: Path, processes: int, parallel: str) -> None:
    """Execute a run by several processes on this machine.

    Args:
        path: the ``run.json``.
        threads: CPU threads of all processes together.
        log: gets all output but the progress lines that the terminal gets; those of the second process stand in ``<log>-1``.
        processes: how many.
        parallel: ``ddp`` or ``fsdp``.

    Raises:
        RunError: one of them failed, which ends all; or such a run cannot be spread.
        DefinitionError: its batch cannot be divided so.
    """
    run = read_run(path)
    _check_processes(run, processes, parallel)
    each = str(max(threads // processes, 1))
    arguments = ["run", str(path), "--threads", each, "--log", str(log), "--parallel", parallel]
    command = group.torchrun_command(processes, ["benchmarks", *arguments])
    result = subprocess.run(command, env={**os.environ, _LAUNCHER: str(os.getpid())}, check=False)
    if result.returncode:
        raise RunError(
            f"{run.id}: one of its {processes} processes failed, see {log} and the logs beside it; started again, the run goes on from its last checkpoint"
        )


def _end_with_launcher() -> None:
    """End this process when the one that launched it with others does: one that is killed cannot end them."""
    launcher = os.environ.pop(_LAUNCHER, None)
    if launcher is None or not hasattr(os, "pidfd_open"):  # Linux has it
        return

    def wait() -> None:
        with suppress(ProcessLookupError):  # it is gone already
            select.select([os.pidfd_open(int(launcher))], [], [])
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


def _check_processes(run: Run, processes: int, parallel: str) -> None:
    try:
        kind_of(run.benchmark).check_processes(run.spec, processes, parallel)
    except RunError as error:
        raise RunError(f"{run.id}: {error}") from error


def _run_worker(run: Run, folder: Path, log: Path) -> None:
    """Be one of the processes that work on a run with the one that writes."""
    group.init_process_group()
    if group.broadcast(None):  # it was finished before
        return
    with _logged(log):
        _pipeline(run).run(run.spec, folder, Progress(run.id, sys.stderr))


def _pipeline(run: Run) -> Any:
    pipeline = load_benchmark(run.benchmark).definition.pipeline  # never a module of a file's choice
    if run.spec["pipeline"] != pipeline:
        raise DefinitionError(
            f"{run.id}: 'pipeline' is {run.spec['pipeline']!r}, but runs of {run.benchmark} are executed by '{pipeline}'"
        )
    torch.manual_seed(derive_seed("run", run.spec["seed"]))
    return importlib.import_module(pipeline)


def _peak_memory_mb() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def _exclusive(folder: Path, run_id: str) -> AcquireReturnProxy[Any]:
    try:
        return hold(folder / LOCK, blocking=False)
    except Timeout:
        print(f"[{run_id}] another process works on this run; waiting for it", file=sys.stderr, flush=True)  # noqa: T201
        return hold(folder / LOCK)


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
