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
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, TextIO

import psutil
import torch
from filelock import AcquireReturnProxy, FileLock, Timeout

from benchmarks.harness import base as paths
from benchmarks.harness.base import RunError, derive_seed, format_json, write_text
from benchmarks.harness.config.benchmark import AnyBenchmark, load_benchmark
from benchmarks.harness.config.runs import Run, read_run
from benchmarks.harness.results.records import check_metrics
from benchmarks.harness.run import environment
from benchmarks.harness.sources.packages import check_sha256
from benchmarks.harness.training.processes import (
    broadcast,
    init_process_group,
    is_main,
    rank,
    set_parallelism,
    world_size,
)
from benchmarks.harness.training.progress import Progress
from emoe.compiled.build import prepare_kernels

# variable with the id of the process that started several processes for a run
_LAUNCHER = "EMOE_LAUNCHER"


def execute(
    path: Path, *, threads: int, log: Path, start_time: float | None = None, parallel: str = "ddp"
) -> Path:
    """Execute the run of a ``run.json`` and write ``metrics.json`` beside it.

    If another process already executes this run, wait for it and keep its result. Several processes
    that torchrun has started for one run compute together. The first one locks and writes.

    Args:
        path: The path of the ``run.json``.
        threads: The number of CPU threads.
        log: The file for all output, except the progress lines on a terminal. For ``log.txt``, the
            other processes write to ``log-1.txt``, ``log-2.txt`` and so on.
        start_time: The start of the process (``time.time()``); by default now.
        parallel: The parallelism of processes that torchrun started: ``ddp`` or ``fsdp``.

    Returns:
        The path of ``metrics.json``.

    Raises:
        DataError: The ``run.json`` cannot be read, or a csv has changed since the run was planned.
            Or other data or weights are missing or damaged, or the run's numbers lack a section.
        DefinitionError: The ``run.json`` was changed by hand, or a setting is wrong. Or the
            settings do not fit the model or the number of processes.
        RunError: Runs of this kind use only one process, and there are several.
    """
    if start_time is None:
        start_time = time.time()
    _end_with_launcher()  # does nothing unless `launch_distributed` started this process
    folder = path.parent
    output = folder / "metrics.json"
    run = read_run(path)
    benchmark = load_benchmark(run.benchmark)
    spec = benchmark.read_spec(run)

    torch.set_num_threads(threads)
    set_parallelism(parallel)
    benchmark.check_processes(run.spec, world_size(), parallel)

    # the first process locks the run for all of them; each writes its own log
    if is_main():
        lock: AbstractContextManager[Any] = _lock_run(folder, run.name)
        own_log = log
    else:
        lock = nullcontext()
        own_log = log.with_name(f"{log.stem}-{rank()}{log.suffix}")

    with lock:  # _lock_run has locked it already, and the end of the block releases it
        # the other processes wait here until the first one has locked the run
        init_process_group()
        # while this process waited for the lock, another one may have finished the run
        is_finished = output.exists()
        if run.keeps_weights:
            is_finished = is_finished and (folder / paths.WEIGHTS).exists()
        if broadcast(is_finished):
            return output
        with _redirect_output(own_log) as terminal:
            # the first process reports to the terminal, and each of the others to its own log
            stream = terminal if is_main() else sys.stderr
            progress = Progress(run.name, stream)
            _check_csv_files(run)
            metrics = _compute_metrics(benchmark, run, spec, folder, progress, start_time)
            if is_main():  # all processes compute, but only the first one writes
                _write_metrics(run, metrics, output)
                progress.finish(metrics["cost"]["job_seconds"])
    return output


def _check_csv_files(run: Run) -> None:
    """Check that the csv files of a run's data sets are those that its id was planned with.

    Packages are checked when they are opened.

    Raises:
        DataError: A csv is missing, or has changed.
    """
    advice = (
        "the run was planned with other rows: restore the file, or start the workflow again, "
        "which plans runs with the present rows"
    )
    for task in run.all_sets:
        name = task.get("source", {}).get("csv")
        if name is not None:
            check_sha256(paths.ROOT / name, run.files[name], advice)


def _write_metrics(run: Run, metrics: dict[str, Any], output: Path) -> None:
    """Check and write ``metrics.json``, and delete the checkpoints of the run.

    Args:
        run: The run.
        metrics: The content of the file.
        output: The path of the file.
    """
    text = format_json(metrics)
    check_metrics(run, text.encode(), output)
    write_text(output, text)
    # a run with a result is never resumed
    shutil.rmtree(output.with_name("checkpoints"), ignore_errors=True)


def _compute_metrics(
    benchmark: AnyBenchmark,
    run: Run,
    spec: Any,
    folder: Path,
    progress: Progress,
    start_time: float,
) -> dict[str, Any]:
    """Compute a run, and return the content of ``metrics.json``.

    Of several processes, only the first one returns the complete content.

    Args:
        benchmark: The benchmark of the run.
        run: The run.
        spec: The run's spec, as read by the benchmark.
        folder: The folder of the run.
        progress: Prints the progress lines.
        start_time: The start of the process (``time.time()``).
    """
    captured = environment.capture()
    pipeline = benchmark.pipeline()
    # The compiled kernels of the CPU are made before the run starts. Otherwise the first run on a
    # machine would use other kernels than later runs.
    if not torch.cuda.is_available():
        prepare_kernels()
    startup_seconds = time.time() - start_time
    torch.manual_seed(derive_seed("run", run.seed))
    metrics: dict[str, Any] = pipeline.run(spec, folder, progress)
    if not is_main():
        return metrics
    job_seconds = time.time() - start_time  # measured before the fingerprint takes time
    metrics["cost"] = {
        **metrics.get("cost", {}),
        "startup_seconds": startup_seconds,
        "job_seconds": job_seconds,
        "peak_memory_mb": _peak_memory() / 1e6,
    }
    captured["fingerprint"] = environment.fingerprint(captured)
    return {"run_id": run.id, **metrics, "environment": captured}


def _peak_memory() -> int:
    """Return the peak memory in bytes: of the accelerator, or of the process if there is none."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_maxrss * 1024  # Linux counts KiB


def launch_distributed(
    path: Path, *, threads: int, log: Path, processes: int, parallel: str
) -> None:
    """Execute a run with several processes on this machine, and wait for them.

    Args:
        path: The path of the ``run.json``.
        threads: The number of CPU threads of all processes together.
        log: The log of the first process. For ``log.txt``, the other processes write to
            ``log-1.txt``, ``log-2.txt`` and so on.
        processes: The number of processes.
        parallel: The parallelism, ``ddp`` or ``fsdp``.

    Raises:
        RunError: A process failed.
    """
    run = read_run(path)
    benchmark = load_benchmark(run.benchmark)
    benchmark.check_processes(run.spec, processes, parallel)
    threads_each = max(threads // processes, 1)
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--local-addr=127.0.0.1",
        f"--nproc-per-node={processes}",
        "-m",
        "--",  # without the dashes, torchrun parses the options of the command
    ]
    command = [
        "benchmarks",
        "run",
        str(path),
        f"--threads={threads_each}",
        f"--log={log}",
        f"--parallel={parallel}",
    ]
    # each process ends itself when this one has ended, see _end_with_launcher
    variables = {**os.environ, _LAUNCHER: str(os.getpid())}
    result = subprocess.run([*torchrun, *command], env=variables, check=False)
    if result.returncode:
        raise RunError(
            f"{run.name}: one of its {processes} processes failed, "
            f"see {log} and the logs beside it; "
            "started again, the run goes on from its last checkpoint"
        )


def _end_with_launcher() -> None:
    """End this process as soon as its launcher has ended; do nothing without a launcher.

    A launcher that is killed cannot end the processes that it started.
    """
    launcher = os.environ.pop(_LAUNCHER, None)
    if launcher is None:
        return

    def wait() -> None:
        """Wait for the launcher, and then end this process."""
        with suppress(psutil.NoSuchProcess):
            psutil.Process(int(launcher)).wait()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


def _lock_run(folder: Path, run_name: str) -> AcquireReturnProxy[Any]:
    """Lock the folder of a run, and return the held lock. Waits if another process holds it."""
    lock = FileLock(folder / paths.LOCK)
    try:
        return lock.acquire(blocking=False)
    except Timeout:
        sys.stderr.write(f"[{run_name}] another process works on this run; waiting for it\n")
        return lock.acquire()


@contextmanager
def _redirect_output(path: Path) -> Iterator[TextIO]:
    """Send all output of the process to a log, and yield the terminal's stream.

    This redirects the file descriptors, because native libraries write to them directly.
    """
    # file descriptors: 1 is the standard output, and 2 is the standard error
    saved_output = os.dup(1)
    saved_errors = os.dup(2)
    with os.fdopen(os.dup(2), "w") as terminal, path.open("a") as log:
        _redirect(log.fileno(), log.fileno())
        try:
            yield terminal
        except BaseException:
            traceback.print_exc(file=log)  # the terminal only gets the message
            raise
        finally:
            _redirect(saved_output, saved_errors)
            os.close(saved_output)
            os.close(saved_errors)


def _redirect(output: int, errors: int) -> None:
    """Send standard output and standard error to these file descriptors."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # the disk is full
            stream.flush()
    os.dup2(output, 1)
    os.dup2(errors, 2)
