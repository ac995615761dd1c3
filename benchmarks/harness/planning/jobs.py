"""What has to be there before a run starts: packages, weights, surveyed images, partitions, other runs."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from benchmarks.domainbed.protocol import BASELINE, sweep_seed
from benchmarks.harness.base import paths
from benchmarks.harness.base.errors import DataError
from benchmarks.harness.planning.catalogue import load_models
from benchmarks.harness.planning.runs import Run, canonical_json
from benchmarks.harness.sources.packages import ALPACA_DEMO, DIGITS, EMOJI, PACKAGE_FILES, RATED_SENTENCES, PackageFile
from emoe.errors import did_you_mean

MMLU_DEV = "mmlu_dev"


class _Job:
    """A job whose content is its identity; a frozen dataclass of plain values."""

    def to_json(self) -> str:
        return canonical_json(dataclasses.asdict(cast(Any, self)))

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:8]


@dataclass(frozen=True)
class PartitionJob(_Job):
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


@dataclass(frozen=True)
class SurveyJob(_Job):
    """The look at all images of a set before anything is trained on it, shared by all runs that read the set alike."""

    benchmark: str
    task: dict[str, Any]
    data_seed: int
    image_size: int
    truncated: str

    @property
    def id(self) -> str:
        return f"{self.task['name']}-{self.image_size}px-{self.digest}"

    @property
    def file(self) -> str:
        """Its counts."""
        return str(paths.IMAGES / f"{self.id}.json")

    @property
    def picture(self) -> str:
        """A grid of samples."""
        return str(paths.IMAGES / f"{self.id}.png")


def survey_job(run: Run) -> SurveyJob | None:
    """The survey that a run needs before it starts; None for a run on text."""
    if not run.on_images:
        return None
    task, training = run.spec["task"], run.spec["training"]
    # samples of MNIST's variants, which every run shuffles anew, are those of the first trial
    seed = sweep_seed(task["domainbed"], BASELINE, [0], 0, 0)
    return SurveyJob(run.benchmark, task, seed, training["image_size"], training["truncated"])


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
    rebuilt = {model: found["rebuilt"] for model, found in load_models().items() if "rebuilt" in found}
    if name not in rebuilt:
        raise DataError(f"no model called '{name}' is rebuilt from a package{did_you_mean(name, rebuilt)}")
    return next(file for file in PACKAGE_FILES.values() if file.package == rebuilt[name])


def is_mmlu_dev(task: str) -> bool:
    """Whether a task of lm-eval is made of MMLU's development questions: all of them, a category, or a subject."""
    return task == MMLU_DEV or task.startswith(f"{MMLU_DEV}_")


def model_files(model: Mapping[str, Any]) -> list[str]:
    """Files that the workflow makes before it can load a model."""
    return [str(paths.MODELS / model["name"] / "model.safetensors")] if "rebuilt" in model else []


def set_files(task: Mapping[str, Any]) -> list[str]:
    """Package files that a set is read from."""
    source = task.get("source", {})
    if "rated" in source:
        files = [RATED_SENTENCES]
    elif source.get("digits") == "package":
        files = [DIGITS]
    elif "package" in source:
        files = [ALPACA_DEMO]
    else:
        files = list(EMOJI.values()) if "emoji" in source else []
    return [str(file.path) for file in files]


def run_inputs(run: Run) -> list[str]:
    """Files beside ``run.json`` that a run needs: data, weights, partitions, and the runs that it evaluates."""
    tasks = [run.spec["task"], *run.spec["ood"]]
    evaluated = [str(paths.RUNS / folder / "metrics.json") for folder in run.spec.get("candidates", ())]
    survey = survey_job(run)
    asked = [entry["task"] for entry in run.spec.get("evaluation", {}).get("tasks", ())]
    return [
        *dict.fromkeys(file for task in tasks for file in set_files(task)),
        *model_files(run.spec["model"]),
        *([survey.file] if survey else []),
        *([str(paths.QUESTIONS / MMLU_DEV / f"{MMLU_DEV}.yaml")] if any(is_mmlu_dev(task) for task in asked) else []),
        *evaluated,
        *(job.file for job in partition_jobs(run)),
    ]
