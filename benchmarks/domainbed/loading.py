"""Which loader reads an image set."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.domainbed.emoji import load_emoji
from benchmarks.domainbed.environments import ImageSet
from benchmarks.domainbed.folders import load_folders
from benchmarks.domainbed.mnist import load_mnist


def load_set(task: Mapping[str, Any], seed: int, *, truncated: str) -> ImageSet:
    """Load a set.

    Args:
        task: of a spec.
        seed: DomainBed's seed of the run; only MNIST's variants depend on it.
        truncated: ``refuse`` image files that end early, or ``load`` what there is of them.

    Raises:
        DataError: the set is missing, or something is wrong with a folder or file of it.
    """
    if "mnist" in task["source"]:
        return load_mnist(task, seed)
    return load_emoji(task) if "emoji" in task["source"] else load_folders(task, truncated=truncated)
