"""Test DomainBed's selections, and their tables, figures and verdicts."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import pyplot as plt

from benchmarks.domainbed.figures import draw_accuracy, draw_routing
from benchmarks.domainbed.outcomes import DomainOutcomes
from benchmarks.domainbed.presentation import choices, paper_table, results, summary
from benchmarks.domainbed.protocol import (
    RunRecords,
    Selection,
    leave_one_domain_out,
    oracle_validation,
    training_domain_validation,
)
from benchmarks.harness.config.benchmark import load_benchmark
from benchmarks.harness.config.runs import Run, run_from_spec
from benchmarks.harness.report import plots
from benchmarks.harness.report.placeholders import is_drawn
from benchmarks.harness.report.presentation import with_runs
from tests import fake_runs
from tests.drawn import saved_figures
from tests.fake_runs import records, write_runs
from tests.image_sets import pacs_run
from tests.planned import plan


def record(step: int, within: list[float], out: list[float]) -> dict[str, Any]:
    accuracies = {f"env{env}_in_acc": value for env, value in enumerate(within)}
    return {
        "step": step,
        **accuracies,
        **{f"env{env}_out_acc": value for env, value in enumerate(out)},
    }


def pairs(choice: int, values: dict[int, list[float]]) -> list[RunRecords]:
    """Return runs that hold out 0 and another environment: the accuracy on that, by step."""
    runs = []
    for env, by_step in values.items():
        within = [[value if other == env else 0.0 for other in range(3)] for value in by_step]
        records = [record(300 * number, row, [1, 1, 1]) for number, row in enumerate(within)]
        runs.append(RunRecords((0, env), choice, records))
    return runs


# environment 0 is held out
ALONE = [
    RunRecords(
        (0,),
        0,
        [record(0, [0.5, 0, 0], [0.9, 0.2, 0.4]), record(300, [0.6, 0, 0], [0.1, 0.5, 0.5])],
    ),
    RunRecords(
        (0,),
        1,
        [record(0, [0.7, 0, 0], [0.3, 0.6, 0.4]), record(300, [0.8, 0, 0], [0.2, 0.1, 0.1])],
    ),
]
SHUFFLED = [
    RunRecords(run.test_envs, run.settings_number, list(reversed(run.records))) for run in ALONE
]


@pytest.mark.parametrize(
    ("select", "runs", "chosen"),
    [
        # both runs have a best value of .5: the run with the larger seed wins, in it the first step
        (training_domain_validation, ALONE, (0.5, 1, 0, 0.7)),
        # the last record, judged on the held-out environment's out split
        (oracle_validation, ALONE, (0.2, 1, 300, 0.8)),
        (oracle_validation, SHUFFLED, (0.2, 1, 300, 0.8)),
        # run 0: .5 at step 0, .55 at step 300; run 1: .2 and .5
        (
            leave_one_domain_out,
            [
                *ALONE,
                *pairs(0, {1: [0.9, 0.3], 2: [0.1, 0.8]}),
                *pairs(1, {1: [0.2, 0.6], 2: [0.2, 0.4]}),
            ],
            (0.55, 0, 300, 0.6),
        ),
        # every pair is needed, and a step without is skipped
        (leave_one_domain_out, ALONE, None),
        (leave_one_domain_out, [*ALONE, *pairs(0, {1: [0.9, 0.3]})], None),
        (leave_one_domain_out, [*ALONE, *pairs(0, {1: [0.1], 2: [0.2, 0.9]})], (0.15, 0, 0, 0.5)),
    ],
)
def test_selections_are_domainbeds(
    select: Selection, runs: list[RunRecords], chosen: tuple[float, int, int, float] | None
) -> None:
    choice = select(runs, 0)
    values = choice and (
        choice.value,
        choice.settings_number,
        choice.record["step"],
        choice.test_accuracy(0),
    )
    assert values == (chosen and pytest.approx(chosen))


@pytest.fixture
def runs(here: Path) -> list[Run]:
    """Write the mini suite's runs with made-up records."""
    planned = plan(["domainbed"], "mini")
    write_runs(planned, gains={"emoe": 0.1})
    return planned


def outcomes(runs: list[Run]) -> DomainOutcomes:
    return DomainOutcomes(load_benchmark("domainbed"), records(runs))


def test_tables_average_over_environments_then_trials(runs: list[Run]) -> None:
    others = [run_from_spec({**run.spec, "test_envs": [5]}) for run in runs]
    write_runs(others)
    both = outcomes([*runs, *others])
    cells = both.cells[both.cells["selection"] == "training"].set_index(
        ["method", "seed", "eval_task"]
    )["value"]
    trials = cells.groupby(["method", "seed"]).mean()
    row = summary(both).frame.set_index(["selection", "method"]).loc[("training", "emoe")]
    assert row["rotated_mnist_5k mean"] == pytest.approx(trials["emoe"].mean())
    assert row["rotated_mnist_5k error"] == pytest.approx(
        np.std(trials["emoe"]) / math.sqrt(3)
    )  # as DomainBed has it
    table = results(both, "rotated_mnist_5k")
    row = table.frame.set_index(["selection", "method"]).loc[("training", "emoe")]
    assert row["0 mean"] == pytest.approx(cells["emoe", :, "0"].mean())
    assert row["average"] == pytest.approx((row["0 mean"] + row["75 mean"]) / 2)
    assert "2 of 6 environments were held out" in table.caption
    row = both.tests.set_index(["selection", "method"]).loc[("training", "emoe")]
    assert row["delta"] == pytest.approx((trials["emoe"] - trials["erm"]).mean())
    assert row["n"] == 3  # trials


def set_accuracies(content: dict[str, Any], accuracy: float) -> None:
    """Give a run the same accuracy on all environments at all steps."""
    for step in content["records"]:
        step.update({key: accuracy for key in step if key.endswith("_acc")})


def test_a_row_without_an_environment_of_the_other_rows_has_a_dash_for_the_mean(here: Path) -> None:
    erm = [pacs_run("erm", env) for env in range(4)]
    emoe = [pacs_run("emoe", env) for env in range(3)]
    write_runs([*erm, *emoe])
    for run in [*erm, *emoe]:
        accuracy = 0.2 if run.spec["test_envs"] == [3] else 0.8
        fake_runs.edit(run, partial(set_accuracies, accuracy=accuracy))

    both = outcomes([*erm, *emoe])
    means = {"summary": "pacs mean", "results": "average"}
    tables = {"summary": summary(both), "results": results(both, "pacs")}
    for name, table in tables.items():
        rows = table.frame.set_index(["selection", "method"])
        assert rows.loc[("training", "erm"), means[name]] == pytest.approx(0.65)
        assert math.isnan(rows.loc[("training", "emoe"), means[name]])
        assert str(rows.loc[("training", "emoe"), "n"]) == "1"  # the trial is counted
        assert "A dash: the row lacks" in table.caption
    texts = tables["summary"].texts()
    assert set(texts.iloc[:, -1]) == {"65.0", "–"}
    # without the fourth environment, the rows are comparable
    shorter = outcomes([*erm[:3], *emoe])
    rows = summary(shorter).frame.set_index(["selection", "method"])
    assert rows.loc["training", "pacs mean"].tolist() == pytest.approx([0.8, 0.8])


def test_each_trial_has_its_choices_with_the_runs_of_all_trials(runs: list[Run]) -> None:
    table = choices(outcomes(runs), "rotated_mnist_5k")
    shown = with_runs(table, table.origins, "domainbed").frame
    of_emoe = shown[(shown["method"] == "emoe") & (shown["selection"] == "training")]
    assert of_emoe["seed"].tolist() == [0, 1, 2]
    folders = {run.folder for run in runs if run.spec["method"]["name"] == "emoe"}
    assert [set(listed.split()) for listed in of_emoe["runs"]] == [folders] * 3


def test_the_numbers_of_evaluated_images_are_in_ascending_order(runs: list[Run]) -> None:
    limited = []
    for run, limit in zip(runs, [8, 1] * len(runs), strict=False):
        training = {**run.spec["training"], "eval_rows": limit}
        limited.append(run_from_spec({**run.spec, "training": training}))
    write_runs(limited)
    caption = results(outcomes(limited), "rotated_mnist_5k").caption
    assert "(80 % of its images, of which 1 or 8 are used)" in caption


def test_environments_are_named_also_if_there_are_more_of_them_than_classes(
    runs: list[Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[Any] = []
    monkeypatch.setattr(plots, "save", lambda figure, path: figures.append(figure))
    draw_routing(outcomes(runs), "rotated_mnist_5k", Path("routing"))
    (figure,) = figures
    labels = [[label.get_text() for label in axis.get_yticklabels()] for axis in figure.axes]
    assert ["cat", "dog"] in labels
    assert [f"{angle}°" for angle in (0, 15, 30, 45, 60, 75)] in labels
    plt.close(figure)


def test_figures_and_tables_have_the_names_of_environments(here: Path) -> None:
    runs = [pacs_run(method, env) for method in ("erm", "emoe") for env in range(4)]
    write_runs(runs)
    shown = outcomes(runs)
    with saved_figures() as figures:
        draw_accuracy(shown, "pacs", Path("accuracy"))
        draw_routing(shown, "pacs", Path("routing"))
    accuracy, routing = figures
    names = ["art painting", "cartoon", "photo", "sketch"]
    (axis,) = accuracy.axes
    lines = [label.get_text() for label in axis.get_yticklabels()]
    assert lines == [f"{name} held out" for name in names]
    labels = [[label.get_text() for label in axis.get_yticklabels()] for axis in routing.axes]
    assert names in labels
    assert "art painting held out" in " ".join(routing.get_suptitle().split())
    headings = results(shown, "pacs").markdown().splitlines()[2]
    assert all(name in headings for name in names)


def test_an_accuracy_has_no_promise_of_an_interval_from_one_trial(runs: list[Run]) -> None:
    first_trials = [run for run in runs if run.spec["seed"] == 0]
    labels = []
    for drawn in (first_trials, runs):
        with saved_figures() as figures:
            draw_accuracy(outcomes(drawn), "rotated_mnist_5k", Path("accuracy"))
        label = figures[0].axes[-1].get_xlabel()
        labels.append(" ".join(label.split()))  # with single blanks for no-break spaces
    assert labels == [
        "Accuracy (%), n = 1 trial, no intervals: they need 3 trials",
        "Accuracy (%), n = 3 trials, 95 % intervals",
    ]


def add_layers(content: dict[str, Any], numbers: Sequence[int]) -> None:
    """Give a run with experts further layers, with the routing of layer 8."""
    routing = content["routing"]
    if routing:
        for number in numbers:
            for name in ("loads", "chance"):
                routing[name][str(number)] = routing[name]["8"]


def test_no_panel_of_the_routing_is_alone_in_its_line(runs: list[Run]) -> None:
    for run in runs:
        name = run.spec["method"]["name"]
        # GMoE keeps one layer, so there are five panels
        if name != "gmoe":
            fake_runs.edit(run, lambda content: add_layers(content, [10]))
    with saved_figures() as figures:
        draw_routing(outcomes(runs), "rotated_mnist_5k", Path("routing"))
    (figure,) = figures
    by_class = [axis for axis in figure.axes if "class" in axis.get_title()]
    in_line = Counter(axis.get_subplotspec().rowspan.start for axis in by_class)
    assert sorted(in_line.values()) == [2, 3]


def test_the_routing_explains_chance_and_numbers_the_experts(runs: list[Run]) -> None:
    with saved_figures() as figures:
        draw_routing(outcomes(runs), "rotated_mnist_5k", Path("routing"))
    (figure,) = figures
    title = figure.get_suptitle().replace("\n", " ")
    assert "chance: mean and 95 % quantile, images shuffled" in title
    numbered = [axis for axis in figure.axes if axis.get_xlabel() == "expert"]
    by_class = [axis for axis in figure.axes if "class" in axis.get_title()]
    assert len(numbered) == len(by_class)
    ends = {axis.get_images()[0].get_array().shape[1] for axis in numbered}
    lasts = {axis.get_xticklabels()[-1].get_text() for axis in numbered}
    assert lasts == {str(end) for end in ends}


def test_figures_without_an_environment_held_out_alone_are_placeholders(runs: list[Run]) -> None:
    pairs = [run_from_spec({**run.spec, "test_envs": [0, 1]}) for run in runs]
    write_runs(pairs)
    for draw in (draw_accuracy, draw_routing):
        draw(outcomes(pairs), "rotated_mnist_5k", Path("figure"))
        assert not is_drawn(Path("figure"))


def test_the_best_draw_is_reported_and_named(here: Path) -> None:
    cell = ("pacs", "erm", 0)
    planned = plan(["domainbed"], "domainbed_sweep")
    runs = [
        run
        for run in planned
        if (run.spec["task"]["name"], run.spec["method"]["name"], run.spec["seed"]) == cell
    ]
    write_runs(runs)
    swept = outcomes(runs)
    assert set(swept.cells["selection"]) == {"training", "leave_one_out", "oracle"}
    for row in swept.cells[swept.cells["selection"] == "oracle"].itertuples():
        env = ["A", "C", "P", "S"].index(row.eval_task)
        last = {}
        for run in runs:
            if run.spec["test_envs"] == [env]:
                steps = swept.finished[run.id].metrics.records or []
                last[run.spec["hparams_seed"]] = steps[-1].numbers()[f"env{env}_out_acc"]
        assert row.chosen_by == max(last.values()) == last[row.hparams_seed]


def test_both_gmoes_have_their_published_numbers(here: Path) -> None:
    runs = [
        pacs_run(method, env, eval_every=6)
        for method in ("gmoe", "gmoe_upstream")
        for env in range(4)
    ]
    write_runs(runs)
    frame = paper_table(outcomes(runs)).frame.set_index(
        ["task", "method_title", "selection", "model"]
    )["value"]
    assert frame["pacs", "GMoE (GMoE's code)", "training", "deit-small"] == pytest.approx(0.881)
    assert frame["average of four", "GMoE (EMoE's README)", "training", "deit-small"] == 0.7134
