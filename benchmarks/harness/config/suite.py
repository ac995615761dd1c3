"""A suite: its file in ``config/``, its runs, and their input and output files for the workflow."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import platform
import sys
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from benchmarks.harness import base as paths
from benchmarks.harness.base import DefinitionError, read_json, write_json, write_text
from benchmarks.harness.config.artifacts import CLAIMS, artifacts_of
from benchmarks.harness.config.benchmark import Part, benchmark_names, load_benchmark, parse_part
from benchmarks.harness.config.catalogue import load_models
from benchmarks.harness.config.claims import Comparison, load_claims
from benchmarks.harness.config.runs import PartitionJob, Run, all_sets, canonical_json, partition_jobs, run_from_spec
from benchmarks.harness.config.yaml import UNIQUE, Count, Key, Strict, check_names, parse, read_yaml
from benchmarks.harness.sources.local import local_path, user_file
from benchmarks.harness.sources.packages import find_package, set_packages, sha256
from emoe.errors import did_you_mean

# They stop glibc from returning memory to the kernel in every step, which takes a tenth of a small model's
# training time. Variables that are already set are kept; other C libraries ignore them.
_GLIBC = {
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(512 << 20),
    "MALLOC_TOP_PAD_": str(64 << 20),
}
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


def suite_names() -> list[str]:
    """Return the suites that have a file in ``config/``, the usual ones first."""
    names = sorted(path.stem for path in paths.CONFIG.glob("*.yaml"))
    return [*(name for name in _USUAL if name in names), *(name for name in names if name not in _USUAL)]


def load_suite(overrides: Mapping[str, Any]) -> Suite:
    """Read ``config/<suite>.yaml``, and apply the values of the command line.

    Args:
        overrides: ``--config`` values; ``suite`` names the file (default ``mini``).

    Raises:
        DefinitionError: There is no such suite, or a key or value is wrong; names the file and the nearest valid one.
    """
    values = {"suite": "mini", **overrides}
    valid = ["suite", *SuiteSettings.model_fields]
    if unknown := [key for key in values if key not in valid]:
        raise DefinitionError(f"--config: unknown key '{unknown[0]}'{did_you_mean(unknown[0], valid)}")
    name = values.pop("suite")
    if name not in suite_names():
        raise DefinitionError(
            f"there is no suite '{name}'{did_you_mean(name, suite_names())} (files in {paths.CONFIG})"
        )
    file = paths.CONFIG / f"{name}.yaml"
    where = f"{file} with --config" if values else str(file)
    chosen, content = values.pop("benchmarks", None), read_yaml(file)
    settings = parse({**content, **values} if isinstance(content, dict) else content, SuiteSettings, where)
    check_names(f"{file}: '", "benchmarks", settings.benchmarks, benchmark_names())
    if chosen:
        chosen = [chosen] if isinstance(chosen, str) else chosen
        check_names(f"{where}: '", "benchmarks", chosen, settings.benchmarks)
        settings = settings.model_copy(update={"benchmarks": {key: settings.benchmarks[key] for key in chosen}})
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
    return Suite(name, settings, parts, dict(overrides))


def _with_seeds(part: Any, seeds: int) -> Any:
    """Set lists of several seeds or trials in a part's unvalidated content to the given number of seeds."""
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
    overrides = json.loads(os.environ.get(paths.OVERRIDES, "{}"))
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
                reserved = resources if spec["learning_rate"] else resources | fewer
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
    """Hold one suite.

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
        return [run for run in self.runs if run.benchmark == benchmark and part in (None, run.spec["task"]["name"])]

    def parts(self, benchmark: str) -> list[str]:
        """Return this suite's sets of a benchmark with separate tables per set, without planning runs."""
        loaded = load_benchmark(benchmark)
        if not loaded.has_set_tables:
            return []
        part = self.benchmark_parts.get(benchmark)
        named = dict.fromkeys(name for block in (part.settings.grid if part else ()) for name in block.set)
        return [name for name in named if name not in self.settings.exclude]

    def metric_files(self, benchmark: str | None = None, part: str | None = None) -> list[str]:
        """Return the ``metrics.json`` of all runs, or of the runs of one benchmark or part."""
        runs = self.runs if benchmark is None else self.runs_of(benchmark, part)
        return [str(paths.RUNS / run.folder / "metrics.json") for run in runs]

    def keeps_weights(self, benchmark: str) -> bool:
        """Return True if the training runs of a benchmark keep their weights."""
        loaded, part = load_benchmark(benchmark), self.benchmark_parts.get(benchmark)
        training = getattr(loaded.definition, "training", None)
        if training is not None and part is not None:  # another suite's runs follow the benchmark
            training = loaded.settings("training", part)
        return bool(getattr(training, "keep_weights", False))

    def weight_files(self) -> list[str]:
        """Return the files of weights that runs keep."""
        names = [name for name in self.settings.benchmarks if self.keeps_weights(name)]
        runs = [run for name in names for run in self.runs_of(name) if run.spec["learning_rate"]]
        return [str(paths.RUNS / run.folder / paths.WEIGHTS) for run in runs]

    @property
    def claimed(self) -> list[str]:
        """Return the suite's benchmarks that test the paper's claims, in the order of the claims."""
        tests = [test for claim in load_claims().values() for test in claim.tests]
        names = dict.fromkeys(test.compare.benchmark for test in tests if test.compare)
        return [name for name in names if name in self.settings.benchmarks]

    def output_files(self, benchmark: str | None = None, part: str | None = None) -> list[str]:
        """Return the files of tables and figures of one part, of one benchmark, or of all including the claims."""
        names = [name for name in self.settings.benchmarks if benchmark in (None, name)]
        artifacts = [
            artifacts_of(name, shown) for name in names for shown in (None, *self.parts(name)) if part in (None, shown)
        ]
        if self.claimed and not benchmark:
            artifacts = [CLAIMS, *artifacts]
        return [file for each in artifacts for file in (*each.table_files(self.name), *each.figure_files(self.name))]

    def pages(self, benchmark: str | None = None) -> list[str]:
        """Return the page of each benchmark, or of one."""
        names = [name for name in self.settings.benchmarks if benchmark in (None, name)]
        return [str(paths.RESULTS / self.name / f"{name}.html") for name in names]

    @property
    def tracking_uri(self) -> str:
        """Return MLflow's store: the configuration, else ``MLFLOW_TRACKING_URI``, else SQLite below ``results/``."""
        return self.settings.tracking_uri or os.environ.get(paths.TRACKING_URI) or DEFAULT_TRACKING_URI

    def environment(self) -> dict[str, str]:
        """Return environment variables for the jobs, which use this interpreter even if it is not on the path."""
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
        data_root, model_root = self.settings.data_root, self.settings.model_root
        variables = {
            "PATH": path,
            "TOKENIZERS_PARALLELISM": "false",
            # datasets asks the hub once for every local file that it opens
            "HF_UPDATE_DOWNLOAD_COUNTS": "0",
            **{name: os.environ.get(name, value) for name, value in _GLIBC.items()},
            paths.OVERRIDES: canonical_json(self.overrides),
            paths.PLAN: str(paths.RESULTS / self.name / "plan.json"),
        }
        optional = {
            paths.DATA_ROOT: data_root and str(Path(data_root).resolve()),
            paths.MODEL_ROOT: model_root and str(Path(model_root).resolve()),
            paths.TRACKING_URI: self.settings.tracking_uri,  # no argument: may hold a password
        }
        return variables | {name: value for name, value in optional.items() if value}

    @property
    def _plan_file(self) -> Path:
        return paths.RESULTS / self.name / "plan.tsv"

    def read_planned(self, key: str) -> dict[str, Any] | None:
        """Read a run or partition from the file of :meth:`write_plan`; None if it is missing."""
        if not self._plan_file.exists():
            return None
        with self._plan_file.open(encoding="utf-8") as lines:
            line = next((line for line in lines if line.startswith(f"{key}\t")), "")
        return json.loads(line.partition("\t")[2]) if line else None

    def missing_sets(self) -> list[str]:
        """Return the missing sets that must be downloaded by hand; runs that need them will fail."""
        sources = {task["name"]: task["source"] for run in self.runs for task in all_sets(run.spec) if "source" in task}
        return [
            name
            for name, source in sources.items()
            if "hub" not in source
            and not set_packages(source)
            and local_path(name, source) is None
            and user_file(name) is None
        ]

    def write_plan(self, folders: Collection[str]) -> None:
        """Write the plan for progress lines: each run's usual seconds, the start time and the machine's name.

        A second file has the runs and their partitions, for jobs on a cluster: :func:`find_run`.

        Args:
            folders: The folders below ``results/runs`` of all runs that the targets need, finished ones included.
        """
        runs = [find_run(folder, self) for folder in sorted(folders)]
        lines = {run.folder: {"id": run.id, "spec": run.spec, "resources": run.resources} for run in runs}
        lines |= {job.id: dataclasses.asdict(job) for run in runs for job in partition_jobs(run)}
        write_text(self._plan_file, "".join(f"{key}\t{canonical_json(content)}\n" for key, content in lines.items()))
        blessed = paths.REFERENCE / f"{self.name}.json"
        usual = read_json(blessed, dict[str, Any]).get("seconds", {}) if blessed.exists() else {}
        seconds = {run.folder: usual.get(run.benchmark, 1.0) for run in runs}
        before = sum(seconds[folder] for folder in folders if (paths.RUNS / folder / "metrics.json").exists())
        plan = {"host": platform.node(), "started": time.time(), "before": before, "runs": seconds}
        write_json(paths.RESULTS / self.name / "plan.json", plan)


def find_run(folder: str, first: Suite, *, on_cluster: bool = False) -> Run:
    """Find the run with this folder below ``results/runs``, in the given suite or in any other.

    Args:
        folder: The folder.
        first: The suite to search first.
        on_cluster: True to read the run from the file of :meth:`Suite.write_plan` instead of planning the suite.
    """
    if on_cluster and (content := first.read_planned(folder)):
        return Run(**content)
    for suite in _suites(first):
        if folder.partition("/")[0] in suite.settings.benchmarks and folder in suite.runs_by_folder:
            return suite.runs_by_folder[folder]
    raise DefinitionError(f"no suite has the run '{folder}'{did_you_mean(folder, first.runs_by_folder)}")


def find_partition(name: str, first: Suite, *, on_cluster: bool = False) -> PartitionJob:
    """Find the clustering with this id, see :func:`find_run`."""
    if on_cluster and (content := first.read_planned(name)):
        return PartitionJob(**content)
    for suite in _suites(first):
        if name in suite.partitions:
            return suite.partitions[name]
    raise DefinitionError(f"no suite needs the partition '{name}'{did_you_mean(name, first.partitions)}")


def _suites(first: Suite) -> Iterator[Suite]:
    """Yield the given suite, then the others, loaded when needed."""
    yield first
    yield from (plain_suite(name) for name in suite_names() if name != first.name)


def suites_hint(target: str, benchmarks: Collection[str], given: Suite, part: str | None = None) -> str:
    """Explain that a suite lacks a target's benchmarks or their part, and list the suites that have them."""
    suites = {name: plain_suite(name) for name in suite_names()}
    others = [name for name in suites if any(suites[name].output_files(each, part) for each in benchmarks)]
    where = f"{', '.join(others)} do: `snakemake --cores all {target} --config suite={others[0]}`" if others else ""
    return f"the suite '{given.name}' does not run {part or ' or '.join(benchmarks)}; {where or 'no suite does'}"


def suites_with(compare: Comparison) -> list[str]:
    """List the suites whose grids have both methods with a shared model that is not randomly initialised."""
    benchmark, models = load_benchmark(compare.benchmark), load_models()
    random = {name for name, model in models.items() if model.config or model.random}
    # a transformed row needs the runs of the row that trains its weights
    transformed = getattr(benchmark.definition, "transformed", {})
    rows = [transformed[row].trained if row in transformed else row for row in (compare.method, compare.against)]
    runs_it, trains = suite_parts(benchmark.name), suite_parts(benchmark.evaluates or benchmark.name)
    suites = []
    for suite in runs_it:
        models_of = {row: set[str]() for row in rows}
        for block in trains[suite].settings.grid:
            for row in rows:
                has_row = row in getattr(block, "method", rows)  # measurements compare all rows
                if has_row and (not compare.tunings or set(compare.tunings) & set(block.finetuning)):
                    models_of[row] |= set(compare.models or block.model) & set(block.model)
        if set.intersection(*models_of.values()) - random:
            suites.append(suite)
    return suites
