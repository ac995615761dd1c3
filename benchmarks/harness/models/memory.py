"""How much memory there is for this process: the machine's, or less where a container or a scheduler limits it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import psutil

_ROOT = Path("/")


@dataclass(frozen=True)
class Memory:
    """Bytes.

    Attributes:
        total: what this process and those that are limited with it can have at most.
        free: what of it can be had now.
    """

    total: float
    free: float


@dataclass(frozen=True)
class _Files:
    """Where a version of control groups is mounted, and what its files are called."""

    mounts: tuple[str, ...]
    limit: str
    usage: str
    # of memory.stat: what is given back when it is needed
    reclaimable: str


_SECOND = _Files(("sys/fs/cgroup", "sys/fs/cgroup/unified"), "memory.max", "memory.current", "inactive_file")
_FIRST = _Files(("sys/fs/cgroup/memory",), "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def memory(root: Path = _ROOT) -> Memory:
    """The smallest of the machine's memory and of the limits of the control groups (both versions) that this process is in.

    Args:
        root: below which ``proc`` and ``sys`` are.
    """
    host = psutil.virtual_memory()
    found = [Memory(float(host.total), float(host.available)), *_limits(root)]
    return Memory(min(one.total for one in found), min(one.free for one in found))


def _limits(root: Path) -> Iterator[Memory]:
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # no Linux
        return
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0" or "memory" in controllers.split(","):
            files, group = _SECOND if number == "0" else _FIRST, PurePosixPath(path)
            # a limit may stand at any group above, and a container may see its own group as the uppermost
            for mount, one in itertools.product(files.mounts, (group, *group.parents)):
                if found := _limit(root / mount / one.relative_to("/"), files):
                    yield found


def _limit(folder: Path, files: _Files) -> Memory | None:
    """The limit of one group; None where it has none."""
    try:
        total = float((folder / files.limit).read_text())
        used = float((folder / files.usage).read_text())
        counts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # the group is not visible here, or its limit is the word max
        return None
    return Memory(total, max(total - used + float(counts.get(files.reclaimable, 0)), 0.0))
