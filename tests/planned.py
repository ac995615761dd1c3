"""The paper's thousands of runs, planned once a process, when the first test asks; only to be looked at."""

from __future__ import annotations

import functools

from benchmarks.harness.planning.runs import Run, plan


@functools.cache
def paper_runs(*benchmarks: str) -> list[Run]:
    """The runs of these benchmarks in the paper's suite."""
    return plan(list(benchmarks), "paper")
