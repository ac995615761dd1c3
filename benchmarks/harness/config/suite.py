"""A suite: its file in ``config/``, and its runs."""

from __future__ import annotations

import functools
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field

from benchmarks.harness import base as paths
from benchmarks.harness.base import DefinitionError, distinct, read_yaml
from benchmarks.harness.config.benchmark import Part, benchmark_names, load_benchmark, parse_part
from benchmarks.harness.config.names import check_name
from benchmarks.harness.config.runs import (
    PartitionJob,
    Run,
    file_digests,
    partition_jobs,
    run_from_spec,
)
from benchmarks.harness.config.yaml import (
    UNIQUE,
    Key,
    Location,
    Strict,
    Text,
    check_names,
    parse,
    refusal,
)
from emoe.errors import did_you_mean

DEFAULT_SUITE = "mini"
DEFAULT_TRACKING_URI = "sqlite:///results/mlflow.db"
_NumSeeds = Annotated[int, Field(ge=1, le=10_000)]  # more would fill the memory
_SUITES_LISTED_FIRST = ("mini", "full", "smoke", "paper")  # the most used ones
# the keys of the command line that say where things are, and so change no run and no partition
PLACE_KEYS = ("data_root", "model_root", "tracking_uri")


class SuiteSettings(Strict):
    """A suite. `exclude`, `seeds`, `tracking_uri` and the folders can also be given on the command
    line (`--config key=value`). `benchmarks=[glue,llama]` runs only these two benchmarks.
    """

    benchmarks: Annotated[dict[Key, Any], Field(min_length=1)]
    """Benchmarks to run, in the order of the report, each with its grid and its differences from
    benchmark.yaml."""
    exclude: Annotated[list[str], UNIQUE] = Field([])
    """Names of sets to exclude, for example because you have no access. Each table lists its
    sets."""
    seeds: _NumSeeds | None = None
    """Number of seeds (for images: trials), counted from 0, at most 10,000. They replace each list
    of several seeds in the blocks of a grid."""
    data_root: Text | None = None
    """Folder with data sets, one subfolder each (`source.folder` in tasks.yaml). A set that is not
    there comes from the hub.
    """
    model_root: Text | None = None
    """Folder with models, one subfolder each (the model's name). A model that is not there comes
    from the hub or its package.
    """
    tracking_uri: Text | None = None
    """MLflow's store. Null: the variable MLFLOW_TRACKING_URI, else sqlite:///results/mlflow.db."""


def suite_names() -> list[str]:
    """Return the names of the suites (files in ``config/``), the most used ones first."""
    names = sorted(path.stem for path in paths.CONFIG.glob("*.yaml"))
    first = [name for name in _SUITES_LISTED_FIRST if name in names]
    others = [name for name in names if name not in _SUITES_LISTED_FIRST]
    return [*first, *others]


def _as_list(given: Any) -> Any:
    """Return a list of names as it is, and a single name as a list of one name.

    Refuse any other value.
    """
    if isinstance(given, str):
        return [given]
    if isinstance(given, list) and all(isinstance(name, str) for name in given):
        return given
    shown = repr(given)[:100]  # the value may be long
    raise refusal(f"{shown} is neither a name nor a list of names like [first,second]")


def _refuse_empty(benchmarks: list[str]) -> list[str]:
    """Refuse an empty list of benchmarks."""
    if benchmarks:
        return benchmarks
    # no name is near the empty one, so this lists all names: "; choose from domainbed, ..."
    choices = did_you_mean("", benchmark_names())
    raise refusal(f"it names no benchmark; leave it out to run all{choices}")


OneOrMore = Annotated[list[str], BeforeValidator(_as_list)]


class CommandLine(Strict):
    """The values of ``--config key=value``.

    A null, as in ``seeds=``, leaves the value of the suite's file. `suite` and `benchmarks` cannot
    be null.
    """

    suite: str = DEFAULT_SUITE
    """Name of a file in config/."""
    benchmarks: Annotated[
        list[str] | None, AfterValidator(_refuse_empty), BeforeValidator(_as_list)
    ] = None
    """Benchmarks of the suite to run, one or a list."""
    exclude: OneOrMore | None = None
    """Names of sets to exclude, one or a list. They replace the names in the suite's file. All keys
    below also replace the values of that file."""
    seeds: _NumSeeds | None = None
    """Number of seeds."""
    data_root: Text | None = None
    """Folder with data sets."""
    model_root: Text | None = None
    """Folder with models."""
    tracking_uri: Text | None = None
    """MLflow's store."""

    def values(self) -> dict[str, Any]:
        """Return the given values, without nulls."""
        return {key: value for key, value in self.given().items() if value is not None}


def load_suite(overrides: Mapping[str, Any]) -> Suite:
    """Read ``config/<suite>.yaml``, and apply the values of the command line.

    Args:
        overrides: ``--config`` values; ``suite`` names the file (default ``mini``).

    Raises:
        DefinitionError: There is no such suite, or a key or value is wrong. The error names the
            file and the nearest valid value.
    """
    # checked before the other values, because the suite selects the file
    name = overrides.get("suite", DEFAULT_SUITE)
    if name not in suite_names():
        near = did_you_mean(name, suite_names())
        raise DefinitionError(f"there is no suite '{name}'{near} (files in {paths.CONFIG})")
    command_line = parse(dict(overrides), CommandLine, "--config")
    given = command_line.values()
    file = paths.CONFIG / f"{name}.yaml"
    check_name(name, file)
    # the source of the settings, for messages
    gives_settings = any(key != "suite" for key in given)
    where = f"{file} with --config" if gives_settings else str(file)
    settings = _read_settings(file, where, command_line)
    parts = _read_parts(name, file, settings)
    _check_settings(settings, where, parts)
    return Suite(name, settings, parts, given)


def _read_settings(file: Path, where: str, command_line: CommandLine) -> SuiteSettings:
    """Read a suite's file, and apply the values and the choice of benchmarks of the command line.

    Args:
        file: The suite's file.
        where: The source of the values, for messages.
        command_line: The values of the command line.
    """
    merged = _replace_values(read_yaml(file), command_line)
    settings = parse(merged, SuiteSettings, where)
    check_names(Location(file, "benchmarks"), settings.benchmarks, benchmark_names())
    _check_exclude(settings, where)
    if not command_line.benchmarks:
        return settings
    # the command line also gives the order of the benchmarks
    check_names(Location(where, "benchmarks"), command_line.benchmarks, settings.benchmarks)
    chosen = {name: settings.benchmarks[name] for name in command_line.benchmarks}
    return settings.model_copy(update={"benchmarks": chosen})


def _replace_values(content: object, command_line: CommandLine) -> object:
    """Replace values of a suite's file by those of the command line.

    Content of a wrong type is returned as it is, because its validation follows.
    """
    if not isinstance(content, dict):
        return content
    replacing = {}
    for key, value in command_line.values().items():
        # these two keys replace no value: they choose the file, and benchmarks in it
        if key not in ("suite", "benchmarks"):
            replacing[key] = value
    return {**content, **replacing}


def _check_exclude(settings: SuiteSettings, where: str) -> None:
    """Check that excluded data sets exist.

    Args:
        settings: The suite's settings, with all benchmarks of its file: an excluded set may belong
            to a benchmark that the command line leaves out.
        where: The source of the settings, for messages.
    """
    # the check reads all benchmarks of the file, which takes time
    if not settings.exclude:
        return
    tasks: set[str] = set()
    for benchmark in settings.benchmarks:
        tasks.update(load_benchmark(benchmark).tasks)
    check_names(Location(where, "exclude"), settings.exclude, tasks)


def _read_parts(name: str, file: Path, settings: SuiteSettings) -> dict[str, Part[Any]]:
    """Validate the settings that a suite has for each of its benchmarks.

    If the suite sets the number of seeds, the lists of seeds in the grids are replaced first.

    Args:
        name: The name of the suite.
        file: The suite's file.
        settings: The suite's settings; those of the benchmarks are not validated yet.

    Returns:
        The suite's part of each benchmark, by the benchmark's name.
    """
    parts = {}
    for benchmark_name, given in settings.benchmarks.items():
        content = given
        if settings.seeds:
            content = _with_seeds(given, settings.seeds)
        benchmark = load_benchmark(benchmark_name)
        parts[benchmark_name] = parse_part(benchmark, suite=name, file=file, content=content)
    return parts


def _check_settings(settings: SuiteSettings, where: str, parts: Mapping[str, Part[Any]]) -> None:
    """Check that evaluated benchmarks and folders exist.

    Args:
        settings: The suite's settings.
        where: The source of the settings, for messages.
        parts: The suite's part of each benchmark, by the benchmark's name.
    """
    # a benchmark that evaluates runs of another benchmark needs this other benchmark in the suite
    for benchmark in parts:
        evaluated = load_benchmark(benchmark).evaluated_benchmark
        if evaluated and evaluated not in parts:
            raise DefinitionError(
                f"{where}: 'benchmarks' has '{benchmark}', which evaluates '{evaluated}'; "
                "name that too"
            )

    for key in ("data_root", "model_root"):
        folder = getattr(settings, key)
        if folder and not Path(folder).is_dir():
            raise DefinitionError(f"{where}: '{key}' is '{folder}', which is not a folder")


def _with_seeds(content: Any, seeds: int) -> Any:
    """Replace each list of several seeds by ``range(seeds)``, at any depth of the content.

    The content is not validated yet, so it may have any type.
    """
    if isinstance(content, list):
        return [_with_seeds(value, seeds) for value in content]
    if not isinstance(content, dict):
        return content
    replaced: dict[str, Any] = {}
    for key, value in content.items():
        # a list of one seed stays as it is
        has_several = isinstance(value, list) and len(value) > 1
        if key == "seed" and has_several:
            replaced[key] = list(range(seeds))
        else:
            replaced[key] = _with_seeds(value, seeds)
    return replaced


@functools.cache
def plain_suite(name: str) -> Suite:
    """Load a suite without values of the command line. A process loads each suite only once."""
    return load_suite({"suite": name})


def suite_parts(benchmark: str) -> dict[str, Part[Any]]:
    """Return the parts of all suites that run a benchmark, by the suite's name."""
    parts = {}
    for name in suite_names():
        suite = plain_suite(name)
        if benchmark in suite.benchmark_parts:
            parts[name] = suite.benchmark_parts[benchmark]
    return parts


@dataclass(frozen=True)
class Suite:
    """A suite: its checked configuration and its runs.

    Attributes:
        name: ``smoke``, ``mini``, …
        settings: The checked configuration.
        benchmark_parts: What the suite sets for each of its benchmarks, by the benchmark's name.
        overrides: The values of the command line.
    """

    name: str
    settings: SuiteSettings
    benchmark_parts: Mapping[str, Part[Any]]
    overrides: dict[str, Any]

    @cached_property
    def runs(self) -> list[Run]:
        """Return every run, each once, in the order of the grids."""
        return plan_runs(self.benchmark_parts, self.settings.exclude)

    @cached_property
    def runs_by_folder(self) -> dict[str, Run]:
        """Return the runs by their folder below ``results/runs``."""
        return {run.folder: run for run in self.runs}

    @cached_property
    def partitions(self) -> dict[str, PartitionJob]:
        """Return the partitions of neurons that the runs need, by id."""
        # several runs need the same partition
        jobs = {}
        for run in self.runs:
            for job in partition_jobs(run):
                jobs[job.id] = job
        return jobs

    def runs_of(self, benchmark: str, data_set: str | None = None) -> list[Run]:
        """Return the runs of a benchmark.

        Args:
            benchmark: The name of the benchmark.
            data_set: The name of one of its data sets; None for all.
        """
        runs = [run for run in self.runs if run.benchmark == benchmark]
        if data_set is None:
            return runs
        return [run for run in runs if run.task == data_set]

    def sets_with_tables(self, benchmark: str) -> list[str]:
        """Return the names of a benchmark's data sets, if each data set has its own tables.

        Otherwise the list is empty. No runs are planned here, because planning takes time.
        """
        if not load_benchmark(benchmark).has_set_tables:
            return []
        if benchmark not in self.benchmark_parts:
            return []
        names: list[str] = []
        for block in self.benchmark_parts[benchmark].settings.grid:
            names += [name for name in block.task if name not in self.settings.exclude]
        # several blocks may have the same data set
        return distinct(names)

    def sets_with_records(self, benchmark: str) -> list[str | None]:
        """Return the names of the data sets whose runs are collected in separate files.

        If the runs of all data sets are collected in one file, return [None].
        """
        names = self.sets_with_tables(benchmark)
        if names:
            return list(names)
        return [None]

    @property
    def tracking_uri(self) -> str:
        """Return MLflow's store.

        It is the configured one, else ``MLFLOW_TRACKING_URI``, else SQLite below ``results/``.
        """
        if self.settings.tracking_uri:
            return self.settings.tracking_uri
        # an empty variable is treated like a missing one
        return os.environ.get(paths.TRACKING_URI) or DEFAULT_TRACKING_URI


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
        complete_spec = {**spec, "files": file_digests(spec)}
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
