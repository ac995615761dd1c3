"""Compile the kernels once per machine, into the user's cache; ``python -m emoe build`` does so explicitly."""

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

_SOURCE = Path(__file__).with_name("kernels.cpp")
_NAME = "emoe_kernels"
# runs in another process, with the ninja package's program on its path
_COMPILE = """
import sys
from torch.utils import cpp_extension
name, source, folder = sys.argv[1:]
cpp_extension.load(name, [source], extra_cflags=["-O3", "-fopenmp"], extra_ldflags=["-fopenmp"], build_directory=folder)
"""
_logger = logging.getLogger(__name__)


def library_file() -> Path:
    """Return the path of the compiled kernels for this Python, torch and source."""
    versions = (torch.__version__, str(torch.version.git_version), str(sysconfig.get_config_var("SOABI")))
    digest = hashlib.sha256(" ".join(versions).encode())
    for source in (_SOURCE, *sorted(_SOURCE.parent.glob("*.h"))):
        digest.update(source.read_bytes())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "emoe" / digest.hexdigest()[:16] / f"{_NAME}.so"


def build_kernels() -> Path:
    """Compile the kernels if this was not done yet; it takes less than a minute.

    Returns:
        Path of the compiled library.

    Raises:
        RuntimeError: there is no compiler or home folder, or the compiler fails; the message is its first error.
        OSError: the cache cannot be written.
    """
    library = library_file()
    if library.exists():
        if compiled_kernels() is None:
            compiled_kernels.cache_clear()  # another process has built them
        return library
    import ninja

    _logger.warning("emoe: compiling kernels, once on this machine")
    library.parent.mkdir(parents=True, exist_ok=True)
    path = os.pathsep.join([ninja.BIN_DIR, os.environ.get("PATH", os.defpath)])
    # built in a temporary folder and moved, because several processes may start together
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        result = subprocess.run(
            [sys.executable, "-c", _COMPILE, _NAME, str(_SOURCE), folder],
            env={**os.environ, "PATH": path},
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        if result.returncode:
            lines = result.stderr.strip().splitlines() or ["the compiler failed"]
            raise RuntimeError(next((line for line in lines if re.search(r"\berror: ", line)), lines[-1]))
        (Path(folder) / library.name).replace(library)
    compiled_kernels.cache_clear()
    return library


@functools.cache
def compiled_kernels() -> ModuleType | None:
    """Load the compiled kernels; None if they were not built or do not load."""
    try:
        library = library_file()
        if not library.exists():
            return None
    except (OSError, RuntimeError):  # an unreadable cache, or no home folder
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
    """Build the kernels; warn once if this is not possible."""
    try:
        build_kernels()
    except (OSError, RuntimeError, ImportError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        _logger.warning("emoe: no compiled kernels, the sparse backend uses PyTorch: %s", reason)
