"""Summarise how routing changes during training: our runs' windows and the paper's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.harness.base import RUNS
from benchmarks.harness.config.benchmark import load_benchmark
from benchmarks.text.outcomes import TextOutcomes
from benchmarks.text.traces import Trace, published_traces, trace_table
from tests import fake_runs

LORA = load_benchmark("glue_lora")


def test_numbers_of_a_trace_that_turns_from_one_expert_to_another() -> None:
    still = Trace(np.tile([0.5, 0.5], (8, 1)), 8)
    assert still.numbers() == {
        "load_entropy": pytest.approx(1), "load_max_over_mean": pytest.approx(1),
        "load_change": 0, "load_drift": 0, "load_drift_chance": 0,
    }  # fmt: skip
    turning = Trace(np.array([[1.0, 0.0]] * 4 + [[0.0, 1.0]] * 4), 8)
    found = turning.numbers()
    assert found["load_entropy"] == pytest.approx(0)
    assert found["load_max_over_mean"] == 2
    assert found["load_change"] == pytest.approx(2 / 7)  # once, of seven steps from window to window
    assert found["load_drift"] == 2
    assert found["load_drift_chance"] == 0


@pytest.fixture
def outcomes(here: Path) -> TextOutcomes:
    return TextOutcomes(LORA, fake_runs.write(RUNS, "smoke", benchmarks=("glue_lora",)))


@pytest.mark.parametrize(
    ("method", "entropy", "busiest", "change"),
    [("lora_emoe", 0.923, 2.21, 0.025), ("lora_emoe_learn", 0.997, 1.28, 0.040), ("lora_gmoe", 0.994, 1.56, 0.048)],
)
def test_the_papers_traces_have_the_numbers_that_are_known_of_them(
    outcomes: TextOutcomes, method: str, entropy: float, busiest: float, change: float
) -> None:
    """Section 3.7 of the paper's facts: entropy, busiest expert and change of its three panels."""
    numbers = published_traces(outcomes)[method].numbers()
    assert numbers["load_entropy"] == pytest.approx(entropy, abs=6e-4)
    assert numbers["load_max_over_mean"] == pytest.approx(busiest, abs=6e-3)
    assert numbers["load_change"] == pytest.approx(change, abs=6e-4)


def test_the_table_has_ours_and_the_papers_and_no_ablations(outcomes: TextOutcomes) -> None:
    rows = trace_table(outcomes).frame.groupby("task_title")["method"].agg(set)
    assert {"lora_emoe", "lora_gmoe", "lora_emoe_learn"} <= rows["Tweets"]
    assert not {"lora", "lora_not_top"} & rows["Tweets"]
    assert rows["QNLI (the paper)"] == {"lora_gmoe", "lora_emoe", "lora_emoe_learn"}
