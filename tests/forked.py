"""Start processes from a fork server with the tests' modules; a fork of pytest itself has threads and may hang."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.process import BaseProcess


def start(work: Callable[..., object], *arguments: object) -> BaseProcess:
    """Start a process that calls a function."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.unit.test_streaming"])
    process = context.Process(target=work, args=arguments)
    process.start()
    return process
