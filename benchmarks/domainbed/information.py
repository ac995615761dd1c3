"""What the choice of an expert tells of an image, beside what it tells by chance."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from benchmarks.harness.results.statistics import shuffled_information


def told(
    loads: NDArray[np.int64], classes: NDArray[np.int64], environments: NDArray[np.int64], *, paired: bool, seed: int
) -> dict[str, NDArray[np.float64]]:
    """What experts tell of ``class`` and ``environment``: as it is, and shuffled over images that could have changed places.

    These are images, not tokens, which go together in their image. Classes are shuffled among the images of an environment and environments among those of
    a class, because the one may hold more of the other: what that alone tells is then part of what chance tells. In a paired set a thing
    has an image in every environment: things exchange their classes, and the images of a thing their environments.

    Args:
        loads: ``[images, layers, experts]``, how often each image chose each expert.
        classes: of the images.
        environments: of the images, which stand environment by environment.
        paired: the environments show the same things in the same order.
        seed: of the shuffling.

    Returns:
        ``[1 + PERMUTATIONS, layers]`` bits each, the first as it is; see :func:`~benchmarks.harness.results.statistics.shuffled_information`.
    """
    if not paired:
        return {
            "class": shuffled_information(loads, classes, environments, seed),
            "environment": shuffled_information(loads, environments, classes, seed),
        }
    count = len(np.unique(environments))
    by_thing = loads.reshape(count, -1, *loads.shape[1:]).sum(0)
    things = np.arange(len(by_thing))
    return {
        "class": shuffled_information(by_thing, classes[: len(things)], np.zeros_like(things), seed),
        "environment": shuffled_information(loads, environments, np.tile(things, count), seed),
    }
