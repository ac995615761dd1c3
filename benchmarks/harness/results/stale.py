"""Results that no suite takes any more, because their benchmark has another version now."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness.base.errors import DefinitionError
from benchmarks.harness.base.paths import RUNS
from benchmarks.harness.config.definition import load_benchmark
from benchmarks.harness.config.runs import read_run


@dataclass(frozen=True)
class Stale:
    """A run's folder below ``results/runs`` that tables leave out.

    Attributes:
        folder: the benchmark and the run's id.
        why: its version and the present one, or what is wrong with its ``run.json``.
    """

    folder: str
    why: str


def stale_runs(root: Path = RUNS) -> Iterator[Stale]:
    """Find the runs of other versions of their benchmarks, and those whose ``run.json`` is none of here.

    >>> [found.folder for found in stale_runs()]
    ['glue/minilm-tweets-emoe-lr0.0001-s0-0123abcd']
    """
    for path in sorted(root.glob("*/*/run.json")):
        try:
            run = read_run(path)
        except DefinitionError as error:
            yield Stale(str(path.parent.relative_to(root)), str(error))
            continue
        had, has = run.spec.get("version"), load_benchmark(run.benchmark).definition.version
        if had != has:
            yield Stale(run.folder, f"of version {had} of {run.benchmark}, which has {has} now")
