"""Load an image set, and check once that every image opens."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock

from benchmarks.domainbed.definition import RunImageSet
from benchmarks.domainbed.images import ImageSet, load_folders
from benchmarks.domainbed.mnist import load_mnist
from benchmarks.harness.base import IMAGES, DataError, read_bytes, short_digest, write_json
from benchmarks.harness.config.runs import canonical_json

_SHOWN = 10  # damaged images that a message names


def load_set(task: RunImageSet, seed: int, *, truncated: str) -> ImageSet:
    """Load an image set.

    Args:
        task: The settings of the set.
        seed: DomainBed's seed of the run. Only MNIST's variants depend on it.
        truncated: ``refuse`` to reject image files that end early, ``load`` to fill them.

    Raises:
        DataError: The set is missing or damaged.
    """
    if task.source.mnist:
        return load_mnist(task, seed)
    return load_folders(task, truncated)


def validate_once(image_set: ImageSet, task: RunImageSet, truncated: str) -> None:
    """Open every image of a set, and write the counts of images to a file in :data:`.IMAGES`.

    If the file exists, no image is opened. The name of the file depends on the paths and sizes of
    the image files. If one changes, all images are opened again. Concurrent runs wait for the first
    one.

    Raises:
        DataError: Images are damaged.
    """
    settings = {
        "task": task.model_dump(),
        "truncated": truncated,
        "files": _digest_files(image_set),
    }
    digest = short_digest(canonical_json(settings), 8)
    output = IMAGES / f"{task.name}-{digest}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(output.with_suffix(".lock")):
        if not output.exists():
            counts = validate_images(image_set)
            write_json(output, {**settings, **counts})


def _digest_files(image_set: ImageSet) -> str:
    """Return a digest of the origin of a set, and of the path and size of every image file.

    No file is read. Images of the hub have no files of their own, but their origin has the commit.
    """
    digest = hashlib.sha256(image_set.source.encode())
    for environment in image_set.environments:
        for file in environment.files:
            line = f"\n{_file_size(file)} {file}"
            digest.update(os.fsencode(line))
    return digest.hexdigest()


def digest_images(image_set: ImageSet) -> str:
    """Return a digest of the labels of a set, and of the content of every image file.

    No image is opened. Images of the hub or of a package have no files of their own; instead, the
    digest has their origin with its commit or version.
    """
    digest = hashlib.sha256()
    for environment in image_set.environments:
        digest.update(f"{environment.name} {environment.labels}\n".encode())
        for file in environment.files:
            digest.update(read_bytes(Path(file)))
        if not environment.files:
            digest.update(image_set.source.encode())
    return digest.hexdigest()


def _file_size(file: str) -> int | None:
    """Return the size of a file in bytes; None for a broken link, which cannot be opened."""
    try:
        return Path(file).stat().st_size
    except OSError:
        return None


def validate_images(image_set: ImageSet) -> dict[str, Any]:
    """Open every image of a set.

    Returns:
        - ``source``: the origin of the images.
        - ``classes``: the names of the classes.
        - ``environments``: the counts of :meth:`.Environment.summary`, by name of the environment.

    Raises:
        DataError: Images are damaged. The message names the first ones.
    """
    damaged: list[str] = []
    for environment in image_set.environments:
        for row in range(len(environment)):
            try:
                environment.open(row)
            except DataError as error:
                damaged.append(str(error))
    if damaged:
        first = "\n".join(damaged[:_SHOWN])
        raise DataError(
            f"{image_set.source}: {len(damaged)} of {image_set.num_images:,} images cannot be "
            f"used, the first:\n{first}"
        )
    environments = {
        environment.name: environment.summary(image_set.classes)
        for environment in image_set.environments
    }
    return {"source": image_set.source, "classes": image_set.classes, "environments": environments}


class ImageCounts(NamedTuple):
    """The number of images of one environment."""

    name: str
    """The environment's short name."""
    images: int
    """The number of images."""
    labels: str
    """The number of classes, and the sizes of the smallest and the largest class, as text."""


def count_images(image_set: ImageSet) -> Iterator[ImageCounts]:
    """Yield the number of images of every environment."""
    for environment in image_set.environments:
        summary = environment.summary(image_set.classes)
        class_sizes = summary["labels"].values()
        labels = f"{len(class_sizes)} classes, {min(class_sizes)} to {max(class_sizes)} each"
        yield ImageCounts(environment.name, len(environment), labels)
