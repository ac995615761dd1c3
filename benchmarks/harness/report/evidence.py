"""Test claims on the numbers of finished runs: paired differences, counts, ratios, verdicts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

import pandas as pd
from scipy import special

from benchmarks.harness.report.claims import Comparison, PaperEffect
from benchmarks.harness.results.statistics import (
    SIGNIFICANCE,
    Difference,
    confidence_interval,
    mean_difference,
)

# two scores are compared if they are equal in these columns: the model, and what it was trained and
# tested on
_COMPARED_COLUMNS = ["model", "task", "eval_task", "tuning"]
# The columns that identify a pair, which is a seed or a question. A question has no seed, because
# its numbers are averaged over seeds.
_PAIR_COLUMNS = ["seed", "question"]


class Verdict(StrEnum):
    """The verdicts on a claim."""

    SUPPORTED = "supported"
    CONTRADICTED = "contradicted"
    EQUIVALENT = "equivalent"  # the whole interval lies within the margin
    UNDECIDED = "undecided"
    # no pair or one, differences that are all equal, two methods that are no better than a guess,
    # or a run that diverged
    UNTESTABLE = "untestable"
    MISSING = "missing"  # the suite lacks the runs


@dataclass(frozen=True)
class Evidence:
    """The result of one comparison of two methods.

    Attributes:
        difference: The difference between the methods. For ratios, the mean is the median − 1, and
            the interval is the range over rounds.
        reference_mean: The mean of the reference method over the same pairs. It is nan for counts
            and ratios.
        is_at_chance: True if neither method is better than a guess.
        num_incomplete: The number of pairs that are left out: they lack a score of a model,
            training task, test set, tuning or setting, or a training diverged.
        num_diverged: The number of these pairs whose training diverged.
        models: The models that both methods have.
        tasks: The tasks that both methods have.
    """

    difference: Difference
    reference_mean: float
    is_at_chance: bool
    num_incomplete: int
    num_diverged: int
    models: list[str]
    tasks: list[str]


def find_evidence(numbers: pd.DataFrame, comparison: Comparison) -> Evidence | None:
    """Compare two methods by pairs, counts or ratios, as the claim's direction requires.

    Returns None if there are no numbers of both methods to compare.

    Args:
        numbers: The numbers of all runs of a benchmark, with the columns ``COMPARED`` of
            :mod:`.common`.
        comparison: The comparison.
    """
    of_methods = _select_methods(numbers, comparison)
    rows = _select_compared(of_methods, comparison)
    if comparison.direction == "near":
        return _compare_ratios(rows, comparison)

    of_metric = rows[rows["metric"] == comparison.metric].astype({"value": float})
    ours = of_metric[of_metric["method"] == comparison.method]
    others = of_metric[of_metric["method"] == comparison.against]
    if comparison.direction == "equal":
        return _compare_counts(ours, others)
    return _compare_pairs(ours, others, comparison.chance)


def _select_methods(numbers: pd.DataFrame, comparison: Comparison) -> pd.DataFrame:
    """Select the numbers of both methods with the settings that are compared.

    The method is compared in the settings that the comparison names, by default in its main one.
    The reference is compared in its main setting, or in the same settings if it has no main one.
    """
    is_main = numbers["setting"].eq("")  # the main setting has no name
    if comparison.settings == "all":
        is_compared = ~is_main
    else:
        is_compared = numbers["setting"].isin(comparison.settings or [""])

    is_method = numbers["method"].eq(comparison.method)
    is_reference = numbers["method"].eq(comparison.against)
    has_main = (is_reference & is_main).any()
    is_reference_setting = is_main if has_main else is_compared

    is_method_row = is_method & is_compared
    is_reference_row = is_reference & is_reference_setting
    return numbers[is_method_row | is_reference_row]


def _select_compared(numbers: pd.DataFrame, comparison: Comparison) -> pd.DataFrame:
    """Select the numbers with the domain, selection, models, tasks and sets of a comparison."""
    is_kept = numbers["domain"] == comparison.domain
    if comparison.selection is not None:
        is_kept &= numbers["selection"] == comparison.selection

    names_by_column = {
        "model": comparison.models,
        "task": comparison.tasks,
        "tuning": comparison.tunings,
        "eval_task": comparison.questions,
    }
    for column, names in names_by_column.items():
        # without names, all are compared
        if names:
            is_kept &= numbers[column].isin(names)
    return numbers[is_kept]


def _compare_pairs(
    ours: pd.DataFrame, others: pd.DataFrame, chance: float | None
) -> Evidence | None:
    """Compare the scores of two methods seed by seed, or question by question.

    A pair is a seed (or question) with a score of each method: the mean of its scores over all
    cells. A cell is a combination of a model, a training task, a test set, a tuning and a setting.
    A pair is left out if it lacks a score in one of the cells, or if a training diverged. Returns
    None if the methods have no pair and cell in common.

    Args:
        ours: The scores of the method of the claim. The score of a run that diverged is nan.
        others: The scores of the reference method.
        chance: The score of a guess; None if it is unknown.
    """
    both = _scores_side_by_side(ours, others)
    if both.empty:
        return None

    # `both` has one row for each pair and cell
    cells = both[[*_COMPARED_COLUMNS, "setting"]].drop_duplicates()
    has_diverged = both[["our_score", "other_score"]].isna().any(axis=1)
    by_pair = both.assign(has_diverged=has_diverged).groupby(_PAIR_COLUMNS, sort=True)

    # from here on, one value per pair; only pairs with a score in every cell are comparable
    num_cells = by_pair.size()
    pair_diverged = by_pair["has_diverged"].any()
    is_complete = (num_cells == len(cells)) & ~pair_diverged
    mean_scores = by_pair[["our_score", "other_score"]].mean()
    complete = mean_scores[is_complete]

    differences = complete["our_score"] - complete["other_score"]
    return Evidence(
        difference=mean_difference(differences.to_numpy()),
        reference_mean=float(complete["other_score"].mean()),
        is_at_chance=chance is not None and _are_at_chance(complete, chance),
        num_incomplete=len(mean_scores) - len(complete),
        num_diverged=int(pair_diverged.sum()),
        models=list(both["model"].unique()),
        tasks=list(both["task"].unique()),
    )


def _scores_side_by_side(ours: pd.DataFrame, others: pd.DataFrame) -> pd.DataFrame:
    """Match the scores of two methods.

    Returns one row for each pair, model, task, set, tuning and setting that both methods have, with
    ``our_score`` and ``other_score``. The score is nan if training diverged.
    """
    # Average first, so that repeated numbers count once. The reference is also averaged over its
    # settings, because every setting of the method is compared with the same score.
    shared_columns = [*_COMPARED_COLUMNS, *_PAIR_COLUMNS]
    our_columns = [*_COMPARED_COLUMNS, "setting", *_PAIR_COLUMNS]
    # the mean with a run that diverged is nan
    our_means = ours.groupby(our_columns, sort=False)["value"].mean(skipna=False)
    other_means = others.groupby(shared_columns, sort=False)["value"].mean(skipna=False)
    our_scores = our_means.rename("our_score").reset_index()
    other_scores = other_means.rename("other_score").reset_index()
    return our_scores.merge(other_scores, on=shared_columns)


def _are_at_chance(scores: pd.DataFrame, chance: float) -> bool:
    """Return True if no method is better than a guess.

    A method is better if the whole 95 % interval of its mean score lies above the score of a guess.
    Scores that are all equal have an interval of width 0. The columns of ``scores`` are the
    methods, and its rows are pairs.
    """
    for method in scores:
        low, _high = confidence_interval(scores[method].to_numpy())
        if low > chance:
            return False
    return True


def _compare_counts(ours: pd.DataFrame, others: pd.DataFrame) -> Evidence | None:
    """Find the largest difference between one of our counts and one of the other method's.

    Each run has one count. Two counts are compared if they have the same model, task and tuning.
    Counts do not vary by chance, so both ends of the interval are the difference, and p is nan.
    ``n`` counts our runs. Returns None if no counts can be compared.
    """
    same = ["model", "task", "tuning"]
    our_values = ours.groupby(same, sort=False)["value"]
    other_values = others.groupby(same, sort=False)["value"]
    our_extremes = our_values.agg(our_least="min", our_most="max", num_runs="size")
    other_extremes = other_values.agg(other_least="min", other_most="max")
    # the combinations of model, task and tuning that both methods have
    both = our_extremes.join(other_extremes, how="inner").reset_index()
    if both.empty:
        return None

    # in each combination, the highest and the lowest difference between two counts
    highest = both["our_most"] - both["other_least"]
    lowest = both["our_least"] - both["other_most"]
    largest = float(max([*highest, *lowest], key=abs))  # with its sign

    num_runs = int(both["num_runs"].sum())
    return Evidence(
        difference=Difference(mean=largest, low=largest, high=largest, p=math.nan, n=num_runs),
        reference_mean=math.nan,
        is_at_chance=False,
        num_incomplete=0,
        num_diverged=0,
        models=list(both["model"].unique()),
        tasks=list(both["task"].unique()),
    )


def _compare_ratios(rows: pd.DataFrame, comparison: Comparison) -> Evidence | None:
    """Compare two methods by recorded ratios of their numbers, one ratio per setting.

    The difference is the median ratio − 1, its interval is the range over the rounds of all
    settings, and ``n`` counts settings. The rows of the method have the ratios, so the rows of the
    reference are not read. Returns None without ratios.
    """
    of_method = rows[rows["method"] == comparison.method]
    ratios = _values_of(of_method, comparison.metric)
    if ratios.empty:
        return None
    difference = Difference(
        mean=ratios.median() - 1,
        low=_values_of(of_method, f"{comparison.metric}_low").min() - 1,
        high=_values_of(of_method, f"{comparison.metric}_high").max() - 1,
        p=math.nan,
        n=len(ratios),
    )
    return Evidence(
        difference=difference,
        reference_mean=math.nan,
        is_at_chance=False,
        num_incomplete=0,
        num_diverged=0,
        models=list(of_method["model"].unique()),
        tasks=[],
    )


def _values_of(rows: pd.DataFrame, metric: str) -> pd.Series[float]:
    """Return the values of the rows with a metric, as floats."""
    return rows.loc[rows["metric"] == metric, "value"].astype(float)


def is_within(difference: Difference, least: float, most: float) -> bool:
    """Return True if the whole interval of a difference lies between two bounds.

    An interval of nan gives False.
    """
    return least <= difference.low and difference.high <= most


@dataclass(frozen=True)
class PaperGap:
    """Our difference minus the paper's, in the unit of the paper's.

    Attributes:
        mean: The gap.
        p: The p of the test that there is no gap. It is nan if the paper's standard error is
            unknown, or if our difference has no interval.
    """

    mean: float
    p: float


def find_gap(difference: Difference, effect: float, paper_effect: PaperEffect) -> PaperGap:
    """Test our difference against the paper's, by Welch's t-test.

    The paper's methods are taken as independent groups of ``paper_effect.seeds`` seeds, because
    only the deviation of each method is published. p is nan without the paper's error or our
    interval.

    Args:
        difference: Our difference, in the unit of the paper's.
        effect: The paper's difference.
        paper_effect: Its standard error and number of seeds, if known.
    """
    gap = difference.mean - effect
    has_interval = not math.isnan(difference.low)
    if paper_effect.error is None or paper_effect.seeds is None or not has_interval:
        return PaperGap(mean=gap, p=math.nan)

    our_freedom = difference.n - 1
    our_error = difference.standard_error()
    paper_freedom = 2 * (paper_effect.seeds - 1)
    variance = our_error**2 + paper_effect.error**2
    # the degrees of freedom of a sum of two estimated variances, by Welch and Satterthwaite
    our_part = our_error**4 / our_freedom
    paper_part = paper_effect.error**4 / paper_freedom
    freedom = variance**2 / (our_part + paper_part)
    # two-sided: twice the lower tail
    p = 2 * float(special.stdtr(freedom, -abs(gap) / math.sqrt(variance)))
    return PaperGap(mean=gap, p=p)


def compare_gains(
    comparison: Comparison, difference: Difference, gap: float, p_holm: float, expected: float
) -> str:
    """Return whether our gain is smaller or larger than the paper's.

    A gain is a difference in the claimed direction. If the claim has no direction, it is the
    difference itself. Smaller or larger needs two facts:

    - Our difference differs significantly from the paper's.
    - Our interval excludes ``expected``. If our difference is below the paper's, the whole
      interval must be below ``expected``, otherwise above it.

    Args:
        comparison: The comparison.
        difference: Our difference.
        gap: Our difference minus the paper's.
        p_holm: The corrected p of the gap; nan if the gap cannot be tested.
        expected: The difference that reduces our errors by the paper's share. It is in the unit of
            ``difference``, and nan if it is unknown.

    Returns:
        ``smaller``, ``larger``, or ``not shown`` if one fact is missing.
    """
    # the first fact; an unknown p, which is nan, is not significant
    is_significant = p_holm < SIGNIFICANCE
    if not is_significant:
        return "not shown"

    # the second fact; an unknown `expected`, which is nan, is never excluded
    is_below_paper = gap < 0
    is_all_below = is_below_paper and difference.high < expected
    is_all_above = not is_below_paper and difference.low > expected
    if not (is_all_below or is_all_above):
        return "not shown"

    # the lower difference is the smaller gain, unless a lower number is claimed
    is_smaller_gain = is_below_paper
    if comparison.direction == "lower":
        is_smaller_gain = not is_below_paper
    return "smaller" if is_smaller_gain else "larger"


def judge(comparison: Comparison, evidence: Evidence, p: float, margin: float) -> Verdict:
    """Judge a claim by the margin, and by the corrected p if it names a direction.

    Two methods that are no better than a guess are untestable. So are two methods of which one
    diverged, because the seeds that did not diverge are not a fair sample.

    Args:
        comparison: The comparison.
        evidence: The result of the comparison.
        p: The corrected p of the t-test; nan without a test.
        margin: The largest negligible difference.
    """
    if evidence.is_at_chance or evidence.num_diverged:
        return Verdict.UNTESTABLE
    if comparison.direction in ("higher", "lower"):
        return _judge_by_test(comparison, evidence.difference, p, margin)
    return _judge_by_interval(comparison, evidence.difference, margin)


def _judge_by_test(
    comparison: Comparison, difference: Difference, p: float, margin: float
) -> Verdict:
    """Judge a claim that a number is higher or lower.

    A negligible difference is equivalence, even if it is significant. Any other significant
    difference supports or contradicts the claim by its sign.
    """
    if math.isnan(p):
        return Verdict.UNTESTABLE
    if is_within(difference, -margin, margin):
        return Verdict.EQUIVALENT
    if p >= SIGNIFICANCE:
        return Verdict.UNDECIDED
    is_higher = difference.mean > 0
    claims_higher = comparison.direction == "higher"
    if is_higher == claims_higher:
        return Verdict.SUPPORTED
    return Verdict.CONTRADICTED


def _judge_by_interval(comparison: Comparison, difference: Difference, margin: float) -> Verdict:
    """Judge a claim that a difference lies within certain bounds, by its interval.

    The claim is supported if the whole interval is within the bounds. It is contradicted if the
    whole interval is outside.
    """
    if math.isnan(difference.low):
        return Verdict.UNTESTABLE
    # the smallest and largest difference that each claim allows
    bounds = {
        "same": (-margin, margin),
        "not_lower": (-margin, math.inf),
        "near": (-math.inf, margin),
        "equal": (0.0, 0.0),
    }
    least, most = bounds[comparison.direction]
    if is_within(difference, least, most):
        return Verdict.SUPPORTED
    if difference.high < least or difference.low > most:
        return Verdict.CONTRADICTED
    return Verdict.UNDECIDED
