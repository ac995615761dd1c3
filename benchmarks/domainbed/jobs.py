"""The validation of an image set, shared by all runs that read the set alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.domainbed.protocol import BASELINE, sweep_seed
from benchmarks.harness.base.paths import IMAGES
from benchmarks.harness.config.jobs import Job
from benchmarks.harness.config.suite import Suite, find_job


@dataclass(frozen=True)
class ValidationJob(Job):
    """Open every image of a set before anything is trained on it."""

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
        return str(IMAGES / f"{self.id}.json")

    @property
    def picture(self) -> str:
        """A grid of samples."""
        return str(IMAGES / f"{self.id}.png")


def validation_job(spec: Mapping[str, Any]) -> ValidationJob:
    """The validation that a run waits for."""
    task, training = spec["task"], spec["training"]
    # samples of MNIST's variants, which every run shuffles anew, are those of the first trial
    seed = sweep_seed(task["domainbed"], BASELINE, [0], 0, 0)
    return ValidationJob(spec["benchmark"], task, seed, training["image_size"], training["truncated"])


def find_validation(name: str, first: Suite) -> ValidationJob:
    """The validation of that id, in the given suite or in any other.

    Raises:
        DefinitionError: no suite needs it.
    """

    def jobs_of(suite: Suite) -> dict[str, ValidationJob]:
        # thousands of runs share a few validations, whose ids are hashes
        read = {
            (run.benchmark, spec["task"]["name"], spec["training"]["image_size"], spec["training"]["truncated"]): spec
            for run in suite.runs
            if "test_envs" in (spec := run.spec)
        }
        return {job.id: job for job in map(validation_job, read.values())}

    return find_job(name, first, jobs_of, "validation")
