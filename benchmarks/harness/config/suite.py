"""A suite: its file in ``config/``, and the runs that it plans."""

from __future__ import annotations

import functools
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, TypeAdapter, ValidationError

from benchmarks.harness import base as paths
from benchmarks.harness.base import DefinitionError, first_problem, read_yaml
from benchmarks.harness.config.benchmark import Part, benchmark_names, load_benchmark, parse_part
from benchmarks.harness.config.names import check_name
from benchmarks.harness.config.runs import PartitionJob, Run, all_sets, partition_jobs, run_from_spec
from benchmarks.harness.config.yaml import UNIQUE, Count, Key, Strict, Text, check_names, parse, refusal
from benchmarks.harness.sources.packages import find_package, set_packages, sha256
from emoe.errors import did_you_mean

DEFAULT_TRACKING_URI = "sqlite:///results/mlflow.db"
_USUAL = ("mini", "full", "smoke", "paper")  # suites that are searched first


class SuiteSettings(Strict):
    """A suite. `exclude`, `seeds`, `tracking_uri` and the folders can also be given on the command line
    (`--config key=value`), and `benchmarks=[glue,llama]` runs only these.
    """

    benchmarks: Annotated[dict[Key, Any], Field(min_length=1)]
    """Benchmarks to run, in the order of the report, each with its grid and its differences from benchmark.yaml."""
    exclude: Annotated[list[str], UNIQUE] = Field([])
    """Names of sets to exclude, for example because you have no access. Tables list their sets."""
    seeds: Count | None = None
    """Number of seeds (trials for images), from 0 on. It replaces lists of several seeds in the blocks of a grid."""
    data_root: Text | None = None
    """Folder with data sets, one subfolder each (`source.folder` in tasks.yaml). A set that is not there comes from the
    hub.
    """
    model_root: Text | None = None
    """Folder with models, one subfolder each (the model's name). A model that is not there comes from the hub or its
    package.
    """
    tracking_uri: Text | None = None
    """MLflow's store. Null: the variable MLFLOW_TRACKING_URI, else sqlite:///results/mlflow.db."""


def suite_names() -> list[str]:
    """Return the suites that have a file in ``config/``, the usual ones first."""
    names = sorted(path.stem for path in paths.CONFIG.glob("*.yaml"))
    return [*(name for name in _USUAL if name in names), *(name for name in names if name not in _USUAL)]


def _list_names(given: Any) -> Any:
    """Take one name for a list of one name."""
    names = [given] if isinstance(given, str) else given
    is_list = isinstance(names, list) and all(isinstance(name, str) for name in names)
    if not is_list:
        raise refusal(f"{given!r:.100} is neither a name nor a list of names like [first,second]")
    return names


def _check_chosen(names: list[str]) -> list[str]:
    if not names:
        raise refusal(f"it names no benchmark; leave it out to run all{did_you_mean('', benchmark_names())}")
    return names


OneOrMore = Annotated[list[str], BeforeValidator(_list_names)]


class CommandLine(Strict):
    """The values of ``--config key=value``. A key of null, as in ``seeds=``, is as in the suite's file.

    `suite` and `benchmarks` cannot be null.
    """

    suite: str = "mini"
    """Name of a file in config/."""
    benchmarks: Annotated[list[str] | None, AfterValidator(_check_chosen), BeforeValidator(_list_names)] = None
    """Benchmarks of the suite to run, one or a list."""
    exclude: OneOrMore | None = None
    """Names of sets to exclude, one or a list. They replace those of the suite's file, as do all keys below."""
    seeds: Count | None = None
    """Number of seeds."""
    data_root: Text | None = None
    """Folder with data sets."""
    model_root: Text | None = None
    """Folder with models."""
    tracking_uri: Text | None = None
    """MLflow's store."""

    def values(self) -> dict[str, Any]:
        """Return the values that are given, null ones left out."""
        return {key: value for key, value in self.given().items() if value is not None}


def load_suite(overrides: Mapping[str, Any]) -> Suite:
    """Read ``config/<suite>.yaml``, and apply the values of the command line.

    Args:
        overrides: ``--config`` values; ``suite`` names the file (default ``mini``).

    Raises:
        DefinitionError: There is no such suite, or a key or value is wrong; names the file and the nearest valid one.
    """
    name = overrides.get("suite", "mini")
    if name not in suite_names():
        raise DefinitionError(
            f"there is no suite '{name}'{did_you_mean(name, suite_names())} (files in {paths.CONFIG})"
        )
    command_line = parse(dict(overrides), CommandLine, "--config")
    given = command_line.values()
    file = paths.CONFIG / f"{name}.yaml"
    check_name(name, file)
    replaced = {key: value for key, value in given.items() if key not in ("suite", "benchmarks")}
    where = f"{file} with --config" if given.keys() - {"suite"} else str(file)
    content = read_yaml(file)
    settings = parse({**content, **replaced} if isinstance(content, dict) else content, SuiteSettings, where)
    check_names(f"{file}: '", "benchmarks", settings.benchmarks, benchmark_names())
    if command_line.benchmarks:
        check_names(f"{where}: '", "benchmarks", command_line.benchmarks, settings.benchmarks)
        chosen = {benchmark: settings.benchmarks[benchmark] for benchmark in command_line.benchmarks}
        settings = settings.model_copy(update={"benchmarks": chosen})
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
    for key, folder in (("data_root", settings.data_root), ("model_root", settings.model_root)):
        if folder and not Path(folder).is_dir():
            raise DefinitionError(f"{where}: '{key}' is '{folder}', which is not a folder")
    return Suite(name, settings, parts, given)


def _with_seeds(part: Any, seeds: int) -> Any:
    """Replace each list of several seeds or trials by ``range(seeds)``, before the content is validated."""
    if isinstance(part, list):
        return [_with_seeds(value, seeds) for value in part]
    if not isinstance(part, dict):
        return part
    several = {key for key in ("seed", "trial") if isinstance(part.get(key), list) and len(part[key]) > 1}
    return {key: list(range(seeds)) if key in several else _with_seeds(value, seeds) for key, value in part.items()}


@functools.cache
def plain_suite(name: str) -> Suite:
    """Load a suite without the command line's values; each process plans it once."""
    return load_suite({"suite": name})


def suite_of_job(name: str) -> Suite:
    """Load a suite in a job of the workflow, with the command line's values from the environment."""
    text = os.environ.get(paths.OVERRIDES, "{}")
    try:
        overrides = TypeAdapter(dict[str, Any]).validate_json(text)
    except ValidationError as error:
        raise DefinitionError(
            f"the environment variable {paths.OVERRIDES} must hold the values of --config as JSON, "
            f'such as {{"seeds": 2}}; {first_problem(error)}; unset it, because the workflow sets it'
        ) from error
    return load_suite(overrides if overrides.get("suite", "mini") == name else {"suite": name})


def suite_parts(benchmark: str) -> dict[str, Part[Any]]:
    """Return a benchmark's part of each suite that runs it, by suite."""
    suites = map(plain_suite, suite_names())
    return {suite.name: suite.benchmark_parts[benchmark] for suite in suites if benchmark in suite.benchmark_parts}


def plan(parts: Mapping[str, Part[Any]], exclude: Collection[str]) -> list[Run]:
    """Plan every run of a suite, each once, in the order of the grids.

    Args:
        parts: The suite's part of each benchmark, by name.
        exclude: The sets to leave out.
    """
    planned: dict[str, list[Run]] = {}

    def runs_of(name: str) -> list[Run]:
        if name not in planned:
            benchmark, part = load_benchmark(name), parts[name]
            others = runs_of(benchmark.evaluates) if benchmark.evaluates else []
            resources = part.settings.resources.model_dump()
            # a run that trains nothing takes one process and at most one GPU
            fewer = {key: min(resources[key], 1) for key in ("gpu", "processes") if key in resources}
            planned[name] = []
            for spec in benchmark.specs(part, exclude, others):
                run = run_from_spec(spec | {"files": _file_digests(spec)})
                reserved = resources if run.is_trained else resources | fewer
                planned[name].append(replace(run, resources=dict(reserved)))
            if not planned[name]:
                raise DefinitionError(f"{part.file}: 'exclude' leaves no run of '{name}'; leave out the benchmark too")
        return planned[name]

    return list({run.id: run for name in parts for run in runs_of(name)}.values())


def _file_digests(spec: Mapping[str, Any]) -> dict[str, str]:
    """Return the sha256 of the source files of a run's sets and rebuilt model, by name."""
    digests: dict[str, str] = {}
    if rebuilt := spec["model"].get("rebuilt"):
        digests[find_package(rebuilt).name] = find_package(rebuilt).sha256
    for task in all_sets(spec):
        source = task.get("source", {})
        digests |= {file.name: file.sha256 for file in set_packages(source)}
        if "csv" in source:
            digests[source["csv"]] = _csv_digest(source["csv"])
    return digests


@functools.cache
def _csv_digest(name: str) -> str:
    """Return the sha256 of a csv in the project."""
    if not (paths.ROOT / name).is_file():
        raise DefinitionError(f"{paths.ROOT / name} does not exist, but a task's 'source.csv' names it")
    return sha256(paths.ROOT / name)


@dataclass(frozen=True)
class Suite:
    """A suite: its checked configuration, and the runs that it plans.

    Attributes:
        name: ``smoke``, ``mini``, …
        settings: The checked configuration.
        benchmark_parts: The part of each benchmark, by name.
        overrides: The values of the command line.
    """

    name: str
    settings: SuiteSettings
    benchmark_parts: Mapping[str, Part[Any]]
    overrides: dict[str, Any]

    @cached_property
    def runs(self) -> list[Run]:
        """Return every run, each once, in the order of the grids."""
        return plan(self.benchmark_parts, self.settings.exclude)

    @cached_property
    def runs_by_folder(self) -> dict[str, Run]:
        return {run.folder: run for run in self.runs}

    @cached_property
    def partitions(self) -> dict[str, PartitionJob]:
        """Return the clusterings that the runs need, by id."""
        return {job.id: job for run in self.runs for job in partition_jobs(run)}

    def runs_of(self, benchmark: str, part: str | None = None) -> list[Run]:
        """Return the runs of a benchmark, or of one of its parts."""
        return [run for run in self.runs if run.benchmark == benchmark and part in (None, run.task)]

    def parts(self, benchmark: str) -> list[str]:
        """Return the sets of a benchmark that have tables of their own. Plans no runs."""
        loaded = load_benchmark(benchmark)
        if not loaded.has_set_tables:
            return []
        part = self.benchmark_parts.get(benchmark)
        named = dict.fromkeys(name for block in (part.settings.grid if part else ()) for name in block.set)
        return [name for name in named if name not in self.settings.exclude]

    def record_parts(self, benchmark: str) -> list[str | None]:
        """Return the sets with a file of records each, or [None] if one file has all records."""
        return [*self.parts(benchmark)] or [None]

    @property
    def tracking_uri(self) -> str:
        """Return MLflow's store: the configuration, else ``MLFLOW_TRACKING_URI``, else SQLite below ``results/``."""
        return self.settings.tracking_uri or os.environ.get(paths.TRACKING_URI) or DEFAULT_TRACKING_URI
