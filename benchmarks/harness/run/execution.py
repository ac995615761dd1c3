"""Execute one run: lock, seed, log, measure, write ``metrics.json``."""

from __future__ import annotations

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
from typing import Any, TextIO

import torch
from filelock import AcquireReturnProxy, Timeout

from benchmarks.harness.base import LOCK, RunError, derive_seed, hold, write_json
from benchmarks.harness.config.benchmark import load_benchmark
from benchmarks.harness.config.runs import Run, read_run
from benchmarks.harness.results.records import check_content
from benchmarks.harness.run import environment
from benchmarks.harness.training import processes as group
from benchmarks.harness.training.progress import Progress
from emoe.sparse.build import prepare_kernels

_LAUNCHER = "EMOE_LAUNCHER"  # the id of the process that started several processes for a run


def execute(path: Path, *, threads: int, log: Path, started: float | None = None, parallel: str = "ddp") -> Path:
    """Execute the run of a ``run.json`` and write ``metrics.json`` beside it.

    If another process executes the same run, wait for its result. Processes that torchrun started work together: the
    first one locks and writes.

    Args:
        path: The path of the ``run.json``.
        threads: The number of CPU threads.
        log: The file for all output except the progress lines on a terminal.
        started: The start of the process (``time.time()``); by default now.
        parallel: The parallelism of processes that torchrun started: ``ddp`` or ``fsdp``.

    Returns:
        The path of ``metrics.json``.
    """
    started = time.time() if started is None else started
    _end_with_launcher()
    run = read_run(path)
    folder, output = path.parent, path.parent / "metrics.json"
    torch.set_num_threads(threads)
    group.set_parallelism(parallel)
    load_benchmark(run.benchmark).check_processes(run.spec, group.world_size(), parallel)
    if not group.is_main():
        _run_worker(run, folder, log.with_name(f"{log.stem}-{group.rank()}{log.suffix}"))
        return output
    with _lock_run(folder, run.id):
        group.init_process_group()
        if group.broadcast(output.exists()):
            return output
        with _redirect_output(log) as terminal:
            progress = Progress(run.id, terminal)
            captured = environment.capture()
            pipeline = load_benchmark(run.benchmark).pipeline()
            if not torch.cuda.is_available():  # before the first run, so that all runs of a suite have them, or none
                prepare_kernels()
            startup = time.time() - started
            torch.manual_seed(derive_seed("run", run.spec["seed"]))
            metrics: dict[str, Any] = pipeline.run(run.spec, folder, progress)
            seconds = time.time() - started
            is_gpu, usage = torch.cuda.is_available(), resource.getrusage(resource.RUSAGE_SELF)
            memory = torch.cuda.max_memory_allocated() if is_gpu else usage.ru_maxrss * 1024
            metrics["cost"] |= {"startup_seconds": startup, "job_seconds": seconds, "peak_memory_mb": memory / 1e6}
            captured["fingerprint"] = environment.fingerprint(captured["packages"], captured["gpus"])
            content = {"run_id": run.id, **metrics, "environment": captured}
            check_content(run, content, output)
            write_json(output, content)
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
            progress.finish(seconds)
    return output


def launch_distributed(path: Path, *, threads: int, log: Path, processes: int, parallel: str) -> None:
    """Execute a run with several processes on this machine.

    Args:
        path: The path of the ``run.json``.
        threads: The number of CPU threads of all processes together.
        log: The file for all output; the second process writes ``<log>-1``.
        processes: The number of processes.
        parallel: The parallelism, ``ddp`` or ``fsdp``.
    """
    run = read_run(path)
    load_benchmark(run.benchmark).check_processes(run.spec, processes, parallel)
    each = str(max(threads // processes, 1))
    arguments = ["run", str(path), "--threads", each, "--log", str(log), "--parallel", parallel]
    command = group.torchrun_command(processes, ["benchmarks", *arguments])
    result = subprocess.run(command, env={**os.environ, _LAUNCHER: str(os.getpid())}, check=False)
    if result.returncode:
        raise RunError(
            f"{run.id}: one of its {processes} processes failed, see {log} and the logs beside it; "
            "started again, the run goes on from its last checkpoint"
        )


def _end_with_launcher() -> None:
    """End this process when its launcher ends, because a killed launcher cannot end its processes."""
    launcher = os.environ.pop(_LAUNCHER, None)
    if launcher is None or not hasattr(os, "pidfd_open"):  # only on Linux
        return

    def wait() -> None:
        with suppress(ProcessLookupError):  # it has ended already
            select.select([os.pidfd_open(int(launcher))], [], [])
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


def _run_worker(run: Run, folder: Path, log: Path) -> None:
    """Execute a run in a process that writes no results."""
    group.init_process_group()
    if group.broadcast(None):  # the run is finished
        return
    with _redirect_output(log):
        pipeline = load_benchmark(run.benchmark).pipeline()
        torch.manual_seed(derive_seed("run", run.spec["seed"]))
        pipeline.run(run.spec, folder, Progress(run.id, sys.stderr))


def _lock_run(folder: Path, run_id: str) -> AcquireReturnProxy[Any]:
    try:
        return hold(folder / LOCK, blocking=False)
    except Timeout:
        sys.stderr.write(f"[{run_id}] another process works on this run; waiting for it\n")
        return hold(folder / LOCK)


@contextmanager
def _redirect_output(path: Path) -> Iterator[TextIO]:
    """Send all output of the process, native libraries included, to a log; yield the terminal's stream."""
    saved = os.dup(1), os.dup(2)
    terminal = os.fdopen(os.dup(2), "w")
    with path.open("a") as log:
        _redirect(log.fileno(), log.fileno())
        try:
            yield terminal
        except BaseException:
            traceback.print_exc(file=log)  # the terminal only gets the message
            raise
        finally:
            _redirect(*saved)
            for number in saved:
                os.close(number)
            terminal.close()


def _redirect(output: int, errors: int) -> None:
    """Send standard output and standard error to these file descriptors."""
    for stream, number, target in ((sys.stdout, 1, output), (sys.stderr, 2, errors)):
        with suppress(OSError):  # the disk is full
            stream.flush()
        os.dup2(target, number)
