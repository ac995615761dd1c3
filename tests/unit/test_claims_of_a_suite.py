"""The claims of a finished suite: a row a test, a table, a figure, a command."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from benchmarks.harness.base.paths import OVERRIDES, RUNS
from benchmarks.harness.config.claims import load_claims
from benchmarks.harness.config.suite import Suite, load_suite
from benchmarks.harness.report.claims import claims_table, judged
from benchmarks.harness.report.claims_figure import draw_claims, write_claims
from benchmarks.harness.results.evidence import (
    Verdict,
    pairs_needed,
)
from tests import fake_runs
from tests.programs import call

PART_OF_MINI = {"suite": "mini", "benchmarks": ["glue_lora", "domainbed", "llama"]}


@pytest.fixture(scope="module")
def suite(shared_here: Path) -> Suite:
    """Most of the mini suite with made-up runs, EMoE a little better by LoRA."""
    found = load_suite(PART_OF_MINI)
    fake_runs.write_runs(found.runs, {"lora_emoe": 0.01})
    return found


@pytest.fixture(scope="module")
def rows(suite: Suite) -> pd.DataFrame:
    """Its claims."""
    return judged(suite)


def test_every_test_of_every_claim_has_a_row(rows: pd.DataFrame) -> None:
    expected = [(name, test.title) for name, claim in load_claims().items() for test in claim.tests]
    assert list(zip(rows["claim"], rows["test"], strict=True)) == expected
    assert set(rows["verdict"]) <= {word.value for word in Verdict}


def test_p_is_corrected_over_all_tests_of_the_table(rows: pd.DataFrame) -> None:
    for column in ("p", "equivalence_p"):
        p = sorted((value, place) for place, value in rows[column].dropna().items())
        assert len(p) > 5
        highest = 0.0
        for step, (value, place) in enumerate(p):
            highest = max(highest, min(1.0, value * (len(p) - step)))
            assert rows.loc[place, f"{column}_holm"] == pytest.approx(highest)


def test_differences_are_those_of_the_runs(suite: Suite, rows: pd.DataFrame) -> None:
    scores: dict[tuple[str, int], float] = {}
    for run in suite.runs_of("glue_lora"):
        if run.spec["method"]["name"] in ("lora", "lora_emoe"):
            found = json.loads((RUNS / run.folder / "metrics.json").read_text())
            task = run.spec["task"]
            key = (run.spec["method"]["name"], run.spec["seed"])
            scores[key] = found["scores"]["test"][task["name"]][task["metric"]]
    seeds = sorted({seed for _, seed in scores})
    pairs = np.array([scores["lora_emoe", seed] - scores["lora", seed] for seed in seeds]) * 100
    row = rows[(rows["claim"] == "in_domain") & (rows["benchmark"] == "glue_lora")].iloc[0]
    assert (row.delta, row.n, row.deviation) == pytest.approx((pairs.mean(), len(pairs), pairs.std(ddof=1)))
    assert row.pairs_needed == pairs_needed(0.79, row.deviation, 0.05 / rows["p"].notna().sum())
    assert row.pairs_needed_alone <= row.pairs_needed


def test_what_is_not_tested_says_what_it_needs(rows: pd.DataFrame) -> None:
    missing = rows[rows["verdict"] == "not tested"].set_index(["claim", "test"])["remark"]
    assert all(text.startswith("not tested in this suite: ") for text in missing)
    assert missing["llama", "questions, full fine-tuning"].endswith("its runs are in paper")
    assert missing["robust", "every N and k, full fine-tuning"].endswith("its runs are in paper")
    assert missing["cost"].iloc[0].endswith("its runs are in smoke, speed")
    assert "mini" not in missing["llama", "questions, full fine-tuning"]


def test_the_table_shows_what_was_found(suite: Suite, rows: pd.DataFrame) -> None:
    table = claims_table(suite, rows)
    cells = table.texts()
    assert list(cells.columns[:5]) == ["Claim", "Tested on", "The paper", "These runs", "n"]
    assert cells["Claim"].ne("").sum() == len(load_claims())
    first, row = cells.iloc[1], rows.iloc[1]
    assert first["Tested on"] == "text, LoRA: (LoRA + EMoE) − LoRA"
    assert first["The paper"].startswith("+0.79 points (Fig. 2")
    assert first["These runs"] == f"{row.delta:+.2f} points [{row.low:+.2f}, {row.high:+.2f}]"
    assert first["n"] == f"{row.n:g} seeds"
    assert cells.loc[rows["claim"] == "parameters", "These runs"].tolist() == ["–", "0 parameters", "0 parameters"]
    assert f"over the {rows['p'].notna().sum()} tests" in table.caption
    assert "random weights" not in table.caption


def test_files_of_a_suite_with_random_weights_say_that_scores_mean_nothing(here: Path) -> None:
    suite = load_suite({"suite": "smoke", "benchmarks": ["glue", "speed"]})
    fake_runs.write_runs(suite.runs)
    write_claims(suite)
    for file in suite.claim_files():
        assert Path(file).stat().st_size > 1000
    text = Path("results/smoke/tables/claims.md").read_text()
    assert "random weights" in text
    frame = pd.read_csv("results/smoke/tables/claims.csv").set_index(["claim", "test"])
    assert frame.loc[("gate", "text in domain, full fine-tuning"), "remark"].endswith("no test: 1 seed")
    assert frame.loc[("cost", "time of a training step"), "n"] == 1


def test_the_command_prints_every_number(rows: pd.DataFrame, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(OVERRIDES, json.dumps(PART_OF_MINI))
    found = json.loads(call("claims", "--suite", "mini", "--json"))
    assert [row["verdict"] for row in found] == list(rows["verdict"])
    assert found[0]["delta"] is None
    assert [found[1][key] for key in ("p", "delta")] == pytest.approx([rows[key].iloc[1] for key in ("p", "delta")])


def test_a_suite_without_claimed_benchmarks_shows_no_claims(monkeypatch: pytest.MonkeyPatch) -> None:
    suite = load_suite({"suite": "mini", "benchmarks": ["glue"]})
    assert [file for file in suite.output_files() if "claims" in file] == suite.claim_files() != []
    assert not [file for file in suite.output_files("glue") if "claims" in file]
    monkeypatch.setattr("benchmarks.harness.config.suite.compared_benchmarks", lambda names: [])
    assert not [file for file in suite.output_files() if "claims" in file]


def test_a_figure_without_tests_says_so(rows: pd.DataFrame, tmp_path: Path) -> None:
    draw_claims(rows[rows["verdict"] == "not tested"], tmp_path / "none")
    assert (tmp_path / "none.png").stat().st_size > 500
