"""How long runs take, from what finished ones took: for the time left."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.harness.base.errors import DefinitionError
from benchmarks.harness.base.paths import RUNS


def benchmark_of(folder: str) -> str:
    """The benchmark that a run's folder names."""
    return folder.partition("/")[0]


def estimate(folders: Iterable[str], done: Collection[str], blessed: Mapping[str, float]) -> dict[str, float]:
    """Seconds of each run: as one that differs in the seed alone, else as finished ones of its benchmark on average, else as those where the suite
    was blessed, at the pace of those that are finished here; those of which nothing is known are left out.

    Args:
        folders: of the runs.
        done: of the finished ones.
        blessed: seconds of a run by benchmark, on the machine where the suite was blessed.

    Raises:
        DefinitionError: a finished run does not say what it took.
    """
    took = {but_the_seed(folder): float(read_cost(folder)[0]["job_seconds"]) for folder in done}
    here = means((benchmark_of(like), seconds) for like, seconds in took.items())
    both = set(here) & set(blessed)
    pace = sum(here[name] for name in both) / sum(blessed[name] for name in both) if both else 1.0
    found = {}
    for folder in folders:
        like, benchmark = but_the_seed(folder), benchmark_of(folder)
        if like in took:
            found[folder] = took[like]
        elif benchmark in here:
            found[folder] = here[benchmark]
        elif benchmark in blessed:
            found[folder] = pace * blessed[benchmark]
    return found


def read_cost(folder: str, root: Path = RUNS) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a finished run took (``cost`` of its ``metrics.json``), and where (``environment``).

    Raises:
        DefinitionError: the file is damaged, or does not say how long the job took.
    """
    path = root / folder / "metrics.json"
    try:
        content = json.loads(path.read_text())
        cost: dict[str, Any] = content["cost"]
        if not 0 < float(cost["job_seconds"]) < math.inf:
            raise ValueError(f"'job_seconds' is {cost['job_seconds']}")
        return cost, dict(content.get("environment", {}))
    except (ValueError, KeyError, TypeError) as error:
        raise DefinitionError(
            f"{path} is damaged ({error!r}); delete it and run `snakemake --cores all {path}`"
        ) from error


def clock(seconds: float) -> str:
    """``75`` as ``1:15``; hours where needed."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def means(pairs: Iterable[tuple[str, float]]) -> dict[str, float]:
    """The mean of the values of each name."""
    found: dict[str, list[float]] = {}
    for name, seconds in pairs:
        found.setdefault(name, []).append(seconds)
    return {name: sum(values) / len(values) for name, values in found.items()}


def but_the_seed(folder: str) -> str:
    """What the folders of runs have in common that differ in the seed alone."""
    return re.sub(r"-s\d+-[0-9a-f]{8}$", "", folder)
