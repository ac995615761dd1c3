"""A suite as the workflow sees it: its configuration, its runs, the files they need and make."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import Field

from benchmarks.harness import base as paths
from benchmarks.harness.base import DefinitionError, write_json
from benchmarks.harness.config.artifacts import CLAIMS, artifacts_of
from benchmarks.harness.config.benchmark import benchmark_names, kind_of, load_benchmark
from benchmarks.harness.config.catalogue import load_metrics, load_models
from benchmarks.harness.config.claims import compared_benchmarks, load_claims
from benchmarks.harness.config.runs import (
    Job,
    PartitionJob,
    Run,
    all_sets,
    canonical_json,
    partition_jobs,
    plan,
    set_files,
    slug,
)
from benchmarks.harness.config.yaml import UNIQUE, Strict, check_names, parse, read_yaml
from benchmarks.harness.sources.local import local_folder, own_file
from emoe.errors import did_you_mean


class SuiteSettings(Strict):
    """The runs of a suite. Every key can also be given on the command line (`--config key=value`)."""

    suite: str
    """The suite, like the file's name. Its grids stand in benchmarks/<name>/benchmark.yaml under `suites`."""
    benchmarks: Annotated[list[str], Field(min_length=1), UNIQUE]
    """Benchmarks to run, in the order of the report."""
    exclude: Annotated[list[str], UNIQUE] = Field([])
    """OOD sets to leave out, by their name in tasks.yaml, for those that you could not obtain. Tables say which sets
    they cover.
    """
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


AnyJob = TypeVar("AnyJob", bound=Job)
# Without them glibc gives memory back to the kernel and asks for it again in every step, which a small model pays for
# with a tenth of its training time.
# Of no account where they are set already, or where the C library is another.
_GLIBC = {
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(512 << 20),
    "MALLOC_TOP_PAD_": str(64 << 20),
}
DEFAULT_TRACKING_URI = "sqlite:///results/mlflow.db"


def suite_names() -> list[str]:
    """Return the suites that have a file in ``config/``."""
    return sorted(path.stem for path in paths.CONFIG.glob("*.yaml"))


def load_suite(overrides: Mapping[str, Any]) -> Suite:
    """Read ``config/<suite>.yaml`` and put the command line's values on top.

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
    file = paths.CONFIG / f"{name}.yaml"
    content = read_yaml(file)
    named = parse(content, SuiteSettings, str(file)).suite
    if named != name:
        raise DefinitionError(f"{file}: 'suite' is '{named}', but must be '{name}' like the file's name")
    where = "--config" if set(overrides) - {"suite"} else str(file)
    settings = parse({**content, **overrides}, SuiteSettings, where)
    for asked in settings.benchmarks:
        if asked not in benchmark_names():
            raise DefinitionError(f"{where}: 'benchmarks' names '{asked}'{did_you_mean(asked, benchmark_names())}")
    loaded = [load_benchmark(asked) for asked in settings.benchmarks]
    known = {name for benchmark in loaded for name in benchmark.kind.excludable(benchmark.tasks)}
    check_names(f"{where}: '", "exclude", settings.exclude, known)
    for benchmark in loaded:
        other = benchmark.evaluates
        if other and other not in settings.benchmarks:
            raise DefinitionError(
                f"{where}: 'benchmarks' names '{benchmark.name}', which evaluates '{other}'; name that too"
            )
    for key, folder in (("data_root", settings.data_root), ("model_root", settings.model_root)):
        if folder and not Path(folder).is_dir():
            raise DefinitionError(f"{where}: '{key}' is '{folder}', which is no folder")
    return Suite(name, settings, dict(overrides))


def suite_of_job(name: str) -> Suite:
    """Load a suite in a job of the workflow, with the command line's values from the environment."""
    overrides = json.loads(os.environ.get(paths.OVERRIDES, "{}"))
    return load_suite(overrides if overrides.get("suite", "mini") == name else {"suite": name})


def elsewhere(what: str, wanted: Collection[str], here: Suite) -> str:
    """Name the suites that have a target which the given one lacks.

    Args:
        what: The target.
        wanted: The benchmarks, each of which shows it.
        here: The suite.
    """
    ready = ("mini", "mini_full", "smoke")  # on any machine
    names = sorted(suite_names(), key=lambda name: (ready.index(name) if name in ready else len(ready), name))
    others = [name for name in names if set(wanted) & set(plain_suite(name).settings.benchmarks)]
    where = (
        f"{', '.join(others)} do: `snakemake --cores all {what} --config suite={others[0]}`"
        if others
        else "no suite does"
    )
    return f"the suite '{here.name}' does not run {' or '.join(wanted)}; {where}"


def find_part(benchmark: str, part: str, first: Suite) -> Suite:
    """Return the given suite if it runs the part of the benchmark, else the first other one that does.

    Raises:
        DefinitionError: No suite runs it.
    """
    for suite in _suites(first):
        if benchmark in suite.settings.benchmarks and part in suite.parts(benchmark):
            return suite
    raise DefinitionError(f"no suite runs '{part}' of the benchmark '{benchmark}'")


@dataclass(frozen=True)
class Suite:
    """Hold one suite.

    Attributes:
        name: ``smoke``, ``mini``, …
        settings: The checked configuration.
        overrides: The values of the command line.
    """

    name: str
    settings: SuiteSettings
    overrides: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def runs(self) -> list[Run]:
        """Return every run, each once, in the order of the grids."""
        return plan(self.settings.benchmarks, self.name, self.settings.exclude)

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
        """Return the sets of a benchmark with tables and figures of their own and runs in this suite, without planning
        them.
        """
        loaded = load_benchmark(benchmark)
        if not loaded.shows_parts:
            return []
        blocks = getattr(loaded.definition.suites.get(self.name), "grid", ())
        named = dict.fromkeys(name for block in blocks for name in block.set)
        return [name for name in named if name not in self.settings.exclude]

    def metric_files(self, benchmark: str | None = None, part: str | None = None) -> list[str]:
        """Return ``metrics.json`` of every run, of one benchmark's, or of one of its parts'."""
        runs = self.runs if benchmark is None else self.runs_of(benchmark, part)
        return [str(paths.RUNS / run.folder / "metrics.json") for run in runs]

    def keeps_weights(self, benchmark: str) -> bool:
        """Return True if all runs of a benchmark that train keep their weights."""
        trained = [run.spec["training"] for run in self.runs_of(benchmark) if run.spec["learning_rate"]]
        # another suite's runs are as the benchmark says
        trained = trained or [load_benchmark(benchmark).definition.model_dump().get("training", {})]
        return all(training.get("keep_weights") for training in trained)

    def weight_files(self) -> list[str]:
        """Return the files of weights that runs keep."""
        names = [name for name in self.settings.benchmarks if self.keeps_weights(name)]
        runs = [run for name in names for run in self.runs_of(name) if run.spec["learning_rate"]]
        return [str(paths.RUNS / run.folder / paths.WEIGHTS) for run in runs]

    def figure_inputs(self, benchmark: str, part: str | None) -> list[str]:
        """Return the files that the figures of a part need beside the runs' numbers."""
        if part is None:
            return []
        kind = kind_of(benchmark)
        return list(
            dict.fromkeys(file for run in self.runs_of(benchmark, part) for file in kind.figure_inputs(run.spec))
        )

    @property
    def claimed(self) -> list[str]:
        """Return its benchmarks that claims of the paper are tested on."""
        return compared_benchmarks(self.settings.benchmarks)

    def claim_files(self) -> list[str]:
        """Return the files of the table of claims and its figure."""
        return [*CLAIMS.table_files(self.name), *CLAIMS.figure_files(self.name)] if self.claimed else []

    def output_files(self, benchmark: str | None = None, part: str | None = None) -> list[str]:
        """Return tables and figures: of every benchmark and of the claims, of one benchmark with its parts, or of one
        part.
        """
        names = [name for name in self.settings.benchmarks if benchmark in (None, name)]
        artifacts = [
            artifacts_of(name, shown) for name in names for shown in (None, *self.parts(name)) if part in (None, shown)
        ]
        files = [file for each in artifacts for file in (*each.table_files(self.name), *each.figure_files(self.name))]
        return files if benchmark else [*self.claim_files(), *files]

    def pages(self, benchmark: str | None = None) -> list[str]:
        """Return the page of each benchmark, or of one."""
        names = [name for name in self.settings.benchmarks if benchmark in (None, name)]
        return [str(paths.RESULTS / self.name / f"{name}.html") for name in names]

    @property
    def tracking_uri(self) -> str:
        """Return MLflow's store: the configuration, else ``MLFLOW_TRACKING_URI``, else SQLite below ``results/``."""
        return self.settings.tracking_uri or os.environ.get(paths.TRACKING_URI) or DEFAULT_TRACKING_URI

    def digest(self, benchmark: str, part: str | None = None) -> str:
        """Hash everything that shapes the tables of a benchmark or of a part beside its runs' numbers; comments do not
        count.
        """
        loaded = load_benchmark(benchmark)
        definition, runs = loaded.definition, self.runs_of(benchmark, part)
        published = [(loaded.folder / name).read_text() for name in loaded.published_files]
        models = {run.spec["model"]["name"] for run in runs}
        content: list[object] = [
            # of its suites only what the report says of this one: their grids are in the runs
            definition.model_dump(exclude={"suites"}),
            definition.suites[self.name].note if self.name in definition.suites else None,
            {name: task.model_dump() for name, task in loaded.tasks.items()},
            {name: metric.model_dump() for name, metric in load_metrics().items()},
            {  # of the models that it shows
                name: model.title
                for name, model in load_models().items()
                if name in models or any(name in text for text in published)
            },
            published,
            [run.id for run in runs],
        ]
        return hashlib.sha256(canonical_json(content).encode()).hexdigest()[:16]

    def claims_digest(self) -> str:
        """Hash everything that shapes the table of claims beside its runs' numbers; comments do not count."""
        claims = {name: claim.model_dump() for name, claim in load_claims().items()}
        content = [claims, *(self.digest(name) for name in self.claimed)]
        return hashlib.sha256(canonical_json(content).encode()).hexdigest()[:16]

    def environment(self) -> dict[str, str]:
        """Return environment variables for the jobs, which use this interpreter even if it is not on the path."""
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
        variables = {
            "PATH": path,
            "TOKENIZERS_PARALLELISM": "false",
            # datasets asks the hub once for every local file that it opens
            "HF_UPDATE_DOWNLOAD_COUNTS": "0",
            **{name: os.environ.get(name, value) for name, value in _GLIBC.items()},
            paths.OVERRIDES: canonical_json(self.overrides),
            paths.PLAN: str(paths.RESULTS / self.name / "plan.json"),
        }
        if self.settings.data_root:
            variables[paths.DATA_ROOT] = str(Path(self.settings.data_root).resolve())
        if self.settings.model_root:
            variables[paths.MODEL_ROOT] = str(Path(self.settings.model_root).resolve())
        if self.settings.tracking_uri:  # may hold a password, which no command line shows
            variables[paths.TRACKING_URI] = self.settings.tracking_uri
        return variables

    @property
    def by_size(self) -> list[str]:
        """Return all benchmarks, those of the suite first, with the fewest runs before the others."""
        sizes = {name: len(self.runs_of(name)) for name in self.settings.benchmarks}
        return [
            *sorted(sizes, key=lambda name: sizes[name]),
            *(name for name in benchmark_names() if name not in sizes),
        ]

    @property
    def modules(self) -> list[str]:
        """Return the modules that its jobs import."""
        loaded = [load_benchmark(name) for name in self.settings.benchmarks]
        imported = [module for each in loaded for module in (each.definition.pipeline, *each.kind.late_imports)]
        return [*dict.fromkeys(imported), "benchmarks.harness.run.execution", "benchmarks.harness.report.page"]

    def missing_sets(self) -> list[str]:
        """Return sets that only exist by hand and are missing; runs that need them will fail."""
        used = {
            task["name"]: (run.benchmark, task) for run in self.runs for task in all_sets(run.spec) if "source" in task
        }
        return [
            name
            for name, (benchmark, task) in used.items()
            if "hub" not in task["source"]
            and not set_files(benchmark, task)
            and local_folder(name, task["source"]) is None
            and own_file(name) is None
        ]

    def write_plan(self, folders: Collection[str]) -> None:
        """Write the list of runs that progress lines count, the start of the work, and the name of the machine.

        Args:
            folders: The folders below ``results/runs`` of all runs that the targets need, finished ones included.
        """
        before = sum((paths.RUNS / folder / "metrics.json").exists() for folder in folders)
        plan = {"host": platform.node(), "started": time.time(), "before": before, "runs": sorted(folders)}
        write_json(paths.RESULTS / self.name / "plan.json", plan)


def find_run(folder: str, first: Suite) -> tuple[Run, Suite]:
    """Find the run of a folder below ``results/runs``, in the given suite or in any other.

    Raises:
        DefinitionError: No suite has such a run; names the nearest.
    """
    for suite in _suites(first):
        if _may_have(suite, folder) and folder in suite.runs_by_folder:
            return suite.runs_by_folder[folder], suite
    raise DefinitionError(f"no suite has the run '{folder}'{did_you_mean(folder, first.runs_by_folder)}")


def _may_have(suite: Suite, folder: str) -> bool:
    """Return True if a suite runs the model that a run's name begins with. Planning ten thousand runs takes seconds."""
    name, _, run = folder.partition("/")
    if name not in suite.settings.benchmarks:
        return False
    benchmark = load_benchmark(name)
    try:
        models = benchmark.kind.offer(benchmark, suite.name).models
    except KeyError:  # a benchmark lacks the suite: planning says so
        return True
    return any(run.startswith(slug(model)) for model in models)


def find_partition(name: str, first: Suite) -> PartitionJob:
    """Find the clustering of an id, in the given suite or in any other.

    Raises:
        DefinitionError: No suite needs such a clustering.
    """
    return find_job(name, first, lambda suite: suite.partitions, "partition")


def find_job(name: str, first: Suite, jobs_of: Callable[[Suite], Mapping[str, AnyJob]], word: str) -> AnyJob:
    """Find the job of an id, in the given suite or in any other.

    Args:
        name: The id.
        first: The suite to search first.
        jobs_of: A function that gives the jobs of a suite, by id.
        word: The word for such a job.

    Raises:
        DefinitionError: No suite needs it; names the nearest.
    """
    for suite in _suites(first):
        if name in jobs_of(suite):
            return jobs_of(suite)[name]
    raise DefinitionError(f"no suite needs the {word} '{name}'{did_you_mean(name, jobs_of(first))}")


@functools.cache
def plain_suite(name: str) -> Suite:
    """Load a suite without any value of the command line; it is planned once a process."""
    return load_suite({"suite": name})


def _suites(first: Suite) -> Iterator[Suite]:
    """Yield the given suite, then the others as they are needed, the usual ones first."""
    yield first
    usual = ("smoke", "mini", "paper")
    for name in sorted(suite_names(), key=lambda name: (usual.index(name) if name in usual else len(usual), name)):
        if name != first.name:
            yield plain_suite(name)
