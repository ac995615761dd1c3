"""What has to be there before a run starts: packages, weights, partitions, and what its kind asks for."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from benchmarks.harness.base import paths
from benchmarks.harness.base.errors import DataError
from benchmarks.harness.config.catalogue import load_models
from benchmarks.harness.config.kinds import kind_of
from benchmarks.harness.config.runs import Run, canonical_json
from benchmarks.harness.config.specs import all_sets
from benchmarks.harness.sources.packages import PackageFile, packaged
from emoe.errors import did_you_mean

WEIGHTS = "model/trained.safetensors"  # in the folder of a run that keeps them


class Job:
    """A job whose content is its identity; a frozen dataclass of plain values."""

    def to_json(self) -> str:
        return canonical_json(dataclasses.asdict(cast(Any, self)))

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:8]


@dataclass(frozen=True)
class PartitionJob(Job):
    """The clustering of one layer of a model under one setting, shared by all runs that need it."""

    model: dict[str, Any]
    config: dict[str, Any]

    @property
    def id(self) -> str:
        layers = "+".join(map(str, self.config["layers"])) if isinstance(self.config["layers"], list) else "layers"
        return f"{self.model['name']}-N{self.config['num_experts']}-L{layers}-{self.digest}"

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


def rebuilt_from(name: str) -> PackageFile:
    """The package file that a rebuilt model is in.

    Raises:
        DataError: no such model.
    """
    rebuilt = {model: found.rebuilt for model, found in load_models().items() if found.rebuilt}
    if name not in rebuilt:
        raise DataError(f"no model called '{name}' is rebuilt from a package{did_you_mean(name, rebuilt)}")
    return packaged(rebuilt[name])


def model_files(model: Mapping[str, Any]) -> list[str]:
    """Files that the workflow makes before it can load a model."""
    return [str(paths.MODELS / model["name"] / "model.safetensors")] if "rebuilt" in model else []


def set_files(benchmark: str, task: Mapping[str, Any]) -> list[str]:
    """Package files that a set of a benchmark is read from."""
    return [str(file.path) for file in kind_of(benchmark).package_files(task)]


def run_inputs(run: Run) -> list[str]:
    """List the files beside ``run.json`` that a run needs: data, weights, partitions and those of its kind."""
    return [
        *dict.fromkeys(file for task in all_sets(run.spec) for file in set_files(run.benchmark, task)),
        *model_files(run.spec["model"]),
        *kind_of(run.benchmark).inputs(run.spec),
        *(job.file for job in partition_jobs(run)),
    ]
