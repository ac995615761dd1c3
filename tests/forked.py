"""Processes of tests that fork from one that has imported what they need: a fork of pytest's own, which has threads, could wait for ever for what one of them holds."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.process import BaseProcess


def start(work: Callable[..., object], *arguments: object) -> BaseProcess:
    """A process that does this."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.unit.test_streaming_interrupted", "tests.unit.test_mlflow"])
    process = context.Process(target=work, args=arguments)
    process.start()
    return process
