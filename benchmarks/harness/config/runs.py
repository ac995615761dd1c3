"""Runs: their specs and ids, and the jobs and files that they need."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.harness import base as paths
from benchmarks.harness.base import DefinitionError, distinct, read_json, short_digest
from benchmarks.harness.config.catalogue import ModelSpec
from benchmarks.harness.config.method_specs import MethodSpec
from benchmarks.harness.config.yaml import Count, Number, Strict, Whole
from benchmarks.harness.sources.packages import find_package, packages_of_dataset, sha256


class RunSpec(Strict):
    """The settings that determine a run's numbers; the run's id is their hash."""

    benchmark: str
    """Name of the benchmark."""
    version: Count
    """Version of the benchmark."""
    model: ModelSpec
    """The trained or evaluated model."""
    method: MethodSpec
    """The method."""
    variant: str
    """Short name of the settings besides model, task and method."""
    learning_rate: Number
    """Peak learning rate; 0 if nothing is trained."""
    seed: Whole
    """The run's seed."""
    files: dict[str, str]
    """The sha256 of each file that the run's data sets or rebuilt model come from, by the file's
    name. Such files are packages, and csv files of the project."""


_ID_DIGITS = 12
RUN_ID = f"[0-9a-f]{{{_ID_DIGITS}}}"  # a regular expression that the id of every run matches


@dataclass(frozen=True)
class Run:
    """One fully resolved run.

    Attributes:
        id: The first twelve hex digits of the hash of ``spec``; the run's folder has this name.
        spec: All settings that determine the numbers, as plain values. The suite is not one of
            them, so that suites share runs.
        resources: The resources that the scheduler reserves. They change no number and are not
            part of the id.
    """

    id: str
    spec: dict[str, Any]
    resources: dict[str, Any] = field(default_factory=dict)

    @property
    def benchmark(self) -> str:
        return str(self.spec["benchmark"])

    @property
    def model(self) -> str:
        """Return the name of the model."""
        return str(self.model_spec["name"])

    @property
    def model_spec(self) -> dict[str, Any]:
        """Return the ``model`` section of the spec, as plain values."""
        section: dict[str, Any] = self.spec["model"]
        return section

    @property
    def task(self) -> str:
        """Return the name of the task: a data set, a mixture of data sets or a speed measure."""
        return str(self.task_spec["name"])

    @property
    def task_spec(self) -> dict[str, Any]:
        """Return the ``task`` section of the spec, as plain values."""
        section: dict[str, Any] = self.spec["task"]
        return section

    @property
    def trained_sets(self) -> list[dict[str, Any]]:
        """Return the data sets that the run is trained on: one, or several of a mixture.

        Each is a section of the spec, as plain values.
        """
        return trained_sets(self.spec)

    @property
    def ood_sets(self) -> list[dict[str, Any]]:
        """Return the out-of-distribution sets that the run is evaluated on, as plain values."""
        sets: list[dict[str, Any]] = self.spec["ood"]
        return sets

    @property
    def all_sets(self) -> list[dict[str, Any]]:
        """Return the data sets that the run is trained or evaluated on, as plain values."""
        return all_sets(self.spec)

    @property
    def candidates(self) -> list[str]:
        """Return the folders of the trained runs that an evaluation chooses from; else empty."""
        folders: list[str] = self.spec.get("candidates", [])
        return folders

    @property
    def files(self) -> dict[str, str]:
        """Return the sha256 of each file that data sets or a rebuilt model come from, by name."""
        files: dict[str, str] = self.spec["files"]
        return files

    @property
    def method(self) -> str:
        """Return the name of the method; empty for a measurement."""
        return str(self.spec["method"]["name"])

    @property
    def config(self) -> dict[str, Any]:
        """Return the configuration of the experts; empty for a dense model."""
        return self.spec["method"]["config"] or {}

    @property
    def method_variant(self) -> str:
        """Return a short name of the method's varied settings, such as ``N16-k0.25``."""
        return str(self.spec["method"]["variant"])

    @property
    def variant(self) -> str:
        """Return a short name of the settings besides model, task and method."""
        return str(self.spec["variant"])

    @property
    def protocol(self) -> str:
        """Return the protocol, ``published`` or ``clean``; empty if the run has none."""
        return str(self.spec.get("protocol", ""))

    @property
    def learning_rate(self) -> float:
        """Return the peak learning rate; 0 if nothing is trained."""
        return self.spec["learning_rate"]

    @property
    def seed(self) -> int:
        """Return the seed; for image classification, the number of the trial."""
        return self.spec["seed"]

    @property
    def folder(self) -> str:
        """Return the folder below ``results/runs``."""
        return f"{self.benchmark}/{self.id}"

    @property
    def name(self) -> str:
        """Return a readable name: model, task, method, settings, learning rate, seed and id."""
        parts = [self.model, self.task, self.method, self.variant]
        # a task without a test split has runs of both protocols, so the name has to tell them apart
        splits = self.task_spec.get("splits", {})
        has_no_test_split = "test" in splits and splits["test"] is None
        if has_no_test_split and self.protocol == "clean":
            parts.append("clean")
        if self.trains_model:
            parts.append(f"lr{self.learning_rate:g}")
        if self.method:  # a measurement has no seed
            parts.append(f"s{self.seed}")
        parts.append(self.id)
        # a measurement has no method, and many runs have no variant
        given_parts = [part for part in parts if part]
        return "-".join(given_parts)

    @property
    def trains_model(self) -> bool:
        """Return True if the run trains a model; an evaluation has the learning rate 0."""
        return bool(self.learning_rate)

    @property
    def keeps_weights(self) -> bool:
        """Return True if the run keeps the weights that it trains."""
        return self.trains_model and bool(self.spec.get("training", {}).get("keep_weights"))

    @property
    def metrics_file(self) -> Path:
        """Return the path of ``metrics.json``, which a run writes when it is finished."""
        return paths.RUNS / self.folder / "metrics.json"

    @property
    def spec_file(self) -> Path:
        """Return the path of ``run.json``, the run's spec."""
        return paths.RUNS / self.folder / "run.json"

    @property
    def weights_file(self) -> Path:
        """Return the path of the weights, if the run keeps them."""
        return paths.RUNS / self.folder / paths.WEIGHTS

    @property
    def has_all_results(self) -> bool:
        """Return True if the run's numbers exist, and the weights if it keeps them.

        A run is called finished as soon as its numbers exist.
        """
        if not self.metrics_file.exists():
            return False
        if self.keeps_weights:
            return self.weights_file.exists()
        return True

    def to_json(self) -> str:
        """Return the spec as canonical JSON, which is hashed, written and compared."""
        return canonical_json(self.spec)


def trained_sets(spec: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the data sets of a spec that the run is trained on: one, or several of a mixture."""
    task = spec["task"]
    if "tasks" in task:  # a mixture
        sets: list[dict[str, Any]] = task["tasks"]
        return sets
    return [task]


def all_sets(spec: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the data sets of a spec that the run is trained or evaluated on.

    Unlike :attr:`Run.all_sets`, it also takes a spec that still lacks ``files``, and so has no id.
    """
    return [*trained_sets(spec), *spec["ood"]]


def file_digests(spec: Mapping[str, Any]) -> dict[str, str]:
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


def canonical_json(value: object) -> str:
    """Write JSON with sorted keys and no spaces."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )


def run_from_spec(spec: Mapping[str, Any]) -> Run:
    """Make a run from a spec; the content determines the id."""
    run_id = short_digest(canonical_json(spec), _ID_DIGITS)
    return Run(run_id, dict(spec))


def read_run(path: Path) -> Run:
    """Read a ``run.json``, and check that its content matches the name of its folder.

    Raises:
        DataError: The file cannot be read.
        DefinitionError: The folder's name is not the id of the content.
    """
    # the workflow writes the file only if it is missing
    advice = "delete it, and `snakemake --cores all --config suite=NAME` writes it again"
    spec = read_json(path, dict[str, Any], advice)
    try:
        run = run_from_spec(spec)
    except ValueError as error:  # pydantic reads NaN, which no spec has
        raise DefinitionError(f"{path} is not a run's specification: {error}; {advice}") from error
    if path.parent.name != run.id:
        raise DefinitionError(
            f"{path} was changed by hand: its content belongs in a folder named {run.id}; {advice}"
        )
    return run


def refuse_old_folders() -> None:
    """Raise an error if a folder of runs has the readable name that older versions gave it."""
    for path in sorted(paths.RUNS.glob("*/*/run.json")):
        if not re.fullmatch(RUN_ID, path.parent.name):
            raise DefinitionError(
                f"{path.parent} was made by an older version, whose folders had readable names; "
                f"this version would make its runs again: move {paths.RUNS} to another place, "
                "or delete it"
            )


@dataclass(frozen=True)
class PartitionJob:
    """One partition of the neurons in some layers of a model, shared by all runs that need it.

    Attributes:
        model: The ``model`` section of a run's spec.
        config: The settings of EMoE that determine the partition.
    """

    model: dict[str, Any]
    config: dict[str, Any]

    def to_json(self) -> str:
        """Return all settings as canonical JSON, which is hashed and written into the plan."""
        return canonical_json(dataclasses.asdict(self))

    @property
    def id(self) -> str:
        """Return a readable name with the first eight hex digits of the hash of all settings."""
        model = self.model["name"]
        num_experts = self.config["num_experts"]
        if isinstance(self.config["layers"], list):
            layers = "+".join(str(layer) for layer in self.config["layers"])
        else:  # a request such as ``last-half:2`` has signs that a file name avoids
            layers = "layers"
        digest = short_digest(self.to_json(), 8)
        return f"{model}-N{num_experts}-L{layers}-{digest}"

    @property
    def file(self) -> str:
        """Return the path of the receipt, which names the cached partition by its content."""
        return str(paths.PARTITIONS / f"{self.id}.json")


def partition_jobs(run: Run) -> list[PartitionJob]:
    """Return the partitions that a run needs; empty unless k-means makes its experts.

    Each layer of a list has its own partition. A request such as ``all`` has a single partition
    for all its layers.
    """
    config = run.config  # empty for a dense model
    if config.get("partition") != "kmeans":
        return []
    if isinstance(config["layers"], list):
        layers_by_job = [[layer] for layer in config["layers"]]
    else:
        # only the loaded model can tell which layers are requested, so one job clusters all of them
        layers_by_job = [config["layers"]]
    jobs = []
    for layers_of_job in layers_by_job:
        partition_config = {
            "kind": "emoe",
            "top_k": 1,  # the configuration requires it, but partitions do not depend on it
            "num_experts": config["num_experts"],
            "partition": config["partition"],
            "partition_seed": config["partition_seed"],
            "layers": layers_of_job,
        }
        jobs.append(PartitionJob(run.model_spec, partition_config))
    return jobs


def model_files(model: Mapping[str, Any]) -> list[str]:
    """Return the files that the workflow has to make for a model; empty for most models.

    Args:
        model: The ``model`` section of a run's spec.
    """
    if "rebuilt" not in model:
        return []
    return [str(paths.MODELS / model["name"] / "model.safetensors")]


def run_inputs(run: Run) -> list[str]:
    """List the files that a run needs besides ``run.json``.

    These are packages, the weights of a rebuilt model, partitions, and the files of candidates: the
    trained runs that an evaluation chooses from.
    """
    packages = _packages_of_sets(run)
    candidates: list[str] = []
    for folder in run.candidates:
        candidates += _candidate_files(paths.RUNS / folder)
    partitions = [job.file for job in partition_jobs(run)]
    return [*packages, *model_files(run.model_spec), *candidates, *partitions]


def _packages_of_sets(run: Run) -> list[str]:
    """List the files of the packages that contain data sets of a run, each once."""
    files = []
    for task in run.all_sets:
        for package in packages_of_dataset(task.get("source", {})):
            files.append(str(package.path))
    # several sets may come from one package
    return distinct(files)


def _candidate_files(folder: Path) -> list[str]:
    """List the files of a trained run that an evaluation needs: its numbers and its weights.

    If the run is finished but has lost its spec, the list also contains the spec. An unfinished run
    writes its spec itself.
    """
    metrics = folder / "metrics.json"
    spec = folder / "run.json"
    weights = folder / paths.WEIGHTS
    files = [str(metrics), str(weights)]
    if metrics.exists() and not spec.exists():
        files.append(str(spec))
    return files
