"""A file that one process holds at a time, on file systems without ``flock`` too (NFS without its lock server)."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path
from typing import Any

from filelock import AcquireReturnProxy, FileLock, SoftFileLock, Timeout

_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)


def hold(path: Path, *, blocking: bool = True) -> AcquireReturnProxy[Any]:
    """Hold a file until it is released, as a context manager or by ``.lock.release()``; a process that ends releases it.

    Without ``flock`` the file ``<path>.held`` stands for it as long as it exists. That a process was killed on this machine is noticed;
    where it was killed on another, the file has to be deleted.

    Args:
        path: of the file, which is created.
        blocking: wait for whoever holds it.

    Raises:
        Timeout: another process holds it, and it is not waited for.
    """
    try:
        return FileLock(path).acquire(blocking=blocking)
    except NotImplementedError:  # as older versions of filelock say it
        pass
    except OSError as error:
        if isinstance(error, Timeout) or error.errno not in _NO_LOCKS:
            raise
    return SoftFileLock(_stand_in(path)).acquire(blocking=blocking)


def _stand_in(path: Path) -> Path:
    return path.with_name(f"{path.name}.held")


def is_held(path: Path) -> bool:
    """Whether a process holds a file; asked for a moment with others, so that a folder that cannot be written to will do."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        # filelock writes into the file itself where flock is unknown altogether
        return _stand_in(path).exists() or path.stat().st_size > 0
    finally:
        os.close(handle)
    return False
