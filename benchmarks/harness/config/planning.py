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
from benchmarks.harness.sources.packages import find_package, packages_of_dataset, sha256


def plan_runs(parts: Mapping[str, Part[Any]], exclude: Collection[str]) -> list[Run]:
    """Plan every run of a suite, each once, in the order of the grids.

    Args:
        parts: The suite's part of each benchmark, by name.
        exclude: The data sets to leave out.
    """
    planned: dict[str, list[Run]] = {}
    # Several grids may plan the same run, with the same id. The dictionary keeps this run once: at
    # the place of the first grid, and with the resources of the last grid.
    runs_by_id: dict[str, Run] = {}
    for name in parts:
        for run in _plan_benchmark(name, parts, exclude, planned):
            runs_by_id[run.id] = run
    return list(runs_by_id.values())


def _plan_benchmark(
    name: str,
    parts: Mapping[str, Part[Any]],
    exclude: Collection[str],
    planned: dict[str, list[Run]],
) -> list[Run]:
    """Plan the runs of a benchmark, unless they are planned already.

    If the benchmark evaluates the runs of another benchmark, the other one is planned first.

    Args:
        name: The name of the benchmark.
        parts: The suite's part of each benchmark, by name.
        exclude: The data sets to leave out.
        planned: The runs that are planned so far, by benchmark; gets the new ones.

    Raises:
        DefinitionError: All runs are excluded.
    """
    if name in planned:  # another benchmark evaluates them
        return planned[name]
    benchmark = load_benchmark(name)
    part = parts[name]
    # the specs of an evaluation name the runs that it evaluates
    evaluated_runs: list[Run] = []
    if benchmark.evaluated_benchmark:
        evaluated_runs = _plan_benchmark(benchmark.evaluated_benchmark, parts, exclude, planned)
    resources = part.settings.resources.model_dump()
    runs = []
    for spec in benchmark.specs(part, exclude, evaluated_runs):
        # the content of the data is part of the run's id
        complete_spec = {**spec, "files": _file_digests(spec)}
        run = run_from_spec(complete_spec)
        reserved = _resources_for(run, resources)
        runs.append(replace(run, resources=reserved))
    if not runs:
        raise DefinitionError(
            f"{part.file}: 'exclude' leaves no run of '{name}'; leave out the benchmark too"
        )
    planned[name] = runs
    return runs


def _resources_for(run: Run, resources: Mapping[str, Any]) -> dict[str, Any]:
    """Return the resources that a run of a benchmark takes.

    A run that trains nothing takes at most one GPU and one process.

    Args:
        run: The run.
        resources: The resources that the suite sets for the runs of the benchmark.
    """
    reserved = dict(resources)
    if not run.trains_model:
        for key in ("gpu", "processes"):
            if key in reserved:
                reserved[key] = min(reserved[key], 1)
    return reserved


def _file_digests(spec: Mapping[str, Any]) -> dict[str, str]:
    """Return the sha256 of the packages and csv files that a run's data and model come from.

    Args:
        spec: The spec of the run, which still lacks ``files``.

    Returns:
        The digests. The keys are the names of package files, and the paths of csv files in the
        checkout.
    """
    digests: dict[str, str] = {}
    # a rebuilt model is made of the files in a package
    rebuilt = spec["model"].get("rebuilt")
    if rebuilt:
        package = find_package(rebuilt)
        digests[package.name] = package.sha256
    for data_set in all_sets(spec):
        source = data_set.get("source", {})
        for package in packages_of_dataset(source):
            digests[package.name] = package.sha256
        if "csv" in source:
            digests[source["csv"]] = _csv_digest(source["csv"])
    return digests


@functools.cache
def _csv_digest(name: str) -> str:
    """Return the sha256 of a csv file in the checkout.

    Args:
        name: The path of the file, relative to the checkout.

    Raises:
        DefinitionError: There is no such file.
    """
    file = paths.ROOT / name
    if not file.is_file():
        raise DefinitionError(f"{file} does not exist, but a task's 'source.csv' names it")
    return sha256(file)
