"""The files in ``config/``: each defines a suite, its benchmarks and their grids."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

from benchmarks.harness import base as paths
from benchmarks.harness.base import DefinitionError
from benchmarks.harness.config.benchmark import Part, benchmark_names, load_benchmark, parse_part
from benchmarks.harness.config.yaml import UNIQUE, Count, Key, Strict, check_names, parse, read_yaml
from emoe.errors import did_you_mean


class SuiteSettings(Strict):
    """A suite. `exclude`, `seeds`, `tracking_uri` and the folders can also be given on the command line
    (`--config key=value`), and `benchmarks=[glue,llama]` runs only these.
    """

    benchmarks: Annotated[dict[Key, Any], Field(min_length=1)]
    """Benchmarks to run, in the order of the report, each with its grid and its differences from benchmark.yaml."""
    exclude: Annotated[list[str], UNIQUE] = Field([])
    """Names of sets to leave out because you could not obtain them. Tables state the sets that they cover."""
    seeds: Count | None = None
    """Number of seeds (trials for images), from 0 on. It replaces lists of several seeds in the blocks of a grid."""
    data_root: str | None = None
    """Folder with data sets, one subfolder each (`source.folder` in tasks.yaml). A set that is not there comes from the
    hub.
    """
    model_root: str | None = None
    """Folder with models, one subfolder each (the model's name). A model that is not there comes from the hub or its
    package.
    """
    tracking_uri: str | None = None
    """MLflow's store. Null: the variable MLFLOW_TRACKING_URI, else sqlite:///results/mlflow.db."""


class _Chosen(Strict):
    benchmarks: Annotated[list[str], Field(min_length=1), UNIQUE]


@dataclass(frozen=True)
class SuiteFile:
    """Hold the content of a suite's file, changed by the command line's values.

    Attributes:
        settings: The content.
        parts: The part of each benchmark, by name.
    """

    settings: SuiteSettings
    parts: Mapping[str, Part[Any]]


def suite_names() -> list[str]:
    """Return the suites that have a file in ``config/``."""
    return sorted(path.stem for path in paths.CONFIG.glob("*.yaml"))


def read_suite_file(name: str, overrides: Mapping[str, Any]) -> SuiteFile:
    """Read ``config/<name>.yaml`` and put the command line's values on top.

    Args:
        name: The name of the suite.
        overrides: Values of ``--config`` by key.

    Raises:
        DefinitionError: There is no such suite, or a key or value is wrong; names the file and the nearest valid one.
    """
    if name not in suite_names():
        near = did_you_mean(name, suite_names())
        raise DefinitionError(f"there is no suite '{name}'{near} (files in {paths.CONFIG})")
    file = paths.CONFIG / f"{name}.yaml"
    content = read_yaml(file)
    settings = parse(content, SuiteSettings, str(file))
    where = "--config" if overrides else str(file)
    values = dict(overrides)
    if "benchmarks" in values:
        asked = parse({"benchmarks": values.pop("benchmarks")}, _Chosen, where).benchmarks
        check_names(f"{where}: '", "benchmarks", asked, settings.benchmarks)
        values["benchmarks"] = {benchmark: settings.benchmarks[benchmark] for benchmark in asked}
    settings = parse({**content, **values}, SuiteSettings, where)
    check_names(f"{file}: '", "benchmarks", settings.benchmarks, benchmark_names())
    parts = {
        benchmark: parse_part(
            load_benchmark(benchmark), name, file, _with_seeds(part, settings.seeds) if settings.seeds else part
        )
        for benchmark, part in settings.benchmarks.items()
    }
    excludable = {task for benchmark in parts for task in load_benchmark(benchmark).tasks}
    check_names(f"{where}: '", "exclude", settings.exclude, excludable)
    for benchmark in parts:
        other = load_benchmark(benchmark).evaluates
        if other and other not in parts:
            raise DefinitionError(f"{where}: 'benchmarks' has '{benchmark}', which evaluates '{other}'; name that too")
    return SuiteFile(settings, parts)


def _with_seeds(part: Any, seeds: int) -> Any:
    """Set lists of several seeds or trials in a part's unvalidated content to the given number of seeds."""
    if isinstance(part, list):
        return [_with_seeds(value, seeds) for value in part]
    if not isinstance(part, dict):
        return part
    several = {key for key in ("seed", "trial") if isinstance(part.get(key), list) and len(part[key]) > 1}
    return {key: list(range(seeds)) if key in several else _with_seeds(value, seeds) for key, value in part.items()}


@functools.cache
def suite_parts(benchmark: str) -> dict[str, Part[Any]]:
    """Return a benchmark's part of each suite that runs it, by suite."""
    files = {name: read_suite_file(name, {}) for name in suite_names()}
    return {name: file.parts[benchmark] for name, file in files.items() if benchmark in file.parts}
