"""A suite as the workflow sees it: its configuration, its runs, the files they need and make."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks.harness import paths
from benchmarks.harness.definition import (
    DefinitionError,
    benchmark_names,
    check,
    check_names,
    load_benchmark,
    load_metrics,
    load_models,
    read_yaml,
)
from benchmarks.harness.files import write_json
from benchmarks.harness.rated import ARCHIVE
from benchmarks.harness.runs import Run, canonical_json, plan
from emoe.errors import did_you_mean

FORMATS = ("csv", "md", "tex", "html")
DEFAULT_TRACKING_URI = "sqlite:///results/mlflow.db"


def suite_names() -> list[str]:
    """The suites that have a file in ``config/``."""
    return sorted(path.stem for path in paths.CONFIG.glob("*.yaml"))


def load_suite(overrides: Mapping[str, Any]) -> Suite:
    """Read ``config/<suite>.yaml`` and put the command line's values on top.

    Args:
        overrides: ``--config`` values; ``suite`` names the file (default ``mini``).

    Raises:
        DefinitionError: no such suite, or a wrong key or value; names the file and the nearest valid one.
    """
    name = overrides.get("suite", "mini")
    if name not in suite_names():
        raise DefinitionError(
            f"there is no suite '{name}'{did_you_mean(name, suite_names())} (files in {paths.CONFIG})"
        )
    file = paths.CONFIG / f"{name}.yaml"
    content = read_yaml(file)
    check(content, "config", str(file))
    if content["suite"] != name:
        raise DefinitionError(f"{file}: 'suite' is '{content['suite']}', but must be '{name}' like the file's name")
    where = "--config" if set(overrides) - {"suite"} else str(file)
    settings = check({**content, **overrides}, "config", where)
    for benchmark in settings["benchmarks"]:
        if benchmark not in benchmark_names():
            raise DefinitionError(
                f"{where}: 'benchmarks' names '{benchmark}'{did_you_mean(benchmark, benchmark_names())}"
            )
    definitions = [task for benchmark in settings["benchmarks"] for task in load_benchmark(benchmark).tasks.values()]
    known = {name for task in definitions for name in task.get("ood", ())}
    check_names(f"{where}: '", "without", settings["without"], known)
    for benchmark in settings["benchmarks"]:
        other = load_benchmark(benchmark).definition.get("evaluates")
        if other and other not in settings["benchmarks"]:
            raise DefinitionError(
                f"{where}: 'benchmarks' names '{benchmark}', which evaluates '{other}'; name that too"
            )
    for key in ("data_root", "model_root"):
        if settings[key] and not Path(settings[key]).is_dir():
            raise DefinitionError(f"{where}: '{key}' is '{settings[key]}', which is no folder")
    return Suite(name, settings, dict(overrides))


def suite_of_job(name: str) -> Suite:
    """A suite as a job of the workflow sees it: with the command line's values, which reach it by its environment."""
    overrides = json.loads(os.environ.get(paths.OVERRIDES, "{}"))
    return load_suite(overrides if overrides.get("suite", "mini") == name else {"suite": name})


@dataclass(frozen=True)
class PartitionJob:
    """The clustering of one layer of a model under one setting, shared by all runs that need it."""

    model: dict[str, Any]
    config: dict[str, Any]

    def to_json(self) -> str:
        return canonical_json(dataclasses.asdict(self))

    @property
    def id(self) -> str:
        digest = hashlib.sha256(self.to_json().encode()).hexdigest()[:8]
        layers = "+".join(map(str, self.config["layers"])) if isinstance(self.config["layers"], list) else "layers"
        return f"{self.model['name']}-N{self.config['num_experts']}-L{layers}-{digest}"

    @property
    def file(self) -> str:
        """The receipt, which names the cached partition by its content."""
        return str(paths.PARTITIONS / f"{self.id}.json")


def partition_jobs(run: Run) -> list[PartitionJob]:
    """The clusterings that a run needs before it starts, one for each layer that its configuration lists."""
    config = run.spec["method"]["config"]
    if config is None or config.get("partition") != "kmeans":
        return []
    keys = ("num_experts", "partition", "partition_seed")
    shared = {"kind": "emoe", "top_k": 1, **{key: config[key] for key in keys}}
    # how many layers a word such as "all" means is known when the model is loaded
    layers = [[layer] for layer in config["layers"]] if isinstance(config["layers"], list) else [config["layers"]]
    return [PartitionJob(run.spec["model"], {**shared, "layers": chosen}) for chosen in layers]


@dataclass(frozen=True)
class Suite:
    """One suite.

    Attributes:
        name: ``smoke``, ``mini``, …
        settings: the checked configuration.
        overrides: what of it the command line said.
    """

    name: str
    settings: dict[str, Any]
    overrides: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def runs(self) -> list[Run]:
        """Every run, each once, in the order of the grids."""
        return plan(self.settings["benchmarks"], self.name, self.settings["without"])

    @cached_property
    def runs_by_folder(self) -> dict[str, Run]:
        return {run.folder: run for run in self.runs}

    @cached_property
    def partitions(self) -> dict[str, PartitionJob]:
        """The clusterings that the runs need, by id."""
        return {job.id: job for run in self.runs for job in partition_jobs(run)}

    def metric_files(self, benchmark: str | None = None) -> list[str]:
        """``metrics.json`` of every run, or of one benchmark's."""
        return [
            str(paths.RUNS / run.folder / "metrics.json") for run in self.runs if benchmark in (None, run.benchmark)
        ]

    def output_files(self, benchmark: str | None = None) -> list[str]:
        """Tables and figures, of every benchmark or of one."""
        names = [name for name in self.settings["benchmarks"] if benchmark in (None, name)]
        return [file for name in names for file in (*self.table_files(name), *self.figure_files(name))]

    def table_files(self, benchmark: str) -> list[str]:
        return [
            str(paths.RESULTS / self.name / "tables" / f"{benchmark}_{table}.{end}")
            for table in load_benchmark(benchmark).definition["tables"]
            for end in FORMATS
        ]

    def figure_files(self, benchmark: str) -> list[str]:
        return [
            str(paths.RESULTS / self.name / "figures" / f"{benchmark}_{figure}.{end}")
            for figure in load_benchmark(benchmark).definition["figures"]
            for end in ("pdf", "png")
        ]

    @property
    def tracking_uri(self) -> str:
        """Where MLflow is: the configuration, else ``MLFLOW_TRACKING_URI``, else SQLite below ``results/``."""
        return self.settings["tracking_uri"] or os.environ.get(paths.TRACKING_URI) or DEFAULT_TRACKING_URI

    def digest(self, benchmark: str) -> str:
        """Hash of everything that shapes a benchmark's tables beside its runs; comments do not count."""
        loaded = load_benchmark(benchmark)
        paper = loaded.definition.get("paper")
        content: list[object] = [
            loaded.definition,
            loaded.tasks,
            load_metrics(),
            {k: v["title"] for k, v in load_models().items()},
        ]
        content.append((loaded.folder / paper).read_text() if paper else None)
        content.append([run.id for run in self.runs])
        return hashlib.sha256(canonical_json(content).encode()).hexdigest()[:16]

    def environment(self) -> dict[str, str]:
        """Environment variables for the jobs, which use this interpreter whether or not its environment is active."""
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
        found = {
            "PATH": path,
            "TOKENIZERS_PARALLELISM": "false",
            paths.OVERRIDES: canonical_json(self.overrides),
            paths.PLAN: str(paths.RESULTS / self.name / "plan.json"),
        }
        if self.settings["data_root"]:
            found[paths.DATA_ROOT] = str(Path(self.settings["data_root"]).resolve())
        if self.settings["model_root"]:
            found[paths.MODEL_ROOT] = str(Path(self.settings["model_root"]).resolve())
        return found

    def missing_sets(self) -> list[str]:
        """OOD sets that only exist by hand and are not there: said before work starts, because their evaluations will fail."""
        from benchmarks.harness.text_files import local_folder

        used = {other["name"]: other for run in self.runs for other in run.spec["ood"]}
        by_hand = [task for task in used.values() if not {"hub", "rated"} & set(task["source"])]
        return [task["name"] for task in by_hand if local_folder(task) is None]

    def write_plan(self) -> None:
        """Write the list of runs that progress lines count, and where the work starts."""
        folders = [run.folder for run in self.runs]
        done = sum((paths.RUNS / folder / "metrics.json").exists() for folder in folders)
        plan = {"started": time.time(), "done": done, "runs": folders}
        write_json(paths.RESULTS / self.name / "plan.json", plan)


def find_run(folder: str, first: Suite) -> tuple[Run, Suite]:
    """The run of a folder below ``results/runs``, in the given suite or in any other.

    Raises:
        DefinitionError: no suite has such a run; names the nearest.
    """
    for suite in _suites(first):
        if folder in suite.runs_by_folder:
            return suite.runs_by_folder[folder], suite
    raise DefinitionError(f"no suite has the run '{folder}'{did_you_mean(folder, first.runs_by_folder)}")


def find_partition(name: str, first: Suite) -> PartitionJob:
    """The clustering of that id, in the given suite or in any other.

    Raises:
        DefinitionError: no suite needs such a clustering.
    """
    for suite in _suites(first):
        if name in suite.partitions:
            return suite.partitions[name]
    raise DefinitionError(f"no suite needs the partition '{name}'{did_you_mean(name, first.partitions)}")


@functools.cache
def plain_suite(name: str) -> Suite:
    """A suite without any value of the command line; planned once a process."""
    return load_suite({"suite": name})


def _suites(first: Suite) -> Iterator[Suite]:
    """The given suite, then the others as they are needed, small ones first."""
    yield first
    for name in sorted(suite_names(), key=lambda name: (name != "smoke", name)):
        if name != first.name:
            yield plain_suite(name)


def run_inputs(run: Run) -> list[str]:
    """Files beside ``run.json`` that a run needs: data, partitions, and the runs that it evaluates."""
    tasks = [run.spec["task"], *run.spec["ood"]]
    rated = any("rated" in task.get("source", ()) for task in tasks)
    evaluated = [str(paths.RUNS / folder / "metrics.json") for folder in run.spec.get("candidates", ())]
    return [*([str(ARCHIVE)] if rated else []), *evaluated, *(job.file for job in partition_jobs(run))]
