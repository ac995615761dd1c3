"""Test the concentration of activations, the use of experts beside chance, and the benchmark that shows both."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

import emoe
from benchmarks.harness.base import RUNS, DefinitionError
from benchmarks.harness.config.benchmark import load_benchmark
from benchmarks.harness.report.presentation import present
from benchmarks.harness.results.reference import read_reference
from benchmarks.modularity.pipeline import concentration, dense_magnitudes, gini, neurons_used
from benchmarks.modularity.presentation import (
    ModularityOutcomes,
    draw_activations,
    draw_activations_3d,
    draw_experts,
    neurons_in_use,
    usage_table,
)
from benchmarks.text.usage import (
    class_information,
    mark_experts,
    shared_and_specialised,
    task_information,
)
from tests import fake_runs, tiny_models
from tests.drawn import saved_figures
from tests.executed import finish, prepare
from tests.planned import edited_benchmark, edited_part, smoke_run, specs

BENCHMARK = load_benchmark("modularity")


def test_a_tokens_best_quarter_is_counted_for_it_alone() -> None:
    magnitudes = torch.zeros(3, 8)  # four blocks of two
    magnitudes[0, [0, 1, 4]] = 3.0  # two of three in the first block
    magnitudes[1, [6, 7]] = 1.0  # and nothing of the third token, which does not count
    expected = {"best_quarter": (2 / 3 + 1) / 2, "best_quarter_mass": (2 / 3 + 1) / 2}
    expected["usage_gini"] = gini(torch.tensor([2.0, 0.0, 1.0, 2.0]))
    expected["dead"] = 3 / 8
    assert concentration(magnitudes, magnitudes > 0, 4) == pytest.approx(expected)


def rows_of(shares: list[list[float]], rows: int, tokens: int, seed: int) -> tuple[Any, Any]:
    """Draw the loads of rows whose tokens choose experts by their task's shares."""
    random = np.random.default_rng(seed)
    loads = np.concatenate([random.multinomial(tokens, share, size=rows) for share in shares])
    return loads, np.repeat(np.arange(len(shares)), rows)


def test_an_expert_that_one_task_prefers_is_marked_and_informs_about_the_task() -> None:
    loads, tasks = rows_of([[0.4, 0.2, 0.2, 0.2], [0.1, 0.3, 0.3, 0.3]], rows=50, tokens=20, seed=0)
    signs = mark_experts(loads, tasks, seed=1)
    assert signs[:, 0].tolist() == [1, -1]
    information = task_information(loads, tasks, seed=1)
    assert information.bits > information.chance_95 > information.chance > 0
    shares = np.stack([loads[tasks == task].sum(0) / loads[tasks == task].sum() for task in (0, 1)])
    shared, specialised = shared_and_specialised(shares, signs)
    assert 0 in set(specialised) - set(shared)


def test_few_matrices_without_a_difference_have_a_marked_expert() -> None:
    marked = sum(
        bool(
            mark_experts(*rows_of([[0.25] * 4] * 3, rows=30, tokens=15, seed=seed), seed=seed).any()
        )
        for seed in range(60)
    )
    assert marked <= 8  # 3 are expected; 9 or more happen once in 300


def test_tokens_of_one_row_count_as_one_observation() -> None:
    """Each row uses one expert: counted by tokens, the tasks would differ significantly."""
    loads = np.zeros((6, 4), dtype=np.int64)
    loads[np.arange(6), [0, 1, 2, 3, 0, 1]] = 500
    tasks = np.array([0, 0, 0, 1, 1, 1])
    assert not mark_experts(loads, tasks, seed=0).any()
    information = task_information(loads, tasks, seed=0)
    assert information.bits <= information.chance_95


def test_classes_are_shuffled_within_their_task_and_tasks_without_have_none() -> None:
    loads, tasks = rows_of([[0.7, 0.3], [0.3, 0.7]], rows=40, tokens=20, seed=3)
    classes = np.tile([0, 1], 40)  # loads do not depend on them
    for known in (False, True):
        loads[(classes == 1) & (tasks == 0), 0] += 20 * known
        information = class_information(loads, tasks, classes, seed=0)
        assert information is not None
        assert (information.bits > information.chance_95) == known
    assert class_information(loads, tasks, np.full(80, -1), seed=0) is None


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_used_neurons_are_those_of_the_models_forward_pass(name: str) -> None:
    model, batches = tiny_models.build(name), [tiny_models.inputs(name)]
    emoe.convert_(model, emoe.EMoEConfig(num_experts=8, top_k=3, layers=[1]))
    expected = tiny_models.output(model, batches[0])
    used = {
        selection: neurons_used(model, 1, batches, selection)
        for selection in ("top", "bottom", "not_top")
    }
    assert torch.equal(used["top"], dense_magnitudes(model, 1, batches) != 0)
    assert torch.equal(used["top"], ~used["not_top"])
    assert (used["bottom"].float().mean(1) == 3 / 8).all()
    assert not (used["top"] & used["bottom"]).any()
    assert torch.equal(tiny_models.output(model, batches[0]), expected)


def test_a_run_measures_experts_and_repeats_exactly(workdir: Path) -> None:
    run = smoke_run("modularity", "emoe", "reading")
    metrics = finish(prepare(run))
    config, measured = run.spec["method"]["config"], metrics["measured"]["experts"]
    assert (
        config["top_k"] / config["num_experts"] < measured["kept_top"] < 1
    )  # more than as many random experts
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
    by_token = [
        sorted(zip(shown["tokens"], shown["values"], strict=True))
        for shown in (matrix, contiguous["matrix"])
    ]
    assert by_token[0] == by_token[1]
    assert matrix["places"] != contiguous["matrix"]["places"]
    assert measured["inertia"] < contiguous["measured"]["experts"]["inertia"]


def test_methods_whose_experts_mean_nothing_before_training_are_refused() -> None:
    for method in ("gmoe", "emoe_learn"):
        with pytest.raises(DefinitionError, match=f"methods.{method}' must be an EMoE"):
            edited_benchmark("modularity", {"methods": {"emoe": {}, method: {}}})
    # the usual router may also be named
    edited_benchmark("modularity", {"methods": {"emoe": {"router": "avg_k"}}})


def test_fewer_shown_tokens_than_tasks_are_refused() -> None:
    part = edited_part("modularity", "mini", {"reading.shown_tokens": 3})
    with pytest.raises(
        DefinitionError, match=r"modularity\.reading\.shown_tokens' is 3, but there are 4 tasks"
    ):
        specs(BENCHMARK, part)


@pytest.fixture
def outcomes(here: Path) -> ModularityOutcomes:
    """Make up numbers of the mini suite."""
    runs = fake_runs.write(RUNS, "mini", benchmarks=("modularity",))
    return ModularityOutcomes(BENCHMARK, fake_runs.records(runs))


def figure_of(draw: Callable[..., None], outcomes: ModularityOutcomes) -> Figure:
    with saved_figures() as figures:
        draw(outcomes, Path("figure"))
    (figure,) = figures
    return figure


def test_panels_of_activations_have_equal_axes_and_no_ticks_for_tasks(
    outcomes: ModularityOutcomes,
) -> None:
    panels = figure_of(draw_activations, outcomes).axes
    assert len(panels) == 3
    assert {axis.get_ylabel() for axis in panels} == {"tokens of", ""}
    for axis in panels:
        assert axis.get_xlim() == panels[0].get_xlim()
        assert axis.get_ylim() == panels[0].get_ylim()
        assert axis.yaxis.get_tick_params()["length"] == 0
        # smaller dots are invisible on a page
        dots = [line for line in axis.lines if line.get_marker() == "o"]
        assert [line.get_markersize() >= 1.4 for line in dots] == [True]


def test_both_panels_in_3d_have_the_same_axes(outcomes: ModularityOutcomes) -> None:
    first, second = figure_of(draw_activations_3d, outcomes).axes
    assert first.get_zlim() == second.get_zlim()
    assert first.get_xlim() == second.get_xlim()
    assert first.get_ylim() == second.get_ylim()


def test_tokens_without_active_neurons_are_drawn(here: Path) -> None:
    runs = fake_runs.write(RUNS, "mini", benchmarks=("modularity",))
    # a placeholder has one axis
    for quiet_methods, num_panels in ((["emoe"], 2), (["emoe", "contiguous"], 1)):
        for run in runs:
            if run.method in quiet_methods:
                fake_runs.edit(
                    run,
                    lambda content: content["matrix"].update(tokens=[], places=[], values=[]),
                )
        quiet = ModularityOutcomes(BENCHMARK, fake_runs.records(runs))
        assert len(figure_of(draw_activations, quiet).axes) == 3
        assert len(figure_of(draw_activations_3d, quiet).axes) == num_panels


def test_the_marks_of_expert_use_are_explained_and_experts_are_numbered(
    outcomes: ModularityOutcomes,
) -> None:
    figure = figure_of(draw_experts, outcomes)
    (legend,) = figure.legends
    meanings = {
        handle.get_marker(): text.get_text()
        for handle, text in zip(legend.legend_handles, legend.get_texts(), strict=True)
    }
    assert meanings["^"] == "used more than by chance"
    assert meanings["v"] == "used less than by chance"
    assert meanings.get("o") in (None, "shared: used by all sets")
    panel = figure.axes[0]
    assert panel.get_xlabel() == "expert"
    numbers = [label.get_text() for label in panel.get_xticklabels()]
    assert numbers == [str(number) for number in range(1, 17)]


def test_tables_have_means_over_seeds_the_papers_values_and_a_sentence_about_chance(
    here: Path,
) -> None:
    runs = fake_runs.write(RUNS, "mini", benchmarks=("modularity",))
    records = fake_runs.records(runs)
    by_cell = present(BENCHMARK, records).tables[0].frame.set_index(["method", "num_experts"])
    assert by_cell.loc[("emoe", 64), "best_quarter_paper"] == pytest.approx(0.957)
    assert np.isnan(by_cell.loc[("emoe", 16), "usage_gini_paper"])
    rows = ModularityOutcomes(BENCHMARK, records).rows
    measured = rows[(rows["method"] == "random_partition") & (rows["num_experts"] == 32)]
    row = by_cell.loc[("random_partition", 32)]
    assert (row["best_quarter"], row["n"]) == (pytest.approx(measured["best_quarter"].mean()), 3)
    for bits, words in ((0.9, "more information"), (0.0, "no more information")):
        for run in runs:
            fake_runs.edit(
                run,
                lambda content, bits=bits: content["measured"]["experts"].update(
                    task_information=bits
                ),
            )
        sentences = present(BENCHMARK, fake_runs.records(runs)).verdicts
        assert any(f"has {words} on the task than chance" in sentence for sentence in sentences)


def test_constructions_and_columns_have_the_names_of_the_page(outcomes: ModularityOutcomes) -> None:
    titles = [method.title for method in BENCHMARK.methods().values()]
    assert titles == ["Contiguous", "Clustered", "Random"]
    headings = neurons_in_use(outcomes).markdown().splitlines()[2]
    for name in ("Dead neurons", "Active neurons", "Magnitude"):
        assert f"{name} in the top k experts (%)" in headings
        assert f"{name} in the bottom k experts (%)" in headings
    information = usage_table(outcomes).markdown().splitlines()[2]
    assert "Mutual information with task (bit)" in information


def test_the_page_has_the_blessed_ranges_of_dead_neurons() -> None:
    numbers = read_reference("mini", "modularity").rows
    of_clusters = numbers[numbers["run"].str.startswith("modularity minilm tweets emoe ")]
    ranges = {}
    for metric in ("dead_bottom", "dead_top"):
        shares = of_clusters.loc[of_clusters["metric"] == metric, "value"].astype(float)
        ranges[metric] = f"{shares.min() * 100:.1f} to {shares.max() * 100:.1f} %"
    sentence = (
        f"In the bottom k clusters {ranges['dead_bottom']} of the neurons are dead, in the top k "
        f"clusters {ranges['dead_top']}."
    )
    assert sentence in (BENCHMARK.folder / "README.md").read_text()
