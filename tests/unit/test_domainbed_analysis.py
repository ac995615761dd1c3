"""DomainBed's selections, and what is made of them: tables, figures, verdicts."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.domainbed.outcomes import DomainOutcomes
from benchmarks.domainbed.presentation import choices, paper, results, summary
from benchmarks.domainbed.protocol import (
    RunRecords,
    Selection,
    leave_one_domain_out,
    oracle_validation,
    training_domain_validation,
)
from benchmarks.harness.base import DefinitionError
from benchmarks.harness.config import suite as planning
from benchmarks.harness.config.benchmark import load_benchmark
from benchmarks.harness.config.runs import Run, run_from_spec
from benchmarks.harness.config.suite import find_part, load_suite
from benchmarks.harness.results.records import read_metrics
from tests.fake_runs import write_runs
from tests.image_sets import pacs_run
from tests.planned import plan


def record(step: int, within: list[float], out: list[float]) -> dict[str, Any]:
    accuracies = {f"env{env}_in_acc": value for env, value in enumerate(within)}
    return {"step": step, **accuracies, **{f"env{env}_out_acc": value for env, value in enumerate(out)}}


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
    RunRecords((0,), 0, [record(0, [0.5, 0, 0], [0.9, 0.2, 0.4]), record(300, [0.6, 0, 0], [0.1, 0.5, 0.5])]),
    RunRecords((0,), 1, [record(0, [0.7, 0, 0], [0.3, 0.6, 0.4]), record(300, [0.8, 0, 0], [0.2, 0.1, 0.1])]),
]
SHUFFLED = [RunRecords(run.test_envs, run.choice, list(reversed(run.records))) for run in ALONE]


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
            [*ALONE, *pairs(0, {1: [0.9, 0.3], 2: [0.1, 0.8]}), *pairs(1, {1: [0.2, 0.6], 2: [0.2, 0.4]})],
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
    found = select(runs, 0)
    values = found and (found.value, found.choice, found.record["step"], found.test_accuracy(0))
    assert values == (chosen and pytest.approx(chosen))


@pytest.fixture
def runs(here: Path) -> list[Run]:
    """Those of the mini suite, finished with made-up records."""
    planned = plan(["domainbed"], "mini")
    write_runs(planned, gains={"emoe": 0.1})
    return planned


def outcomes(runs: list[Run]) -> DomainOutcomes:
    return DomainOutcomes(load_benchmark("domainbed"), runs)


def test_tables_average_over_environments_then_trials(runs: list[Run]) -> None:
    others = [run_from_spec({**run.spec, "test_envs": [5]}) for run in runs]
    write_runs(others)
    found = outcomes([*runs, *others])
    own = found.cells[(found.cells["selection"] == "training") & (found.cells["method"] == "emoe")]
    assert len(own) == 6  # two environments, three trials
    trials = [own.loc[own["trial"] == trial, "value"].mean() for trial in (0, 1, 2)]
    row = summary(found).frame.set_index(["selection", "method"]).loc[("training", "emoe")]
    assert row["rotated_mnist_5k mean"] == pytest.approx(np.mean(trials))
    assert row["rotated_mnist_5k error"] == pytest.approx(np.std(trials) / math.sqrt(3))  # as DomainBed has it
    table = results(found, "rotated_mnist_5k")
    row = table.frame.set_index(["selection", "method"]).loc[("training", "emoe")]
    assert row["average"] == pytest.approx((row["0 mean"] + row["75 mean"]) / 2)
    assert row["0 mean"] == pytest.approx(own.loc[own["env"] == "0", "value"].mean())
    assert "2 of 6 environments were held out" in table.caption


def test_differences_are_paired_by_trial(runs: list[Run]) -> None:
    found = outcomes(runs)
    cells = found.cells[found.cells["selection"] == "oracle"].set_index(["method", "trial", "env"])["value"]
    expected = (cells["emoe"] - cells["erm"]).groupby("trial").mean()
    row = found.tests.set_index(["selection", "method"]).loc[("oracle", "emoe")]
    assert row["delta"] == pytest.approx(expected.mean())
    assert row["n"] == 3


def test_the_best_draw_is_reported_and_named(here: Path) -> None:
    cell = ("pacs", "erm", 0)
    runs = [
        run
        for run in plan(["domainbed"], "domainbed_sweep")
        if (run.spec["task"]["name"], run.spec["method"]["name"], run.spec["seed"]) == cell
    ]
    write_runs(runs)
    cells = outcomes(runs).cells
    assert set(cells["selection"]) == {"training", "leave_one_out", "oracle"}
    metrics = {(tuple(run.spec["test_envs"]), run.spec["hparams_seed"]): read_metrics(run)["records"] for run in runs}
    for row in cells[cells["selection"] == "oracle"].itertuples():
        env = ["A", "C", "P", "S"].index(row.env)
        last = {h: records[-1][f"env{env}_out_acc"] for (envs, h), records in metrics.items() if envs == (env,)}
        assert row.chosen_by == max(last.values()) == last[row.hparams_seed]


@pytest.mark.parametrize("val_augment", [True, False])
def test_tables_say_whose_validation_and_whose_gmoe_it_is(val_augment: bool, here: Path) -> None:
    settings = {"val_augment": val_augment, "eval_every": 6}
    runs = [pacs_run(method, env, **settings) for method in ("gmoe", "gmoe_upstream") for env in range(4)]
    write_runs(runs)
    found = outcomes(runs)
    for table in (results(found, "pacs"), summary(found), choices(found, "pacs")):
        assert ("are augmented for validation too" in table.caption) == val_augment
        assert ("are not augmented for validation" in table.caption) != val_augment
    frame = paper(found).frame.set_index(["set", "method_title", "selection", "model"])
    assert frame.loc[("pacs", "GMoE (GMoE's code)", "training", "deit-small"), "value"] == pytest.approx(0.881)
    assert frame.loc[("average of four", "GMoE (EMoE's README)", "training", "deit-small"), "value"] == 0.7134


def test_a_set_is_found_in_the_suite_that_runs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "suite_names", lambda: ["mini", "smoke"])
    mini = load_suite({"suite": "mini"})
    assert find_part("domainbed", "rotated_mnist_5k", mini).name == "mini"
    assert find_part("domainbed", "colored_mnist_5k", mini).name == "smoke"
    with pytest.raises(DefinitionError, match="no suite runs 'colored_mnist' of the benchmark 'domainbed'"):
        find_part("domainbed", "colored_mnist", mini)
