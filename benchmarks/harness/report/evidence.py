"""Test claims on the numbers of finished runs: paired differences, counts, measured ratios, verdicts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import pandas as pd

from benchmarks.harness.report.claims import Comparison
from benchmarks.harness.results.statistics import SIGNIFICANCE, Difference, mean_difference

_CELL = ["model", "task", "eval_task", "tuning"]
_PAIR = [
    "seed",
    "question",
]  # a number of a seed has no question; the numbers of a question are averaged over seeds


class Verdict(StrEnum):
    """List the verdicts on a claim."""

    SUPPORTED = "supported"
    CONTRADICTED = "contradicted"
    UNDECIDED = "undecided"
    UNTESTABLE = "untestable"  # one pair, or differences that are all equal
    MISSING = "missing"  # the suite lacks the runs


@dataclass(frozen=True)
class Evidence:
    """Hold the result of one comparison."""

    difference: Difference  # between the methods; for a ratio: median − 1, and range over rounds
    incomplete: int  # omitted pairs, which lack a model, task or set
    models: list[str]  # shared by both methods
    tasks: list[str]  # shared by both methods


def find_evidence(numbers: pd.DataFrame, compare: Comparison) -> Evidence | None:
    """Compare two methods as the claim's direction requires; None if they share no model and task.

    Args:
        numbers: The numbers of all runs of a benchmark, see :data:`benchmarks.harness.report.common.COMPARED`.
        compare: The comparison.
    """
    rows = _select(numbers, compare)
    if compare.direction == "near":
        return _compare_ratios(rows, compare)
    rows = rows[rows["metric"] == compare.metric]
    ours, others = (
        rows[rows["method"] == name].astype({"value": float})
        for name in (compare.method, compare.against)
    )
    return (
        _compare_counts(ours, others)
        if compare.direction == "equal"
        else _compare_pairs(ours, others)
    )


def _select(numbers: pd.DataFrame, compare: Comparison) -> pd.DataFrame:
    """Select both methods' numbers: the reference's main setting, and the method's compared settings."""
    setting, is_main = numbers["setting"], numbers["setting"].eq("")
    is_compared = ~is_main if compare.settings == "all" else setting.isin(compare.settings or [""])
    is_against = numbers["method"].eq(compare.against)
    is_against &= is_main if (is_against & is_main).any() else is_compared
    kept = numbers["method"].eq(compare.method) & is_compared | is_against
    kept &= numbers["domain"] == compare.domain
    if compare.selection is not None:
        kept &= numbers["selection"] == compare.selection
    named = {
        "model": compare.models,
        "task": compare.tasks,
        "tuning": compare.tunings,
        "eval_task": compare.questions,
    }
    for column, names in named.items():
        if names:
            kept &= numbers[column].isin(names)
    return numbers[kept]


def _compare_pairs(ours: pd.DataFrame, others: pd.DataFrame) -> Evidence | None:
    """Compare seed by seed or question by question, after averaging each pair over models, tasks, sets and settings.

    A pair is omitted if it lacks a model, task, set or setting of another pair.
    """
    # repeated numbers count once
    means = ours.groupby([*_CELL, "setting", *_PAIR], sort=False)["value"].mean()
    other_means = others.groupby([*_CELL, *_PAIR], sort=False)["value"].mean().rename("other")
    both = means.reset_index().merge(other_means.reset_index(), on=[*_CELL, *_PAIR])
    if both.empty:
        return None
    by_pair = both.assign(difference=both["value"] - both["other"]).groupby(_PAIR, sort=True)[
        "difference"
    ]
    complete = by_pair.mean()[by_pair.size() == len(both[[*_CELL, "setting"]].drop_duplicates())]
    difference = mean_difference(complete.to_numpy(dtype=float))
    return Evidence(
        difference,
        by_pair.ngroups - len(complete),
        list(both["model"].unique()),
        list(both["task"].unique()),
    )


def _compare_counts(ours: pd.DataFrame, others: pd.DataFrame) -> Evidence | None:
    """Return the largest difference of counts, which are deterministic; ``n`` counts the method's runs."""
    cell = ["model", "task", "tuning"]
    ends = [
        rows.groupby(cell, sort=False)["value"].agg(["min", "max", "size"])
        for rows in (ours, others)
    ]
    both = ends[0].join(ends[1], how="inner", rsuffix="_other").reset_index()
    if both.empty:
        return None
    spans = np.concatenate([both["max"] - both["min_other"], both["min"] - both["max_other"]])
    largest = float(spans[np.abs(spans).argmax()])
    difference = Difference(largest, largest, largest, math.nan, int(both["size"].sum()))
    return Evidence(difference, 0, list(both["model"].unique()), list(both["task"].unique()))


def _compare_ratios(rows: pd.DataFrame, compare: Comparison) -> Evidence | None:
    """Return median ratio − 1, with the range over rounds of all settings; ``n`` counts settings."""
    rows = rows[rows["method"] == compare.method]
    ratios, low, high = (
        rows.loc[rows["metric"] == f"{compare.metric}{end}", "value"].astype(float)
        for end in ("", "_low", "_high")
    )
    if ratios.empty:
        return None
    difference = Difference(
        ratios.median() - 1, low.min() - 1, high.max() - 1, math.nan, len(ratios)
    )
    return Evidence(difference, 0, list(rows["model"].unique()), [])


def is_within(difference: Difference, least: float, most: float) -> bool:
    """Return True if the whole interval of a difference lies between two bounds."""
    return least <= difference.low and difference.high <= most


def compare_with_paper(compare: Comparison, difference: Difference, effect: float) -> str:
    """Return ``smaller`` or ``larger`` if the interval is below or above the paper's gain, else ``compatible``.

    Args:
        compare: The comparison; its direction is ``higher`` or ``lower``.
        difference: The difference of these runs.
        effect: The paper's difference in the same unit.
    """
    sign = 1 if compare.direction == "higher" else -1
    low, high = sorted((sign * difference.low, sign * difference.high))
    return "smaller" if high < sign * effect else "larger" if low > sign * effect else "compatible"


def judge(compare: Comparison, difference: Difference, p: float, margin: float) -> Verdict:
    """Judge ``higher`` and ``lower`` claims by the corrected p, and others by the interval and the margin."""
    if compare.direction in ("higher", "lower"):
        if math.isnan(p):
            return Verdict.UNTESTABLE
        if p >= SIGNIFICANCE:
            return Verdict.UNDECIDED
        is_claimed = (difference.mean > 0) == (compare.direction == "higher")
        return Verdict.SUPPORTED if is_claimed else Verdict.CONTRADICTED
    if math.isnan(difference.low):
        return Verdict.UNTESTABLE
    bounds = {
        "same": (-margin, margin),
        "not_lower": (-margin, math.inf),
        "near": (-math.inf, margin),
    }
    least, most = bounds.get(compare.direction, (0, 0))
    if is_within(difference, least, most):
        return Verdict.SUPPORTED
    is_beyond = difference.high < least or difference.low > most
    return Verdict.CONTRADICTED if is_beyond else Verdict.UNDECIDED
