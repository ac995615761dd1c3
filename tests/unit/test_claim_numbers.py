"""Test the numbers that claims compare, besides scores: each is that of the runs' records."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from benchmarks.harness.base import RUNS
from benchmarks.harness.config.benchmark import load_benchmark
from benchmarks.harness.config.runs import Run
from benchmarks.harness.config.suite import load_suite
from benchmarks.harness.report.claims_table import (
    judge_claims,
    read_claim_numbers,
    write_claim_numbers,
)
from benchmarks.harness.report.common import COMPARED
from benchmarks.harness.report.presentation import present
from benchmarks.harness.training.metrics import calibrated_loss, mean_loss
from benchmarks.text.training import score_and_loss
from tests import fake_runs
from tests.planned import plan

KEYS = ["method", "setting", "seed"]


def runs_of(benchmark: str, suite: str = "mini") -> list[Run]:
    return plan([benchmark], suite)


def claimed_numbers(benchmark: str, runs: list[Run]) -> pd.DataFrame:
    """Return the claim numbers of runs under the protocol `clean`, or without a protocol."""
    outcomes = present(load_benchmark(benchmark), fake_runs.records(runs)).outcomes
    numbers = outcomes.claim_numbers()
    assert list(numbers) == COMPARED
    return numbers[numbers["selection"].isin(["clean", ""])]


def values(numbers: pd.DataFrame, domain: str, metric: str, task: str = "tweets") -> Any:
    """Return the numbers of a domain by method, setting and seed; each must occur once."""
    is_shown = (numbers["domain"] == domain) & (numbers["metric"] == metric)
    shown = numbers[is_shown & (numbers["task"] == task)].set_index(KEYS)["value"]
    assert shown.index.is_unique
    return shown


def content(run: Run) -> dict[str, Any]:
    made: dict[str, Any] = json.loads(run.metrics_file.read_text())
    return made


def find(runs: list[Run], method: str, seed: int = 0, task: str = "tweets") -> Run:
    return next(run for run in runs if (run.method, run.seed, run.task) == (method, seed, task))


@pytest.fixture
def glue(here: Path) -> list[Run]:
    return fake_runs.write(RUNS)


@pytest.fixture
def lora(here: Path) -> list[Run]:
    return fake_runs.write(RUNS, benchmarks=("glue_lora",))


@pytest.fixture
def ood(here: Path) -> list[Run]:
    runs = fake_runs.write(RUNS, benchmarks=("glue_lora", "glue_ood"))
    return [run for run in runs if run.benchmark == "glue_ood"]


# losses


@pytest.mark.parametrize("metric", ["loss", "loss_calibrated"])
def test_losses_are_those_of_the_records_and_means_over_the_sets_out_of_domain(
    glue: list[Run], metric: str
) -> None:
    numbers = claimed_numbers("glue", glue)
    in_domain = values(numbers, "id", metric)
    out_of_domain = values(numbers, "ood_mean", metric)
    assert (
        set(in_domain.index)
        == set(out_of_domain.index)
        == set(values(numbers, "id", "score").index)
    )
    for run in glue:
        if run.task != "tweets":
            continue
        recorded = content(run)
        by_method = {run.method: recorded["scores"]}
        for name, transformed in recorded.get("transformed", {}).items():
            by_method[name] = transformed["scores"]
        for method, scores in by_method.items():
            key = (method, "", run.seed)
            assert in_domain[key] == scores["test"]["tweets"][metric]
            losses = [by_metric[metric] for by_metric in scores["ood"].values()]
            assert len(losses) > 1
            assert out_of_domain[key] == pytest.approx(np.mean(losses))
    assert {"vanilla2emoe", "emoe2vanilla"} <= set(in_domain.index.get_level_values("method"))


def test_evaluations_have_losses_of_transformed_models_and_settings_their_own(
    ood: list[Run], lora: list[Run]
) -> None:
    numbers = claimed_numbers("glue_ood", ood)
    losses = values(numbers, "ood_mean", "loss")
    for domain in ("id", "ood_mean"):
        with_loss = values(numbers, domain, "loss").index
        assert set(with_loss) == set(values(numbers, domain, "score").index)
    recorded = content(find(ood, "emoe2lora"))["scores"]["ood"]
    expected = np.mean([by_metric["loss"] for by_metric in recorded.values()])
    assert losses["emoe2lora", "", 0] == pytest.approx(expected)

    part = next(run for run in lora if run.method == "lora_emoe_part" and run.seed == 0)
    in_domain = values(claimed_numbers("glue_lora", lora), "id", "loss")
    loss_of_part = content(part)["scores"]["test"]["tweets"]["loss"]
    assert in_domain["lora_emoe_part", "D0.8", 0] == loss_of_part


def test_the_squared_error_of_a_regression_is_no_loss_of_a_claim(here: Path) -> None:
    runs = [
        run
        for run in plan(["glue"], "paper")
        if run.task in ("stsb", "rte") and run.model == "bert-base-cased"
    ]
    fake_runs.write_runs(runs)
    numbers = claimed_numbers("glue", runs)
    tasks = {metric: set(group["task"]) for metric, group in numbers.groupby("metric")}
    assert tasks["score"] == {"stsb", "rte"}
    assert tasks["loss"] == {"rte"}


def test_a_run_that_diverged_on_a_set_has_a_mean_loss_of_nan(glue: list[Run]) -> None:
    diverged = find(glue, "emoe", seed=1)

    def lose(made: dict[str, Any]) -> None:
        first = next(iter(made["scores"]["ood"].values()))
        first["loss"] = None

    fake_runs.edit(diverged, lose)
    numbers = claimed_numbers("glue", glue)
    means = values(numbers, "ood_mean", "loss")
    assert math.isnan(means["emoe", "", 1])
    assert means.notna().sum() == len(means) - 1
    assert values(numbers, "ood_mean", "loss_calibrated").notna().all()
    assert values(numbers, "id", "loss").notna().all()


def test_the_mean_loss_is_nan_if_all_seeds_of_a_method_diverged_on_a_set(glue: list[Run]) -> None:
    # a mean over the other sets would be compared with the dense model's mean over all sets
    def lose(made: dict[str, Any]) -> None:
        first = next(iter(made["scores"]["ood"].values()))
        first["loss"] = None

    for run in glue:
        if (run.method, run.task) == ("emoe", "tweets"):
            fake_runs.edit(run, lose)
    means = values(claimed_numbers("glue", glue), "ood_mean", "loss")
    assert means.loc["emoe"].isna().all()
    assert means.loc["vanilla"].notna().all()


def test_claims_are_told_that_a_run_diverged(glue: list[Run]) -> None:
    diverged = find(glue, "emoe", seed=1)

    def lose(made: dict[str, Any]) -> None:
        for values_of_set in made["scores"]["test"].values():
            values_of_set["loss"] = None

    fake_runs.edit(diverged, lose)
    suite = load_suite({"benchmarks": ["glue"]})
    for name, numbers in fake_runs.claim_numbers(suite).items():
        write_claim_numbers(suite.name, name, numbers)
    rows = judge_claims(suite, read_claim_numbers(suite))
    is_loss = (rows["metric"] == "loss") & (rows["method"] == "emoe") & (rows["domain"] == "id")
    of_dense = rows[is_loss & (rows["against"] == "vanilla")].iloc[0]
    assert (of_dense["n"], of_dense["verdict"]) == (7, "untestable")
    assert math.isnan(of_dense["p"])
    assert of_dense["remark"].endswith("; 1 seed left out because training diverged")


def test_a_set_on_which_no_run_has_a_loss_is_left_out_of_the_mean(glue: list[Run]) -> None:
    """The classes of such a set are merged."""
    of_tweets = [run for run in glue if run.task == "tweets"]
    name = next(iter(content(of_tweets[0])["scores"]["ood"]))

    def merge_classes(made: dict[str, Any]) -> None:
        for results in (made, *made.get("transformed", {}).values()):
            del results["scores"]["ood"][name]["loss"]

    for run in of_tweets:
        fake_runs.edit(run, merge_classes)
    losses = values(claimed_numbers("glue", glue), "ood_mean", "loss")
    recorded = content(find(glue, "emoe"))["scores"]["ood"]
    others = [by_metric["loss"] for other, by_metric in recorded.items() if other != name]
    assert losses["emoe", "", 0] == pytest.approx(np.mean(others))


def test_the_best_temperature_is_that_of_the_share_of_right_answers() -> None:
    logits = np.array([[1.0, 0.0]] * 4)
    labels = np.array([0, 0, 0, 1])
    # three of four are right, so the best probability is 3/4, and the loss is its entropy
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert calibrated_loss(logits, labels) == pytest.approx(entropy, abs=1e-8)
    # with a temperature, the scale of the logits does not matter
    assert calibrated_loss(logits * 7, labels) == pytest.approx(entropy, abs=1e-8)
    assert mean_loss(logits * 7, labels) > 1.5
    # mostly wrong answers: the best scale is close to 0
    assert calibrated_loss(logits, 1 - labels) == pytest.approx(math.log(2), abs=1e-3)
    # only right answers: the best scale is large
    assert calibrated_loss(logits, np.zeros(4, dtype=int)) == pytest.approx(0, abs=1e-6)
    assert math.isnan(calibrated_loss(np.array([[math.inf, 0.0]]), np.array([0])))


def test_only_classes_have_a_loss_at_the_best_temperature() -> None:
    tasks = load_benchmark("glue_ood").tasks
    rte, stsb, sick = tasks["rte"], tasks["stsb"], tasks["sick_relatedness"]
    logits = np.array([[1.0, 0.0], [0.0, 1.0], [2.0, 0.0]], dtype=np.float32)
    scores = score_and_loss(logits, np.array([0, 1, 1]), rte, rte, ["accuracy"])
    assert scores["loss_calibrated"] < scores["loss"]
    predictions = np.array([[1.0], [2.0], [4.0]], dtype=np.float32)
    scores = score_and_loss(
        predictions, np.array([1.0, 2.0, 3.0]), stsb, sick, ["pearson_spearman"]
    )
    assert set(scores) == {"pearson_spearman", "loss"}
    assert scores["loss"] == pytest.approx(1 / 3)


def test_a_diverged_model_has_no_losses() -> None:
    rte = load_benchmark("glue_ood").tasks["rte"]
    logits = np.full((2, 2), math.nan, dtype=np.float32)
    scores = score_and_loss(logits, np.array([0, 1]), rte, rte, ["accuracy"])
    assert scores["loss"] is None
    assert scores["loss_calibrated"] is None


# routing


def test_information_is_that_of_the_routing(ood: list[Run]) -> None:
    numbers = claimed_numbers("glue_ood", ood)
    for metric in ("class_information", "task_information"):
        information = values(numbers, "routing", metric)
        methods = set(information.index.get_level_values("method"))
        assert methods == {"lora_gmoe", "lora_emoe", "lora_emoe_learn", "lora_random", "lora2emoe"}
        for method in ("lora_emoe", "lora_random"):
            recorded = content(find(ood, method, seed=2))["routing"][metric]
            assert information[method, "", 2] == recorded


def test_the_change_of_loads_is_the_distance_of_windows_averaged_over_layers(
    glue: list[Run],
) -> None:
    loads = {"1": [[1, 1], [3, 1], [0, 2]], "5": [[1, 1], [2, 2], [5, 5]]}

    def route(made: dict[str, Any]) -> None:
        made["routing"]["windows"] = {"ends": [10, 20, 30], "loads": loads}

    fake_runs.edit(find(glue, "emoe"), route)
    changes = values(claimed_numbers("glue", glue), "training", "load_change")
    # layer 1: shares 1/2 1/2, 3/4 1/4, 0 1, so changes of 1/2 and 3/2; layer 5 does not change
    assert changes["emoe", "", 0] == pytest.approx((1.0 + 0.0) / 2)
    # dense models have no experts, and converted models were not trained as what they became
    methods = set(changes.index.get_level_values("method"))
    assert methods == {"emoe", "gmoe", "emoe_learn", "random_partition"}
    assert len(changes.loc["emoe"]) == 8


# memory


def test_memory_is_compared_on_gpus_with_the_dense_run_of_the_same_seed(glue: list[Run]) -> None:
    assert not claimed_numbers("glue", glue)["domain"].eq("memory").any()
    peaks = {("vanilla", 0): 100.0, ("vanilla", 1): 200.0, ("emoe", 0): 104.0, ("emoe", 1): 220.0}
    for (method, seed), peak in peaks.items():

        def measure(made: dict[str, Any], peak: float = peak) -> None:
            made["environment"]["gpus"] = ["H100"]
            made["cost"]["peak_memory_mb"] = peak

        fake_runs.edit(find(glue, method, seed), measure)
    numbers = claimed_numbers("glue", glue)
    ratios = numbers[numbers["domain"].eq("memory") & numbers["method"].eq("emoe")]
    by_metric = ratios.set_index("metric")["value"].to_dict()
    expected = {"memory_ratio": 1.07, "memory_ratio_low": 1.04, "memory_ratio_high": 1.1}
    assert by_metric == pytest.approx(expected)
    assert set(ratios["task"]) == {"tweets"}


# ranks


def test_ranks_are_those_of_each_seed_over_the_sets_out_of_domain(ood: list[Run]) -> None:
    numbers = claimed_numbers("glue_ood", ood)
    ranks = values(numbers, "ood_rank", "ood_rank", task="")
    ranked = load_benchmark("glue_ood").definition.ranked
    assert set(ranks.index.get_level_values("method")) == set(ranked)
    for seed in range(5):
        scores = {}
        for method in ranked:
            recorded = content(find(ood, method, seed))["scores"]["ood"]
            scores[method] = [by_metric["balanced_accuracy"] for by_metric in recorded.values()]
        for method in ranked:
            # 1 and the number of methods that are better, on each set
            ranks_on_sets = []
            for place, score in enumerate(scores[method]):
                better = [name for name in ranked if scores[name][place] > score]
                ranks_on_sets.append(1 + len(better))
            assert ranks[method, "", seed] == pytest.approx(np.mean(ranks_on_sets))


def test_a_seed_that_a_ranked_method_lacks_has_no_ranks(ood: list[Run]) -> None:
    finished = [run for run in ood if (run.method, run.seed) != ("lora_gmoe", 3)]
    ranks = values(claimed_numbers("glue_ood", finished), "ood_rank", "ood_rank", task="")
    assert set(ranks.index.get_level_values("seed")) == {0, 1, 2, 4}


def test_a_seed_that_lacks_one_of_the_sets_has_no_ranks(here: Path) -> None:
    """Ranks over fewer sets do not compare with those over all."""
    planned = [
        run
        for run in runs_of("glue_ood", "paper")
        if run.model == "bert-large-cased"
        and run.task in ("mrpc", "rte")
        and run.spec["protocol"] == "clean"
    ]
    finished = [
        run for run in planned if (run.method, run.task, run.seed) != ("lora_gmoe", "rte", 1)
    ]
    fake_runs.write_runs(finished)
    ranks = values(claimed_numbers("glue_ood", finished), "ood_rank", "ood_rank", task="")
    assert set(ranks.index.get_level_values("seed")) == {0, 2}
