"""What runs say of a claim: paired differences, their test, equivalence, and how many pairs would decide."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import pandas as pd
from scipy import stats

from benchmarks.harness.planning.claims import Comparison
from benchmarks.harness.results.statistics import SIGNIFICANCE, Difference, mean_difference

POWER = 0.8
MOST_PAIRS = 1000
_CELL = ["model", "task", "eval_task", "tuning"]


class Verdict(StrEnum):
    """What runs say of a claim."""

    SUPPORTED = "supported"
    CONTRADICTED = "contradicted"
    UNDECIDED = "undecided"
    NO_TEST = "no test"
    NOT_TESTED = "not tested"


@dataclass(frozen=True)
class Evidence:
    """What a suite's runs say of one comparison.

    Attributes:
        difference: of the means over what is compared; of a ratio: its middle less 1, with the ends of its range.
        deviation: standard deviation of the differences of pairs; nan below two.
        left_out: pairs that lack a part of what the others have.
        models: that it is over.
        tasks: likewise.
    """

    difference: Difference
    deviation: float
    left_out: int
    models: tuple[str, ...]
    tasks: tuple[str, ...]


def chosen(numbers: pd.DataFrame, compare: Comparison) -> pd.DataFrame:
    """The numbers that a comparison is about, of both methods.

    Args:
        numbers: of all of a benchmark's runs, see :data:`benchmarks.harness.reporting.outcomes.COMPARED`.
        compare: the comparison.
    """
    kept = numbers["method"].isin([compare.method, compare.against]) & (numbers["domain"] == compare.domain)
    if compare.selection is not None:
        kept &= numbers["selection"] == compare.selection
    for column, names in (("model", compare.models), ("task", compare.tasks), ("tuning", compare.tunings)):
        if names:
            kept &= numbers[column].isin(names)
    return numbers[kept]


def paired(numbers: pd.DataFrame, compare: Comparison) -> Evidence | None:
    """Compare two methods over pairs: each pair's numbers are averaged over models, tasks and sets before.

    Only what both methods have counts. Pairs that lack a model, task or set that another pair has are left out: their mean would be of other things.

    Returns:
        None where the methods share nothing.
    """
    found = chosen(numbers, compare)
    found = found[found["metric"] == compare.metric].assign(value=lambda rows: rows["value"].astype(float))
    # variants of one method and repeated numbers count as one
    means = found.groupby(["method", *_CELL, "pair"], sort=False)["value"].mean()
    present = means.index.get_level_values("method")
    if not {compare.method, compare.against} <= set(present):
        return None
    differences = (means.xs(compare.method, level="method") - means.xs(compare.against, level="method")).dropna()
    if differences.empty:
        return None
    by_pair = differences.groupby(level="pair", sort=True)
    cells = differences.index.droplevel("pair").unique()
    complete = by_pair.mean()[by_pair.size() == len(cells)]
    values = complete.to_numpy(dtype=float)
    return Evidence(
        mean_difference(values),
        float(np.std(values, ddof=1)) if len(values) > 1 else math.nan,
        by_pair.ngroups - len(complete),
        tuple(dict.fromkeys(cells.get_level_values("model"))),
        tuple(dict.fromkeys(cells.get_level_values("task"))),
    )


def counted(numbers: pd.DataFrame, compare: Comparison) -> Evidence | None:
    """Compare counts, which do not depend on chance: the largest difference that there is, as it is.

    Returns:
        None where the methods share nothing. ``n`` is the number of the method's runs that were compared.
    """
    found = chosen(numbers, compare)
    found = found[found["metric"] == compare.metric]
    ends = found.groupby(["method", "model", "task", "tuning"], sort=False)["value"].agg(["min", "max", "size"])
    present = set(ends.index.get_level_values("method"))
    if not {compare.method, compare.against} <= present:
        return None
    own, other = (ends.xs(name, level="method") for name in (compare.method, compare.against))
    both = own.join(other, how="inner", rsuffix="_other")
    if both.empty:
        return None
    spans = np.concatenate([both["max"] - both["min_other"], both["min"] - both["max_other"]]).astype(float)
    most = float(spans[np.abs(spans).argmax()])
    return Evidence(
        Difference(most, math.nan, math.nan, math.nan, int(both["size"].sum())),
        math.nan,
        0,
        tuple(dict.fromkeys(both.index.get_level_values("model"))),
        tuple(dict.fromkeys(both.index.get_level_values("task"))),
    )


def measured(numbers: pd.DataFrame, compare: Comparison) -> Evidence | None:
    """The middle of a ratio over the measured settings, less 1, and its range from the lowest round of any setting to the highest.

    Returns:
        None where it was not measured. ``n`` is the number of settings.
    """
    found = chosen(numbers, compare)
    found = found[found["method"] == compare.method]
    ratios, low, high = (
        found.loc[found["metric"] == f"{compare.metric}{end}", "value"].astype(float) for end in ("", "_low", "_high")
    )
    if ratios.empty:
        return None
    range_ = Difference(float(ratios.median()) - 1, float(low.min()) - 1, float(high.max()) - 1, math.nan, len(ratios))
    return Evidence(range_, math.nan, 0, tuple(dict.fromkeys(found["model"])), ())


def equivalence_p(difference: Difference, deviation: float, margin: float) -> float:
    """p of two one-sided t-tests (TOST): of the hypothesis that the true difference is as large as the margin, or larger.

    Returns:
        nan where there is no test: one pair, or equal differences.
    """
    if math.isnan(difference.p):
        return math.nan
    error = deviation / math.sqrt(difference.n)
    above, below = (difference.mean + margin) / error, (difference.mean - margin) / error
    return float(max(stats.t.sf(above, difference.n - 1), stats.t.cdf(below, difference.n - 1)))


def power_of(n: int, effect: float, deviation: float, alpha: float) -> float:
    """Chance that a two-sided paired t-test over n pairs finds an effect, whose pairs have this deviation, at level alpha."""
    critical = stats.t.isf(alpha / 2, n - 1)
    shift = abs(effect) / deviation * math.sqrt(n)
    # the other tail adds nothing that shows, and scipy's far tails are not always numbers
    return float(stats.nct.sf(critical, n - 1, shift))


@functools.cache
def pairs_needed(effect: float, deviation: float, alpha: float) -> float:
    """The least number of pairs with which :func:`power_of` reaches :data:`POWER`.

    Returns:
        inf above :data:`MOST_PAIRS`; nan without an effect or a deviation.
    """
    if not effect or not deviation or math.isnan(effect) or math.isnan(deviation):
        return math.nan
    if power_of(MOST_PAIRS, effect, deviation, alpha) < POWER:
        return math.inf
    low, high = 1, MOST_PAIRS  # too few, enough
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if power_of(middle, effect, deviation, alpha) >= POWER else (middle, high)
    return high


def judge(compare: Comparison, evidence: Evidence, p: float, margin: float | None) -> Verdict:
    """The verdict on a comparison.

    Args:
        compare: the comparison.
        evidence: what runs say.
        p: of its test, corrected.
        margin: up to which a ratio is near 1.
    """
    difference = evidence.difference
    if compare.direction == "equal":
        return Verdict.SUPPORTED if difference.mean == 0 else Verdict.CONTRADICTED
    if compare.direction == "near":
        limit = margin or 0.0
        if difference.high <= limit:
            return Verdict.SUPPORTED
        return Verdict.CONTRADICTED if difference.low > limit else Verdict.UNDECIDED
    if math.isnan(p):
        return Verdict.NO_TEST
    if p >= SIGNIFICANCE:
        return Verdict.UNDECIDED
    claimed = (difference.mean > 0) == (compare.direction == "higher")
    return Verdict.SUPPORTED if claimed else Verdict.CONTRADICTED


def summary(verdicts: Sequence[str]) -> str:
    """How many tests ended how, as a sentence's end."""
    return ", ".join(f"{list(verdicts).count(word)} {word.value}" for word in Verdict if list(verdicts).count(word))
