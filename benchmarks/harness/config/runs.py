"""Runs: their specs and ids, and the jobs and files that they need."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.harness import base as paths
from benchmarks.harness.base import DefinitionError, read_json
from benchmarks.harness.config.yaml import Count, Number, Strict, Whole
from benchmarks.harness.sources.packages import set_packages


class RunSpec(Strict):
    """The settings that determine a run's numbers; the run's id is their hash."""

    benchmark: str
    """Name of the benchmark."""
    version: Count
    """Version of the benchmark."""
    model: dict[str, Any]
    """The trained or evaluated model: name, source from models.yaml, and format of the weights."""
    method: dict[str, Any]
    """The method, from :func:`.methods.method_spec`."""
    variant: str
    """Short name of the settings besides model, task and method."""
    learning_rate: Number
    """Peak learning rate; 0 if nothing is trained."""
    seed: Whole
    """The run's seed."""
    files: dict[str, str]
    """The sha256 of the files that its sets are read from: csv files of the project and packages, by name."""


def trained_sets(spec: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the sets that a run is trained on: one, or several of a mixture."""
    sets: list[Mapping[str, Any]] = spec["task"].get("tasks", [spec["task"]])
    return sets


def all_sets(spec: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the sets that a run is trained or evaluated on."""
    return [*trained_sets(spec), *spec["ood"]]


_READABLE = 71  # most characters of an id before its hash


@dataclass(frozen=True)
class Run:
    """Hold one fully resolved run.

    Attributes:
        id: A readable text and eight hex digits of the hash of ``spec``.
        spec: All settings that determine the numbers, as plain values. The suite is not one of them, so that suites
            share runs.
        resources: The resources that the scheduler reserves. They change no number and are not part of the id.
    """

    id: str
    spec: dict[str, Any]
    resources: dict[str, Any] = field(default_factory=dict)

    @property
    def benchmark(self) -> str:
        return str(self.spec["benchmark"])

    @property
    def folder(self) -> str:
        """Return the folder below ``results/runs``."""
        return f"{self.benchmark}/{self.id}"

    def to_json(self) -> str:
        """Return canonical JSON: it is hashed, written and compared."""
        return canonical_json(self.spec)


def canonical_json(value: object) -> str:
    """Write JSON with sorted keys and no spaces."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def run_from_spec(spec: Mapping[str, Any]) -> Run:
    """Make a run from a spec; the content determines the id."""
    digest = hashlib.sha256(canonical_json(spec).encode()).hexdigest()[:8]
    method, task = spec["method"]["name"], spec["task"]
    parts = [spec["model"]["name"], task["name"], method, spec["variant"]]
    # a task without a test split has runs of both protocols
    if spec.get("protocol") == "clean" and task.get("splits", {}).get("test", "") is None:
        parts.append("clean")
    if spec["learning_rate"]:  # 0 if nothing was trained
        parts.append(f"lr{spec['learning_rate']:g}")
    if method:  # a measurement has no seed
        parts.append(f"s{spec['seed']}")
    text = re.sub(r"[^A-Za-z0-9._+-]", "_", "-".join(part for part in parts if part))
    return Run(f"{text[:_READABLE]}-{digest}", dict(spec))


def read_run(path: Path) -> Run:
    """Read a ``run.json``, and check that its content matches the name of its folder."""
    advice = f"the workflow writes it when it runs `{path.parent}/metrics.json`"
    spec = read_json(path, dict[str, Any], advice)
    try:
        run = run_from_spec(spec)
    except (LookupError, TypeError) as error:  # a key is missing or has another type
        raise DefinitionError(f"{path} is not a run's specification: {error!r}") from error
    if path.parent.name != run.id:
        raise DefinitionError(f"{path} was changed by hand: its content belongs in a folder named {run.id}")
    return run


@dataclass(frozen=True)
class PartitionJob:
    """Describe one clustering of a model's layers, shared by all runs that need it."""

    model: dict[str, Any]
    config: dict[str, Any]

    def to_json(self) -> str:
        return canonical_json(dataclasses.asdict(self))

    @property
    def id(self) -> str:
        layers = "+".join(map(str, self.config["layers"])) if isinstance(self.config["layers"], list) else "layers"
        digest = hashlib.sha256(self.to_json().encode()).hexdigest()[:8]
        return f"{self.model['name']}-N{self.config['num_experts']}-L{layers}-{digest}"

    @property
    def file(self) -> str:
        """Return the path of the receipt, which names the cached partition by its content."""
        return str(paths.PARTITIONS / f"{self.id}.json")


def partition_jobs(run: Run) -> list[PartitionJob]:
    """Return the clusterings that a run needs: one per layer, or one for a request such as ``all``."""
    config = run.spec["method"]["config"]
    if config is None or config.get("partition") != "kmeans":
        return []
    keys = ("num_experts", "partition", "partition_seed")
    shared = {"kind": "emoe", "top_k": 1, **{key: config[key] for key in keys}}
    # the layers of a word such as "all" are known when the model is loaded
    layers = [[layer] for layer in config["layers"]] if isinstance(config["layers"], list) else [config["layers"]]
    return [PartitionJob(run.spec["model"], {**shared, "layers": chosen}) for chosen in layers]


def model_files(model: Mapping[str, Any]) -> list[str]:
    """Return the files that the workflow makes before it can load a model."""
    return [str(paths.MODELS / model["name"] / "model.safetensors")] if "rebuilt" in model else []


def run_inputs(run: Run) -> list[str]:
    """List the files that a run needs besides ``run.json``: packages, weights, candidates' metrics, and partitions."""
    packages = [str(file.path) for task in all_sets(run.spec) for file in set_packages(task.get("source", {}))]
    return [
        *dict.fromkeys(packages),
        *model_files(run.spec["model"]),
        *(str(paths.RUNS / folder / "metrics.json") for folder in run.spec.get("candidates", ())),
        *(job.file for job in partition_jobs(run)),
    ]
