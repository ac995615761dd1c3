"""Load an image set, and validate it once by opening every image."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from benchmarks.domainbed.batches import DEVIATION, MEAN, evaluation_transform, load_pixels, training_transform
from benchmarks.domainbed.definition import RunImageSet, ValidationJob
from benchmarks.domainbed.images import REFUSE, ImageSet, load_folders
from benchmarks.domainbed.mnist import load_mnist
from benchmarks.harness.base import DataError, atomic_write, derive_seed, write_json
from benchmarks.harness.config.yaml import parse

_SHOWN = 10  # damaged images that a message names
_SAMPLES = 8  # pictures in a row of the grid


def load_set(task: RunImageSet, seed: int, *, truncated: str) -> ImageSet:
    """Load a set (:class:`DataError` if it is missing or damaged).

    Args:
        task: The set.
        seed: DomainBed's seed of the run; only MNIST's variants depend on it.
        truncated: ``refuse`` to reject image files that end early, ``load`` to fill them.
    """
    return load_mnist(task, seed) if task.source.mnist else load_folders(task, truncated)


def validate_once(job: ValidationJob) -> None:
    """Validate a set unless it is done; write its counts and a grid of samples. Concurrent runs wait.

    Raises:
        DataError: The set is missing or damaged.
    """
    output = Path(job.file)
    output.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(output.with_suffix(".lock")):
        if output.exists():
            return
        image_set = load_set(parse(job.task, RunImageSet, "the set"), job.data_seed, truncated=job.truncated)
        summary = validate_dataset(image_set)
        names, grid = sample_grid(image_set, job.image_size)
        with atomic_write(Path(job.picture)) as temporary:
            Image.fromarray(grid.permute(1, 2, 0).numpy()).save(temporary, "png")
        write_json(output, {**asdict(job), **summary, "samples": names})


def validate_dataset(image_set: ImageSet) -> dict[str, Any]:
    """Open every image; return counts by environment and class (:class:`DataError` if some are damaged)."""
    damaged: list[str] = []
    for environment in image_set.environments:
        for row in range(len(environment)):
            try:
                environment.open(row)
            except DataError as error:
                damaged.append(str(error))
    if damaged:
        total = sum(map(len, image_set.environments))
        first = "\n".join(damaged[:_SHOWN])
        raise DataError(f"{image_set.source}: {len(damaged)} of {total:,} images cannot be used, the first:\n{first}")
    environments = {environment.name: environment.summary(image_set.classes) for environment in image_set.environments}
    return {"source": image_set.source, "classes": image_set.classes, "environments": environments}


def list_environments(task: RunImageSet, seed: int, *, open_images: bool) -> list[tuple[str, int, str, str]]:
    """Return name, number of images, class summary and source of every environment."""
    image_set = load_set(task, seed, truncated=REFUSE)
    if open_images:
        validate_dataset(image_set)
    return [(name, rows, labels, image_set.source) for name, rows, labels in count_images(image_set)]


def count_images(image_set: ImageSet) -> Iterator[tuple[str, int, str]]:
    """Yield name, number of images and class summary of every environment."""
    for environment in image_set.environments:
        counts = environment.summary(image_set.classes)["labels"].values()
        yield environment.name, len(environment), f"{len(counts)} classes, {min(counts)} to {max(counts)} each"


def sample_grid(image_set: ImageSet, size: int) -> tuple[list[str], Tensor]:
    """Return the names of rows, and a grid of transformed pictures ``[3, height, width]`` (uint8).

    Each environment has a row, and a second, augmented one unless it holds digits.
    """
    names: list[str] = []
    pictures: list[Tensor] = []
    for environment in image_set.environments:
        seed = derive_seed("samples", environment.name)
        order = torch.randperm(len(environment), generator=torch.Generator().manual_seed(seed)).tolist()
        chosen = [order[i % len(order)] for i in range(_SAMPLES)]
        transforms = {"": evaluation_transform(size)}
        if environment.places:
            transforms[", training"] = training_transform(size)
        for suffix, transform in transforms.items():
            names.append(f"{environment.name}{suffix}")
            pictures += [load_pixels(environment, row, transform, derive_seed(seed, row)) for row in chosen]
    mean, deviation = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(DEVIATION).view(3, 1, 1)
    visible = ((torch.stack(pictures) * deviation + mean).clamp(0, 1) * 255).round().to(torch.uint8)
    return names, make_grid(visible, nrow=_SAMPLES, padding=2, pad_value=255)
