"""Planned runs of suites. Tests must not change them, because the paper's are planned once per process."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from benchmarks.glue_ood.grid import KIND as EVALUATION
from benchmarks.harness.config import suite as suites
from benchmarks.harness.config.benchmark import Benchmark, load_benchmark
from benchmarks.harness.config.runs import Run, plan, run_from_spec


@functools.cache
def _planned(suite: str, benchmarks: tuple[str, ...], exclude: tuple[str, ...] = ()) -> list[Run]:
    return plan(list(benchmarks), suite, exclude)


def paper_runs(*benchmarks: str) -> list[Run]:
    """Return the runs of these benchmarks in the paper's suite."""
    return _planned("paper", benchmarks)


def paper_spec(benchmark: str, **names: str) -> dict[str, Any]:
    """Return the first spec of the paper's suite with these names, such as ``task="rte"``."""
    runs = paper_runs(benchmark)
    return next(run.spec for run in runs if all(run.spec[key]["name"] == name for key, name in names.items()))


def plan_once(patch: pytest.MonkeyPatch) -> None:
    """Plan each suite once, for tests that change no definition."""
    patch.setattr(suites, "plan", lambda benchmarks, suite, exclude: _planned(suite, tuple(benchmarks), tuple(exclude)))


def smoke_run(benchmark: str, method: str, section: str = "training", **changes: Any) -> Run:
    """Return the first run of a method in the smoke suite, with other values in a section of its spec."""
    spec = next(run.spec for run in _planned("smoke", (benchmark,)) if run.spec["method"]["name"] == method)
    return run_from_spec({**spec, section: {**spec[section], **changes}})


def evaluations(runs: list[Run], suite: str = "smoke", **changes: Any) -> list[Run]:
    """Return glue_ood's evaluations of these runs in a suite, with another definition."""
    ood = load_benchmark("glue_ood")
    benchmark = Benchmark("glue_ood", ood.definition.model_copy(update=changes), ood.tasks)
    specs = EVALUATION.specs(benchmark, suite, (), lambda _: {run.folder: run.spec for run in runs})
    return [run_from_spec(spec) for spec in specs]
