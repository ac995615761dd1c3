"""Equivalence and power are those of scipy, simulations and printed tables."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from benchmarks.harness.results.evidence import (
    POWER,
    equivalence_p,
    pairs_needed,
    power_of,
)
from benchmarks.harness.results.statistics import mean_difference


def test_equivalence_is_the_90_percent_interval_within_the_margin() -> None:
    values = np.array([0.004, -0.002, 0.001, 0.003, 0.0])
    found, deviation = mean_difference(values), float(values.std(ddof=1))
    low, high = stats.t.interval(0.9, 4, loc=values.mean(), scale=deviation / math.sqrt(5))
    end = max(abs(low), abs(high))
    assert equivalence_p(found, deviation, end) == pytest.approx(0.05)
    assert equivalence_p(found, deviation, 1.001 * end) < 0.05 < equivalence_p(found, deviation, 0.999 * end)
    # the two one-sided tests, by scipy
    sides = [
        stats.ttest_1samp(values, -0.004, alternative="greater").pvalue,
        stats.ttest_1samp(values, 0.004, alternative="less").pvalue,
    ]
    assert equivalence_p(found, deviation, 0.004) == pytest.approx(max(sides))


@pytest.mark.parametrize("values", [[0.001], [0.001, 0.001], [0.0, 0.0]])
def test_there_is_no_equivalence_test_of_one_pair_or_equal_differences(values: list[float]) -> None:
    found = mean_difference(np.array(values))
    assert math.isnan(equivalence_p(found, 0.0, 0.01))


@pytest.mark.parametrize(("n", "ratio", "alpha"), [(5, 1.2, 0.05), (12, 0.8, 0.05), (20, 0.8, 0.005)])
def test_power_is_what_a_simulation_finds(n: int, ratio: float, alpha: float) -> None:
    draws = np.random.default_rng(0).normal(ratio * 0.02, 0.02, (40_000, n))
    found = float((stats.ttest_1samp(draws, 0.0, axis=1).pvalue < alpha).mean())
    assert power_of(n, ratio * 0.02, 0.02, alpha) == pytest.approx(found, abs=0.008)


@pytest.mark.parametrize(("ratio", "pairs"), [(0.5, 34), (0.8, 15), (1.0, 10), (0.2, 199)])
def test_pairs_needed_are_those_of_power_tables(ratio: float, pairs: int) -> None:
    assert pairs_needed(ratio, 1.0, 0.05) == pairs
    assert power_of(pairs - 1, ratio, 1.0, 0.05) < POWER <= power_of(pairs, ratio, 1.0, 0.05)
    assert pairs_needed(-ratio, 1.0, 0.05) == pairs
    assert pairs_needed(ratio, 1.0, 0.05 / 11) > pairs


def test_pairs_needed_are_capped_and_need_an_effect_and_a_deviation() -> None:
    assert pairs_needed(0.08, 1.0, 0.05) == math.inf
    for effect, deviation in ((math.nan, 1.0), (0.0, 1.0), (1.0, math.nan), (1.0, 0.0)):
        assert math.isnan(pairs_needed(effect, deviation, 0.05))
