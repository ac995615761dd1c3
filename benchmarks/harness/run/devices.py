"""Share the accelerators of a machine among its jobs, each with its own."""

from __future__ import annotations

import itertools
import os
import platform
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import BaseFileLock, Timeout

from benchmarks.harness.base import RunError, hold
from benchmarks.harness.config.runs import Run

VISIBLE = "CUDA_VISIBLE_DEVICES"  # ROCm's torch reads it too
_ENDS = ("-1", "NoDevFiles")  # CUDA ignores what follows -1; Slurm writes NoDevFiles for no device
_JOBS = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID")
_PAUSE = 1.0  # seconds between two attempts


@contextmanager
def reserve_devices(count: int, name: str, processes: int = 1) -> Iterator[list[str]]:
    """Reserve accelerators for this process and its children, and hide all others.

    Waits until enough accelerators are free of the locks of this user's other processes on this machine; a process's
    locks end with it. A scheduler's job that sees as many devices as it requests needs no locks: schedulers may number
    the devices of each job from 0. Call this before anything uses an accelerator.

    Args:
        count: The number of accelerators. With 0, or on a machine without any, nothing is reserved and nothing changes.
        name: The name of the run, for messages.
        processes: The number of processes of the run, one on each accelerator.

    Yields:
        The devices that the process sees, as ``CUDA_VISIBLE_DEVICES`` names them.

    Raises:
        RunError: Fewer accelerators are visible than requested, or than processes.
    """
    devices = visible_devices() if count else []
    if devices and (len(devices) < count or count < processes):
        raise RunError(
            f"{name} asks for {count} accelerators for {processes} process(es), and {len(devices)} are visible; give "
            "it more (`--resources gpu=N`), or set 'resources.gpu' and 'resources.processes' in benchmark.yaml"
        )
    job = next(filter(None, map(os.environ.get, _JOBS)), "")
    if not devices or (job and len(devices) == count):
        yield devices
        return
    before, locks = os.environ.get(VISIBLE), _lock_devices(_folder(job), devices, count, name)
    os.environ[VISIBLE] = ",".join(locks)
    try:
        yield list(locks)
    finally:
        os.environ.pop(VISIBLE)
        if before is not None:
            os.environ[VISIBLE] = before
        for lock in locks.values():
            lock.release()


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
    given = os.environ.get(VISIBLE)
    if given is None:
        import torch

        return [str(number) for number in range(torch.cuda.device_count())]
    names = [name.strip() for name in given.split(",")]
    return [name for name in itertools.takewhile(lambda name: name not in _ENDS, names) if name]


def _lock_devices(folder: Path, devices: list[str], count: int, name: str) -> dict[str, BaseFileLock]:
    """Lock ``count`` devices. One job at a time chooses, so that two jobs never wait for each other."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    locks: dict[str, BaseFileLock] = {}
    is_waiting = False
    with hold(folder / "choice.lock"):
        while True:
            for device in devices:
                if device not in locks and len(locks) < count:
                    with suppress(Timeout):
                        locks[device] = hold(folder / f"{device.replace('/', '_')}.lock", blocking=False).lock
            if len(locks) == count:
                return locks
            if not is_waiting:
                sys.stderr.write(f"[{name}] waiting for {count} of {len(devices)} accelerators\n")
                is_waiting = True
            time.sleep(_PAUSE)


def _folder(job: str) -> Path:
    """Return the folder of this user's locks on this machine; each scheduler's job has its own."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "emoe" / "accelerators" / "-".join(filter(None, (platform.node(), job)))
