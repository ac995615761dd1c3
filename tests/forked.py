"""Start processes from a fork server that has imported a module of tests.

A fork of pytest itself has threads and may hang.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.process import BaseProcess


def start(work: Callable[..., object], *arguments: object) -> BaseProcess:
    """Start a process that calls a function; at the first call the server imports its module."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([work.__module__])
    process = context.Process(target=work, args=arguments)
    process.start()
    return process
