"""Load an image set, and validate it once by opening every image."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

from filelock import FileLock

from benchmarks.domainbed.definition import RunImageSet
from benchmarks.domainbed.images import ImageSet, load_folders
from benchmarks.domainbed.mnist import load_mnist
from benchmarks.harness.base import IMAGES, DataError, write_json
from benchmarks.harness.config.runs import canonical_json

_SHOWN = 10  # damaged images that a message names


def load_set(task: RunImageSet, seed: int, *, truncated: str) -> ImageSet:
    """Load a set (:class:`DataError` if it is missing or damaged).

    Args:
        task: The set.
        seed: DomainBed's seed of the run; only MNIST's variants depend on it.
        truncated: ``refuse`` to reject image files that end early, ``load`` to fill them.
    """
    return load_mnist(task, seed) if task.source.mnist else load_folders(task, truncated)


def validate_once(image_set: ImageSet, task: RunImageSet, truncated: str) -> None:
    """Open every image of a set, if not done before, and write its counts. Concurrent runs wait.

    Raises:
        DataError: Images are damaged.
    """
    settings = {"task": task.model_dump(), "truncated": truncated}
    digest = hashlib.sha256(canonical_json(settings).encode()).hexdigest()[:8]
    output = IMAGES / f"{task.name}-{digest}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(output.with_suffix(".lock")):
        if not output.exists():
            write_json(output, settings | validate_images(image_set))


def validate_images(image_set: ImageSet) -> dict[str, Any]:
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
        raise DataError(
            f"{image_set.source}: {len(damaged)} of {total:,} images cannot be used, the first:\n{first}"
        )
    environments = {
        environment.name: environment.summary(image_set.classes)
        for environment in image_set.environments
    }
    return {"source": image_set.source, "classes": image_set.classes, "environments": environments}


def count_images(image_set: ImageSet) -> Iterator[tuple[str, int, str]]:
    """Yield name, number of images and class summary of every environment."""
    for environment in image_set.environments:
        counts = environment.summary(image_set.classes)["labels"].values()
        yield (
            environment.name,
            len(environment),
            f"{len(counts)} classes, {min(counts)} to {max(counts)} each",
        )
