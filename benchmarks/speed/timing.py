"""Time things side by side: in turn, in one process, so that what disturbs one disturbs all."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping


def side_by_side(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every call in each of ``rounds`` rounds, after one round that does not count."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if turn:
                taken[name].append(time.perf_counter() - start)
    return taken


def ratios(taken: Mapping[str, list[float]], base: str) -> dict[str, dict[str, float]]:
    """By name: the ``ratio`` to the base's time in the same round (median, lowest, highest), and the median ``seconds``."""
    found = {}
    for name, seconds in taken.items():
        by_round = [own / other for own, other in zip(seconds, taken[base], strict=True)]
        found[name] = {
            "ratio": statistics.median(by_round),
            "ratio_low": min(by_round),
            "ratio_high": max(by_round),
            "seconds": statistics.median(seconds),
        }
    return found
