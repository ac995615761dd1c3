"""What a configuration may name as its router; known without PyTorch, which takes a second to import."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class RegisteredRouter:
    """One router.

    Attributes:
        learned: see :class:`emoe.Router`.
        load: gives its class.
    """

    learned: bool
    load: Callable[[], type[Any]]


def _of_this_library(name: str) -> Callable[[], type[Any]]:
    return lambda: getattr(importlib.import_module("emoe.routers"), name)


# emoe.register_router adds to it
ROUTERS: dict[str, RegisteredRouter] = {
    "avg_k": RegisteredRouter(False, _of_this_library("AvgKRouter")),
    "cosine": RegisteredRouter(True, _of_this_library("CosineRouter")),
    "fixed": RegisteredRouter(False, _of_this_library("FixedRouter")),
}
