"""Compile the kernels once per machine, into the user's cache.

``python -m emoe build`` does so explicitly.
"""

from __future__ import annotations

import functools
import hashlib
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
from torch import Tensor, nn

_SOURCE = Path(__file__).with_name("kernels.cpp")
_NAME = "emoe_kernels"
# Python code that compiles the kernels. It runs in another process, with ninja on its path.
_COMPILE = """
import sys
from torch.utils import cpp_extension
name, source, folder = sys.argv[1:]
cpp_extension.load(
    name,
    [source],
    extra_cflags=["-O3", "-fopenmp"],
    extra_ldflags=["-fopenmp"],
    build_directory=folder,
)
"""
_logger = logging.getLogger(__name__)


def library_file() -> Path:
    """Return the path of the compiled kernels for this Python, torch and source code.

    The file may not exist yet.
    """
    abi = sysconfig.get_config_var("SOABI")
    digest = hashlib.sha256(f"{torch.__version__} {abi}".encode())
    headers = sorted(_SOURCE.parent.glob("*.h"))
    for source in (_SOURCE, *headers):
        digest.update(source.read_bytes())
    folder = _cache() / "emoe" / digest.hexdigest()[:16]
    return folder / f"{_NAME}.so"


def _cache() -> Path:
    """Return the user's cache folder."""
    cache = os.environ.get("XDG_CACHE_HOME")
    if cache:
        return Path(cache)
    return Path.home() / ".cache"


def build_kernels() -> Path:
    """Compile the kernels if necessary, and return the library's path.

    Raises:
        RuntimeError: there is no compiler or home folder, or the compiler fails. If it fails, the
            message is its first error.
        ImportError: ninja is not installed.
        OSError: the cache cannot be written.
    """
    library = library_file()
    if not library.exists():
        _logger.warning("emoe: compiling kernels, once on this machine")
        library.parent.mkdir(parents=True, exist_ok=True)
        # built in a temporary folder and moved, because several processes may start together
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            _compile(folder)
            built = Path(folder) / library.name
            built.replace(library)
    # an earlier call may have found no library, and cached this
    compiled_kernels.cache_clear()
    return library


def _compile(folder: str) -> None:
    """Compile the kernels in another process into a folder.

    Raises:
        RuntimeError: the compiler fails.
    """
    import ninja  # `import emoe` needs only torch and safetensors

    command = [sys.executable, "-c", _COMPILE, _NAME, str(_SOURCE), folder]
    old_path = os.environ.get("PATH", os.defpath)
    path_with_ninja = f"{ninja.BIN_DIR}{os.pathsep}{old_path}"
    environment = {**os.environ, "PATH": path_with_ninja}
    result = subprocess.run(
        command, env=environment, capture_output=True, text=True, errors="replace", check=False
    )
    if result.returncode != 0:
        raise RuntimeError(_first_error(result.stderr))


def _first_error(output: str) -> str:
    """Return the first error in the output of a compiler, or else its last line."""
    lines = output.strip().splitlines()
    if not lines:
        return "the compiler failed"
    for line in lines:
        if re.search(r"\berror: ", line):
            return line
    return lines[-1]


@functools.cache
def compiled_kernels() -> ModuleType | None:
    """Load the compiled kernels; None if they were not built or do not load."""
    try:
        library = library_file()
        if not library.exists():
            return None
        spec = importlib.util.spec_from_file_location(_NAME, library)
        module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
        spec.loader.exec_module(module)  # type: ignore[union-attr]
    except (ImportError, OSError, RuntimeError) as error:  # RuntimeError: no home folder
        _logger.warning("emoe: the kernels do not load, the sparse backend uses PyTorch: %s", error)
        return None
    return module


def is_traced() -> bool:
    """Check if torch.compile, torch.export or torch.jit.trace is tracing this forward pass."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined]


def kernels_for(x: Tensor) -> ModuleType | None:
    """Return the compiled kernels if they may compute with a tensor in this forward pass.

    The kernels compute no gradients, cannot be recorded in a graph, and only read the CPU's memory.
    None if they may not be used for this reason, or if they were not built.
    """
    if torch.is_grad_enabled() or is_traced() or not is_in_memory(x):
        return None
    return compiled_kernels()


def is_in_memory(tensor: Tensor) -> bool:
    """Check if a tensor's elements are in the CPU's memory, in PyTorch's own format."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.device.type != "cpu":
        return False
    try:
        tensor.data_ptr()
    except RuntimeError:  # the tensors of torch.func's transforms have no address
        return False
    return True


@functools.cache
def prepare_kernels() -> None:
    """Build the kernels, once per process. Log a warning if this is not possible."""
    try:
        build_kernels()
    except (OSError, RuntimeError, ImportError) as error:
        _logger.warning("emoe: no compiled kernels, the sparse backend uses PyTorch: %s", error)
