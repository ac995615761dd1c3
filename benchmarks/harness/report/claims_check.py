"""Compare the tests of the paper's claims on finished runs with those on the blessed runs.

On another machine, many numbers may differ a little. If all differences go one way, the mean of a
test moves, and with it the verdict on a claim.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from benchmarks.harness.config.suite import Suite
from benchmarks.harness.report.claims import claimed_benchmarks
from benchmarks.harness.report.claims_table import judge_claims
from benchmarks.harness.report.common import COMPARED
from benchmarks.harness.report.evidence import find_evidence
from benchmarks.harness.report.presentation import has_random_weights
from benchmarks.harness.report.writing import claim_numbers
from benchmarks.harness.results.records import Record
from benchmarks.harness.results.reference import read_blessed_records
from benchmarks.harness.results.statistics import Difference

# rounding errors scatter around zero, so they seldom move a mean with a smaller p
_SIGNIFICANCE = 0.001


@dataclass(frozen=True)
class MovedTest:
    """A test of a claim whose mean difference has moved.

    Attributes:
        title: The claim, and the models and data of the test.
        unit: The unit of the numbers, such as ``points``.
        n: The number of pairs.
        before: The mean difference of the blessed runs.
        after: The mean difference of the finished runs.
        limit: The standard error of ``before``.
        verdict_before: The verdict on the blessed runs. It is corrected over the compared tests, so
            it may differ from that of the suite's table.
        verdict_after: The verdict on the finished runs.
    """

    title: str
    unit: str
    n: int
    before: float
    after: float
    limit: float
    verdict_before: str
    verdict_after: str

    def __str__(self) -> str:
        # z: no minus sign for a number that is rounded to 0
        means = f"{self.before:+z.4f} -> {self.after:+z.4f} {self.unit}".rstrip()
        text = f"moved {self.title}: mean of {self.n} pairs {means} (limit {self.limit:.2g})"
        if self.verdict_before == self.verdict_after:
            return f"{text}, still {self.verdict_after}"
        return f"{text}, {self.verdict_before} -> {self.verdict_after}"


@dataclass(frozen=True)
class ClaimsCheck:
    """The comparison of the tests of claims.

    Attributes:
        num_compared: The number of compared tests.
        moved: The tests that have moved.
    """

    num_compared: int
    moved: Sequence[MovedTest]

    def __str__(self) -> str:
        lines = [str(test) for test in self.moved]
        lines.append(f"tests of claims: {self.num_compared} compared, {len(self.moved)} moved")
        return "\n".join(lines)


def check_claims(suite: Suite, finished: Mapping[str, Sequence[Record]]) -> ClaimsCheck:
    """Find the tests of claims whose means have moved from the blessed runs to the finished ones.

    The blessed records of a suite are stored as its reference. Only runs that are finished here
    and have a blessed record with the same id are compared.

    Args:
        suite: The suite. If all its models have random weights, no claim is tested.
        finished: The records of finished runs, by the name of the benchmark.

    Raises:
        DataError: A file of blessed records is damaged.
    """
    if has_random_weights(suite.runs):
        return ClaimsCheck(0, [])
    numbers_before = {}
    numbers_after = {}
    for name in claimed_benchmarks(suite):
        if name not in finished:
            continue
        blessed = read_blessed_records(suite, name)
        if blessed is None:
            continue
        # the runs that both sides have, in the same order
        new_records = [record for record in finished[name] if record.run.folder in blessed.records]
        old_records = [blessed.records[record.run.folder] for record in new_records]
        if new_records:
            numbers_before[name] = claim_numbers(name, old_records)
            numbers_after[name] = claim_numbers(name, new_records)
    return compare_tests(suite, numbers_before, numbers_after)


def compare_tests(
    suite: Suite, before: Mapping[str, pd.DataFrame], after: Mapping[str, pd.DataFrame]
) -> ClaimsCheck:
    """Find the tests of claims whose mean differences have moved.

    A mean has moved if two conditions hold:

    - It changed by more than its standard error over the pairs, before the change.
    - Rounding errors do not explain the change. Either all pairs changed by the same amount, or
      the paired t-test of the changes has a p below 0.1 %.

    Tests of counts and times are not compared. Nor are tests without a standard error: those with
    fewer than two pairs, or with the same difference in all pairs, unless that is 0.

    Args:
        suite: The suite.
        before: The older numbers that claims compare, one frame per benchmark. Its columns are
            ``COMPARED`` of :mod:`.common`.
        after: The newer numbers of the same runs.
    """
    # the newer minus the older value of each number
    changes = {name: _subtract(before[name], after[name]) for name in before}
    # both frames have a row for each test, in the same order
    tests_before = judge_claims(suite, before).itertuples()
    tests_after = judge_claims(suite, after).itertuples()
    num_compared = 0
    moved = []
    for old, new in zip(tests_before, tests_after, strict=True):
        if old.evidence is None or new.evidence is None or not old.comparison.is_paired:
            continue
        limit = old.evidence.difference.standard_error()
        # tests if the difference between the two methods has changed
        change = find_evidence(changes[old.benchmark], old.comparison)
        # without two pairs on both sides, nothing tells a change from chance
        if math.isnan(limit) or change is None or change.difference.n < 2:
            continue
        num_compared += 1
        if _has_moved(change.difference, limit):
            moved.append(_moved_test(old, new))
    return ClaimsCheck(num_compared, moved)


def _subtract(before: pd.DataFrame, after: pd.DataFrame) -> pd.DataFrame:
    """Subtract the older from the newer value of each number. The columns are ``COMPARED``."""
    # newer code may record other numbers, so only those that both sides have are kept
    old, new = _values(before).align(_values(after), join="inner")
    differences = (new - old).rename("value")
    return differences.dropna().reset_index()


def _values(numbers: pd.DataFrame) -> pd.Series[float]:
    """Return each number by all its names, once.

    An evaluation may record it several times. Then it is their mean, which is nan if one of them is
    missing.
    """
    names = [column for column in COMPARED if column != "value"]
    as_floats = numbers.astype({"value": float})
    return as_floats.groupby(names, sort=False, dropna=False)["value"].mean(skipna=False)


def _has_moved(change: Difference, limit: float) -> bool:
    """Return True if the mean of a test has moved, as :func:`compare_tests` defines it.

    Args:
        change: The newer minus the older difference of the two methods.
        limit: The standard error of the older difference.
    """
    if abs(change.mean) <= limit:
        return False
    # changes that are all equal have no p
    return math.isnan(change.p) or change.p < _SIGNIFICANCE


def _moved_test(old: Any, new: Any) -> MovedTest:
    """Describe a test that has moved. ``old`` and ``new`` are its rows of :func:`judge_claims`."""
    difference = old.evidence.difference.scaled(old.comparison.scale)
    return MovedTest(
        title=f"{old.claim_title}: {old.test_shown}",
        unit=old.unit,
        n=difference.n,
        before=old.delta,
        after=new.delta,
        limit=difference.standard_error(),
        verdict_before=old.verdict,
        verdict_after=new.verdict,
    )
