"""What runs say of a claim: paired differences, their test, equivalence, and how many pairs would decide."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

import numpy as np
import pandas as pd
from scipy import stats

from benchmarks.harness.config.claims import Comparison
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
        setting: of a method with several, that it is about: the one furthest from what is claimed; empty where it has one.
        settings: how many there are.
        left_out: pairs that lack a part of what the others have.
        models: that it is over.
        tasks: likewise.
    """

    difference: Difference
    deviation: float
    left_out: int
    models: tuple[str, ...]
    tasks: tuple[str, ...]
    setting: str = ""
    settings: int = 1


def chosen(numbers: pd.DataFrame, compare: Comparison) -> pd.DataFrame:
    """The numbers that a comparison is about, of both methods.

    Args:
        numbers: of all of a benchmark's runs, see :data:`benchmarks.harness.report.outcomes.COMPARED`.
        compare: the comparison.
    """
    wanted = (
        numbers["setting"].ne("") if compare.settings == "all" else numbers["setting"].isin(compare.settings or [""])
    )
    own = (numbers["method"] == compare.method) & wanted
    kept = own | (numbers["method"].eq(compare.against) & numbers["setting"].eq(""))
    kept &= numbers["domain"] == compare.domain
    if compare.selection is not None:
        kept &= numbers["selection"] == compare.selection
    for column, names in (("model", compare.models), ("task", compare.tasks), ("tuning", compare.tunings)):
        if names:
            kept &= numbers[column].isin(names)
    return numbers[kept]


def paired(numbers: pd.DataFrame, compare: Comparison) -> Evidence | None:
    """Compare two methods over pairs: each pair's numbers are averaged over models, tasks and sets before.

    Only what both methods have counts. Pairs that lack a model, task or set that another pair has are left out: their mean would be of other things.
    Of a method with several settings, each is compared, and the one counts that is furthest from what is claimed, by its p: a claim of all of them holds if it holds of that one
    (an intersection-union test, which needs no correction); against it, p is corrected for how many there are. Where one has no test, there is none.

    Returns:
        None where the methods share nothing, or a setting that is named did not run.
    """
    found = chosen(numbers, compare)
    own, other = (found[found["method"] == name] for name in (compare.method, compare.against))
    each = {
        str(setting): evidence
        for setting, rows in own.groupby("setting", sort=False)
        if (evidence := _paired(pd.concat([rows, other]), compare))
    }
    if not each or (isinstance(compare.settings, list) and set(compare.settings) != set(each)):
        return None
    if len(each) == 1:
        return replace(*each.values(), setting=next(iter(each)))
    setting = max(each, key=lambda name: _doubt(each[name].difference, compare))
    weakest, count = each[setting], len(each)
    difference = weakest.difference
    if (difference.mean > 0) != (compare.direction == "higher"):
        difference = replace(difference, p=min(1.0, difference.p * count))
    return replace(weakest, difference=difference, setting=setting, settings=count)


def _doubt(difference: Difference, compare: Comparison) -> float:
    """p of the one-sided test of what is claimed; above all others where there is no test."""
    if math.isnan(difference.p):
        return math.inf
    claimed = (difference.mean > 0) == (compare.direction == "higher")
    return difference.p / 2 if claimed else 1 - difference.p / 2


def _paired(numbers: pd.DataFrame, compare: Comparison) -> Evidence | None:
    """Compare one setting of a method with another method."""
    found = numbers[numbers["metric"] == compare.metric].assign(value=lambda rows: rows["value"].astype(float))
    # repeated numbers count as one
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


def equivalence_p(difference: Difference, deviation: float, margin: float, *, below_only: bool = False) -> float:
    """p of two one-sided t-tests (TOST): of the hypothesis that the true difference is as large as the margin, or larger.

    Args:
        difference: the paired difference.
        deviation: of the pairs.
        margin: the smallest difference that makes odds.
        below_only: ask only whether it is below 0 by the margin or more (non-inferiority).

    Returns:
        nan where there is no test: one pair, or equal differences.
    """
    if math.isnan(difference.p):
        return math.nan
    error = deviation / math.sqrt(difference.n)
    above, below = (difference.mean + margin) / error, (difference.mean - margin) / error
    if below_only:
        return float(stats.t.sf(above, difference.n - 1))
    return float(max(stats.t.sf(above, difference.n - 1), stats.t.cdf(below, difference.n - 1)))


def beyond_p(difference: Difference, deviation: float, margin: float, *, below_only: bool = False) -> float:
    """p of the one-sided t-test that the true difference is no larger than the margin, which a finding beyond it rejects.

    Args:
        difference: the paired difference.
        deviation: of the pairs.
        margin: the smallest difference that makes odds.
        below_only: ask only about differences below 0.

    Returns:
        nan where there is no test.
    """
    if math.isnan(difference.p):
        return math.nan
    size = -difference.mean if below_only else abs(difference.mean)
    return float(stats.t.sf((size - margin) / (deviation / math.sqrt(difference.n)), difference.n - 1))


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


def judge(compare: Comparison, evidence: Evidence, p: float, margin: float | None, beyond: float = math.nan) -> Verdict:
    """The verdict on a comparison.

    Args:
        compare: the comparison.
        evidence: what runs say.
        p: of the test that decides for what is claimed, corrected.
        margin: up to which a ratio is near 1.
        beyond: p of :func:`beyond_p`, corrected, of what is claimed to be the same or not lower.
    """
    difference = evidence.difference
    if compare.direction == "equal":
        return Verdict.SUPPORTED if difference.mean == 0 else Verdict.CONTRADICTED
    if compare.direction == "near":
        limit = margin or 0.0
        if difference.high <= limit:
            return Verdict.SUPPORTED
        return Verdict.CONTRADICTED if difference.low > limit else Verdict.UNDECIDED
    if compare.direction in ("same", "not_lower") and not math.isnan(p):
        if p < SIGNIFICANCE:
            return Verdict.SUPPORTED
        return Verdict.CONTRADICTED if beyond < SIGNIFICANCE else Verdict.UNDECIDED
    if math.isnan(p):
        return Verdict.NO_TEST
    if p >= SIGNIFICANCE:
        return Verdict.UNDECIDED
    claimed = (difference.mean > 0) == (compare.direction == "higher")
    return Verdict.SUPPORTED if claimed else Verdict.CONTRADICTED


def summary(verdicts: Sequence[str]) -> str:
    """How many tests ended how, as a sentence's end."""
    return ", ".join(f"{list(verdicts).count(word)} {word.value}" for word in Verdict if list(verdicts).count(word))
