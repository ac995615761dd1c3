"""Write small image sets in DomainBed's layout."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.domainbed.definition import RunImageSet
from benchmarks.domainbed.images import ImageSet
from benchmarks.domainbed.validation import load_set
from benchmarks.harness.config.benchmark import load_benchmark
from benchmarks.harness.config.runs import Run, run_from_spec
from tests.planned import paper_runs, plan

FOLDERS = ("art_painting", "cartoon", "photo", "sketch")
CLASSES = ("dog", "elephant", "giraffe")
PACS = load_benchmark("domainbed").tasks["pacs"].spec("pacs")


def write_images(root: Path, name: str, rows: int = 2) -> Path:
    """Write a small image set: the class is a colour, and the environment a stripe.

    ``rows`` is the number of images of each class in each environment. Returns the folder.
    """
    task = load_benchmark("domainbed").tasks[name]
    folder: Path = root / task.source.folder
    draw = random.Random(0)
    for env, env_folder in enumerate(task.environments.values()):
        for channel, class_name in enumerate(CLASSES):
            images = folder / env_folder / class_name
            images.mkdir(parents=True)
            for row in range(rows):
                pixels = np.full((40, 40, 3), 30, dtype=np.uint8)
                pixels[:, :, channel] = 150 + draw.randrange(60)
                top = 4 * env
                pixels[top : top + 4] = draw.randrange(256)
                Image.fromarray(pixels).save(images / f"{row:03}.jpg", quality=95)
    return folder


def pacs_run(method: str = "erm", held_out: int = 0, **training: Any) -> Run:
    """Return a run of seconds on PACS with timm's test_vit.

    Args:
        method: The name of the method.
        held_out: The number of the held-out environment.
        **training: Settings of the training to change.
    """
    spec = copy.deepcopy(_planned_spec(method, held_out))
    spec["model"] = plan(["domainbed"], "smoke")[0].spec["model"]
    config = spec["method"]["config"]
    if config is not None:
        config["layers"] = [2, 4]
        config["num_experts"] = 8
        config["top_k"] = 8 if method == "all_experts" else 2

    spec["learning_rate"] = 1e-3
    spec["hparams"]["lr"] = 1e-3
    spec["hparams"]["batch_size"] = 4
    spec["training"]["steps"] = 7
    spec["training"]["eval_every"] = 3
    spec["training"]["image_size"] = 32
    spec["training"]["eval_batch_size"] = 8
    spec["training"].update(training)
    return run_from_spec(spec)


def _planned_spec(method: str, held_out: int) -> dict[str, Any]:
    """Return the spec of the first trial of a method on PACS in the paper's suite."""
    for run in paper_runs("domainbed"):
        is_first_trial = run.task == "pacs" and run.seed == 0
        if is_first_trial and run.method == method and run.spec["test_envs"] == [held_out]:
            return run.spec
    raise LookupError(f"the paper's suite has no run of {method} that holds out {held_out} alone")


def load(truncated: str = "refuse", task: dict[str, Any] = PACS) -> ImageSet:
    """Load a set as runs of the first trial do."""
    return load_set(RunImageSet.model_validate(task), 0, truncated=truncated)
