"""Run commands in forks of one server process, which imports everything once.

Importing torch and transformers takes longer than many runs. Before it forks, the server does
nothing but import, so a run has the same numbers as in its own process. A fork ends with its
caller, and the server ends with the workflow. A command runs in its own process if there is no
server, if its environment (threads, devices, settings) differs, or if a file of code or settings
was edited after the server had started.

This module imports only the standard library, so that the caller starts fast.
"""

from __future__ import annotations

import gc
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

ADDRESS = "EMOE_FORKSERVER"  # variable with the path of the server's socket
# the variables that Snakemake sets for a job of one thread; forks are for such jobs
ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "GOTO_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "NUMEXPR_NUM_THREADS": "1",
    "VECLIB_MAXIMUM_THREADS": "1",
}
# a fork copies these variables from its caller; their values do not influence results
_CALLERS_VARIABLES = {
    ADDRESS,
    # folders
    "PWD",
    "OLDPWD",
    "TMPDIR",
    "TMP",
    "TEMP",
    "TEMPDIR",
    # what bash sets, resets or drops before it starts a job
    "_",
    "SHLVL",
    "SHELLOPTS",
    "IFS",
    "OPTIND",
    "PS1",
    "PS2",
    "PS4",
}
_ENVIRONMENT = dict(os.environ)  # read before other imports, because some libraries set variables
_ACCEPTED = b"+"  # the server's answer before it runs a command; the exit status follows


def run_in_fork(arguments: Sequence[str]) -> int | None:
    """Run a command in a fork of the server, whose address is in the environment.

    Args:
        arguments: The arguments of ``python -m benchmarks``.

    Returns:
        The exit status. None if there is no server, or if the server has another environment or
        older files; the command was then not run.
    """
    address = os.environ.get(ADDRESS)
    if not address:
        return None
    request = {"arguments": list(arguments), "folder": str(Path.cwd()), "environment": _ENVIRONMENT}
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server,
        server.makefile("rb") as answer,
    ):
        try:
            server.connect(address)
            # The fork uses the standard streams of this process: 0, 1 and 2. They must be sent
            # together with a byte, which means nothing.
            socket.send_fds(server, [b"\n"], [0, 1, 2])
            server.sendall(f"{json.dumps(request)}\n".encode())
            if answer.read(1) != _ACCEPTED:
                return None
        except OSError:  # the server has ended, or is on another machine
            return None
        status = answer.read()
    if not status:
        sys.stderr.write(
            "error: the process that did the work was killed, perhaps because memory ran out\n"
        )
        return 1
    return int(status)


class Server:
    """Starts and stops the server process, which imports everything and forks for each command.

    Args:
        benchmarks: The benchmarks whose pipelines the server imports; forks may import others.
    """

    def __init__(self, benchmarks: Iterable[str]) -> None:
        self._benchmarks = list(benchmarks)
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the server, and set its address in the environment.

        The commands of later callers wait until the server has imported everything. If the server
        cannot start, print a warning. Each command then runs in its own process.
        """
        # With this variable, torch counts accelerators without starting their driver. A driver that
        # the server has started would not work in its forks.
        os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
        try:
            folder = Path(tempfile.mkdtemp(prefix="emoe-"))
        except OSError as error:  # for example, the disk is full
            _warn_without_server(error)
            return
        try:
            self._start_in(folder)
        except OSError as error:  # for example, the path is too long for a socket
            shutil.rmtree(folder, ignore_errors=True)
            _warn_without_server(error)

    def _start_in(self, folder: Path) -> None:
        """Start the server with its socket in a folder, and set its address in the environment."""
        address = str(folder / "socket")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            listener.bind(address)
            listener.listen(64)
            command = [sys.executable, "-m", "benchmarks", "serve"]
            self._process = subprocess.Popen(
                [*command, str(listener.fileno()), *self._benchmarks],
                stdin=subprocess.PIPE,  # ends when this process does
                env={**os.environ, **ONE_THREAD},
                pass_fds=[listener.fileno()],
            )
        os.environ[ADDRESS] = address

    def stop(self) -> None:
        """End the server if it was started."""
        if self._process is None:
            return
        self._process.terminate()  # while it imports, it would not notice that its input ends
        self._process.communicate()
        self._process = None
        address = Path(os.environ.pop(ADDRESS))
        shutil.rmtree(address.parent, ignore_errors=True)


def _warn_without_server(error: OSError) -> None:
    """Print a warning that the server could not start."""
    sys.stderr.write(
        f"warning: no server for imports in {tempfile.gettempdir()}, so every run imports "
        f"everything again: {error} (TMPDIR sets the folder)\n"
    )


def serve(
    listener: socket.socket,
    import_all: Callable[[], None],
    file_times: Callable[[], Mapping[Path, int]],
    work: Callable[[list[str]], int],
) -> None:
    """Import the pipelines, and fork for each caller until the standard input ends.

    Args:
        listener: The socket on which callers connect.
        import_all: A function that imports all modules that commands need.
        file_times: A function that returns the files of code and settings, with the times of their
            last changes. After a change, the server declines all commands.
        work: A function that runs a command in a fork and returns its exit status.
    """
    folder = Path(listener.getsockname()).parent
    # a terminal sends this signal to all processes, and the workflow handles it
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # nobody waits for forks, which send their status to their callers
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    # before the import, so that an edit during the import is noticed too
    times_at_start = file_times()
    import_all()

    def is_current() -> bool:
        return file_times() == times_at_start

    gc.collect()
    gc.freeze()  # forks share these pages until one of them is written
    with listener:
        while True:
            readable, _, _ = select.select([listener, sys.stdin], [], [])
            if sys.stdin in readable:  # closed, because the workflow has ended
                break
            caller, _ = listener.accept()
            with caller:
                if os.fork() == 0:  # the following is run in the fork only
                    listener.close()
                    # never returns: it ends the fork
                    _run_for_caller(caller, is_current, work)
    shutil.rmtree(folder, ignore_errors=True)


def _run_for_caller(
    caller: socket.socket, is_current: Callable[[], bool], work: Callable[[list[str]], int]
) -> None:
    """Run a caller's command in this fork, send the exit status to the caller, and end the fork.

    If the caller's environment does not fit, or the imported files have changed since, end without
    an answer; the caller then runs the command itself.
    """
    status = 1  # of a command that raises an error
    try:
        # the caller sends one byte with its three standard streams, then a line of JSON
        _byte, streams, _flags, _address = socket.recv_fds(caller, 1, 3)
        with caller.makefile() as content:
            request = json.loads(content.readline())
        if not _fits(request["environment"]) or not is_current():
            # decline: os._exit ends the fork without an answer, because it skips `finally`
            os._exit(0)
        caller.sendall(_ACCEPTED)
        _become_like_caller(streams, request["folder"], request["environment"])
        # if the caller is killed, this fork ends too
        threading.Thread(target=_end_with, args=(caller,), daemon=True).start()
        status = work(request["arguments"])
    except BaseException:  # no error may reach the loop of the server, whose copy this fork is
        traceback.print_exc()
    finally:
        with suppress(OSError):  # the caller has ended
            sys.stdout.flush()
            sys.stderr.flush()
            caller.sendall(str(status).encode())
        os._exit(status)  # skips the exit handlers of the server


def _become_like_caller(
    streams: Sequence[int], folder: str, environment: Mapping[str, str]
) -> None:
    """Give this fork the signals, standard streams, working directory and variables of a caller.

    Args:
        streams: The file descriptors of the caller's standard input, output and errors.
        folder: The caller's working directory.
        environment: The caller's environment variables.
    """
    # undo the server's handling of signals
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, stream in enumerate(streams):  # 0, 1 and 2 are the standard streams
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(folder)
    for name in _CALLERS_VARIABLES:
        if name in environment:
            os.environ[name] = environment[name]


def _fits(environment: Mapping[str, str]) -> bool:
    """Return True if a caller's environment differs only in variables that a fork copies."""
    # (name, value) pairs that only one side has: changed values and missing variables
    differences = environment.items() ^ _ENVIRONMENT.items()
    return all(name in _CALLERS_VARIABLES for name, _ in differences)


def _end_with(caller: socket.socket) -> None:
    """Wait until the caller has ended, and then end this process."""
    caller.recv(1)  # the caller sends nothing more, so this returns when its socket is closed
    os.kill(os.getpid(), signal.SIGTERM)
