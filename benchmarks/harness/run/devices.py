"""Share the accelerators of a machine among its jobs. Each job reserves its own accelerators."""

from __future__ import annotations

import itertools
import os
import platform
import sys
import time
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

from filelock import FileLock, Timeout

from benchmarks.harness.base import RunError, distinct
from benchmarks.harness.config.runs import Run

VISIBLE = "CUDA_VISIBLE_DEVICES"  # ROCm's torch reads it too
# names of no accelerator; the last one is Slurm's
_NO_DEVICES = ("", "-1", "NoDevFiles")
# the variables with the id of a cluster's job
_JOB_VARIABLES = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID")
_PAUSE = 1.0  # seconds between two attempts


def reserve_devices(count: int, name: str, processes: int = 1) -> ExitStack:
    """Reserve accelerators for this process and its children, and hide all others.

    Waits until this user's other processes on this machine have released enough accelerators. Call
    this before anything uses an accelerator, because it sets ``CUDA_VISIBLE_DEVICES``.

    Args:
        count: The number of accelerators. With 0, or on a machine without any, nothing is reserved
            or hidden: a run with 0 uses an accelerator if one is visible.
        name: The name of the run, for messages.
        processes: The number of processes of the run, one on each accelerator.

    Returns:
        The locks, as a context manager. The end of the process releases them too.
        ``CUDA_VISIBLE_DEVICES`` keeps its new value.

    Raises:
        RunError: Fewer accelerators are visible than requested, or fewer are requested than
            processes.
    """
    locks = ExitStack()
    if count == 0:
        return locks
    devices = visible_devices()
    if not devices:
        return locks
    too_few_requested = count < processes
    too_few_visible = len(devices) < count
    if too_few_requested or too_few_visible:
        raise RunError(
            f"{name} asks for {count} accelerators for {processes} process(es), "
            f"and {len(devices)} are visible; give it more (`--resources gpu=N`), "
            "or set 'resources.gpu' and 'resources.processes' in the benchmark's part of "
            "config/<suite>.yaml"
        )
    locked = _lock_devices(locks, devices, count, name)
    os.environ[VISIBLE] = ",".join(locked)
    return locks


def check_accelerators(suite: str, runs: Iterable[Run]) -> None:
    """Check before a suite starts that this machine has an accelerator if any run needs one.

    Raises:
        RunError: A run needs an accelerator, and none is visible.
    """
    demanding = [run for run in runs if run.resources["gpu"]]
    if not demanding or visible_devices():
        return
    benchmark = demanding[0].benchmark
    raise RunError(
        f"the suite '{suite}' asks for accelerators, and none is visible here: start it on a "
        "machine that has one, or on a cluster (docs/cluster.md), or set "
        f"'benchmarks.{benchmark}.resources.gpu: 0' in config/{suite}.yaml "
        "to run it on the CPU"
    )


def visible_devices() -> list[str]:
    """Return the ids of the accelerators that this process may use.

    These are the ids in ``CUDA_VISIBLE_DEVICES``. If it is not set, they are the numbers of all
    accelerators that torch finds.
    """
    visible = os.environ.get(VISIBLE)
    if visible is None:
        import torch

        return [str(number) for number in range(torch.cuda.device_count())]
    names = [name.strip() for name in visible.split(",")]
    # CUDA uses the devices before the first name that is not valid
    usable = itertools.takewhile(lambda name: name not in _NO_DEVICES, names)
    # a device that is named twice is one device; its second lock would never become free
    return distinct(usable)


def _lock_devices(locks: ExitStack, devices: list[str], count: int, name: str) -> list[str]:
    """Lock ``count`` of the devices, and return their ids. Waits until enough devices are free.

    Args:
        locks: The stack of locks to which the new ones are added.
        devices: The ids of all devices that may be used.
        count: The number of devices to lock.
        name: The name of the run, for messages.
    """
    folder = _lock_folder()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    # Only one process chooses at a time. Otherwise two processes could each hold a device that the
    # other one needs, and wait forever.
    with FileLock(folder / "choice.lock"):
        locked = _lock_available(locks, folder, devices, count)
        if len(locked) < count:
            sys.stderr.write(f"[{name}] waiting for {count} of {len(devices)} accelerators\n")
        while len(locked) < count:
            time.sleep(_PAUSE)
            # this process keeps the devices that it has locked, and tries only the others
            others = [device for device in devices if device not in locked]
            missing = count - len(locked)
            newly_locked = _lock_available(locks, folder, others, missing)
            locked.extend(newly_locked)
    return locked


def _lock_available(locks: ExitStack, folder: Path, devices: list[str], count: int) -> list[str]:
    """Lock up to ``count`` devices that no process has locked, and return their ids.

    Does not wait. The result has fewer than ``count`` ids if other processes hold too many devices.

    Args:
        locks: The stack of locks to which the new ones are added.
        folder: The folder of the lock files.
        devices: The ids of the devices to try.
        count: The largest number of devices to lock.
    """
    locked: list[str] = []
    for device in devices:
        if len(locked) == count:
            break
        if _try_lock(locks, folder, device):
            locked.append(device)
    return locked


def _lock_folder() -> Path:
    """Return the folder of the lock files. Each user, machine and scheduled job has its own."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    names = [platform.node()]
    # one folder per scheduled job, because schedulers may number the devices of each job from 0
    for variable in _JOB_VARIABLES:
        job = os.environ.get(variable)
        if job:
            names.append(job)
            break
    given_names = [name for name in names if name]  # a machine may have no name
    return cache / "emoe" / "accelerators" / "-".join(given_names)


def _try_lock(locks: ExitStack, folder: Path, device: str) -> bool:
    """Try to lock a device without waiting; return False if another process has locked it.

    Args:
        locks: The stack of locks to which the new one is added.
        folder: The folder of the lock files.
        device: The id of the device.
    """
    file_name = device.replace("/", "_")
    lock = FileLock(folder / f"{file_name}.lock", blocking=False)
    try:
        locks.enter_context(lock)
    except Timeout:
        return False
    return True
