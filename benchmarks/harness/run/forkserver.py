"""Commands that share their imports: one process imports everything once and forks for each of them.

Importing torch, transformers and what else a run needs takes longer than many a run. The workflow starts a :class:`Server`; each
``python -m benchmarks …`` below it then has a fork of it do its work (:func:`ask`), with its own arguments, folder and streams. A fork
starts as a process that has imported and done nothing else, so that a run's numbers are those that it has alone. It ends when its
caller does, and the server ends with the workflow, however that ends.

A caller whose environment is another (threads, devices, settings) works by itself, as does one that finds no server.
This module imports the standard library alone: a caller shall not import what was imported for it.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

ADDRESS = "EMOE_FORKSERVER"
# what Snakemake tells the libraries of a job of one thread; forks are for such jobs
ONE_THREAD = dict.fromkeys(
    (
        "OMP_NUM_THREADS",
        "GOTO_NUM_THREADS",
        "OPENBLAS_NUM_THREADS",
        "MKL_NUM_THREADS",
        "VECLIB_MAXIMUM_THREADS",
        "NUMEXPR_NUM_THREADS",
    ),
    "1",
)
# a fork takes these over: what says where it stands, and what a shell keeps for itself, which bash sets, resets or drops (its
# prompts, which an activated environment exports) before it starts a job
_PLACES = {ADDRESS, "PWD", "OLDPWD", "TMPDIR", "TMP", "TEMP", "TEMPDIR"}
_SHELL = {"_", "SHLVL", "SHELLOPTS", "IFS", "OPTIND", "PS1", "PS2", "PS4"}
_FREE = _PLACES | _SHELL
# has torch count accelerators without starting their driver, which a fork could not use any more
_COUNT_ONLY = "PYTORCH_NVML_BASED_CUDA_CHECK"
_ENVIRONMENT = dict(os.environ)  # read before anything else is imported, because some libraries set variables
_TAKEN, _REFUSED = b"+", b"-"


def ask(arguments: Sequence[str]) -> int | None:
    """Have a command done by a fork of the server that the environment names.

    Args:
        arguments: of ``python -m benchmarks``.

    Returns:
        Its exit status; None where there is no server, or one with another environment, and nothing was done.
    """
    address = os.environ.get(ADDRESS)
    if not address:
        return None
    request = {
        "arguments": list(arguments),
        "folder": str(Path.cwd()),
        "environment": _ENVIRONMENT,
        "python": sys.executable,
    }
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server, server.makefile("rb") as answer:
        try:
            server.connect(address)
            socket.send_fds(server, [json.dumps(request).encode() + b"\n"], [0, 1, 2])
            taken = answer.read(1) == _TAKEN
        except OSError:  # it has ended, or is on another machine
            return None
        if not taken:
            return None
        status = answer.read()
    if not status:
        sys.stderr.write("error: the process that did the work was killed; was there memory enough?\n")
        return 1
    return int(status)


def _fixed(environment: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name not in _FREE}


class Server:
    """The process that imports and forks.

    Args:
        modules: what it imports; a command may need others.
    """

    def __init__(self, modules: Sequence[str]) -> None:
        self._modules = list(modules)
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, and name it to all commands that this process starts from now on. They wait until it has imported."""
        os.environ.setdefault(_COUNT_ONLY, "1")
        address = str(Path(tempfile.mkdtemp(prefix="emoe-")) / "socket")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            listener.bind(address)
            listener.listen(64)
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks", "serve", str(listener.fileno()), *self._modules],
                stdin=subprocess.PIPE,  # ends when this process does
                env={**os.environ, **ONE_THREAD},
                pass_fds=[listener.fileno()],
            )
        os.environ[ADDRESS] = address

    def stop(self) -> None:
        """End it; nothing where it was not started."""
        if self._process is not None:
            self._process.terminate()  # it may still import
            self._process.communicate()
            self._process = None
            shutil.rmtree(Path(os.environ.pop(ADDRESS)).parent, ignore_errors=True)


def serve(listener: socket.socket, modules: Sequence[str], work: Callable[[list[str]], int]) -> None:
    """Be the server, until the standard input ends.

    Args:
        listener: where commands ask.
        modules: to import first.
        work: does a command in a fork; gives its exit status.
    """
    folder = Path(listener.getsockname()).parent
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all; the workflow knows what to do
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # forks tell their callers themselves
    for name in modules:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # forks share these pages as long as nobody writes on them
    with listener, selectors.DefaultSelector() as waiting:
        for source in (listener, sys.stdin):
            waiting.register(source, selectors.EVENT_READ)
        while sys.stdin not in [key.fileobj for key, _ in waiting.select()]:
            caller, _ = listener.accept()
            with caller:
                if os.fork() == 0:
                    listener.close()
                    _be_fork(caller, work)
    shutil.rmtree(folder, ignore_errors=True)


def _be_fork(caller: socket.socket, work: Callable[[list[str]], int]) -> None:
    """Do what a caller asks for, tell it the exit status, and end."""
    content, streams = b"", list[int]()
    while not content.endswith(b"\n"):
        part, given, _, _ = socket.recv_fds(caller, 2**16, 3)
        if not part:
            os._exit(1)
        content, streams = content + part, streams + given
    request = json.loads(content)
    status = 1
    try:
        theirs = request["environment"]
        if request["python"] != sys.executable or _fixed(theirs) != _fixed(_ENVIRONMENT):
            caller.sendall(_REFUSED)
            os._exit(0)
        caller.sendall(_TAKEN)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for place, stream in enumerate(streams):
            os.dup2(stream, place)
            os.close(stream)
        os.chdir(request["folder"])
        os.environ.update({name: value for name, value in theirs.items() if name in _FREE})
        threading.Thread(target=_end_with, args=(caller,), daemon=True).start()
        status = work(request["arguments"])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        caller.sendall(str(status).encode())
        os._exit(status)  # not through the server's own end


def _end_with(caller: socket.socket) -> None:
    """End this process when the caller does, as if it were the caller."""
    caller.recv(1)
    os.kill(os.getpid(), signal.SIGTERM)
