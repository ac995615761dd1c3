"""Files as others find them: with the permissions that the umask allows, and whole after a power cut."""

from __future__ import annotations

import os
import shutil
import uuid
from pathlib import Path


def share(path: Path) -> None:
    """Give a file the permissions of any new file beside it; safetensors lets its owner alone read what it writes.

    Args:
        path: of the file; a new one beside it tells the umask, which cannot be asked for without setting it.
    """
    usual = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    usual.touch()
    try:
        shutil.copymode(usual, path)
    finally:
        usual.unlink()


def sync(path: Path) -> None:
    """Have the disk take a file's content, before it takes its name: after a power cut the name could stand alone."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
