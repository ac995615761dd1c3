"""Check differences, ranks and corrections by scipy and textbooks."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from benchmarks.harness.report.common import average_over_seeds, our_means, summarize_scores
from benchmarks.harness.results.statistics import (
    confidence_interval,
    critical_difference,
    expected_maximum,
    friedman_ranks,
    holm,
    mean_difference,
    paired_differences,
    with_verdicts,
)


def test_a_difference_is_scipys_paired_t_test_over_the_seeds_that_both_have() -> None:
    ours, base = [0.8, 0.9, 0.7, 0.85], [0.75, 0.8, 0.72, 0.8, 0.1]
    scores = pd.DataFrame(
        {
            "method": ["ours"] * 4 + ["base"] * 5,
            "seed": [0, 1, 2, 3, 0, 1, 2, 3, 9],
            "value": ours + base,
        }
    )
    (row,) = paired_differences(scores, ["method"], {"method": "base"}, "seed").to_dict("records")
    expected = stats.ttest_rel(ours, base[:4])
    assert (row["method"], row["n"], row["p"]) == ("ours", 4, pytest.approx(expected.pvalue))
    assert (row["low"], row["high"]) == pytest.approx(tuple(expected.confidence_interval()))


def test_values_of_a_pair_are_averaged_over_shared_values() -> None:
    rows = [
        ("ours", 0, "a", 0.9),
        ("ours", 0, "b", 0.7),
        ("ours", 1, "a", 0.6),
        ("ours", 1, "c", 0.0),
    ]
    rows += [
        ("base", 0, "a", 0.5),
        ("base", 0, "b", 0.5),
        ("base", 1, "a", 0.5),
        ("base", 2, "a", 0.1),
    ]
    scores = pd.DataFrame(rows, columns=["method", "seed", "env", "value"])
    (row,) = paired_differences(scores, ["method"], {"method": "base"}, "seed").to_dict("records")
    assert (row["delta"], row["n"], row["values"]) == (pytest.approx((0.3 + 0.1) / 2), 2, 3)
    (row,) = paired_differences(scores, ["method"], {"method": "base"}, "seed", ["seed"]).to_dict(
        "records"
    )
    means = {"a": (0.5 + 0.5 + 0.1) / 3, "b": 0.5}
    first, second = (0.9 + 0.7 - means["a"] - means["b"]) / 2, 0.6 - means["a"]
    assert row["delta"] == pytest.approx((first + second) / 2)


def test_differences_without_spread_or_with_one_pair() -> None:
    single = mean_difference(np.array([0.1]))
    assert single.mean == pytest.approx(0.1)
    assert math.isnan(single.low)
    equal = mean_difference(np.array([0.125, 0.125]))
    assert equal.mean == 0.125
    assert math.isnan(equal.low)  # two equal differences prove nothing
    same = mean_difference(np.zeros(2))
    assert (same.mean, same.low, same.high) == (0, 0, 0)
    assert confidence_interval(np.array([0.3])) == (0.3, 0.3)


def test_a_mean_over_seeds_is_missing_if_one_of_its_n_values_is_missing() -> None:
    scores = pd.DataFrame(
        {
            "method": ["emoe", "emoe", "emoe", "dense", "dense"],
            "model": "minilm",
            "value": [0.5, 0.7, math.nan, 0.2, 0.4],
        }
    )
    cell = ["model", "method"]
    ours = our_means(scores.set_index(cell)["value"], cell)
    assert list(ours["n"]) == [3, 2]
    assert list(ours["ours"].isna()) == [True, False]
    # two equal values do not show that the mean has no error
    equal = our_means(scores.assign(value=0.5).set_index(cell)["value"], cell)
    assert equal[["low", "high"]].isna().to_numpy().all()
    averages = average_over_seeds(scores, cell, ["value"])
    assert list(averages["n"]) == [3, 2]
    assert list(averages["value"].isna()) == [True, False]
    assert list(averages["value_std"].isna()) == [True, False]
    summaries = summarize_scores(scores, cell)
    assert list(summaries["n"]) == [3, 2]
    numbers = summaries[["mean", "std", "population_std"]]
    assert numbers.iloc[0].isna().all()
    assert numbers.iloc[1].notna().all()


def test_friedman_ranks() -> None:
    table = pd.DataFrame(
        {"x": [0.9, 0.8, 0.7], "y": [0.5, 0.6, 0.4], "z": [0.3, 0.3, 0.1]}, index=["a", "b", "c"]
    )
    ranks, p = friedman_ranks(table)
    assert ranks.to_dict() == pytest.approx({"a": 4.5 / 3, "b": 4.5 / 3, "c": 3})
    assert p == pytest.approx(stats.friedmanchisquare(*table.to_numpy()).pvalue)
    assert math.isnan(friedman_ranks(table.head(2))[1])
    assert math.isnan(friedman_ranks(table * 0)[1])  # ties everywhere


def test_holm_by_hand() -> None:
    p = pd.Series([0.01, math.nan, 0.04, 0.03], index=list("abcd"))
    assert holm(p).fillna(-1).to_dict() == pytest.approx({"a": 0.03, "b": -1, "c": 0.06, "d": 0.06})
    assert holm(pd.Series([math.nan])).isna().all()


def test_all_tests_of_a_table_are_one_family() -> None:
    rows = pd.DataFrame(
        {"method": ["a", "b"], "delta": -0.1, "low": -0.2, "high": -0.01, "p": 0.03}
    )
    assert with_verdicts(rows)["verdict"].tolist() == ["within noise"] * 2
    assert with_verdicts(rows, ["method"])["verdict"].tolist() == ["worse"] * 2


@pytest.mark.parametrize(
    ("count", "expected"),
    [(1, 0.0), (2, 1 / math.sqrt(math.pi)), (3, 1.5 / math.sqrt(math.pi)), (10, 1.53875)],
)
def test_expected_maxima_are_the_known_ones(count: int, expected: float) -> None:
    assert expected_maximum(count) == pytest.approx(expected, abs=1e-5)  # 10: Harter 1961


def test_critical_differences_are_demsars() -> None:
    # Demšar (2006), section 3.2.2 and table 5: four classifiers on fourteen sets
    assert critical_difference(4, 14) == pytest.approx(1.25, abs=0.005)
