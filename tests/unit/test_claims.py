"""A verdict per claim: what is compared, how it is tested, and what readers see of it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from scipy import stats

from benchmarks.harness.base.errors import DefinitionError
from benchmarks.harness.base.paths import BENCHMARKS
from benchmarks.harness.config.catalogue import load_metrics
from benchmarks.harness.config.claims import Claim, Comparison, load_claims, suites_with
from benchmarks.harness.results.evidence import (
    Evidence,
    Verdict,
    beyond_p,
    counted,
    equivalence_p,
    judge,
    measured,
    paired,
)

HIGHER = Comparison(
    benchmark="glue",
    method="emoe",
    against="vanilla",
    selection="clean",
    domain="id",
    metric="score",
    direction="higher",
)
LOWER = HIGHER.model_copy(update={"direction": "lower"})


def numbers(of: dict[str, dict[tuple[str, int], float]], **same: Any) -> pd.DataFrame:
    """Rows as presentations give them: of every method, the value of a task and seed."""
    usual = {
        "selection": "clean",
        "domain": "id",
        "metric": "score",
        "model": "m",
        "eval_task": "",
        "tuning": "",
        "setting": "",
    }
    return pd.DataFrame(
        [
            {**usual, "method": method, "task": task, "pair": seed, "value": value, **same}
            for method, values in of.items()
            for (task, seed), value in values.items()
        ]
    )


def evidence_of(differences: list[float], compare: Comparison = HIGHER) -> Evidence:
    base = {("t", seed): 0.5 + 0.01 * seed for seed in range(len(differences))}
    own = {key: value + differences[key[1]] for key, value in base.items()}
    found = paired(numbers({"emoe": own, "vanilla": base}), compare)
    assert found is not None
    return found


def verdict_of(differences: list[float], compare: Comparison = HIGHER) -> Verdict:
    found = evidence_of(differences, compare)
    return judge(compare, found, found.difference.p, None)


# the comparison


@pytest.mark.parametrize(
    ("differences", "higher", "lower"),
    [
        ([0.010, 0.012, 0.009, 0.011], Verdict.SUPPORTED, Verdict.CONTRADICTED),
        ([-0.010, -0.012, -0.009, -0.011], Verdict.CONTRADICTED, Verdict.SUPPORTED),
        ([0.01, -0.012, 0.009, -0.011], Verdict.UNDECIDED, Verdict.UNDECIDED),
        ([0.01], Verdict.NO_TEST, Verdict.NO_TEST),
        ([0.01, 0.01, 0.01], Verdict.NO_TEST, Verdict.NO_TEST),
        ([0.0, 0.0, 0.0], Verdict.NO_TEST, Verdict.NO_TEST),
    ],
)
def test_the_verdict_is_what_the_test_says_in_the_claimed_direction(
    differences: list[float], higher: Verdict, lower: Verdict
) -> None:
    assert verdict_of(differences) == higher
    assert verdict_of(differences, LOWER) == lower


def test_a_verdict_needs_the_corrected_p() -> None:
    found = evidence_of([0.010, 0.012, 0.009, 0.011])
    assert judge(HIGHER, found, 0.049, None) is Verdict.SUPPORTED
    assert judge(HIGHER, found, 0.05, None) is Verdict.UNDECIDED


SAME, NOT_LOWER = (HIGHER.model_copy(update={"direction": direction}) for direction in ("same", "not_lower"))


@pytest.mark.parametrize(
    ("differences", "same", "not_lower"),
    [
        ([0.001, -0.002, 0.002, 0.000], Verdict.SUPPORTED, Verdict.SUPPORTED),
        ([0.050, 0.052, 0.049, 0.051], Verdict.CONTRADICTED, Verdict.SUPPORTED),  # far better
        ([-0.050, -0.052, -0.049, -0.051], Verdict.CONTRADICTED, Verdict.CONTRADICTED),
        ([-0.009, -0.012, 0.008, -0.011], Verdict.UNDECIDED, Verdict.UNDECIDED),
        ([0.001], Verdict.NO_TEST, Verdict.NO_TEST),
    ],
)
def test_sameness_is_shown_and_not_taken_from_a_test_that_finds_nothing(
    differences: list[float], same: Verdict, not_lower: Verdict
) -> None:
    for compare, expected in ((SAME, same), (NOT_LOWER, not_lower)):
        found, below = evidence_of(differences, compare), compare is NOT_LOWER
        numbers = (found.difference, found.deviation, 0.01)
        p, beyond = equivalence_p(*numbers, below_only=below), beyond_p(*numbers, below_only=below)
        assert judge(compare, found, p, None, beyond) == expected


def test_what_is_beyond_the_margin_is_scipys_one_sided_test() -> None:
    found = evidence_of([-0.050, -0.052, -0.049, -0.051])
    expected = stats.ttest_1samp([-0.050, -0.052, -0.049, -0.051], -0.01, alternative="less").pvalue
    for below_only in (False, True):
        p = beyond_p(found.difference, found.deviation, 0.01, below_only=below_only)
        assert p == pytest.approx(expected)
    assert beyond_p(evidence_of([0.05, 0.051]).difference, 0.001, 0.01, below_only=True) > 0.5


def test_one_sided_p_is_scipys() -> None:
    found = evidence_of([-0.009, -0.012, 0.008, -0.011], NOT_LOWER)
    expected = stats.ttest_1samp([-0.009, -0.012, 0.008, -0.011], -0.01, alternative="greater").pvalue
    assert equivalence_p(found.difference, found.deviation, 0.01, below_only=True) == pytest.approx(expected)


def of_settings(by_setting: dict[str, list[float]], compare: Comparison) -> Evidence | None:
    """A method with settings: their differences to a baseline."""
    base = {("t", seed): 0.5 + 0.01 * seed for seed in range(4)}
    parts = [numbers({"vanilla": base})]
    for setting, differences in by_setting.items():
        own = {("t", seed): base["t", seed] + difference for seed, difference in enumerate(differences)}
        parts.append(numbers({"emoe": own}, setting=setting))
    return paired(pd.concat(parts), compare)


GOOD, BETTER, BAD = [0.010, 0.012, 0.009, 0.011], [0.030, 0.032, 0.029, 0.031], [-0.010, -0.012, -0.009, -0.011]


def test_a_claim_of_every_setting_holds_if_it_holds_of_the_weakest() -> None:
    every = HIGHER.model_copy(update={"settings": "all"})
    found = of_settings({"N16": BETTER, "N32": GOOD}, every)
    alone = evidence_of(GOOD)
    assert found is not None
    assert (found.setting, found.settings) == ("N32", 2)
    assert found.difference == alone.difference  # not corrected
    against = of_settings({"N16": BETTER, "N32": GOOD, "N64": BAD}, every)
    assert against is not None
    assert (against.setting, against.settings) == ("N64", 3)
    assert against.difference.p == pytest.approx(3 * evidence_of(BAD).difference.p)
    assert judge(every, against, against.difference.p, None) is Verdict.CONTRADICTED
    lower = of_settings({"N16": BAD, "N32": GOOD}, every.model_copy(update={"direction": "lower"}))
    assert lower is not None
    assert lower.setting == "N32"


def test_the_weakest_setting_is_the_one_with_the_largest_p() -> None:
    """Not the one with the smallest t: three pairs with a larger t can say less than ten with a smaller one."""
    every = HIGHER.model_copy(update={"settings": "all"})
    few, many = [0.010, 0.018, 0.026], [0.002, 0.03, 0.004, 0.028]
    found = of_settings({"N16": few, "N32": many}, every)
    assert found is not None
    p = {name: evidence_of(values).difference.p for name, values in (("N16", few), ("N32", many))}
    assert found.setting == max(p, key=lambda name: p[name])
    untested = of_settings({"N16": [0.010], "N32": GOOD}, every)
    assert untested is not None
    assert untested.setting == "N16"
    assert judge(every, untested, untested.difference.p, None) is Verdict.NO_TEST


def test_pairs_that_are_all_incomplete_are_no_pairs() -> None:
    base = {("a", seed): 0.5 for seed in (0, 1)} | {("b", seed): 0.5 for seed in (2, 3)}
    found = paired(numbers({"emoe": dict.fromkeys(base, 0.6), "vanilla": base}), HIGHER)
    assert found is not None
    assert (found.difference.n, found.left_out) == (0, 4)


def test_settings_are_compared_where_a_claim_names_them() -> None:
    chosen = {"": BETTER, "D0.8": BAD, "D0.5": BAD}
    usual = of_settings(chosen, HIGHER)
    named = of_settings(chosen, HIGHER.model_copy(update={"settings": ["D0.8"]}))
    assert usual is not None
    assert named is not None
    assert usual.difference.mean == pytest.approx(0.0305)
    assert (named.setting, named.difference.mean) == ("D0.8", pytest.approx(-0.0105))
    assert of_settings(chosen, HIGHER.model_copy(update={"settings": ["D0.9"]})) is None
    assert of_settings(chosen, HIGHER.model_copy(update={"settings": ["D0.8", "D0.9"]})) is None


def test_the_difference_is_the_paired_one_as_scipy_has_it() -> None:
    found = evidence_of([0.02, -0.01, 0.04, 0.03])
    expected = stats.ttest_rel([0.52, 0.50, 0.56, 0.56], [0.50, 0.51, 0.52, 0.53])
    low, high = expected.confidence_interval(0.95)
    difference = found.difference
    assert (difference.mean, difference.low, difference.high) == pytest.approx((0.02, low, high))
    assert difference.p == pytest.approx(expected.pvalue)
    assert found.deviation == pytest.approx(np.std([0.02, -0.01, 0.04, 0.03], ddof=1))


def test_tasks_are_averaged_within_a_seed_and_a_seed_that_lacks_one_is_left_out() -> None:
    base = {(task, seed): 0.5 for task in ("a", "b") for seed in (0, 1, 2)}
    own = {("a", 0): 0.52, ("b", 0): 0.54, ("a", 1): 0.51, ("b", 1): 0.53, ("a", 2): 0.9, ("c", 0): 0.9}
    found = paired(numbers({"emoe": own, "vanilla": base, "gmoe": {("d", 0): 1.0}}), HIGHER)
    assert found is not None
    assert (found.difference.n, found.left_out, found.tasks) == (2, 1, ("a", "b"))
    assert found.difference.mean == pytest.approx((0.03 + 0.02) / 2)


def test_only_what_is_named_is_compared() -> None:
    base = {("a", 0): 0.5, ("a", 1): 0.5, ("b", 0): 0.5, ("b", 1): 0.6}
    own = {("a", 0): 0.6, ("a", 1): 0.7, ("b", 0): 0.1, ("b", 1): 0.2}
    rows = numbers({"emoe": own, "vanilla": base})
    others = [rows.assign(value=9.0, **other) for other in ({"domain": "ood"}, {"selection": "published"})]
    everything = pd.concat([rows, *others])
    found = paired(everything, HIGHER.model_copy(update={"tasks": ["a"]}))
    assert found is not None
    assert found.difference.mean == pytest.approx(0.15)
    assert paired(everything, HIGHER.model_copy(update={"models": ["other"]})) is None
    assert paired(everything, HIGHER.model_copy(update={"method": "gmoe"})) is None


def test_parameters_are_compared_exactly() -> None:
    same = HIGHER.model_copy(update={"domain": "model", "metric": "parameters", "direction": "equal"})

    def found(own: list[int]) -> Evidence:
        values = {"emoe": {("t", seed): value for seed, value in enumerate(own)}, "vanilla": {("t", 0): 1000}}
        one = counted(numbers(values, domain="model", metric="parameters"), same.model_copy(update={"selection": None}))
        assert one is not None
        return one

    assert judge(same, found([1000, 1000]), math.nan, None) is Verdict.SUPPORTED
    more = found([1000, 1001])
    assert judge(same, more, math.nan, None) is Verdict.CONTRADICTED
    assert (more.difference.mean, more.difference.n) == (1, 2)


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (0.9, 1.1, Verdict.SUPPORTED),
        (0.9, 1.11, Verdict.UNDECIDED),
        (1.11, 1.4, Verdict.CONTRADICTED),
        (0.2, 0.3, Verdict.SUPPORTED),
    ],
)
def test_a_ratio_is_near_one_where_all_of_its_range_is(low: float, high: float, verdict: Verdict) -> None:
    near = Comparison(
        benchmark="speed", method="auto", against="dense", domain="step", metric="ratio", direction="near"
    )
    ends = {"ratio": (low + high) / 2, "ratio_low": low, "ratio_high": high}
    rows = [
        numbers({"auto": {("", 0): value, ("", 1): (low + high) / 2}}, domain="step", metric=name)
        for name, value in ends.items()
    ]
    found = measured(pd.concat(rows), near)
    assert found is not None
    assert found.difference.n == 2
    assert judge(near, found, math.nan, 0.1 + 1e-9) is verdict


# the file


CLAIM: dict[str, Any] = {
    "title": "A",
    "tests": [
        {"title": "b", "paper": {"effect": 1, "where": "Fig. 1"}, "compare": HIGHER.model_dump(exclude_none=True)}
    ],
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"benchmark": "glu"}, "compare.benchmark' is 'glu', which does not exist; did you mean 'glue'?"),
        ({"method": "emo"}, "compare.method' is 'emo', which does not exist; did you mean 'emoe'?"),
        ({"against": "vanila"}, "compare.against' is 'vanila', which does not exist; did you mean 'vanilla'?"),
        ({"against": "emoe"}, "compare.against' is 'emoe', which is the method itself"),
        ({"domain": "odd"}, "compare.domain' is 'odd', which does not exist; did you mean 'ood'?"),
        ({"metric": "scor"}, "compare.metric' is 'scor', which does not exist; did you mean 'score'?"),
        ({"selection": "cleen"}, "compare.selection' is 'cleen', which does not exist; did you mean 'clean'?"),
        ({"selection": None}, "compare' needs the key 'selection'; choose from clean, published"),
        ({"tasks": ["tweet"]}, "compare.tasks' is 'tweet', which does not exist; did you mean 'tweets'?"),
        ({"models": ["minilmm"]}, "compare.models' is 'minilmm', which does not exist; did you mean 'minilm'?"),
        ({"tunings": ["lora"]}, "compare.tunings' is 'lora', which does not exist"),
        ({"direction": "better"}, "compare.direction' is 'better'"),
        ({"settings": ["N16"]}, "compare.settings' is for rows with several settings; 'emoe' has one"),
        ({"method": "emoe_search", "settings": ["N16-k.25"]}, "compare.settings' is 'N16-k.25', which does not exist"),
        ({"method": "emoe_search", "settings": "all", "direction": "same"}, "must be a single one where the direction"),
        ({"direction": "near"}, "compare.direction' is 'near', but score has no interval of its own"),
        ({"domain": "model", "metric": "parameters", "selection": None}, "has no equivalence_margin in metrics.yaml"),
        ({"metod": "emoe"}, "compare.metod'; did you mean 'method'?"),
    ],
)
def test_a_wrong_name_ends_with_file_key_and_the_nearest(
    change: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = json.loads(json.dumps({"claims": {"a": CLAIM}}))
    compare = content["claims"]["a"]["tests"][0]["compare"]
    compare.update({key: value for key, value in change.items() if value is not None})
    for key in [key for key, value in change.items() if value is None]:
        del compare[key]
    (tmp_path / "claims.yaml").write_text(yaml.safe_dump(content))
    monkeypatch.setattr("benchmarks.harness.config.claims.BENCHMARKS", tmp_path)
    with pytest.raises(DefinitionError) as caught:
        load_claims.__wrapped__()
    assert message in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path / "claims.yaml"))


def test_a_test_has_a_comparison_or_what_it_needs() -> None:
    for wrong in ({"compare": None}, {"needs": "more"}):
        test = {**CLAIM["tests"][0], **wrong}
        with pytest.raises(ValueError, match="it needs one of compare, needs"):
            Claim(title="A", tests=[{key: value for key, value in test.items() if value is not None}])


def test_other_suites_are_named_where_the_runs_are() -> None:
    assert suites_with(HIGHER) == ["mini", "mini_full", "paper"]
    # the paper's glue leaves out of domain to glue_ood
    assert suites_with(HIGHER.model_copy(update={"domain": "ood_mean"})) == ["mini", "mini_full"]
    assert suites_with(HIGHER.model_copy(update={"method": "random_partition"})) == ["mini", "mini_full", "paper"]


@pytest.mark.parametrize(
    ("claim", "benchmark", "method", "against"),
    [("in_domain", "glue", "emoe", "vanilla"), ("in_domain", "glue_lora", "lora_emoe", "lora")],
)
def test_the_papers_effects_are_those_of_its_published_averages(
    claim: str, benchmark: str, method: str, against: str
) -> None:
    published = pd.read_csv(BENCHMARKS / benchmark / "paper.csv")
    averages = published[published["scope"] == "average"].pivot_table(index="model", columns="method", values="value")
    (test,) = (
        one for one in load_claims()[claim].tests if one.compare is not None and one.compare.benchmark == benchmark
    )
    assert test.paper.effect == pytest.approx((averages[method] - averages[against]).mean(), abs=0.006)


def test_every_metric_that_claims_compare_by_has_a_margin() -> None:
    for name in ("score", "accuracy"):
        assert load_metrics()[name].equivalence_margin == 0.01
