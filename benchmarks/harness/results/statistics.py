"""Compute paired differences over seeds, ranks over data sets, and mutual information."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import special, stats

CONFIDENCE, SIGNIFICANCE = 0.95, 0.05
PERMUTATIONS = 500


def information_numbers(*names: str) -> list[str]:
    """List the names of the mutual information metrics, each with its mean and 95 % quantile by chance."""
    return [
        f"{name}_information{chance}" for name in names for chance in ("", "_chance", "_chance_95")
    ]


@dataclass(frozen=True)
class Difference:
    """Hold a paired difference: mean over ``n`` pairs, 95 % confidence interval (Student's t), and p of the t-test.

    With one pair, or if all differences are equal, p, ``low`` and ``high`` are nan. The ends are 0 if all differences
    are.
    """

    COLUMNS: ClassVar = ("delta", "low", "high", "p")

    mean: float
    low: float
    high: float
    p: float
    n: int

    def columns(self) -> dict[str, float]:
        """Return the numbers by column name, without ``n``."""
        return {"delta": self.mean, "low": self.low, "high": self.high, "p": self.p}

    def scaled(self, scale: float) -> Difference:
        """Return the difference in another unit, ``scale`` times as large. p and ``n`` stay."""
        return replace(self, mean=self.mean * scale, low=self.low * scale, high=self.high * scale)


def mean_difference(differences: np.ndarray[tuple[int], np.dtype[np.float64]]) -> Difference:
    """Compute the mean of paired differences, with interval and test."""
    n = len(differences)
    mean = float(differences.mean()) if n else math.nan
    if n < 2:
        return Difference(mean, math.nan, math.nan, math.nan, n)
    if np.allclose(differences, differences[0], rtol=0, atol=1e-12):
        # equal differences give no estimate of the spread, unless all are zero
        end = 0.0 if abs(mean) < 1e-12 else math.nan
        return Difference(mean, end, end, math.nan, n)
    error = float(differences.std(ddof=1)) / math.sqrt(n)
    # scipy's special functions, because its distributions take a millisecond to check their arguments
    reach = error * float(special.stdtrit(n - 1, (1 + CONFIDENCE) / 2))
    return Difference(
        mean, mean - reach, mean + reach, 2 * float(special.stdtr(n - 1, -abs(mean) / error)), n
    )


def confidence_interval(
    values: np.ndarray[tuple[int], np.dtype[np.float64]],
) -> tuple[float, float]:
    """Return the 95 % interval of a mean. Both ends are the mean for a single value or equal values."""
    mean = mean_difference(values)
    return (mean.mean, mean.mean) if math.isnan(mean.low) else (mean.low, mean.high)


def paired_differences(
    scores: pd.DataFrame,
    cell: Sequence[str],
    reference: Mapping[str, str],
    pair: str,
    averaged: Sequence[str] = (),
) -> pd.DataFrame:
    """Compare every cell with its reference cell, which differs from it only in the columns of ``reference``.

    Rows with equal values in all other columns are compared, then averaged per ``pair``, such as a seed. The
    reference is averaged over the columns ``averaged``. Returns one row per cell that shares pairs with its reference:
    the cell's columns, :attr:`Difference.COLUMNS`, and the counts of pairs ``n`` and compared ``values``.
    """
    is_reference = (scores[list(reference)] == list(reference.values())).all(axis=1)
    shared = [column for column in scores if column not in ("value", *reference, *averaged)]
    base = (
        scores[is_reference]
        .groupby(shared, sort=False)["value"]
        .mean()
        .rename("reference")
        .reset_index()
    )
    both = scores[~is_reference].merge(base, on=shared)
    by_pair = both.groupby([*cell, pair], sort=False)
    means = by_pair[["value", "reference"]].mean().assign(values=by_pair.size())
    rows = []
    for key, pairs in means.groupby(list(cell), sort=False):
        difference = mean_difference((pairs["value"] - pairs["reference"]).to_numpy(dtype=float))
        counts = {"n": difference.n, "values": pairs["values"].sum()}
        rows.append(dict(zip(cell, key, strict=True)) | difference.columns() | counts)
    return pd.DataFrame(rows, columns=[*cell, *Difference.COLUMNS, "n", "values"])


def shared_pairs(
    scores: pd.DataFrame, table: Sequence[str], row: Sequence[str], pair: str
) -> pd.DataFrame:
    """Keep the scores of the pairs (such as seeds) that all rows of a table share, so that means are comparable.

    The columns ``table`` identify a table, and the columns ``row`` a row in it.
    """
    rows = scores.groupby(list(row), sort=False).ngroup()
    all_rows, rows_with_pair = (
        rows.groupby([scores[key] for key in keys]).transform("nunique")
        for keys in (table, [*table, pair])
    )
    return scores[all_rows == rows_with_pair]


def holm(p: pd.Series[float]) -> pd.Series[float]:
    """Correct the p values of one family by Holm's step-down procedure; nan is not counted."""
    # statsmodels' multipletests collects garbage at every call, which takes longer than the rest
    ordered = p.dropna().sort_values()
    steps = ordered * np.arange(len(ordered), 0, -1)
    return steps.cummax().clip(upper=1.0).reindex(p.index)


def with_verdicts(
    rows: pd.DataFrame, family: Sequence[str] = (), *, lower_is_better: bool = False
) -> pd.DataFrame:
    """Add ``p_holm``, corrected over all rows or per group of the columns ``family``, and a ``verdict``.

    The verdict is ``better``, ``worse``, ``within noise``, ``equal``, or empty without a test.
    """
    p = (
        rows.groupby(list(family), sort=False)["p"].transform(holm)
        if family and len(rows)
        else holm(rows["p"])
    )
    is_better = rows["delta"] < 0 if lower_is_better else rows["delta"] > 0
    is_equal = (rows["low"] == 0) & (rows["high"] == 0)
    words = {
        "equal": is_equal,
        "": p.isna(),
        "within noise": p >= SIGNIFICANCE,
        "better": is_better,
    }
    return rows.assign(p_holm=p, verdict=np.select(list(words.values()), list(words), "worse"))


def friedman_ranks(scores: pd.DataFrame) -> tuple[pd.Series[float], float]:
    """Compute the mean rank of each row (method) over the columns (data sets) of scores without missing values.

    The highest score has rank 1; ties share their mean rank. Returns the ranks, and p of Friedman's test (nan below
    three rows or two sets).
    """
    ranks = scores.rank(axis=0, ascending=False, method="average").mean(axis=1)
    is_tied = (scores.nunique(axis=0) == 1).all()
    if len(scores) < 3 or scores.shape[1] < 2 or is_tied:
        return ranks, math.nan
    return ranks, float(stats.friedmanchisquare(*scores.to_numpy()).pvalue)


def critical_difference(methods: int, sets: int) -> float:
    """Return the critical difference of two mean ranks in Nemenyi's test at 5 % (Demšar 2006)."""
    quantile = float(stats.studentized_range.ppf(CONFIDENCE, methods, math.inf)) / math.sqrt(2)
    return quantile * math.sqrt(methods * (methods + 1) / (6 * sets))


def mutual_information(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Compute the mutual information of expert and label, in bits, from counts ``[..., labels, experts]``.

    It is above 0 by chance, more so with many experts and labels and few rows; see :func:`shuffled_information`.
    """
    shares = counts / np.maximum(counts.sum((-2, -1), keepdims=True), 1)
    of_labels, of_experts = (special.entr(shares.sum(axis)).sum(-1) for axis in (-1, -2))
    nats = of_labels + of_experts - special.entr(shares).sum((-2, -1))
    return np.maximum(nats / math.log(2), 0.0)


def shuffled_information(
    loads: NDArray[np.int64], labels: NDArray[np.int64], strata: NDArray[np.int64], seed: int
) -> NDArray[np.float64]:
    """Compute the mutual information of experts and labels, unshuffled and shuffled.

    Labels are shuffled among the rows (or images) of each stratum; the tokens of a row stay together. ``loads`` counts
    the choices of each expert by row, ``[rows, layers, experts]``. Returns ``[1 + PERMUTATIONS, layers]`` bits; the
    first row is unshuffled.
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


def shuffle_statistics(bits: NDArray[np.float64]) -> tuple[float, float]:
    """Return the mean and the 95 % quantile of the shuffled bits among ``[1 + PERMUTATIONS]``."""
    return float(bits[1:].mean()), float(np.quantile(bits[1:], CONFIDENCE))


@dataclass(frozen=True)
class MutualInformation:
    """Hold the mutual information of experts and labels in bits, and the mean and 95 % quantile of shuffles."""

    bits: float
    chance: float
    chance_95: float

    @classmethod
    def mean(cls, bits: NDArray[np.float64]) -> MutualInformation:
        """Average bits ``[1 + PERMUTATIONS, cases]`` over cases; the first row is unshuffled."""
        means = bits.mean(1)
        return cls(float(means[0]), *shuffle_statistics(means))

    def numbers(self, name: str) -> dict[str, float]:
        """Return the numbers by metric name; ``name`` is the kind of label, such as ``task``."""
        return dict(
            zip(information_numbers(name), (self.bits, self.chance, self.chance_95), strict=True)
        )
