"""Share the accelerators of a machine among its jobs, each with its own."""

from __future__ import annotations

import itertools
import os
import platform
import sys
import time
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from benchmarks.harness.base import RunError
from benchmarks.harness.config.runs import Run

VISIBLE = "CUDA_VISIBLE_DEVICES"  # ROCm's torch reads it too
_NO_DEVICES = (
    "",
    "-1",
    "NoDevFiles",
)  # values of the variable that hide all; the last one is Slurm's
_JOBS = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID")
_PAUSE = 1.0  # seconds between two attempts


def reserve_devices(count: int, name: str, processes: int = 1) -> ExitStack:
    """Reserve accelerators for this process and its children, and hide all others (``CUDA_VISIBLE_DEVICES``).

    Waits until enough accelerators are free of the locks of this user's other processes on this machine. Call this
    before anything uses an accelerator.

    Args:
        count: The number of accelerators. With 0, or on a machine without any, nothing is reserved.
        name: The name of the run, for messages.
        processes: The number of processes of the run, one on each accelerator.

    Returns:
        The locks, as a context manager; the end of the process releases them too. The variable keeps its value.

    Raises:
        RunError: Fewer accelerators are visible than requested, or than processes.
    """
    locks, devices = ExitStack(), visible_devices() if count else []
    if devices:
        if not processes <= count <= len(devices):
            raise RunError(
                f"{name} asks for {count} accelerators for {processes} process(es), and {len(devices)} are visible; "
                "give it more (`--resources gpu=N`), or set 'resources.gpu' and 'resources.processes' in benchmark.yaml"
            )
        os.environ[VISIBLE] = ",".join(_lock_devices(locks, devices, count, name))
    return locks


def check_accelerators(suite: str, runs: Iterable[Run]) -> None:
    """Raise an error before the first run of a suite if a run needs an accelerator and this machine has none."""
    asking = next((run for run in runs if run.resources["gpu"]), None)
    if asking and not visible_devices():
        raise RunError(
            f"the suite '{suite}' asks for accelerators, and none is visible here: start it on a machine that has "
            f"one, or on a cluster (docs/cluster.md), or set 'benchmarks.{asking.benchmark}.resources.gpu: 0' in "
            f"config/{suite}.yaml to run it on the CPU"
        )


def visible_devices() -> list[str]:
    """Return the accelerators that this process may use: ``CUDA_VISIBLE_DEVICES``, else all of torch's."""
    visible = os.environ.get(VISIBLE)
    if visible is None:
        import torch

        return [str(number) for number in range(torch.cuda.device_count())]
    return [] if visible in _NO_DEVICES else visible.split(",")


def _lock_devices(locks: ExitStack, devices: list[str], count: int, name: str) -> list[str]:
    """Lock ``count`` devices, and return them. Jobs choose one at a time, which avoids deadlocks."""
    # one folder per scheduled job, because schedulers may number the devices of each job from 0
    job = next(filter(None, map(os.environ.get, _JOBS)), "")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "emoe" / "accelerators" / "-".join(filter(None, (platform.node(), job)))
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    locked: list[str] = []
    with FileLock(folder / "choice.lock"):
        for attempt in itertools.count():
            for device in devices:
                if device not in locked and len(locked) < count:
                    with suppress(Timeout):
                        locks.enter_context(
                            FileLock(folder / f"{device.replace('/', '_')}.lock", blocking=False)
                        )
                        locked.append(device)
            if len(locked) == count:
                break
            if attempt == 0:
                sys.stderr.write(f"[{name}] waiting for {count} of {len(devices)} accelerators\n")
            time.sleep(_PAUSE)
    return locked
