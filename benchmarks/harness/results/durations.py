"""How long runs take, from what finished ones took: for the time left, and for plans."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from benchmarks.harness.base.errors import DefinitionError
from benchmarks.harness.base.paths import RUNS

Basis = Literal["seed", "kind", "blessed"]


@dataclass(frozen=True)
class Estimate:
    """What one run takes.

    Attributes:
        seconds: of one job.
        basis: as a finished one that differs in the ``seed`` alone; as finished ones of its ``kind`` on average; as those of its benchmark
            where the suite was ``blessed``, at the pace of those that are finished here.
    """

    seconds: float
    basis: Basis


def benchmark_of(folder: str) -> str:
    """The benchmark that a run's folder names."""
    return folder.partition("/")[0]


def estimate(
    folders: Iterable[str],
    done: Collection[str],
    blessed: Mapping[str, float],
    kind: Callable[[str], str] = benchmark_of,
) -> dict[str, Estimate]:
    """What each run takes; those of which nothing is known are left out.

    Args:
        folders: of the runs.
        done: of the finished ones.
        blessed: seconds of a run by benchmark, on the machine where the suite was blessed.
        kind: what runs have in common whose mean stands for one.

    Raises:
        DefinitionError: a finished run does not say what it took.
    """
    finished = {_but_the_seed(folder): folder for folder in done}
    took = {like: job_seconds(folder) for like, folder in finished.items()}
    usual = _means((kind(finished[like]), seconds) for like, seconds in took.items())
    here = _means((benchmark_of(like), seconds) for like, seconds in took.items())
    both = set(here) & set(blessed)
    pace = sum(here[name] for name in both) / sum(blessed[name] for name in both) if both else 1.0
    found = {}
    for folder in folders:
        like, benchmark = _but_the_seed(folder), benchmark_of(folder)
        if like in took:
            found[folder] = Estimate(took[like], "seed")
        elif kind(folder) in usual:
            found[folder] = Estimate(usual[kind(folder)], "kind")
        elif benchmark in blessed:
            found[folder] = Estimate(pace * blessed[benchmark], "blessed")
    return found


def job_seconds(folder: str, root: Path = RUNS) -> float:
    """What a finished run took, from start to end.

    Raises:
        DefinitionError: its ``metrics.json`` is damaged, or does not say.
    """
    path = root / folder / "metrics.json"
    try:
        return float(json.loads(path.read_text())["cost"]["job_seconds"])
    except (ValueError, KeyError, TypeError) as error:
        raise DefinitionError(
            f"{path} is damaged ({error!r}); delete it and run `snakemake --cores all {path}`"
        ) from error


def clock(seconds: float) -> str:
    """``75`` as ``1:15``; hours where needed."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _means(pairs: Iterable[tuple[str, float]]) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    for name, seconds in pairs:
        found.setdefault(name, []).append(seconds)
    return {name: sum(values) / len(values) for name, values in found.items()}


def _but_the_seed(folder: str) -> str:
    return re.sub(r"-s\d+-[0-9a-f]{8}$", "", folder)
