"""What the choice of an expert tells of an image, beside what it tells by chance."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy.special import entr

PERMUTATIONS = 500
_LEVEL = 0.95


def mutual_information(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Bits that a token's choice of an expert tells about what its image is, and the other way round.

    Mutual information of the empirical distribution: 0 where every row uses the experts alike. Chance alone gives more than 0, the more the more
    experts and rows and the fewer images there are (see :func:`told`).

    Args:
        counts: ``[..., classes or environments, experts]``, how often each expert was chosen.
    """
    shares = counts / np.maximum(counts.sum((-2, -1), keepdims=True), 1)
    nats = entr(shares.sum(-1)).sum(-1) + entr(shares.sum(-2)).sum(-1) - entr(shares).sum((-2, -1))
    return np.maximum(nats / math.log(2), 0.0)


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
        ``[1 + PERMUTATIONS, layers]`` bits each, the first as it is.
    """
    if not paired:
        return {
            "class": _shuffled(loads, classes, environments, seed),
            "environment": _shuffled(loads, environments, classes, seed),
        }
    count = len(np.unique(environments))
    by_thing = loads.reshape(count, -1, *loads.shape[1:]).sum(0)
    things = np.arange(len(by_thing))
    return {
        "class": _shuffled(by_thing, classes[: len(things)], np.zeros_like(things), seed),
        "environment": _shuffled(loads, environments, np.tile(things, count), seed),
    }


def _shuffled(
    loads: NDArray[np.int64], labels: NDArray[np.int64], strata: NDArray[np.int64], seed: int
) -> NDArray[np.float64]:
    """What experts tell of labels, as they are and shuffled within strata."""
    random = np.random.default_rng(seed)
    in_order = np.argsort(strata, kind="stable")
    starts = np.flatnonzero(np.diff(np.sort(labels), prepend=-1))
    counts = []
    for number in range(1 + PERMUTATIONS):
        given = labels.copy()
        if number:
            given[in_order] = labels[np.lexsort((random.random(len(labels)), strata))]
        counts.append(np.add.reduceat(loads[np.argsort(given, kind="stable")], starts))
    return mutual_information(np.moveaxis(np.stack(counts), 1, 2))


def by_chance(bits: NDArray[np.float64]) -> tuple[float, float]:
    """Mean of the shuffled ones among ``[1 + PERMUTATIONS]``, and what 95 % of them stay below."""
    return float(bits[1:].mean()), float(np.quantile(bits[1:], _LEVEL))
