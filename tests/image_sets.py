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
    """Write an image set in small: the class is a colour, the environment a stripe."""
    task = load_benchmark("domainbed").tasks[name]
    folder, size, draw = root / task.source.folder, 40, random.Random(0)
    for env, environment in enumerate(task.environments.values()):
        for number, name in enumerate(CLASSES):
            images = folder / environment / name
            images.mkdir(parents=True)
            for row in range(rows):
                pixels = np.full((size, size, 3), 30, dtype=np.uint8)
                pixels[..., number] = 150 + draw.randrange(60)
                pixels[env * 4 : env * 4 + 4] = draw.randrange(256)
                Image.fromarray(pixels).save(images / f"{row:03}.jpg", quality=95)
    return folder


def pacs_run(method: str = "erm", held_out: int = 0, **training: Any) -> Run:
    """Return a run of seconds on PACS with timm's test_vit; ``training`` overrides settings."""
    cell = ("pacs", method, [held_out], 0)
    planned = (run.spec for run in paper_runs("domainbed"))
    keys = ("test_envs", "seed")
    spec = copy.deepcopy(
        next(
            s
            for s in planned
            if (s["task"]["name"], s["method"]["name"], *(s[key] for key in keys)) == cell
        )
    )
    if spec["method"]["config"] is not None:
        spec["method"]["config"] |= {
            "layers": [2, 4],
            "num_experts": 8,
            "top_k": 8 if method == "all_experts" else 2,
        }
    spec["training"] |= {
        "steps": 7,
        "eval_every": 3,
        "image_size": 32,
        "eval_batch_size": 8,
        **training,
    }
    spec["hparams"] |= {"lr": 1e-3, "batch_size": 4}
    return run_from_spec(
        {**spec, "model": plan(["domainbed"], "smoke")[0].spec["model"], "learning_rate": 1e-3}
    )


def load(truncated: str = "refuse", task: dict[str, Any] = PACS) -> ImageSet:
    """Load a set as runs of the first trial do."""
    return load_set(RunImageSet.model_validate(task), 0, truncated=truncated)
