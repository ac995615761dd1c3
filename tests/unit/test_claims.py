"""Test claims: comparisons, verdicts, the file, and a finished suite's table, figure and command."""

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

from benchmarks.harness.base import BENCHMARKS, OVERRIDES, DataError, DefinitionError
from benchmarks.harness.config.catalogue import Metric, load_metrics
from benchmarks.harness.config.suite import Suite, load_suite
from benchmarks.harness.report.artifacts import claim_artifacts, numbers_file
from benchmarks.harness.report.claims import (
    Claim,
    Comparison,
    PaperEffect,
    claimed_benchmarks,
    load_claims,
    loss_comparison,
)
from benchmarks.harness.report.claims_figure import draw_all_claims
from benchmarks.harness.report.claims_table import (
    claims_table,
    judge_claims,
    read_claim_numbers,
    verdict_sentences,
    write_claim_numbers,
)
from benchmarks.harness.report.evidence import (
    Evidence,
    Verdict,
    compare_gains,
    find_evidence,
    find_gap,
    judge,
)
from benchmarks.harness.report.placeholders import is_drawn
from benchmarks.harness.results.statistics import holm
from tests import fake_runs
from tests.drawn import watched
from tests.programs import call

MARGIN = 0.01
HIGHER = Comparison(
    benchmark="glue",
    method="emoe",
    against="vanilla",
    selection="clean",
    domain="id",
    metric="score",
    direction="higher",
)


def claimed(direction: str, **changes: Any) -> Comparison:
    return HIGHER.model_copy(update={"direction": direction, **changes})


def numbers(by_method: dict[str, dict[tuple[str, int], float]], **columns: Any) -> pd.DataFrame:
    """Return rows like those of a presentation: the value of each method, task and seed."""
    usual = {"selection": "clean", "domain": "id", "metric": "score", "model": "m"}
    usual |= dict.fromkeys(("eval_task", "tuning", "setting", "question"), "")
    rows = [
        {**usual, "method": method, "task": task, "seed": seed, "value": value, **columns}
        for method, values in by_method.items()
        for (task, seed), value in values.items()
    ]
    return pd.DataFrame(rows)


def compared(rows: pd.DataFrame, compare: Comparison = HIGHER) -> Evidence:
    evidence = find_evidence(rows, compare)
    assert evidence is not None
    return evidence


def evidence_of(differences: list[float], compare: Comparison = HIGHER) -> Evidence:
    base = {("t", seed): 0.5 + 0.01 * seed for seed in range(len(differences))}
    ours = {key: value + differences[key[1]] for key, value in base.items()}
    return compared(numbers({"emoe": ours, "vanilla": base}), compare)


@pytest.mark.parametrize(
    ("differences", "verdicts"),  # of: higher, lower, same, not_lower
    [
        ([0.010, 0.012, 0.009, 0.011], "supported,contradicted,undecided,supported"),
        ([-0.010, -0.012, -0.009, -0.011], "contradicted,supported,undecided,undecided"),
        ([0.01, -0.012, 0.009, -0.011], "undecided,undecided,undecided,undecided"),
        ([0.001, -0.002, 0.002, 0.000], "equivalent,equivalent,supported,supported"),
        # a difference that is significant, but too small to matter
        ([0.001, 0.002, 0.0015, 0.0012], "equivalent,equivalent,supported,supported"),
        # one end of the interval is outside the margin
        ([0.010, -0.001, 0.002, 0.000], "undecided,undecided,undecided,supported"),
        ([0.050, 0.052, 0.049, 0.051], "supported,contradicted,contradicted,supported"),
        ([-0.050, -0.052, -0.049, -0.051], "contradicted,supported,contradicted,contradicted"),
        ([0.01, 0.01, 0.01], "untestable,untestable,untestable,untestable"),
        ([0.0, 0.0, 0.0], "untestable,untestable,supported,supported"),
    ],
)
def test_more_or_less_is_judged_by_the_test_and_sameness_by_the_interval(
    differences: list[float], verdicts: str
) -> None:
    evidence = evidence_of(differences)
    for direction, verdict in zip(
        ("higher", "lower", "same", "not_lower"), verdicts.split(","), strict=True
    ):
        p = evidence.difference.p
        assert judge(claimed(direction), evidence, p, MARGIN) == verdict, direction


def test_the_difference_is_scipys_paired_one_and_the_corrected_p_decides() -> None:
    evidence = evidence_of([0.02, -0.01, 0.04, 0.03])
    difference = evidence.difference
    expected = stats.ttest_rel([0.52, 0.50, 0.56, 0.56], [0.50, 0.51, 0.52, 0.53])
    interval = expected.confidence_interval(0.95)
    assert (difference.mean, difference.low, difference.high) == pytest.approx((0.02, *interval))
    assert difference.p == pytest.approx(expected.pvalue)
    assert difference.standard_error() == pytest.approx(expected._standard_error)
    assert judge(HIGHER, evidence, 0.049, MARGIN) is Verdict.SUPPORTED
    assert judge(HIGHER, evidence, 0.05, MARGIN) is Verdict.UNDECIDED


@pytest.mark.parametrize(
    ("scores", "verdict"),
    [
        ({"emoe": [1, 0, 0, 0], "vanilla": [0, 0, 1, 0]}, "untestable"),
        # one method is better than a guess
        ({"emoe": [1, 1, 1, 0.9], "vanilla": [0, 0, 1, 0]}, "undecided"),
        # the same, with equal scores
        ({"emoe": [1, 1, 1, 1], "vanilla": [0, 0, 1, 0]}, "undecided"),
    ],
)
def test_two_methods_that_only_guess_have_no_verdict(
    scores: dict[str, list[float]], verdict: str
) -> None:
    by_method = {
        method: {("t", seed): value for seed, value in enumerate(values)}
        for method, values in scores.items()
    }
    guess = claimed("higher", chance=0.25)
    evidence = compared(numbers(by_method), guess)
    assert judge(guess, evidence, 0.5, MARGIN) == verdict
    # without a known chance, the same numbers are only undecided
    assert judge(HIGHER, compared(numbers(by_method)), 0.5, MARGIN) == "undecided"


def test_the_gap_to_the_paper_is_tested_with_the_papers_error() -> None:
    difference = evidence_of([0.02, -0.01, 0.04, 0.03]).difference.scaled(100)
    paper = PaperEffect(effect=1.5, error=0.4, seeds=3, reference=80, where="Fig. 3")
    gap = find_gap(difference, 1.5, paper)
    n = difference.n
    # two methods with three seeds each have four degrees of freedom, like one group of five
    expected = stats.ttest_ind_from_stats(
        difference.mean, difference.standard_error() * n**0.5, n, 1.5, 0.4 * 5**0.5, 5, False
    )
    assert (gap.mean, gap.p) == pytest.approx((difference.mean - 1.5, expected.pvalue))
    assert math.isnan(find_gap(difference, 1.5, PaperEffect(effect=1.5, where="Fig. 2")).p)
    one_pair = evidence_of([0.02]).difference
    assert math.isnan(find_gap(one_pair, 1.5, paper).p)
    with pytest.raises(ValueError, match="'error' needs the key 'seeds'"):
        PaperEffect(effect=1.5, error=0.4, reference=80, where="Fig. 3")


@pytest.mark.parametrize("change", [{"direction": "not_lower"}, {"chance": 0.25}])
def test_only_scores_that_are_claimed_to_be_higher_lower_or_the_same_have_a_loss(
    change: dict[str, Any],
) -> None:
    compare = HIGHER.model_dump(exclude_none=True)
    test = {"title": "b", "paper": {"where": "Fig. 1"}, "loss": True}
    for direction, of_loss in (("higher", "lower"), ("lower", "higher"), ("same", "same")):
        scores = {**compare, "direction": direction}
        Claim(title="A", tests=[{**test, "compare": scores}])
        assert loss_comparison(Comparison(**scores)).direction == of_loss
    with pytest.raises(ValueError, match="'loss' needs a comparison that claims higher, lower or"):
        Claim(title="A", tests=[{**test, "compare": {**compare, **change}}])
    with pytest.raises(ValueError, match="'loss' needs a comparison"):
        Claim(title="A", tests=[{**test, "needs": "more"}])


@pytest.mark.parametrize(
    ("direction", "effect", "expected", "p", "word"),
    [
        ("higher", 2.0, 2.0, 0.01, "smaller"),
        ("higher", 0.1, 0.1, 0.01, "larger"),
        ("lower", 2.0, 2.0, 0.01, "larger"),
        ("same", 2.0, 2.0, 0.01, "smaller"),
        ("higher", 2.0, 2.0, 0.06, "not shown"),  # the gap is not significant
        ("higher", 2.0, 1.1, 0.01, "not shown"),  # the share of errors is compatible
        ("higher", 2.0, 0.1, 0.01, "not shown"),  # the two facts point to different sides
        ("higher", 2.0, math.nan, 0.01, "not shown"),  # the paper's errors are unknown
        ("higher", 2.0, 2.0, math.nan, "not shown"),  # the paper's deviation is unknown
    ],
)
def test_a_gain_is_smaller_or_larger_only_if_both_facts_hold(
    direction: str, effect: float, expected: float, p: float, word: str
) -> None:
    difference = evidence_of([0.010, 0.012, 0.009, 0.013]).difference.scaled(100)
    gap = find_gap(difference, effect, PaperEffect(effect=effect, where="Fig. 3"))
    assert compare_gains(claimed(direction), difference, gap.mean, p, expected) == word


def test_the_margin_of_scores_is_below_half_of_every_main_effect() -> None:
    margin = load_metrics()["accuracy"].equivalence_margin
    assert margin is not None
    for claim in load_claims().values():
        for test in claim.tests:
            if test.headline and test.paper.effect is not None:
                assert margin * 100 <= abs(test.paper.effect) / 2, test.title


def test_the_margin_of_a_loss_is_a_share_of_the_loss_of_the_reference() -> None:
    loss = load_metrics()["loss"]
    assert loss.margin(0.5) == pytest.approx(0.006)
    assert load_metrics()["accuracy"].margin(0.5) == 0.0035
    with pytest.raises(ValueError, match="exclude each other"):
        Metric(**{**loss.model_dump(), "equivalence_margin": 0.1})


def test_tasks_are_averaged_within_a_seed_and_a_seed_that_lacks_one_is_left_out() -> None:
    base = {(task, seed): 0.5 for task in ("a", "b") for seed in (0, 1, 2)}
    ours = {
        ("a", 0): 0.52,
        ("b", 0): 0.54,
        ("a", 1): 0.51,
        ("b", 1): 0.53,
        ("a", 2): 0.9,
        ("c", 0): 0.9,
    }
    evidence = compared(numbers({"emoe": ours, "vanilla": base, "gmoe": {("d", 0): 1.0}}))
    assert (evidence.difference.n, evidence.num_incomplete, evidence.tasks) == (2, 1, ["a", "b"])
    assert evidence.difference.mean == pytest.approx((0.03 + 0.02) / 2)
    # no seed has all tasks
    base = {("a", seed): 0.5 for seed in (0, 1)} | {("b", seed): 0.5 for seed in (2, 3)}
    evidence = compared(numbers({"emoe": dict.fromkeys(base, 0.6), "vanilla": base}))
    assert (evidence.difference.n, evidence.num_incomplete) == (0, 4)


def test_a_loss_is_untestable_if_a_run_diverged() -> None:
    lower = claimed("lower", metric="loss")
    base = {("t", seed): 0.5 + 0.01 * seed for seed in range(6)}
    ours = {key: value - 0.02 + 0.001 * key[1] for key, value in base.items()}
    usual = compared(numbers({"emoe": ours, "vanilla": base}, metric="loss"), lower)
    assert judge(lower, usual, usual.difference.p, MARGIN) is Verdict.SUPPORTED
    # the other five seeds alone would support the claim
    diverged = {**ours, ("t", 5): math.nan}
    evidence = compared(numbers({"emoe": diverged, "vanilla": base}, metric="loss"), lower)
    assert (evidence.difference.n, evidence.num_incomplete, evidence.num_diverged) == (5, 1, 1)
    assert judge(lower, evidence, evidence.difference.p, MARGIN) is Verdict.UNTESTABLE


def test_a_claim_of_all_settings_is_of_their_mean_and_a_setting_counts_if_it_is_named() -> None:
    base = {("t", seed): 0.5 + 0.01 * seed for seed in range(4)}
    rows = [numbers({"vanilla": base})]
    for setting, gain in {"": 0.0, "D0.8": 0.02, "D0.5": 0.04}.items():
        rows.append(
            numbers({"emoe": {key: value + gain for key, value in base.items()}}, setting=setting)
        )
    for settings, mean in ((None, 0.0), (["D0.8"], 0.02), (["D0.8", "D0.5"], 0.03), ("all", 0.03)):
        difference = compared(pd.concat(rows), claimed("higher", settings=settings)).difference
        assert (difference.mean, difference.n) == (pytest.approx(mean), 4)
    assert find_evidence(pd.concat(rows), claimed("higher", settings=["D0.9"])) is None
    # against a row that only runs with settings: in the same one
    rows.append(
        numbers({"gmoe": {key: value - 0.01 for key, value in base.items()}}, setting="D0.8")
    )
    against = claimed("higher", settings=["D0.8"], against="gmoe")
    assert compared(pd.concat(rows), against).difference.mean == pytest.approx(0.03)


def test_only_what_is_named_is_compared() -> None:
    base = {("a", 0): 0.5, ("a", 1): 0.5, ("b", 0): 0.5, ("b", 1): 0.6}
    ours = {("a", 0): 0.6, ("a", 1): 0.7, ("b", 0): 0.1, ("b", 1): 0.2}
    rows = numbers({"emoe": ours, "vanilla": base})
    others = [
        rows.assign(value=9.0, **other) for other in ({"domain": "ood"}, {"selection": "published"})
    ]
    everything = pd.concat([rows, *others])
    assert compared(everything, claimed("higher", tasks=["a"])).difference.mean == pytest.approx(
        0.15
    )
    assert find_evidence(everything, claimed("higher", models=["other"])) is None
    assert find_evidence(everything, claimed("higher", method="gmoe")) is None


@pytest.mark.parametrize(
    ("ours", "verdict"), [([1000, 1000], "supported"), ([1000, 1001], "contradicted")]
)
def test_parameters_are_compared_exactly(ours: list[int], verdict: str) -> None:
    equal = claimed("equal", domain="model", metric="parameters", selection=None)
    values = {
        "emoe": {("t", seed): value for seed, value in enumerate(ours)},
        "vanilla": {("t", 0): 1000},
    }
    evidence = compared(numbers(values, domain="model", metric="parameters"), equal)
    assert judge(equal, evidence, math.nan, 0.0) == verdict


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (0.9, 1.1, "supported"),
        (0.9, 1.11, "undecided"),
        (1.11, 1.4, "contradicted"),
        (0.2, 0.3, "supported"),
    ],
)
def test_a_ratio_is_near_one_if_all_of_its_range_is(low: float, high: float, verdict: str) -> None:
    near = claimed("near", domain="step", metric="ratio", selection=None)
    ends = {"ratio": (low + high) / 2, "ratio_low": low, "ratio_high": high}
    rows = [
        numbers({"emoe": {("", 0): value, ("", 1): (low + high) / 2}}, domain="step", metric=name)
        for name, value in ends.items()
    ]
    evidence = compared(pd.concat(rows), near)
    assert evidence.difference.n == 2
    assert judge(near, evidence, math.nan, 0.1 + 1e-9) == verdict


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "emo"}, "compare.method' is 'emo', which does not exist; did you mean 'emoe'?"),
        ({"against": "emoe"}, "compare.against' is 'emoe', which does not exist"),
        (
            {"selection": None},
            "compare.selection' is '', which does not exist; choose from clean, published",
        ),
        (
            {"domain": "model", "metric": "parameters", "selection": None},
            "compare.metric' is 'parameters', which does",
        ),
    ],
)
def test_a_wrong_name_ends_with_file_key_and_the_nearest(
    change: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare = HIGHER.model_dump(exclude_none=True) | change
    compare = {key: value for key, value in compare.items() if value is not None}
    test = {"title": "b", "paper": {"effect": 1, "where": "Fig. 1"}, "compare": compare}
    (tmp_path / "claims.yaml").write_text(
        yaml.safe_dump({"claims": {"a": {"title": "A", "tests": [test]}}})
    )
    monkeypatch.setattr("benchmarks.harness.report.claims.BENCHMARKS", tmp_path)
    with pytest.raises(DefinitionError) as caught:
        load_claims.__wrapped__()
    assert message in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path / "claims.yaml"))
    with pytest.raises(ValueError, match="it needs one of compare, needs"):
        Claim(title="A", tests=[{**test, "needs": "more"}])


@pytest.mark.parametrize(
    ("claim", "benchmark", "method", "against"),
    [
        ("in_domain", "glue", "emoe", "vanilla"),
        ("in_domain", "glue_lora", "lora_emoe", "lora"),
        ("vision", "domainbed", "emoe", "erm"),
        ("gmoe", "domainbed", "emoe", "gmoe"),
        ("gmoe", "glue", "emoe", "gmoe"),
        ("gmoe", "glue_lora", "lora_emoe", "lora_gmoe"),
        ("gate", "glue_lora", "lora_emoe", "lora_emoe_learn"),  # the paper's has softmax weights
    ],
)
def test_the_papers_effects_are_those_of_its_published_averages(
    claim: str, benchmark: str, method: str, against: str
) -> None:
    published = pd.read_csv(BENCHMARKS / benchmark / "paper.csv").rename(columns={"task": "scope"})
    published = published[published["scope"].str.startswith("average")].drop_duplicates(
        ["model", "method"]
    )
    averages = published.pivot(index="model", columns="method", values="value")
    tests = [
        test
        for test in load_claims()[claim].tests
        if test.compare and test.compare.benchmark == benchmark
    ]
    (effect,) = (test.paper.effect for test in tests if test.paper.effect is not None)
    assert effect == pytest.approx((averages[method] - averages[against]).mean(), abs=0.006)


@pytest.mark.parametrize(
    ("claim", "figure"),
    [
        ("out_of_domain", "glue_ood/transformation"),
        ("training", "glue_ood/transformation"),
        ("use", "glue_ood/transformation"),
        ("clustering", "glue_lora/selection"),
        ("selection", "glue_lora/selection"),
        ("robust", "glue_lora/settings"),
        ("data", "glue_lora/data"),
    ],
)
def test_the_papers_effects_are_those_of_its_figures_with_each_training_task_once(
    claim: str, figure: str
) -> None:
    cells = pd.read_csv(BENCHMARKS / f"{figure}.csv").fillna("")
    for test in load_claims()[claim].tests:
        # ranks are in another figure
        has_scores = test.compare and test.compare.metric == "score"
        if has_scores and test.paper.effect is not None:
            compare = test.compare
            shown = cells[cells["scope"].str.contains("→") == (compare.domain == "ood_mean")]
            named = shown[shown["setting"].isin([*(compare.settings or ())])]
            ours, others = (
                next(
                    rows
                    for rows in (part[part["method"] == name] for part in (named, shown))
                    if len(rows)
                )
                for name in (compare.method, compare.against)
            )
            both = ours.merge(others, on="scope")
            by_task = (
                (both["value_x"] - both["value_y"])
                .groupby(both["scope"].str.partition(" → ")[0])
                .mean()
            )
            assert test.paper.effect == pytest.approx(by_task.mean(), abs=0.006), test.title


PART_OF_MINI = {"suite": "mini", "benchmarks": ["glue_lora", "domainbed", "llama"]}


@pytest.fixture(scope="module")
def suite(shared_here: Path) -> Suite:
    """Load most of the mini suite with made-up runs, EMoE a little better by LoRA."""
    suite = load_suite(PART_OF_MINI)
    fake_runs.write_runs(suite.runs, {"lora_emoe": 0.01})
    return suite


@pytest.fixture(scope="module")
def computed(suite: Suite) -> dict[str, pd.DataFrame]:
    """Write the claim numbers of the suite, and return them as they were computed."""
    computed = fake_runs.claim_numbers(suite)
    for name, frame in computed.items():
        write_claim_numbers(suite.name, name, frame)
    return computed


@pytest.fixture(scope="module")
def rows(suite: Suite, computed: dict[str, pd.DataFrame]) -> pd.DataFrame:
    return judge_claims(suite, computed)


def test_every_test_has_a_row_and_its_p_is_corrected_within_its_endpoint(
    suite: Suite, rows: pd.DataFrame
) -> None:
    expected = []
    for name, claim in load_claims().items():
        for test in claim.tests:
            expected.append((name, test.title))
            if test.loss:
                expected.append((name, f"{test.title}: loss"))
    assert list(zip(rows["claim"], rows["test"], strict=True)) == expected

    losses = rows[rows["endpoint"] == "loss"]
    others = rows[rows["endpoint"] == "main"]
    for of_endpoint in (losses, others):
        assert of_endpoint["p"].notna().sum() > 5
        corrected = holm(of_endpoint["p"])
        pd.testing.assert_series_equal(of_endpoint["p_holm"], corrected, check_names=False)
    missing = rows[rows["verdict"] == "missing"].set_index(["claim", "test"])["remark"]
    name = "questions, full fine-tuning, every fourth upper layer"
    assert missing["llama", name] == "no runs of both methods that can be compared"

    first, second = verdict_sentences(rows)
    assert first.startswith(f"{len(others)} tests of {rows['claim'].nunique()} claims")
    assert second.startswith(f"{len(losses)} tests of losses: ")


def test_a_difference_is_also_a_share_of_the_errors(rows: pd.DataFrame) -> None:
    row = rows.set_index(["claim", "test"]).loc["in_domain", "text, LoRA"]
    dense = row.evidence.reference_mean * 100
    ours = f"{row.delta / (100 - dense) * 100:+.1f} %"
    # Fig. 2: +0.79 at a mean of 84.48
    paper = 0.79 / (100 - 84.48)
    assert row.error_share_shown.startswith(ours)
    assert row.error_share_shown.endswith(f"; the paper {paper * 100:+.1f} %")
    assert row.expected == pytest.approx(paper * (100 - dense))
    assert row.against_paper == "the paper's error is unknown"


def test_negative_numbers_of_a_cell_have_the_same_minus_sign(rows: pd.DataFrame) -> None:
    # the paper's effect, and the numbers of the paper that it is made from
    assert rows["paper"].str.contains(r"-\d.*\(.*-\d").any()
    assert not rows["paper"].str.contains("\u2212").any()


def test_differences_are_those_of_the_runs_and_the_table_shows_them(
    suite: Suite, rows: pd.DataFrame
) -> None:
    scores: dict[tuple[str, int], float] = {}
    for run in suite.runs_of("glue_lora"):
        name, metric = run.spec["task"]["name"], run.spec["task"]["metric"]
        recorded = json.loads(run.metrics_file.read_text())
        scores[run.spec["method"]["name"], run.spec["seed"]] = recorded["scores"]["test"][name][
            metric
        ]
    seeds = sorted({seed for method, seed in scores if method == "lora_emoe"})
    pairs = np.array([scores["lora_emoe", seed] - scores["lora", seed] for seed in seeds]) * 100
    is_row = rows["claim"].eq("in_domain") & rows["test"].eq("text, LoRA")
    row = rows[is_row].iloc[0]
    assert (row.delta, row.n) == pytest.approx((pairs.mean(), len(pairs)))
    cells = claims_table(suite, rows).texts()
    shown = cells[is_row].iloc[0]
    assert shown["The paper"].startswith("+0.79 points (Fig. 2")
    assert shown["These runs"] == f"{row.delta:+.2f} points [{row.low:+.2f}, {row.high:+.2f}]"
    assert cells.loc[rows["claim"] == "parameters", "These runs"].tolist() == [
        "–",
        "+0 parameters",
        "+0 parameters",
    ]


def test_no_text_of_a_picture_touches_another_and_each_has_its_file(
    suite: Suite, rows: pd.DataFrame, tmp_path: Path
) -> None:
    with watched() as faults:
        draw_all_claims(suite, rows, tmp_path)
    assert faults == []
    drawn = {file.name for file in tmp_path.iterdir() if is_drawn(file)}
    assert drawn == {Path(file).name for file in claim_artifacts(suite).figure_files("mini")}
    stems = {"claims", "claims_narrow", "claims_glue_lora", "claims_domainbed", "claims_llama"}
    assert {Path(name).stem for name in drawn} == stems


def test_only_a_benchmark_with_a_test_in_points_has_a_figure() -> None:
    suite = load_suite({"suite": "smoke", "benchmarks": ["domainbed", "speed"]})
    assert "speed" in claimed_benchmarks(suite)
    assert claim_artifacts(suite).figures == ["", "narrow", "domainbed"]


def test_the_command_prints_the_table(
    suite: Suite, rows: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(OVERRIDES, json.dumps(PART_OF_MINI))
    assert call("claims", "--suite", "mini") == f"{claims_table(suite, rows).markdown()}\n"


def test_numbers_that_are_read_have_the_types_and_verdicts_of_those_that_were_computed(
    suite: Suite, computed: dict[str, pd.DataFrame], rows: pd.DataFrame
) -> None:
    read = read_claim_numbers(suite)
    assert list(read) == list(computed)
    for name, frame in computed.items():
        assert read[name].to_dict("records") == frame.to_dict("records")
        for column in frame:
            assert list(map(type, read[name][column])) == list(map(type, frame[column])), (
                name,
                column,
            )
    # a seed is a number, a question and an environment are text
    assert set(map(type, read["glue_lora"]["seed"])) == {int}
    assert {"anatomy 0", ""} <= set(read["llama"]["question"])
    assert "0" in set(read["domainbed"]["eval_task"])
    pd.testing.assert_frame_equal(judge_claims(suite, read), rows)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "cannot be read: No such file or directory"),
        ('{"seed": 0', "is damaged: 'the file': Invalid JSON: EOF .*"),
        ("[1]", "is damaged: 'the file': Input should be an object"),
        ('{"seed": [0]}', "is damaged: 'seed.str': Input should be a valid string"),
        ("", "is damaged: it was cut or is of an older form"),
        ('{"numbers": 2}\n{"seed": 0}', "is damaged: it was cut or is of an older form"),
    ],
)
def test_wrong_numbers_are_named_with_the_way_to_make_them_again(
    content: str | None, problem: str, suite: Suite, here: Path
) -> None:
    path = Path(numbers_file("mini", "glue_lora"))
    path.parent.mkdir(parents=True)
    if content is not None:
        path.write_text(content)
    advice = f"`snakemake --cores all --force {path} --config suite=mini` makes it again"
    with pytest.raises(DataError, match=rf"^{path} {problem}; {advice}$") as error:
        read_claim_numbers(suite)
    assert "\n" not in str(error.value)


def test_the_margin_is_at_most_half_of_the_papers_effect(rows: pd.DataFrame) -> None:
    by_test = rows.set_index(["claim", "test"])
    # Fig. 2 has +0.79, and half of its share of our errors is less than half of it, or than 0.35
    row = by_test.loc["in_domain", "text, LoRA"]
    smallest = min(0.35, 0.79 / 2, abs(row.expected) / 2)
    assert row.margin == pytest.approx(smallest)
    # the paper has no number, so the margin is that of the metric
    assert by_test.loc["gate", "scale-matched gate: text, LoRA"].margin == pytest.approx(0.35)
    # the margin of a loss is a share of the loss of the reference method
    loss = by_test.loc["in_domain", "text, LoRA: loss"]
    assert loss.margin == pytest.approx(0.012 * loss.evidence.reference_mean)
    # a claim of equality keeps the margin of the metric, although the paper's effect is +0.08
    same = by_test.loc["data", "EMoE on 80 % of the rows, dense on all, LoRA"]
    assert (same.effect, same.margin) == (0.08, pytest.approx(0.35))


def test_a_loss_at_the_best_temperature_is_of_the_second_endpoint(rows: pd.DataFrame) -> None:
    endpoints = rows.groupby("metric")["endpoint"].unique()
    assert list(endpoints["loss_calibrated"]) == ["loss"]
    assert list(endpoints["score"]) == ["main"]
