"""Which loader reads an image set."""

from __future__ import annotations

from benchmarks.domainbed.definition import RunSet
from benchmarks.domainbed.environments import ImageSet
from benchmarks.domainbed.folders import load_folders
from benchmarks.domainbed.mnist import load_mnist


def load_set(task: RunSet, seed: int, *, truncated: str) -> ImageSet:
    """Load a set.

    Args:
        task: of a spec.
        seed: DomainBed's seed of the run; only MNIST's variants depend on it.
        truncated: ``refuse`` image files that end early, or ``load`` what there is of them.

    Raises:
        DataError: the set is missing, or something is wrong with a folder or file of it.
    """
    if task.source.mnist:
        return load_mnist(task, seed)
    return load_folders(task, truncated=truncated)
