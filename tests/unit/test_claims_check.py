"""The check compares the tests of claims, whose means may move less than single numbers."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from benchmarks.__main__ import main
from benchmarks.harness.base import OVERRIDES, RESULTS
from benchmarks.harness.config.benchmark import load_benchmark
from benchmarks.harness.config.suite import Suite, load_suite
from benchmarks.harness.report.claims_check import check_claims, compare_tests
from benchmarks.harness.report.presentation import present
from benchmarks.harness.results import reference
from benchmarks.harness.results.reference import read_blessed_records
from benchmarks.harness.results.suite_check import check
from tests import fake_runs

FULL = load_suite({"suite": "full"})
IN_DOMAIN = "EMoE is better than the dense model in domain: text, LoRA: LoRA + EMoE against LoRA"


@pytest.fixture(scope="module")
def blessed() -> pd.DataFrame:
    """Compute the claim numbers of ``full``'s blessed LoRA runs on SST-2, with 12 seeds."""
    records = read_blessed_records(FULL, "glue_lora")
    assert records is not None
    of_sst2 = [record for record in records.records.values() if record.run.task == "sst2"]
    outcomes = present(load_benchmark("glue_lora"), of_sst2).outcomes
    return outcomes.claim_numbers().astype({"value": float})


def shifted(numbers: pd.DataFrame, shift: float, rounding: float) -> pd.DataFrame:
    """Shift the scores of EMoE, and add a rounding error to each score."""
    is_score = numbers["metric"] == "score"
    errors = np.random.default_rng(0).uniform(-rounding, rounding, len(numbers))
    shifts = np.where(numbers["method"] == "lora_emoe", shift, 0.0)
    changed = (numbers["value"] + errors + shifts).where(is_score, numbers["value"])
    return numbers.assign(value=changed)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shift", "rounding"),
    [
        (0.0, 0.0),
        # a validation row of SST-2 is 0.11 points
        (0.0, 0.0011),
        # a hundredth of a point, less than the standard error of any test
        (0.0001, 0.0),
    ],
)
def test_rounding_errors_and_small_shifts_move_no_test(
    blessed: pd.DataFrame, shift: float, rounding: float
) -> None:
    after = shifted(blessed, shift, rounding)
    result = compare_tests(FULL, {"glue_lora": blessed}, {"glue_lora": after})
    assert result.num_compared > 20
    assert result.moved == []


@pytest.mark.slow
@pytest.mark.parametrize(("shift", "rounding"), [(0.002, 0.0), (-0.004, 0.0011), (0.029, 0.0011)])
def test_a_shift_of_one_method_moves_its_tests(
    blessed: pd.DataFrame, shift: float, rounding: float
) -> None:
    after = shifted(blessed, shift, rounding)
    moved = compare_tests(FULL, {"glue_lora": blessed}, {"glue_lora": after}).moved
    tests = {test.title: test for test in moved}
    test = tests[IN_DOMAIN]
    assert test.after - test.before == pytest.approx(100 * shift, abs=0.1)
    assert test.n == 12
    # no test of other methods moved
    assert all("LoRA + EMoE" in title for title in tests)
    assert not any(title.startswith("It needs") for title in tests)


def test_a_moved_test_names_both_verdicts(blessed: pd.DataFrame) -> None:
    after = shifted(blessed, 0.029, 0.0)
    moved = compare_tests(FULL, {"glue_lora": blessed}, {"glue_lora": after}).moved
    texts = [str(test) for test in moved]
    assert (
        f"moved {IN_DOMAIN}: mean of 12 pairs -0.1433 -> +2.7567 points (limit 0.12), "
        "undecided -> supported" in texts
    )


def test_a_number_that_is_missing_once_is_left_out(blessed: pd.DataFrame) -> None:
    """A pair with such a number is in no mean of the claim, so its change does not count either."""
    is_loss = (blessed["metric"] == "loss") & (blessed["method"] == "lora_emoe")
    is_first_seed = blessed["seed"] == blessed["seed"].min()
    losses_of_seed = blessed[is_loss & is_first_seed]
    before = pd.concat([blessed, losses_of_seed.assign(value=np.nan)], ignore_index=True)
    # the mean over all twelve seeds does not change
    shifts = np.where(is_first_seed, -1.1, 0.1)
    values = blessed["value"].where(~is_loss, blessed["value"] + shifts)
    changed = blessed.assign(value=values)
    after = pd.concat([changed, losses_of_seed.assign(value=np.nan)], ignore_index=True)
    moved = compare_tests(FULL, {"glue_lora": before}, {"glue_lora": after}).moved
    test_of_loss = IN_DOMAIN.replace("LoRA: LoRA", "LoRA: loss: LoRA")
    assert test_of_loss in [test.title for test in moved]


@pytest.mark.parametrize("num_shared", [0, 1])
def test_a_change_of_fewer_than_two_pairs_moves_no_test(
    blessed: pd.DataFrame, num_shared: int
) -> None:
    shared_seeds = sorted(blessed["seed"].unique())[:num_shared]
    # the other seeds have no number that both sides know
    others = blessed["metric"].where(blessed["seed"].isin(shared_seeds), "of_older_code")
    before = pd.concat([blessed, blessed.assign(metric=others)], ignore_index=True)
    after = shifted(blessed, 0.029, 0.0)
    is_shared = after["seed"].isin(shared_seeds)
    after = after.assign(value=after["value"].where(is_shared))
    assert compare_tests(FULL, {"glue_lora": before}, {"glue_lora": after}).moved == []


@pytest.fixture
def blessed_runs(here: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Suite]:
    """Return a function that writes and blesses the text runs of a suite, then shifts EMoE's scores."""
    (here / RESULTS).mkdir()
    monkeypatch.setattr(reference, "REFERENCE", here / "reference")

    def write(name: str) -> Suite:
        part = {"suite": name, "benchmarks": ["glue"]}
        monkeypatch.setenv(OVERRIDES, json.dumps(part))
        suite = load_suite(part)
        fake_runs.write_runs(suite.runs)
        fake_runs.bless(suite)
        assert check_claims(suite, check(suite, ["glue"]).finished).moved == []
        fake_runs.write_runs(suite.runs, {"emoe": 0.029})
        return suite

    return write


def test_the_command_reports_moved_tests_of_finished_runs(
    blessed_runs: Callable[[str], Suite],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    suite = blessed_runs("mini")
    monkeypatch.setattr(sys, "argv", ["emoe-bench", "check", "--suite", "mini", "--elsewhere"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 1
    moved = "moved EMoE is better than the dense model in domain: text, full fine-tuning"
    assert moved in capsys.readouterr().out
    # benchmarks that were not asked for are not compared
    assert check_claims(suite, {}).num_compared == 0


def test_models_with_random_weights_test_no_claim(blessed_runs: Callable[[str], Suite]) -> None:
    suite = blessed_runs("smoke")
    finished = check(suite, ["glue"]).finished
    assert finished["glue"]
    assert check_claims(suite, finished).num_compared == 0
