"""Accelerators of a machine, shared by its jobs: each sees those that it asked for, and no other job sees the same."""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from benchmarks.harness.base.errors import RunError

VISIBLE = "CUDA_VISIBLE_DEVICES"  # ROCm's torch reads it too
_ENDS = "-1"  # CUDA reads the list up to here
_PAUSE = 1.0  # seconds between two looks for free ones


@contextmanager
def reserved(count: int, name: str) -> Iterator[list[str]]:
    """Keep accelerators for this process and those that it starts, which see no others.

    Waits until so many are free. A device is free when no process holds its lock, whichever checkout the process runs in; a lock ends
    with its process, however that ends. Where a scheduler shows no more devices than are asked for, they are this job's already,
    and nothing is locked: it numbers those of each job from 0. Must be called before anything uses an accelerator.

    Args:
        count: how many; of 0, or on a machine without accelerators, nothing is reserved and nothing changes.
        name: of the run, for messages.

    Yields:
        What the process sees, as ``CUDA_VISIBLE_DEVICES`` names them.

    Raises:
        RunError: fewer are visible than are asked for.

    Example:
        >>> with reserved(0, "a run on the CPU") as devices:
        ...     devices
        []
    """
    devices = visible() if count else []
    if devices and len(devices) < count:
        raise RunError(
            f"{name} asks for {count} accelerators, but {len(devices)} {'is' if len(devices) == 1 else 'are'} visible; give the run fewer ('resources.gpu' and "
            "'resources.processes' in the suite's part of benchmark.yaml, or Snakemake's --set-resources), or show it more"
        )
    if len(devices) <= count:
        yield devices
        return
    taken = _take(devices, count, name)
    before = os.environ.get(VISIBLE)
    os.environ[VISIBLE] = ",".join(taken)
    try:
        yield list(taken)
    finally:
        if before is None:
            del os.environ[VISIBLE]
        else:
            os.environ[VISIBLE] = before
        for lock in taken.values():
            lock.release()


def visible() -> list[str]:
    """The accelerators that this process may use, as ``CUDA_VISIBLE_DEVICES`` names them; the driver is not started to count them."""
    given = os.environ.get(VISIBLE)
    if given is None:
        import torch

        return [str(number) for number in range(torch.cuda.device_count())]
    names = [name.strip() for name in given.split(",")]
    return names[: names.index(_ENDS)] if _ENDS in names else [name for name in names if name]


def _take(devices: list[str], count: int, name: str) -> dict[str, FileLock]:
    """Lock so many, all at once or none, so that two jobs never wait for each other's."""
    folder = _folder()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    said = False
    while True:
        with FileLock(folder / "choice.lock"):
            free = _locked(folder, devices, count)
        if len(free) == count:
            return free
        for lock in free.values():
            lock.release()
        if not said:
            print(f"[{name}] waiting for {count} of {len(devices)} accelerators", file=sys.stderr, flush=True)  # noqa: T201
            said = True
        time.sleep(_PAUSE)


def _locked(folder: Path, devices: list[str], count: int) -> dict[str, FileLock]:
    found: dict[str, FileLock] = {}
    for device in devices:
        if len(found) == count:
            break
        lock = FileLock(folder / f"{device.replace('/', '_')}.lock")
        try:
            lock.acquire(blocking=False)
        except Timeout:
            continue
        found[device] = lock
    return found


def _folder() -> Path:
    """Of this user's locks on this machine; a job of a scheduler that holds several devices has its own, as it has its own numbers."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    job = os.environ.get("SLURM_JOB_ID", "")
    return (
        (Path(runtime) if runtime else cache) / "emoe" / "accelerators" / "-".join(filter(None, (platform.node(), job)))
    )
