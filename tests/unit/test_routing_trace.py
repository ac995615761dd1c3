"""Summarise how routing changes during training: our runs' windows and the paper's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.harness.config.benchmark import load_benchmark
from benchmarks.harness.config.runs import Run
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


def test_one_window_has_no_change_and_one_expert_is_balanced() -> None:
    found = Trace(np.ones((1, 1)), 3).numbers()
    assert found["load_entropy"] == 1
    assert np.isnan([found["load_change"], found["load_drift"], found["load_drift_chance"]]).all()


@pytest.fixture
def runs(here: Path) -> list[Run]:
    return fake_runs.write(Path("results/runs"), "smoke", benchmarks=("glue_lora",))


def test_the_papers_traces_have_the_numbers_that_are_known_of_them(runs: list[Run]) -> None:
    """Section 3.7 of the paper's facts: entropy, busiest expert and change of its three panels."""
    found = {name: trace.numbers() for name, trace in published_traces(TextOutcomes(LORA, runs)).items()}
    known = {
        "lora_emoe": (0.923, 2.21, 0.025),
        "lora_emoe_learn": (0.997, 1.28, 0.040),
        "lora_gmoe": (0.994, 1.56, 0.048),
    }
    for name, (entropy, busiest, change) in known.items():
        assert found[name]["load_entropy"] == pytest.approx(entropy, abs=6e-4)
        assert found[name]["load_max_over_mean"] == pytest.approx(busiest, abs=6e-3)
        assert found[name]["load_change"] == pytest.approx(change, abs=6e-4)


def test_the_table_has_ours_and_the_papers_and_no_ablations(runs: list[Run]) -> None:
    frame = trace_table(TextOutcomes(LORA, runs)).frame
    ours = frame[frame["task_title"] == "Tweets"]
    assert {"lora_emoe", "lora_gmoe", "lora_emoe_learn"} <= set(ours["method"])
    assert not {"lora", "lora_not_top"} & set(ours["method"])
    paper = frame[frame["task_title"] == "QNLI (the paper)"]
    assert list(paper["method"]) == ["lora_gmoe", "lora_emoe", "lora_emoe_learn"]
    assert set(paper["windows"]) == {"330"}
