"""How routing changes while a model is trained: windows of loads, kept beside checkpoints, told in a table and drawn."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.harness.base.errors import DefinitionError
from benchmarks.harness.config.benchmark import load_benchmark
from benchmarks.harness.config.runs import Run
from benchmarks.harness.training import routing_trace
from benchmarks.harness.training.routing_trace import window_steps
from benchmarks.text.outcomes import TextOutcomes
from benchmarks.text.traces import Trace, published_traces, shown_traces, trace_table
from tests import fake_runs
from tests.executed import finish, prepare
from tests.planned import smoke_run

LORA = load_benchmark("glue_lora")


def test_a_window_is_the_authors_or_what_gives_twenty_to_a_hundred_of_them() -> None:
    assert [window_steps(steps) for steps in (1, 20, 80, 2_000, 10_000, 32_735, 122_720)] == [
        1,
        1,
        4,
        100,
        100,
        328,
        1228,
    ]
    for steps in (40, 999, 7_777, 1_000_000):
        assert 20 <= -(-steps // window_steps(steps)) <= 101


def small(method: str) -> Run:
    """A run of the smoke suite on few rows; test_execution kills such runs, and what they end with has the windows too."""
    return smoke_run("glue", method, train_rows=48, eval_rows=20, epochs=2)


@pytest.mark.parametrize("method", ["emoe", "gmoe", "emoe_learn_published"])
def test_a_run_has_the_loads_of_every_window_of_its_training(workdir: Path, method: str) -> None:
    run = small(method)
    path = prepare(run)
    windows = finish(path)["routing"]["windows"]
    config = run.spec["method"]["config"]
    assert windows["ends"] == list(range(1, 13))  # two epochs of six steps
    counts = np.array(windows["loads"]["1"])
    assert counts.shape == (12, config["num_experts"])
    assert (counts.sum(1) % config["top_k"] == 0).all()  # choices, before the capacity drops any
    assert (counts.sum(1) > 0).all()


def test_a_window_ends_with_its_epoch(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routing_trace, "window_steps", lambda steps: 4)
    windows = finish(prepare(small("emoe")))["routing"]["windows"]
    assert windows["ends"] == [4, 6, 10, 12]
    tokens = np.array(windows["loads"]["1"]).sum(1)
    assert tokens[:2].sum() == tokens[2:].sum()  # the same rows in both epochs


def test_a_dense_run_has_no_windows(workdir: Path) -> None:
    assert finish(prepare(small("vanilla")))["routing"] == {}


def test_numbers_of_a_trace_that_turns_from_one_expert_to_another() -> None:
    still = Trace(np.tile([0.5, 0.5], (8, 1)), [])
    assert still.numbers() == {
        "load_entropy": pytest.approx(1), "load_max_over_mean": pytest.approx(1),
        "load_change": 0, "load_drift": 0, "load_drift_chance": 0,
    }  # fmt: skip
    turning = Trace(np.array([[1.0, 0.0]] * 4 + [[0.0, 1.0]] * 4), [])
    found = turning.numbers()
    assert found["load_entropy"] == pytest.approx(0)
    assert found["load_max_over_mean"] == 2
    assert found["load_change"] == pytest.approx(2 / 7)  # once, of seven steps from window to window
    assert found["load_drift"] == 2
    assert found["load_drift_chance"] == 0


def test_one_window_has_no_change_and_one_expert_is_balanced() -> None:
    found = Trace(np.ones((1, 1)), [3]).numbers()
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


def test_a_figure_shows_the_first_seed_of_every_method_that_is_no_control(runs: list[Run]) -> None:
    (shown,) = shown_traces(TextOutcomes(LORA, runs)).values()
    assert "lora_random" not in shown
    seeds = [run for run in runs if run.spec["method"]["name"] == "lora_emoe" and run.spec["seed"] == 0]
    loads = json.loads((Path("results/runs") / seeds[0].folder / "metrics.json").read_text())["routing"]["windows"][
        "loads"
    ]["1"]
    title, trace = shown["lora_emoe"]
    assert title == "LoRA + EMoE, layer 1"
    assert np.allclose(trace.shares, np.array(loads) / np.sum(loads, axis=1, keepdims=True))


def test_a_damaged_file_of_the_papers_is_named(runs: list[Run], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LORA.definition.published_traces.rows, "lora_emoe", "benchmark.yaml")
    with pytest.raises(DefinitionError, match=r"benchmark\.yaml is no table of shares, a row a window"):
        published_traces(TextOutcomes(LORA, runs))
