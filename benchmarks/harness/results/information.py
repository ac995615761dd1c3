"""What the choice of an expert tells of a token, beside what it tells by chance."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import entr

from benchmarks.harness.results.records import information_numbers

PERMUTATIONS = 500
LEVEL = 0.95


def mutual_information(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Bits that a token's choice of an expert tells about what it is of, and the other way round.

    Mutual information of the empirical distribution: 0 where every row uses the experts alike. Chance alone gives more than 0, the more the more
    experts and rows and the fewer rows (or images) the tokens are of (see :func:`shuffled_information`).

    Args:
        counts: ``[..., labels, experts]``, how often each expert was chosen.
    """
    shares = counts / np.maximum(counts.sum((-2, -1), keepdims=True), 1)
    nats = entr(shares.sum(-1)).sum(-1) + entr(shares.sum(-2)).sum(-1) - entr(shares).sum((-2, -1))
    return np.maximum(nats / math.log(2), 0.0)


def shuffled_information(
    loads: NDArray[np.int64], labels: NDArray[np.int64], strata: NDArray[np.int64], seed: int
) -> NDArray[np.float64]:
    """What experts tell of labels, as they are and shuffled within strata.

    Rows (or images) are shuffled, not tokens, which go together in their row.

    Args:
        loads: ``[rows, layers, experts]``, how often each row chose each expert.
        labels: of the rows.
        strata: of the rows; labels stay among the rows of one.
        seed: of the shuffling.

    Returns:
        ``[1 + PERMUTATIONS, layers]`` bits, the first as it is.
    """
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
    return float(bits[1:].mean()), float(np.quantile(bits[1:], LEVEL))


@dataclass(frozen=True)
class Told:
    """What the choice of an expert tells of a label, in bits: as it is, by chance, and what chance stays below in 95 % of the shuffles."""

    bits: float
    chance: float
    chance_95: float

    @classmethod
    def mean(cls, found: NDArray[np.float64]) -> Told:
        """Of ``[1 + PERMUTATIONS, cases]``, the first as it is, the mean over cases."""
        means = found.mean(1)
        return cls(float(means[0]), *by_chance(means))

    def numbers(self, name: str) -> dict[str, float]:
        """By the names of metrics.yaml; ``name`` is what the label is of."""
        return dict(zip(information_numbers(name), (self.bits, self.chance, self.chance_95), strict=True))
