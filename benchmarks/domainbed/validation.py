"""Load a set, and open every image of it once, before anything is trained on it."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tabulate import tabulate
from torch import Tensor
from torchvision.utils import make_grid

from benchmarks.domainbed.batches import augmented, load_pixels, plain, visible
from benchmarks.domainbed.definition import RunSet, ValidationJob
from benchmarks.domainbed.images import REFUSE, Environment, ImageSet, load_folders
from benchmarks.domainbed.mnist import load_mnist
from benchmarks.harness.base import DataError, atomic_write, derive_seed, hold, write_json
from benchmarks.harness.config.yaml import parse


def load_set(task: RunSet, seed: int, *, truncated: str) -> ImageSet:
    """Load a set.

    Args:
        task: The set.
        seed: DomainBed's seed of the run; only MNIST's variants depend on it.
        truncated: ``refuse`` to reject image files that end early, ``load`` to fill them.

    Raises:
        DataError: The set is missing, or a folder or file of it is damaged.
    """
    if task.source.mnist:
        return load_mnist(task, seed)
    return load_folders(task, truncated=truncated)


_SHOWN = 10  # damaged images that a message names


def validate_once(job: ValidationJob) -> None:
    """Validate a set unless another run has done so: write its counts, and a grid of samples. Other runs wait.

    Raises:
        DataError: The set is missing or damaged.
    """
    output = Path(job.file)
    output.parent.mkdir(parents=True, exist_ok=True)
    with hold(output.with_suffix(".lock")):
        if output.exists():
            return
        image_set = load_set(parse(job.task, RunSet, "the set"), job.data_seed, truncated=job.truncated)
        summary = validate_dataset(image_set)
        names, grid = sample_grid(image_set, job.image_size)
        with atomic_write(Path(job.picture)) as temporary:
            Image.fromarray(grid.permute(1, 2, 0).numpy()).save(temporary, "png")
        write_json(output, {**asdict(job), **summary, "samples": names})


def validate_dataset(image_set: ImageSet) -> dict[str, Any]:
    """Open every image, and count them by environment, class and conversion.

    Raises:
        DataError: Images are damaged; names the first of them.
    """
    damaged: list[str] = []
    environments = {}
    for environment in image_set.environments:
        converted: Counter[str] = Counter()
        for row in range(len(environment)):
            try:
                converted[environment.open(row)[1]] += 1
            except DataError as error:
                damaged.append(str(error))
        converted.pop("", None)
        environments[environment.name] = {
            "converted": dict(sorted(converted.items())),
            "ignored": environment.ignored,
            **environment.summary(image_set.classes),
        }
    if damaged:
        total = sum(map(len, image_set.environments))
        first = "\n".join(damaged[:_SHOWN])
        raise DataError(f"{image_set.source}: {len(damaged)} of {total:,} images cannot be used, the first:\n{first}")
    return {"source": image_set.source, "classes": image_set.classes, "environments": environments}


def list_environments(task: RunSet, seed: int, *, open_images: bool) -> list[tuple[str, int, str, str]]:
    """Return name, images, images by class and source of every environment.

    Raises:
        DataError: The set is missing, or a folder or an opened image of it is damaged.
    """
    image_set = load_set(task, seed, truncated=REFUSE)
    if open_images:
        validate_dataset(image_set)
    return [
        (environment.name, len(environment), _by_class(environment, image_set.classes), image_set.source)
        for environment in image_set.environments
    ]


def _by_class(environment: Environment, classes: list[str]) -> str:
    by_class = environment.summary(classes)["labels"].values()
    return f"{len(classes)} classes, {min(by_class)} to {max(by_class)} each{_ignored(environment, '; ')}"


def _ignored(environment: Environment, before: str) -> str:
    """Name the files of an environment that are not read; empty if there are none."""
    counted = ", ".join(f"{number:,} {ending}" for ending, number in environment.ignored.items())
    return f"{before}not read: {counted}" if counted else ""


def counts(image_set: ImageSet) -> str:
    """Tabulate images by class and environment, and the files that are not read."""
    summaries = {environment.name: environment.summary(image_set.classes) for environment in image_set.environments}
    rows = [[name, *(summary["labels"][name] for summary in summaries.values())] for name in image_set.classes]
    rows.append(["all", *(summary["rows"] for summary in summaries.values())])
    table = tabulate(rows, headers=["class", *summaries])
    return table + "".join(_ignored(environment, f"\n{environment.name}: ") for environment in image_set.environments)


def sample_grid(image_set: ImageSet, size: int, samples: int = 8) -> tuple[list[str], Tensor]:
    """Make a grid of pictures as a model sees them.

    Returns:
        The rows' names, and the grid ``[3, height, width]`` of bytes: a row per environment, and of images one more,
        augmented.
    """
    names: list[str] = []
    pictures: list[Tensor] = []
    for environment in image_set.environments:
        seed = derive_seed("samples", environment.name)
        order = torch.randperm(len(environment), generator=torch.Generator().manual_seed(seed)).tolist()
        chosen = [order[i % len(order)] for i in range(samples)]
        transforms = {"": plain(size)} | ({", training": augmented(size)} if environment.places else {})
        for suffix, transform in transforms.items():
            names.append(f"{environment.name}{suffix}")
            pictures += [visible(load_pixels(environment, row, transform, derive_seed(seed, row))) for row in chosen]
    return names, make_grid(torch.stack(pictures), nrow=samples, padding=2, pad_value=255)
