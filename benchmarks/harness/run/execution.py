"""Execute one run: lock, seed, log, measure, write ``metrics.json``."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, TextIO

import psutil
import torch
from filelock import AcquireReturnProxy, FileLock, Timeout

from benchmarks.harness.base import LOCK, RunError, derive_seed, format_json, write_text
from benchmarks.harness.config.benchmark import load_benchmark
from benchmarks.harness.config.runs import read_run
from benchmarks.harness.results.records import check_metrics
from benchmarks.harness.run import environment
from benchmarks.harness.training import processes as group
from benchmarks.harness.training.progress import Progress
from emoe.compiled.build import prepare_kernels

_LAUNCHER = "EMOE_LAUNCHER"  # the id of the process that started several processes for a run


def execute(
    path: Path, *, threads: int, log: Path, started: float | None = None, parallel: str = "ddp"
) -> Path:
    """Execute the run of a ``run.json`` and write ``metrics.json`` beside it.

    If another process executes the same run, wait for its result. Processes that torchrun started work together: the
    first one locks and writes.

    Args:
        path: The path of the ``run.json``.
        threads: The number of CPU threads.
        log: The file for all output except the progress lines on a terminal; other processes write ``<log>-1``, ….
        started: The start of the process (``time.time()``); by default now.
        parallel: The parallelism of processes that torchrun started: ``ddp`` or ``fsdp``.

    Returns:
        The path of ``metrics.json``.
    """
    started = time.time() if started is None else started
    _end_with_launcher()
    run, output, is_main = read_run(path), path.with_name("metrics.json"), group.is_main()
    benchmark = load_benchmark(run.benchmark)
    spec = benchmark.read_spec(run)
    torch.set_num_threads(threads)
    group.set_parallelism(parallel)
    benchmark.check_processes(run.spec, group.world_size(), parallel)
    log = log if is_main else log.with_name(f"{log.stem}-{group.rank()}{log.suffix}")
    with _lock_run(path.parent, run.name) if is_main else nullcontext():
        group.init_process_group()
        if group.broadcast(output.exists()):
            return output
        with _redirect_output(log) as terminal:
            progress = Progress(run.name, terminal if is_main else sys.stderr)
            captured = environment.capture()
            pipeline = benchmark.pipeline()
            if (
                not torch.cuda.is_available()
            ):  # built before a suite's first run, so that all its runs use them
                prepare_kernels()
            startup = time.time() - started
            torch.manual_seed(derive_seed("run", run.seed))
            metrics: dict[str, Any] = pipeline.run(spec, path.parent, progress)
            if not is_main:
                return output
            seconds = time.time() - started
            is_gpu, usage = torch.cuda.is_available(), resource.getrusage(resource.RUSAGE_SELF)
            memory = torch.cuda.max_memory_allocated() if is_gpu else usage.ru_maxrss * 1024
            metrics["cost"] = metrics.get("cost", {}) | {
                "startup_seconds": startup,
                "job_seconds": seconds,
                "peak_memory_mb": memory / 1e6,
            }
            captured["fingerprint"] = environment.fingerprint(captured)
            content = {"run_id": run.id, **metrics, "environment": captured}
            text = format_json(content)
            check_metrics(run, text.encode(), output)
            write_text(output, text)
            shutil.rmtree(path.with_name("checkpoints"), ignore_errors=True)
            progress.finish(seconds)
    return output


def launch_distributed(
    path: Path, *, threads: int, log: Path, processes: int, parallel: str
) -> None:
    """Execute a run with several processes on this machine.

    Args:
        path: The path of the ``run.json``.
        threads: The number of CPU threads of all processes together.
        log: The log of the first process, as in :func:`execute`.
        processes: The number of processes.
        parallel: The parallelism, ``ddp`` or ``fsdp``.
    """
    run = read_run(path)
    load_benchmark(run.benchmark).check_processes(run.spec, processes, parallel)
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--local-addr=127.0.0.1",
    ]
    torchrun += [
        f"--nproc-per-node={processes}",
        "-m",
        "--",
    ]  # else torchrun parses the module's options
    threads_each = str(max(threads // processes, 1))
    command = [
        "benchmarks",
        "run",
        str(path),
        "--threads",
        threads_each,
        "--log",
        str(log),
        "--parallel",
        parallel,
    ]
    result = subprocess.run(
        [*torchrun, *command], env={**os.environ, _LAUNCHER: str(os.getpid())}, check=False
    )
    if result.returncode:
        raise RunError(
            f"{run.name}: one of its {processes} processes failed, see {log} and the logs beside it; "
            "started again, the run goes on from its last checkpoint"
        )


def _end_with_launcher() -> None:
    """End this process when its launcher ends; a killed launcher cannot end its processes."""
    launcher = os.environ.pop(_LAUNCHER, None)
    if launcher is None:
        return

    def wait() -> None:
        with suppress(psutil.NoSuchProcess):
            psutil.Process(int(launcher)).wait()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


def _lock_run(folder: Path, run_name: str) -> AcquireReturnProxy[Any]:
    lock = FileLock(folder / LOCK)
    try:
        return lock.acquire(blocking=False)
    except Timeout:
        sys.stderr.write(f"[{run_name}] another process works on this run; waiting for it\n")
        return lock.acquire()


@contextmanager
def _redirect_output(path: Path) -> Iterator[TextIO]:
    """Send all output of the process, native libraries included, to a log; yield the terminal's stream."""
    saved = os.dup(1), os.dup(2)
    with os.fdopen(os.dup(2), "w") as terminal, path.open("a") as log:
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


def _redirect(output: int, errors: int) -> None:
    """Send standard output and standard error to these file descriptors."""
    for stream, number, target in ((sys.stdout, 1, output), (sys.stderr, 2, errors)):
        with suppress(OSError):  # the disk is full
            stream.flush()
        os.dup2(target, number)
