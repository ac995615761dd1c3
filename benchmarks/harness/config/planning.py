"""Plan the runs of a suite from its grids."""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from benchmarks.harness import base as paths
from benchmarks.harness.base import DefinitionError
from benchmarks.harness.config.benchmark import Part, load_benchmark
from benchmarks.harness.config.runs import Run, all_sets, run_from_spec
from benchmarks.harness.sources.packages import find_package, set_packages, sha256


def plan_runs(parts: Mapping[str, Part[Any]], exclude: Collection[str]) -> list[Run]:
    """Plan every run of a suite, each once, in the order of the grids.

    Args:
        parts: The suite's part of each benchmark, by name.
        exclude: The data sets to leave out.
    """
    planned: dict[str, list[Run]] = {}
    for name in parts:
        _plan_benchmark(name, parts, exclude, planned)
    # several grids may plan the same run, which then has the same id
    runs_by_id: dict[str, Run] = {}
    for name in parts:
        for run in planned[name]:
            runs_by_id[run.id] = run
    return list(runs_by_id.values())


def _plan_benchmark(
    name: str,
    parts: Mapping[str, Part[Any]],
    exclude: Collection[str],
    planned: dict[str, list[Run]],
) -> None:
    """Add a benchmark's runs to ``planned``. Plan the benchmark that it evaluates first."""
    if name in planned:
        return
    benchmark = load_benchmark(name)
    part = parts[name]
    # the specs of an evaluation name the runs that it evaluates
    evaluated_runs: list[Run] = []
    if benchmark.evaluates:
        _plan_benchmark(benchmark.evaluates, parts, exclude, planned)
        evaluated_runs = planned[benchmark.evaluates]
    resources = part.settings.resources.model_dump()
    # a run that trains nothing takes one process and at most one GPU
    untrained_resources = dict(resources)
    for key in ("gpu", "processes"):
        if key in resources:
            untrained_resources[key] = min(resources[key], 1)
    runs = []
    for spec in benchmark.specs(part, exclude, evaluated_runs):
        run = run_from_spec({**spec, "files": _file_digests(spec)})
        reserved = resources if run.is_trained else untrained_resources
        runs.append(replace(run, resources=dict(reserved)))
    if not runs:
        raise DefinitionError(
            f"{part.file}: 'exclude' leaves no run of '{name}'; leave out the benchmark too"
        )
    planned[name] = runs


def _file_digests(spec: Mapping[str, Any]) -> dict[str, str]:
    """Return the sha256 of each file that a run's data sets or rebuilt model come from, by name."""
    digests: dict[str, str] = {}
    # a rebuilt model is made of the files in a package
    rebuilt = spec["model"].get("rebuilt")
    if rebuilt:
        package = find_package(rebuilt)
        digests[package.name] = package.sha256
    for task in all_sets(spec):
        source = task.get("source", {})
        for package in set_packages(source):
            digests[package.name] = package.sha256
        if "csv" in source:
            digests[source["csv"]] = _csv_digest(source["csv"])
    return digests


@functools.cache
def _csv_digest(name: str) -> str:
    """Return the sha256 of a csv in the project."""
    file = paths.ROOT / name
    if not file.is_file():
        raise DefinitionError(f"{file} does not exist, but a task's 'source.csv' names it")
    return sha256(file)
