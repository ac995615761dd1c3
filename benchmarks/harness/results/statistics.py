"""Compute paired differences over seeds, ranks over data sets, and mutual information."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import integrate, special, stats

CONFIDENCE = 0.95  # of intervals
SIGNIFICANCE = 0.05  # a smaller p is significant
PERMUTATIONS = 500  # shuffles that estimate the mutual information by chance


def information_metrics(*labels: str) -> list[str]:
    """List the metrics of the mutual information of experts and labels, three per kind of label.

    The metrics of the label ``task`` are

    - ``task_information``: the mutual information,
    - ``task_information_chance``: its mean over shuffled labels, and
    - ``task_information_chance_95``: its 95 % quantile over shuffled labels.
    """
    metrics = []
    for label in labels:
        metrics.append(f"{label}_information")
        metrics.append(f"{label}_information_chance")
        metrics.append(f"{label}_information_chance_95")
    return metrics


@dataclass(frozen=True)
class Difference:
    """The mean of paired differences, with a confidence interval and a test.

    With one pair, ``low``, ``high`` and ``p`` are nan. The same holds if all differences are equal
    and not 0. If several differences are all 0, ``low`` and ``high`` are 0, and ``p`` is nan.
    Without pairs, all numbers except ``n`` are nan.

    Attributes:
        mean: The mean over ``n`` pairs.
        low: The lower end of the 95 % confidence interval (Student's t).
        high: The upper end.
        p: The p of the paired t-test.
        n: The number of pairs.
    """

    COLUMNS: ClassVar = ("delta", "low", "high", "p")  # in tables, besides ``n``

    mean: float
    low: float
    high: float
    p: float
    n: int

    def columns(self) -> dict[str, float]:
        """Return the numbers by column name: :attr:`COLUMNS`, then ``n``."""
        return {
            "delta": self.mean,
            "low": self.low,
            "high": self.high,
            "p": self.p,
            "n": self.n,
        }

    def standard_error(self) -> float:
        """Return the standard error of the mean, which the interval implies."""
        quantile = float(special.stdtrit(self.n - 1, (1 + CONFIDENCE) / 2))
        return (self.high - self.low) / 2 / quantile

    def scaled(self, scale: float) -> Difference:
        """Return the difference in another unit, ``scale`` times as large. p and ``n`` stay."""
        return replace(self, mean=self.mean * scale, low=self.low * scale, high=self.high * scale)


def mean_difference(differences: np.ndarray[tuple[int], np.dtype[np.float64]]) -> Difference:
    """Compute the mean of paired differences, its confidence interval, and the paired t-test."""
    n = len(differences)
    if n == 0:
        return Difference(mean=math.nan, low=math.nan, high=math.nan, p=math.nan, n=n)
    mean = float(differences.mean())
    if n == 1:
        return Difference(mean=mean, low=math.nan, high=math.nan, p=math.nan, n=n)
    if np.allclose(differences, differences[0], rtol=0, atol=1e-12):
        # equal differences give no estimate of the spread, unless all are zero
        end = math.nan
        if abs(mean) < 1e-12:
            end = 0.0
        return Difference(mean=mean, low=end, high=end, p=math.nan, n=n)

    error = float(differences.std(ddof=1)) / math.sqrt(n)
    # scipy's special functions, because its distributions take a millisecond to check arguments
    quantile = float(special.stdtrit(n - 1, (1 + CONFIDENCE) / 2))
    reach = error * quantile
    # two-sided: twice the lower tail
    p = 2 * float(special.stdtr(n - 1, -abs(mean) / error))
    return Difference(mean=mean, low=mean - reach, high=mean + reach, p=p, n=n)


def confidence_interval(
    values: np.ndarray[tuple[int], np.dtype[np.float64]],
) -> tuple[float, float]:
    """Return the lower and upper end of the 95 % confidence interval of a mean.

    Both ends are the mean if there is a single value, or if all values are equal.
    """
    # the interval of a mean is that of the differences to 0
    interval = mean_difference(values)
    if math.isnan(interval.low):
        return interval.mean, interval.mean
    return interval.low, interval.high


def paired_differences(
    scores: pd.DataFrame,
    cell_columns: Sequence[str],
    reference: Mapping[str, str],
    pair: str,
    averaged: Sequence[str] = (),
) -> pd.DataFrame:
    """Compare scores with reference scores seed by seed, such as each method with the baseline.

    The scores are split into cells, such as one per model and method. For each cell and seed, the
    difference is the mean score minus the mean of the matching reference scores.

    Args:
        scores: The scores in the column ``value``, one row per score.
        cell_columns: The columns that identify a cell.
        reference: The value that rows of the reference have in some columns, such as
            ``{"method": "dense"}``. A reference score matches a score with the same values in all
            other columns.
        pair: The column that pairs scores with reference scores, such as ``seed``.
        averaged: The columns over which reference scores are averaged before they are matched.

    Returns:
        One row per cell with matching reference scores: the columns ``cell_columns``,
        :attr:`Difference.COLUMNS`, the count ``n`` of seeds and the count ``values`` of scores. The
        difference is nan if a score is nan, such as the loss of a diverged model.
    """
    # rows with all of the given values
    is_reference = pd.Series(True, scores.index)
    for column, name in reference.items():
        is_reference &= scores[column] == name

    # a score may differ from its reference score in these columns, such as the method; all other
    # columns must agree
    may_differ = ("value", *reference, *averaged)
    must_agree = [column for column in scores if column not in may_differ]
    matching = scores[is_reference].groupby(must_agree, sort=False)
    # with skipna=False, a mean is nan if one of its scores is missing
    reference_means = matching["value"].mean(skipna=False)
    references = reference_means.rename("reference_score").reset_index()
    # put the reference score beside each score; the merge drops scores without a reference score
    with_reference = scores[~is_reference].merge(references, on=must_agree)

    # one row per cell and seed: both mean scores, and how many scores they average
    by_pair = with_reference.groupby([*cell_columns, pair], sort=False)
    mean_scores = by_pair[["value", "reference_score"]].mean(skipna=False)
    means = mean_scores.assign(num_scores=by_pair.size())

    rows = []
    for names, means_of_cell in means.groupby(list(cell_columns), sort=False):
        cell = dict(zip(cell_columns, names, strict=True))
        differences = means_of_cell["value"] - means_of_cell["reference_score"]
        difference = mean_difference(differences.to_numpy(dtype=float))
        row = {
            **cell,
            **difference.columns(),
            "values": means_of_cell["num_scores"].sum(),
        }
        rows.append(row)
    return pd.DataFrame(rows, columns=[*cell_columns, *Difference.COLUMNS, "n", "values"])


def shared_pairs(
    scores: pd.DataFrame, within: Sequence[str], compared: Sequence[str], pair: str
) -> pd.DataFrame:
    """Keep the scores of seeds that all methods have, so that their means are comparable.

    Args:
        scores: The scores.
        within: The columns that identify a group of scores, such as ``model`` and ``task``. Methods
            are compared within each group.
        compared: The columns that identify what is compared, such as ``method``.
        pair: The column that pairs the scores of different methods, such as ``seed``.
    """
    is_shared = np.zeros(len(scores), dtype=bool)
    # `indices` has the positions of each group's rows in the frame
    row_numbers_by_group = scores.groupby(list(within), sort=False).indices
    for row_numbers in row_numbers_by_group.values():
        group = scores.iloc[row_numbers]
        seeds_of_methods = []  # one set of seeds for each method
        for _method, scores_of_method in group.groupby(list(compared), sort=False):
            seeds_of_methods.append(set(scores_of_method[pair]))
        shared_seeds = set.intersection(*seeds_of_methods)
        is_shared[row_numbers] = group[pair].isin(shared_seeds)
    return scores[is_shared]


def holm(p: pd.Series[float]) -> pd.Series[float]:
    """Correct the p values of one family by Holm's step-down procedure.

    Values of nan do not count as tests, and they stay nan.
    """
    # statsmodels' multipletests collects garbage at every call, which takes longer than the rest
    ordered = p.dropna().sort_values()
    # the smallest is multiplied by the number of tests, the next by one less, and so on
    factors = np.arange(len(ordered), 0, -1)
    corrected = (ordered * factors).cummax().clip(upper=1.0)
    return corrected.reindex(p.index)


def with_verdicts(
    rows: pd.DataFrame, family: Sequence[str] = (), *, lower_is_better: bool = False
) -> pd.DataFrame:
    """Add the columns ``p_holm`` (corrected p) and ``verdict`` to rows of differences.

    Args:
        rows: The differences, with the columns :attr:`Difference.COLUMNS`.
        family: p is corrected within each group of rows that are equal in these columns. Without
            columns, all rows are one group.
        lower_is_better: True if a negative difference is an improvement.
    """
    if family and len(rows):
        p_holm = rows.groupby(list(family), sort=False)["p"].transform(holm)
    else:
        p_holm = holm(rows["p"])

    verdicts = []
    for row in rows.assign(p_holm=p_holm).to_dict("records"):
        verdicts.append(_verdict(row, lower_is_better=lower_is_better))
    return rows.assign(p_holm=p_holm, verdict=pd.Series(verdicts, rows.index, dtype=str))


def _verdict(row: Mapping[Hashable, Any], *, lower_is_better: bool) -> str:
    """Return the verdict on a row with :attr:`Difference.COLUMNS` and the corrected p, ``p_holm``.

    It is ``equal`` if all differences are 0 (p is then nan). Otherwise it is ``better``, ``worse``
    or ``within noise``, and empty without a p.
    """
    if row["low"] == 0 and row["high"] == 0:
        return "equal"
    if math.isnan(row["p_holm"]):
        return ""
    if row["p_holm"] >= SIGNIFICANCE:
        return "within noise"

    is_better = row["delta"] > 0
    if lower_is_better:
        is_better = row["delta"] < 0
    return "better" if is_better else "worse"


def friedman_ranks(scores: pd.DataFrame) -> tuple[pd.Series[float], float]:
    """Compute the mean rank of each method over data sets, and test if the methods differ.

    Args:
        scores: The scores, ``[methods, data sets]``, without missing values.

    Returns:
        The mean ranks by method, and p of Friedman's test. The highest score has rank 1, and ties
        share their mean rank. p is nan for fewer than three methods or two data sets, or if all
        methods are equal.
    """
    ranks_by_set = scores.rank(axis=0, ascending=False, method="average")
    mean_ranks = ranks_by_set.mean(axis=1)

    num_methods, num_sets = scores.shape
    all_are_tied = (scores.nunique(axis=0) == 1).all()
    if num_methods < 3 or num_sets < 2 or all_are_tied:
        return mean_ranks, math.nan
    test = stats.friedmanchisquare(*scores.to_numpy())
    return mean_ranks, float(test.pvalue)


def critical_difference(num_methods: int, num_sets: int) -> float:
    """Return the critical difference of mean ranks in Nemenyi's test at 5 % (Demšar 2006).

    The mean ranks of two methods differ significantly if they are further apart.
    """
    studentized_range = float(stats.studentized_range.ppf(CONFIDENCE, num_methods, math.inf))
    quantile = studentized_range / math.sqrt(2)
    standard_error = math.sqrt(num_methods * (num_methods + 1) / (6 * num_sets))
    return quantile * standard_error


def expected_maximum(count: int) -> float:
    """Return the expected maximum of ``count`` independent standard normal variables."""

    def weighted_density(x: float) -> float:
        # the maximum is x if one variable is x, and the others are smaller
        density_of_one = math.exp(-x * x / 2) / math.sqrt(2 * math.pi)
        share_of_smaller = float(special.ndtr(x))
        return x * count * density_of_one * share_of_smaller ** (count - 1)

    # the density is negligible outside
    return float(integrate.quad(weighted_density, -10.0, 10.0)[0])


def mutual_information(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Compute the mutual information of expert and label in bits.

    Even if experts and labels are independent, the value is above 0 by chance. It is larger with
    more experts and labels, and with fewer rows. :func:`shuffled_information` estimates the value
    by chance.

    Args:
        counts: How often each expert was chosen for each label, ``[..., labels, experts]``.

    Returns:
        The information for each of the leading dimensions, ``[...]``.
    """
    totals = counts.sum((-2, -1), keepdims=True)
    shares = counts / np.maximum(totals, 1)  # without choices, all shares are 0
    label_shares = shares.sum(-1)
    expert_shares = shares.sum(-2)

    # entr(x) is -x * log(x), and 0 for x = 0
    label_entropy = special.entr(label_shares).sum(-1)
    expert_entropy = special.entr(expert_shares).sum(-1)
    joint_entropy = special.entr(shares).sum((-2, -1))
    nats = label_entropy + expert_entropy - joint_entropy
    # rounding must not make it negative
    return np.maximum(nats / math.log(2), 0.0)


def shuffled_information(
    loads: NDArray[np.int64], labels: NDArray[np.int64], strata: NDArray[np.int64], seed: int
) -> NDArray[np.float64]:
    """Compute the mutual information of experts and labels, unshuffled and shuffled.

    Labels are shuffled among the rows (texts or images) of each stratum. All tokens of a row have
    the label of the row.

    Args:
        loads: How often each row chooses each expert, ``[rows, layers, experts]``.
        labels: The label of each row, from 0.
        strata: The stratum of each row. Labels are shuffled only within a stratum.
        seed: The seed of the shuffles.

    Returns:
        Bits, ``[1 + PERMUTATIONS, layers]``; the first row is unshuffled.
    """
    random = np.random.default_rng(seed)
    # the row numbers, sorted by stratum
    rows_by_stratum = np.argsort(strata, kind="stable")

    counts = [_sum_by_label(loads, labels)]  # without a shuffle
    for _ in range(PERMUTATIONS):
        # The row numbers, sorted by stratum and in random order within each stratum. lexsort sorts
        # by its last key first.
        random_keys = random.random(len(labels))
        shuffled_rows = np.lexsort((random_keys, strata))
        # At the same position, both lists have a row of the same stratum. The row of the first list
        # gets the label of the row of the second list.
        shuffled_labels = np.empty_like(labels)
        shuffled_labels[rows_by_stratum] = labels[shuffled_rows]
        counts.append(_sum_by_label(loads, shuffled_labels))

    counts_by_label = np.stack(counts)  # [1 + PERMUTATIONS, labels, layers, experts]
    # [1 + PERMUTATIONS, layers, labels, experts]
    counts_by_layer = np.moveaxis(counts_by_label, 1, 2)
    return mutual_information(counts_by_layer)


def _sum_by_label(loads: NDArray[np.int64], labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """Sum loads ``[rows, layers, experts]`` over the rows of each label that occurs.

    Returns ``[labels, layers, experts]``.
    """
    # put the rows of each label next to each other
    rows_by_label = np.argsort(labels, kind="stable")
    sorted_labels = labels[rows_by_label]
    sorted_loads = loads[rows_by_label]
    # a label begins where it differs from the label before; no label is -1
    starts = np.flatnonzero(np.diff(sorted_labels, prepend=-1))
    # sums the rows from each start up to the next one
    sums: NDArray[np.int64] = np.add.reduceat(sorted_loads, starts)
    return sums


def shuffle_statistics(bits: NDArray[np.float64]) -> tuple[float, float]:
    """Return the mean and the 95 % quantile of the information of shuffled labels.

    ``bits`` are ``[1 + PERMUTATIONS]``; the first is of the unshuffled labels and is ignored.
    """
    shuffled = bits[1:]
    mean = float(shuffled.mean())
    quantile = float(np.quantile(shuffled, CONFIDENCE))
    return mean, quantile


@dataclass(frozen=True)
class MutualInformation:
    """The mutual information of experts and labels in bits.

    Attributes:
        bits: The information.
        chance: The mean of the shuffles.
        chance_95: The 95 % quantile of the shuffles.
    """

    bits: float
    chance: float
    chance_95: float

    @classmethod
    def averaged(cls, bits: NDArray[np.float64]) -> MutualInformation:
        """Average bits ``[1 + PERMUTATIONS, cases]`` over cases, such as layers.

        The first row is of the unshuffled labels.
        """
        means = bits.mean(1)
        chance, chance_95 = shuffle_statistics(means)
        return cls(bits=float(means[0]), chance=chance, chance_95=chance_95)

    def numbers(self, label: str) -> dict[str, float]:
        """Return the numbers by metric, see :func:`information_metrics`.

        ``label`` is the kind of label, such as ``task``.
        """
        bits_metric, chance_metric, chance_95_metric = information_metrics(label)
        return {
            bits_metric: self.bits,
            chance_metric: self.chance,
            chance_95_metric: self.chance_95,
        }
