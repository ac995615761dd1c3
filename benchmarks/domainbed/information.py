"""What the choice of an expert tells of an image, beside what it tells by chance."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from benchmarks.harness.results.information import shuffled_information


def told(
    loads: NDArray[np.int64], classes: NDArray[np.int64], environments: NDArray[np.int64], *, seed: int
) -> dict[str, NDArray[np.float64]]:
    """What experts tell of ``class`` and ``environment``: as it is, and shuffled over images that could have changed places.

    These are images, not tokens, which go together in their image. Classes are shuffled among the images of an environment and environments among those of
    a class, because the one may hold more of the other: what that alone tells is then part of what chance tells.

    Args:
        loads: ``[images, layers, experts]``, how often each image chose each expert.
        classes: of the images.
        environments: of the images, which stand environment by environment.
        seed: of the shuffling.

    Returns:
        ``[1 + PERMUTATIONS, layers]`` bits each, the first as it is; see :func:`~benchmarks.harness.results.information.shuffled_information`.
    """
    return {
        "class": shuffled_information(loads, classes, environments, seed),
        "environment": shuffled_information(loads, environments, classes, seed),
    }
