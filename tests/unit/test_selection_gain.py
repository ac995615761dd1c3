"""Test what the choice of hyper-parameters adds, on made-up runs, by hand and by simulation."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import integrate, stats

from benchmarks.harness.config.benchmark import load_benchmark
from benchmarks.harness.config.runs import Run
from benchmarks.harness.config.suite import load_suite
from benchmarks.harness.report.presentation import with_runs
from benchmarks.harness.results.records import Record
from benchmarks.text.outcomes import TextOutcomes
from benchmarks.text.selection_gain import (
    selection_gain_table,
    selection_gains,
)
from tests import fake_runs

LORA = load_benchmark("glue_lora")
# three learning rates and seeds each; the last has three k too
METHODS = ("lora", "lora_emoe", "lora_emoe_search")
TASKS = ("cola", "mrpc")
SEARCHED = "LoRA + EMoE, k searched"


def is_used(run: Run) -> bool:
    return (
        run.spec["model"]["name"] == "bert-large-cased"
        and run.spec["task"]["name"] in TASKS
        and run.spec["method"]["name"] in METHODS
    )


@pytest.fixture(scope="module")
def runs(shared_here: Path) -> list[Run]:
    """Make up numbers of three rows of the paper suite on two tasks; one seed of one choice is missing."""
    suite = load_suite({"suite": "paper", "benchmarks": ["glue_lora"]})
    used = [run for run in suite.runs if is_used(run)]
    lost = next(run for run in used if run.method == "lora_emoe_search")
    kept = [run for run in used if run is not lost]
    fake_runs.write_runs(kept)
    return kept


@pytest.fixture(scope="module")
def records(runs: list[Run]) -> list[Record]:
    return fake_runs.records(runs)


def scores(
    runs: list[Run], part: str, protocol: str, task: str, method: str
) -> dict[tuple[str, float], dict[int, float]]:
    """Read the scores of a row from the files: by variant and learning rate, then by seed."""
    by_choice: dict[tuple[str, float], dict[int, float]] = {}
    for run in runs:
        spec = run.spec
        if (spec["protocol"], run.task, run.method) == (protocol, task, method):
            content = json.loads(run.metrics_file.read_text())
            choice = (run.variant, spec["learning_rate"])
            score = content["scores"][part][task][spec["task"]["metric"]]
            by_choice.setdefault(choice, {})[spec["seed"]] = score
    return by_choice


def expected_best(count: int) -> float:
    """Integrate the tails of the distribution of the maximum of ``count`` normal variables."""
    above = integrate.quad(lambda x: 1 - stats.norm.cdf(x) ** count, 0, 12)[0]
    below = integrate.quad(lambda x: stats.norm.cdf(x) ** count, -12, 0)[0]
    return above - below


def error_of_a_choice(choices: list[list[float]]) -> float:
    """Return the deviation of a choice's mean score, from the residuals of all its runs."""
    residuals = np.concatenate([np.array(values) - np.mean(values) for values in choices])
    freedom = len(residuals) - len(choices)
    # the mean of the chi distribution is the bias of a deviation
    bias = stats.chi.mean(freedom) / math.sqrt(freedom)
    deviation = math.sqrt((residuals**2).sum() / freedom) / bias
    return deviation * math.sqrt(np.mean([1 / len(values) for values in choices]))


def test_gains_are_those_of_the_files(runs: list[Run], records: list[Record]) -> None:
    frame = selection_gains(TextOutcomes(LORA, records)).set_index(["task", "method"])
    assert set(frame.index) == {(task, method) for task in TASKS for method in METHODS}
    assert set(frame["protocol"]) == {"published"}
    for task, method in frame.index:
        row = frame.loc[(task, method)]
        by_choice = scores(runs, "dev", "published", task, method)
        choices = [list(by_seed.values()) for by_seed in by_choice.values()]
        means = [np.mean(values) for values in choices]
        count = 9 if method == "lora_emoe_search" else 3
        assert row["num_choices"] == len(choices) == count
        assert row["best_gain"] == pytest.approx(max(means) - np.mean(means))
        assert row["luck"] == pytest.approx(expected_best(count) * error_of_a_choice(choices))
        of_baseline = scores(runs, "dev", "published", task, "lora")
        error = error_of_a_choice([list(by_seed.values()) for by_seed in of_baseline.values()])
        assert row["baseline_luck"] == pytest.approx(expected_best(count) * error)
    lost_a_seed = ("cola", "lora_emoe_search")
    assert frame["n"].to_dict() == dict.fromkeys(frame.index, "3") | {lost_a_seed: "2–3"}


def test_differences_under_both_selections_stand_side_by_side(
    runs: list[Run], records: list[Record]
) -> None:
    outcomes = TextOutcomes(LORA, records)
    table = selection_gain_table(outcomes)
    row = table.frame.set_index(["task", "method"]).loc[("mrpc", "lora_emoe")]
    for protocol in ("published", "clean"):
        reported = {}
        for method in ("lora", "lora_emoe"):
            dev = scores(runs, "dev", protocol, "mrpc", method)
            best = max(dev, key=lambda choice: np.mean(list(dev[choice].values())))
            reported[method] = scores(runs, "test", protocol, "mrpc", method)[best]
        gaps = [reported["lora_emoe"][seed] - reported["lora"][seed] for seed in (0, 1, 2)]
        assert row[f"{protocol}_delta"] == pytest.approx(np.mean(gaps))
    # the suite searches k under the authors' selection alone
    searched = table.texts().set_index(["Trained on", "Method"]).loc[("MRPC", SEARCHED)]
    assert searched["Δ, clean selection (points)"] == "–"
    assert searched["Δ, authors' selection (points)"] != "–"


def test_a_row_links_to_its_runs_of_both_selections(runs: list[Run], records: list[Record]) -> None:
    table = selection_gain_table(TextOutcomes(LORA, records))
    frame = with_runs(table, table.origins, "glue_lora").frame.set_index(["task", "method"])
    linked = frame.loc[("cola", "lora"), "runs"].split()
    expected = {f"glue_lora/{run.id}" for run in runs if (run.task, run.method) == ("cola", "lora")}
    assert set(linked) == expected
    assert len(linked) == 2 * 3 * 3  # selections, rates, seeds


def test_luck_is_what_pure_noise_adds(records: list[Record]) -> None:
    """If all choices are equally good, best − mean is the gain by luck on average, for 3 and 9 choices."""
    outcomes = TextOutcomes(LORA, records)
    dev_scores = outcomes.recorded_numbers[outcomes.recorded_numbers["part"] == "dev"]
    # the same runs on 400 times as many tasks
    copies = [dev_scores.assign(task=dev_scores["task"] + f" {i}") for i in range(400)]
    noisy = pd.concat(copies, ignore_index=True)
    noise = 0.01 * np.random.default_rng(0).standard_normal(len(noisy))
    outcomes.recorded_numbers = noisy.assign(value=0.8 + noise)
    for _, rows in selection_gains(outcomes).groupby("method"):
        assert len(rows) == 800
        for luck in ("luck", "baseline_luck"):
            gaps = rows["best_gain"] - rows[luck]
            assert abs(gaps.mean()) < 3 * gaps.sem()
            assert gaps.sem() < 0.03 * rows["best_gain"].mean()  # so it sees an error of a tenth
        assert rows["deviation"].mean() == pytest.approx(0.01, rel=0.03)


def only(records: list[Record], **names: Any) -> TextOutcomes:
    """Return the outcomes of the runs whose spec has these values."""
    kept = []
    for record in records:
        if all(record.run.spec[key] == value for key, value in names.items()):
            kept.append(record)
    return TextOutcomes(LORA, kept)


def test_clean_runs_alone_show_the_clean_choice(records: list[Record]) -> None:
    table = selection_gain_table(only(records, protocol="clean"))
    assert set(table.frame["selection"]) == {"clean"}
    assert len(table.frame) == 4  # two rows on two tasks
    headings = [column.heading for column in table.printed]
    assert "Δ, clean selection (points)" in headings
    assert "Δ, authors' selection (points)" not in headings


def test_a_single_seed_tells_no_luck(records: list[Record]) -> None:
    frame = selection_gains(only(records, seed=2))
    assert len(frame) == 6
    assert (frame["best_gain"] > 0).all()
    assert frame[["deviation", "luck", "baseline_luck"]].isna().all(axis=None)


def test_without_a_choice_the_table_is_empty(records: list[Record]) -> None:
    one_choice = only(records, learning_rate=3.0e-4)
    # k is searched on both tasks, so both stay, with the rows that have a single choice
    assert selection_gains(one_choice)["num_choices"].tolist() == [1, 1, 3] * 2
    without_search = [record for record in records if record.run.method != "lora_emoe_search"]
    assert selection_gain_table(only(without_search, learning_rate=3.0e-4)).frame.empty
    assert selection_gain_table(TextOutcomes(LORA, [])).frame.empty
