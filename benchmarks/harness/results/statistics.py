"""Uncertainty: paired differences over seeds, and ranks over data sets."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pandas as pd
from scipy import special, stats

CONFIDENCE, SIGNIFICANCE = 0.95, 0.05


@dataclass(frozen=True)
class Difference:
    """A paired difference.

    Attributes:
        mean: of the differences.
        low: lower end of the 95 % confidence interval (Student's t); nan with one pair, or where all
            differences are the same number other than 0.
        high: upper end.
        p: of the paired t-test; nan with one pair or where all differences are equal.
        n: number of pairs.
    """

    COLUMNS: ClassVar = ("delta", "low", "high", "p")

    mean: float
    low: float
    high: float
    p: float
    n: int

    def columns(self) -> dict[str, float]:
        """As columns of a frame."""
        return dict(zip(self.COLUMNS, (self.mean, self.low, self.high, self.p), strict=True))


def mean_difference(differences: np.ndarray[tuple[int], np.dtype[np.float64]]) -> Difference:
    """What the differences of pairs say of their mean."""
    n = len(differences)
    mean = float(differences.mean()) if n else math.nan
    if n < 2:
        return Difference(mean, math.nan, math.nan, math.nan, n)
    if np.allclose(differences, differences[0], rtol=0, atol=1e-12):
        # equal differences say nothing of their spread, except where there is no difference at all
        end = 0.0 if abs(mean) < 1e-12 else math.nan
        return Difference(mean, end, end, math.nan, n)
    error = _error(differences)
    reach = error * _quantile(n)
    return Difference(mean, mean - reach, mean + reach, 2 * float(special.stdtr(n - 1, -abs(mean) / error)), n)


# of Student's t, by scipy's special functions: its tests and distributions check their arguments for a millisecond a call, for thousands of calls
def _error(values: np.ndarray[tuple[int], np.dtype[np.float64]]) -> float:
    """The standard error of a mean."""
    return float(values.std(ddof=1)) / math.sqrt(len(values))


def _quantile(n: int) -> float:
    """How many standard errors the interval of a mean of ``n`` reaches to each side."""
    return float(special.stdtrit(n - 1, (1 + CONFIDENCE) / 2))


def paired_differences(
    scores: pd.DataFrame, cell: Sequence[str], reference: Mapping[str, str], pair: str, averaged: Sequence[str] = ()
) -> pd.DataFrame:
    """Compare every cell with the one that differs from it in the columns of ``reference`` alone.

    Values are paired by all other columns that there are; what is paired is the mean over those of one ``pair``.

    Args:
        scores: a row a ``value``, with the columns of ``cell``, ``pair`` and perhaps more.
        cell: columns that say what is compared.
        reference: those of them in which the reference differs, with its values; rows that have these are compared with nothing.
        pair: the column over which the test is: a seed, a question.
        averaged: columns of the reference that are no pairs: its mean over them stands against every value.

    Returns:
        A row a cell that shares values with its reference: ``cell``, :attr:`Difference.COLUMNS`, ``n`` pairs, and ``values``, how many they
        are means of.
    """
    of_reference = (scores[list(reference)] == list(reference.values())).all(axis=1)
    shared = [column for column in scores if column not in ("value", *reference, *averaged)]
    theirs = scores[of_reference].groupby(shared, sort=False)["value"].mean().rename("reference").reset_index()
    both = scores[~of_reference].merge(theirs, on=shared)
    by_pair = both.groupby([*cell, pair], sort=False)
    means = by_pair[["value", "reference"]].mean().assign(values=by_pair.size())
    found = []
    for key, pairs in means.groupby(list(cell), sort=False):
        difference = mean_difference((pairs["value"] - pairs["reference"]).to_numpy(dtype=float))
        counts = {"n": difference.n, "values": pairs["values"].sum()}
        found.append(dict(zip(cell, key, strict=True)) | difference.columns() | counts)
    return pd.DataFrame(found, columns=[*cell, *Difference.COLUMNS, "n", "values"])


def holm(p: pd.Series[float]) -> pd.Series[float]:
    """p-values of one family, corrected by Holm's step-down procedure; without those that do not exist (nan)."""
    # by hand: statsmodels' multipletests collects garbage at every call, which takes longer than all else here
    ordered = p.dropna().sort_values()
    steps = ordered * np.arange(len(ordered), 0, -1)
    return steps.cummax().clip(upper=1.0).reindex(p.index)


def with_verdicts(rows: pd.DataFrame, family: list[str], *, lower_is_better: bool = False) -> pd.DataFrame:
    """Rows of differences (:attr:`Difference.COLUMNS`) with ``p_holm``, corrected within each family, and a ``verdict``."""
    corrected = rows.groupby(family, sort=False)["p"].transform(holm) if len(rows) else math.nan
    judged = rows.assign(p_holm=corrected)
    better = [-row.delta if lower_is_better else row.delta for row in judged.itertuples()]
    rest = zip(better, judged["low"], judged["high"], judged["p_holm"], strict=True)
    return judged.assign(verdict=[_verdict(*row) for row in rest])


def _verdict(better: float, low: float, high: float, p: float) -> str:
    """What a corrected test says of a difference; nothing where there is no test."""
    if low == high == 0:
        return "equal"
    if math.isnan(p):
        return ""
    return "within noise" if p >= SIGNIFICANCE else "better" if better > 0 else "worse"


def confidence_interval(values: np.ndarray[tuple[int], np.dtype[np.float64]]) -> tuple[float, float]:
    """95 % interval of a mean; the value itself where there is only one or all are equal."""
    mean, n = float(values.mean()), len(values)
    error = _error(values) if n > 1 else 0.0
    if error == 0:
        return mean, mean
    reach = error * _quantile(n)
    return mean - reach, mean + reach


@dataclass(frozen=True)
class Ranking:
    """Friedman ranks: ``ranks`` by row (1 is best), the test's ``p`` (nan below three rows or two sets)."""

    ranks: pd.Series[float]
    p: float


def friedman_ranks(scores: pd.DataFrame) -> Ranking:
    """Average rank of each row over the columns; higher scores are better, ties share their mean rank.

    Args:
        scores: one row a method, one column a data set, no gaps. The rank only means something relative
            to the rows that are ranked together.
    """
    ranks = scores.rank(axis=0, ascending=False, method="average").mean(axis=1)
    all_tied = bool((scores.nunique(axis=0) == 1).all())
    if min(scores.shape[0] - 1, scores.shape[1]) < 2 or all_tied:
        return Ranking(ranks, math.nan)
    return Ranking(ranks, float(stats.friedmanchisquare(*scores.to_numpy()).pvalue))


def nemenyi(scores: pd.DataFrame) -> pd.DataFrame:
    """p of every pair of rows by Nemenyi's test on their Friedman ranks (Demšar 2006); rows and columns are the methods."""
    import scikit_posthocs  # it takes a plotting library along

    found = scikit_posthocs.posthoc_nemenyi_friedman(scores.to_numpy().T)
    return pd.DataFrame(found.to_numpy(), index=scores.index, columns=scores.index)


def critical_difference(methods: int, sets: int) -> float:
    """The distance of two mean ranks from which Nemenyi's test tells them apart at 5 % (Demšar 2006)."""
    quantile = float(stats.studentized_range.ppf(CONFIDENCE, methods, math.inf)) / math.sqrt(2)
    return quantile * math.sqrt(methods * (methods + 1) / (6 * sets))
