"""Test the concentration of activations, the use of experts beside chance, and the benchmark that shows both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import emoe
from benchmarks.harness.base import RUNS, DefinitionError
from benchmarks.harness.config.benchmark import load_benchmark
from benchmarks.harness.report.presentation import present
from benchmarks.modularity.activations import concentration, dense_magnitudes, gini, is_active, neurons_used, selected
from benchmarks.modularity.outcomes import ModularityOutcomes
from benchmarks.text.usage import class_information, marks, shared_and_specialised, task_information
from tests import fake_runs, tiny_models
from tests.executed import finish, prepare
from tests.planned import edited_benchmark, edited_part, plan, smoke_run, specs

BENCHMARK = load_benchmark("modularity")


# concentration


def test_a_tokens_best_quarter_is_counted_for_it_alone() -> None:
    magnitudes = torch.zeros(3, 8)  # four blocks of two
    magnitudes[0, [0, 1, 4]] = 3.0  # two of three in the first block
    magnitudes[1, [6, 7]] = 1.0  # and nothing of the third token, which does not count
    expected = {"best_quarter": (2 / 3 + 1) / 2, "best_quarter_mass": (2 / 3 + 1) / 2}
    expected["usage_gini"] = gini(torch.tensor([2.0, 0.0, 1.0, 2.0]))
    expected["dead"] = 3 / 8
    assert concentration(magnitudes, magnitudes > 0, 4) == pytest.approx(expected)


@pytest.mark.parametrize(("share", "count"), [(0.1, 10), (0.333, 33), (1.0, 100), (0.001, 1)])
def test_a_share_of_the_largest_is_active(share: float, count: int) -> None:
    values = torch.randperm(100).float().reshape(10, 10)
    assert is_active(values, share).sum() == count
    assert values[is_active(values, share)].min() == 100 - count


def test_gini_by_its_definition() -> None:
    values = np.random.default_rng(0).random(30)
    pairs = np.abs(values[:, None] - values[None]).sum() / (2 * len(values) ** 2 * values.mean())
    assert gini(torch.from_numpy(values)) == pytest.approx(pairs)


# use of experts


def rows_of(shares: list[list[float]], rows: int, tokens: int, seed: int) -> tuple[Any, Any]:
    """Loads of rows whose tokens choose experts by their task's shares."""
    random = np.random.default_rng(seed)
    loads = np.concatenate([random.multinomial(tokens, share, size=rows) for share in shares])
    return loads, np.repeat(np.arange(len(shares)), rows)


def test_an_expert_that_one_task_prefers_is_marked_and_told_of() -> None:
    loads, tasks = rows_of([[0.4, 0.2, 0.2, 0.2], [0.1, 0.3, 0.3, 0.3]], rows=50, tokens=20, seed=0)
    signs = marks(loads, tasks, seed=1)
    assert signs[:, 0].tolist() == [1, -1]
    told = task_information(loads, tasks, seed=1)
    assert told.bits > told.chance_95 > told.chance > 0
    shares = np.stack([loads[tasks == task].sum(0) / loads[tasks == task].sum() for task in (0, 1)])
    shared, specialised = shared_and_specialised(shares, signs)
    assert 0 in set(specialised) - set(shared)


def test_by_chance_alone_one_matrix_in_twenty_has_a_mark() -> None:
    marked = sum(
        bool(marks(*rows_of([[0.25] * 4] * 3, rows=30, tokens=15, seed=seed), seed=seed).any()) for seed in range(60)
    )
    assert marked <= 8  # 3 are expected; 9 or more happen once in 300


def test_tokens_of_a_row_go_together_so_that_few_rows_tell_little() -> None:
    """Rows that use one expert each: by tokens the tasks would differ beyond doubt, by rows they do not."""
    loads = np.zeros((6, 4), dtype=np.int64)
    loads[np.arange(6), [0, 1, 2, 3, 0, 1]] = 500
    tasks = np.array([0, 0, 0, 1, 1, 1])
    assert not marks(loads, tasks, seed=0).any()
    told = task_information(loads, tasks, seed=0)
    assert told.bits <= told.chance_95


def test_classes_are_shuffled_within_their_task_and_tasks_without_have_none() -> None:
    loads, tasks = rows_of([[0.7, 0.3], [0.3, 0.7]], rows=40, tokens=20, seed=3)
    classes = np.tile([0, 1], 40)  # the loads know nothing of them
    for known in (False, True):
        loads[(classes == 1) & (tasks == 0), 0] += 20 * known
        told = class_information(loads, tasks, classes, seed=0)
        assert told is not None
        assert (told.bits > told.chance_95) == known
    assert class_information(loads, tasks, np.full(80, -1), seed=0) is None


# what selections use


def test_what_is_used_fires_or_is_dead() -> None:
    active = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0]], dtype=torch.bool)
    used = torch.tensor([[1, 0, 1, 0], [0, 1, 0, 1]], dtype=torch.bool)
    magnitudes = torch.tensor([[4.0, 1.0, 2.0, 1.0], [4.0, 5.0, 2.0, 1.0]])
    assert selected(used, magnitudes, active) == {"kept": 12 / 20, "active": 0.5, "dead": 0.5}


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_neurons_in_use_are_those_that_the_model_computes_with(name: str) -> None:
    model, batches = tiny_models.build(name), [tiny_models.inputs(name)]
    emoe.convert_(model, emoe.EMoEConfig(num_experts=8, top_k=3, layers=[1]))
    expected = tiny_models.output(model, batches[0])
    used = {selection: neurons_used(model, 1, batches, selection) for selection in ("top", "bottom", "not_top")}
    assert torch.equal(used["top"], dense_magnitudes(model, 1, batches) != 0)
    assert torch.equal(used["top"], ~used["not_top"])
    assert (used["bottom"].float().mean(1) == 3 / 8).all()
    assert not (used["top"] & used["bottom"]).any()
    assert torch.equal(tiny_models.output(model, batches[0]), expected)  # it is as it was


# a run


def test_a_run_measures_and_counts_and_does_so_again(workdir: Path) -> None:
    run = smoke_run("modularity", "emoe", "reading")
    metrics = finish(prepare(run))
    config, measured = run.spec["method"]["config"], metrics["measured"]["experts"]
    assert config["top_k"] / config["num_experts"] < measured["kept_top"] < 1  # more than as many random experts
    assert measured["kept_bottom"] < measured["kept_top"]
    assert 0.25 < measured["best_quarter"] <= 1
    assert set(metrics["usage"]["tasks"]) == {"tweets", "amazon"}
    matrix = metrics["matrix"]
    assert matrix["tasks"] == ["tweets"] * 20 + ["amazon"] * 20
    assert len(matrix["tokens"]) == len(matrix["places"]) == len(matrix["values"]) > 0
    assert finish(prepare(run, "again")) == metrics
    other = finish(prepare(smoke_run("modularity", "emoe", "reading", batch_size=7)))
    assert other["measured"]["experts"] == pytest.approx(measured, abs=1e-4)
    # contiguous neurons fire as the clustered ones do, in another order
    contiguous = finish(prepare(smoke_run("modularity", "contiguous", "reading")))
    by_token = [sorted(zip(shown["tokens"], shown["values"], strict=True)) for shown in (matrix, contiguous["matrix"])]
    assert by_token[0] == by_token[1]
    assert matrix["places"] != contiguous["matrix"]["places"]
    assert measured["inertia"] < contiguous["measured"]["experts"]["inertia"]


# what is planned, and what is not


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ({"emoe": {}, "gmoe": {}}, "methods.gmoe' must be an EMoE"),
        ({"emoe": {}, "emoe_learn": {}}, "methods.emoe_learn' sets 'router', which needs training"),
    ],
)
def test_rows_that_say_nothing_before_training_are_refused(methods: dict[str, Any], message: str) -> None:
    with pytest.raises(DefinitionError, match=message):
        edited_benchmark("modularity", {"methods": methods})


def test_two_tasks_are_compared_in_one_layer() -> None:
    runs = plan(["modularity"], "mini", exclude=["nyt"])
    assert {other["name"] for run in runs for other in run.spec["ood"]} == {"amazon", "movie"}
    with pytest.raises(DefinitionError, match="needs two tasks that are not excluded"):
        plan(["modularity"], "smoke", exclude=["amazon"])
    block = {"model": ["tiny-bert"], "method": ["emoe"], "num_experts": [8], "layers": [[0, 1]], "seed": [0]}
    with pytest.raises(DefinitionError, match=r"grid\[0\]\.layers' must be lists of one layer each"):
        specs(BENCHMARK, edited_part("modularity", "smoke", {"grid": [block]}))


# what is shown


def test_tables_have_means_over_seeds_the_papers_values_and_a_sentence_about_chance(here: Path) -> None:
    runs = fake_runs.write(RUNS, "mini", benchmarks=("modularity",))
    by_cell = present(BENCHMARK, runs).tables[0].frame.set_index(["method", "num_experts"])
    assert by_cell.loc[("emoe", 64), "best_quarter_paper"] == pytest.approx(0.957)
    assert np.isnan(by_cell.loc[("emoe", 16), "usage_gini_paper"])
    rows = ModularityOutcomes(BENCHMARK, runs).rows
    own = rows[(rows["method"] == "random_partition") & (rows["num_experts"] == 32)]
    row = by_cell.loc[("random_partition", 32)]
    assert (row["best_quarter"], row["n"]) == (pytest.approx(own["best_quarter"].mean()), 3)
    for bits, words in ((0.9, "more than chance"), (0.0, "no more than chance")):
        for run in runs:
            fake_runs.edit(run, lambda content, bits=bits: content["measured"]["experts"].update(task_information=bits))
        assert any(f"tells {words} of the task" in sentence for sentence in present(BENCHMARK, runs).verdicts)
