"""Compile the kernels, once a machine; they are kept in the user's cache. ``python -m emoe build`` does it by hand."""

from __future__ import annotations

import functools
import hashlib
import importlib.machinery
import importlib.util
import logging
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from types import ModuleType

import torch

from emoe.permissions import sync

_SOURCE = Path(__file__).with_name("kernels.cpp")
_NAME = "emoe_kernels"
# run in a process of its own, whose path has the package ninja's program on it
_COMPILE = """
import sys
from torch.utils import cpp_extension
name, source, folder = sys.argv[1:]
cpp_extension.load(name, [source], extra_cflags=["-O3", "-fopenmp"], extra_ldflags=["-fopenmp"], build_directory=folder)
"""
_logger = logging.getLogger(__name__)


def library_file() -> Path:
    """Where the compiled kernels of this Python, this torch and this source are kept."""
    parts = (torch.__version__, str(torch.version.git_version), str(sysconfig.get_config_var("SOABI")))
    digest = hashlib.sha256(" ".join(parts).encode())
    for source in (_SOURCE, *sorted(_SOURCE.parent.glob("*.h"))):
        digest.update(source.read_bytes())
    named = os.environ.get("XDG_CACHE_HOME")
    cache = Path(named) if named else Path.home() / ".cache"
    return cache / "emoe" / digest.hexdigest()[:16] / f"{_NAME}.so"


def build_kernels() -> Path:
    """Compile the kernels where that has not been done, which takes less than a minute.

    Returns:
        The file.

    Raises:
        RuntimeError: there is no compiler, or it fails; the message is the compiler's first error, or its last line. Or there is no home to keep them in.
        OSError: the cache cannot be written.
    """
    library = library_file()
    if library.exists():
        if compiled_kernels() is None:
            compiled_kernels.cache_clear()  # another process has built them meanwhile
        return library
    import ninja

    _logger.warning("emoe: compiling kernels, once on this machine")
    library.parent.mkdir(parents=True, exist_ok=True)
    path = os.pathsep.join([ninja.BIN_DIR, os.environ.get("PATH", os.defpath)])
    # in a folder of its own and then moved, so that processes that start together do not meet
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        done = subprocess.run(
            [sys.executable, "-c", _COMPILE, _NAME, str(_SOURCE), folder],
            env={**os.environ, "PATH": path},
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        if done.returncode:
            said = done.stderr.strip().splitlines() or ["the compiler failed"]
            raise RuntimeError(next((line for line in said if re.search(r"\berror: ", line)), said[-1]))
        built = Path(folder) / library.name
        sync(built)
        built.replace(library)
    compiled_kernels.cache_clear()
    return library


@functools.cache
def compiled_kernels() -> ModuleType | None:
    """The compiled module, or None where it has not been built, cannot be looked for or does not load. It never builds."""
    try:
        library = library_file()
        if not library.exists():
            return None
    except (OSError, RuntimeError):  # a cache of another user, no home, no source beside this file
        return None
    try:
        loader = importlib.machinery.ExtensionFileLoader(_NAME, str(library))
        spec = importlib.util.spec_from_loader(_NAME, loader)
        module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
        loader.exec_module(module)
    except (OSError, ImportError) as error:
        _logger.warning(
            "emoe: %s does not load, the sparse backend uses PyTorch: %s", library, str(error).splitlines()[0]
        )
        return None
    return module


@functools.cache
def prepare_kernels() -> None:
    """Build the kernels if they can be built here, and say so once where they cannot."""
    try:
        build_kernels()
    except (OSError, RuntimeError, ImportError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        _logger.warning("emoe: no compiled kernels, the sparse backend uses PyTorch: %s", reason)
