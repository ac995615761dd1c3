"""`check` and `bless`: two tiers, lost runs, times, spreads, and what cannot be blessed; on made-up runs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from benchmarks.harness.base.errors import DefinitionError, RunError
from benchmarks.harness.base.paths import RUNS
from benchmarks.harness.config.runs import Run
from benchmarks.harness.results.quantities import COLUMNS, KEYS, deviation, one_counts
from benchmarks.harness.results.reference import (
    FACTOR,
    ROUNDING,
    Spread,
    SpreadFile,
    read_reference,
    read_tolerances,
    spread_file,
    write_reference,
)
from benchmarks.harness.results.regression import Comparison, compare, present
from benchmarks.harness.run import spread
from tests import fake_runs
from tests.fake_runs import edit
from tests.programs import call


@pytest.fixture
def runs(here: Path) -> list[Run]:
    """Finished runs of text and measurements, in an empty working directory."""
    return fake_runs.text_and_measurements()


@pytest.fixture
def blessed(runs: list[Run], tmp_path: Path) -> Path:
    """A folder with their numbers as the reference."""
    folder = tmp_path / "reference"
    numbers, _ = present(runs, "mini")
    write_reference("mini", numbers, "0" * 40, folder)
    return folder


def score_of(run: Run, difference: float) -> None:
    name, metric = run.spec["task"]["name"], run.spec["task"]["metric"]

    def change(content: dict[str, Any]) -> None:
        content["scores"]["test"][name][metric] += difference

    edit(run, change)


def on_another_machine(runs: list[Run]) -> None:
    for run in runs:
        edit(run, lambda content: content["environment"]["fingerprint"].update({"threads": "2"}))


def write_spreads(folder: Path, suite: str = "mini", **largest: float) -> None:
    spreads = [
        Spread(quantity=name.replace("_losses", " losses"), largest=value, numbers=9) for name, value in largest.items()
    ]
    content = SpreadFile(made_by="", commit="", machine={}, variants=[], runs=1, spreads=spreads)
    spread_file(suite, folder).write_text(content.model_dump_json())


def named(comparison: Comparison) -> set[str]:
    return {finding.metric for finding in comparison.findings if finding.status != "shown"}


# same machine


def test_on_the_machine_that_blessed_everything_is_equal_and_the_last_digit_counts(
    runs: list[Run], blessed: Path
) -> None:
    same = compare(runs, "mini", blessed)
    assert same.passed
    assert [tier.name for tier in same.tiers] == ["equal"]
    assert "the machine is the same" in str(same)

    score_of(runs[0], 2e-16)
    moved = compare(runs, "mini", blessed)
    assert not moved.passed
    assert len(moved.changed) == 1
    assert moved.changed[0].difference == pytest.approx(2e-16, rel=0.5)


def test_a_real_second_machine_counts_in_the_spreads(
    runs: list[Run], blessed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs here that differ from what another machine blessed widen what may differ, with every run and not a sample."""
    monkeypatch.setattr(spread, "clean_commit", lambda: "0" * 40)
    text = [run for run in runs if run.benchmark == "glue"]
    with pytest.raises(RunError, match="there is nothing to compare with"):  # the machine that blessed
        spread.measure(text, "mini", "none", 1, blessed)
    on_another_machine(runs)
    score_of(text[-1], 0.002)
    found = SpreadFile.model_validate_json(spread.measure(text, "mini", "none", 1, blessed).read_text())
    assert found.variants == [f"as blessed on CPU, {len(text)} runs"]
    metric = text[-1].spec["task"]["metric"]
    assert {row.quantity: row.largest for row in found.spreads}[metric] == pytest.approx(0.002)

    # a third machine, which is farther away in one quantity and nearer in the others
    write_spreads(blessed, **{metric: 0.001, "first losses": 0.5, "of old": 0.25})
    both = SpreadFile.model_validate_json(spread.measure(text, "mini", "none", 1, blessed, add=True).read_text())
    largest = {row.quantity: row.largest for row in both.spreads}
    assert largest == {row.quantity: row.largest for row in found.spreads} | {"first losses": 0.5, "of old": 0.25}
    numbers = {row.quantity: row.numbers for row in found.spreads}
    assert {row.quantity: row.numbers for row in both.spreads}[metric] == numbers[metric] + 9
    assert both.variants == found.variants
    assert both.made_by.endswith("(0000000)")


def test_a_seed_or_a_run_that_is_lost_fails(runs: list[Run], blessed: Path) -> None:
    fewer = compare(runs[1:], "mini", blessed)
    assert not fewer.passed
    assert {(finding.run, finding.seed) for finding in fewer.missing} == {
        ("glue " + fewer.missing[0].run[5:], runs[0].spec["seed"])
    }
    (RUNS / runs[1].folder / "metrics.json").unlink()
    unfinished = compare(runs, "mini", blessed)
    assert unfinished.unfinished == (runs[1].id,)
    assert not unfinished.passed
    assert f"1 runs are not finished, the first is {runs[1].id}" in str(unfinished)


def test_a_run_that_was_not_blessed_is_new(runs: list[Run], blessed: Path) -> None:
    path = blessed / "mini.csv"
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    first = table["run"].iloc[0], table["seed"].iloc[0]
    table[(table["run"] != first[0]) | (table["seed"] != first[1])].to_csv(path, index=False)
    found = compare(runs, "mini", blessed)
    assert not found.passed
    assert not found.changed
    assert not found.missing
    assert {(finding.run, str(finding.seed)) for finding in found.new} == {first}


def test_times_are_shown_and_decide_nothing(runs: list[Run], blessed: Path) -> None:
    run = next(run for run in runs if run.benchmark == "speed" and "sparse" in run.spec["settings"]["candidates"])

    def slower(content: dict[str, Any]) -> None:
        content["measured"]["sparse"]["ratio"] *= 3

    edit(run, slower)
    found = compare(runs, "mini", blessed)
    assert found.passed
    assert [finding.metric for finding in found.shown] == ["ratio"]
    assert "decides nothing" in str(found)

    def other_work(content: dict[str, Any]) -> None:
        content["measured"]["sparse"]["expected_ratio"] *= 1.001

    edit(run, other_work)
    assert named(compare(runs, "mini", blessed)) == {"expected_ratio"}


def test_counts_and_digests_are_compared(runs: list[Run], blessed: Path) -> None:
    edit(runs[0], lambda content: content["data"]["train"].update(rows=9))
    assert named(compare(runs, "mini", blessed)) == {"content"}


def test_a_difference_is_shown_in_units_of_the_seeds_spread(runs: list[Run], blessed: Path) -> None:
    table = read_reference("mini", blessed).rows
    score_of(runs[0], -0.5)
    finding = next(one for one in compare(runs, "mini", blessed).changed if one.part == "test")
    theirs = table[(table["run"] == finding.run) & (table["part"] == "test") & (table["metric"] == finding.metric)]
    values = theirs["value"].astype(float)
    assert finding.n == len(values) > 1
    assert finding.spreads == pytest.approx(-0.5 / values.std())
    assert f"n {finding.n}" in str(finding)
    assert "sd of the seeds" in str(finding)


# another machine


def test_another_machine_may_differ_as_much_as_machines_were_seen_to(runs: list[Run], blessed: Path) -> None:
    metric = runs[0].spec["task"]["metric"]
    on_another_machine(runs)
    found = compare(runs, "mini", blessed)  # equal numbers need no tolerance
    assert found.passed
    assert found.tiers[0].name == "tolerance"
    assert "threads: 1 -> 2" in found.tiers[0].why

    edit(runs[0], lambda content: content["data"]["test"].update(labels={"0": 4000, "1": 6000}))
    write_reference("mini", present(runs, "mini")[0], "0" * 40, blessed)
    score_of(runs[0], 0.001)
    with pytest.raises(DefinitionError, match=r"measure how far machines are apart \(`python -m benchmarks spread"):
        compare(runs, "mini", blessed, elsewhere=True)
    write_spreads(blessed, **{metric: 0.0009})  # and one row of 8,000
    assert compare(runs, "mini", blessed, elsewhere=True).passed
    write_spreads(blessed, **{metric: 0.0008})
    assert named(compare(runs, "mini", blessed, elsewhere=True)) == {metric}


def test_another_machine_may_count_one_row_and_one_choice_otherwise(runs: list[Run], blessed: Path) -> None:
    write_spreads(blessed, loss=0.0)
    score_of(runs[0], -1 / 8)  # of two classes, the smaller one with four rows
    assert compare(runs, "mini", blessed, elsewhere=True).passed
    assert not compare(runs, "mini", blessed).passed
    score_of(runs[0], -0.001)
    assert not compare(runs, "mini", blessed, elsewhere=True).passed


def test_the_mean_over_sets_may_differ_by_the_mean_of_their_rows() -> None:
    rows = pd.DataFrame(
        [
            ("glue a", 0, "data", "ood:here", "content", "rows 8, 0: 4, 1: 4, abc"),
            ("glue a", 0, "data", "ood:there", "content", "rows 20, 0: 10, 1: 10, abc"),
            ("glue a", 0, "ood_mean", "", "score", "0.5"),
            ("glue a", 0, "ood_mean as b", "", "score", "0.5"),
            ("glue a", 1, "ood_mean", "", "score", "0.5"),
        ],
        columns=COLUMNS,
    )
    both = (1 / 8 + 1 / 20) / 2
    assert one_counts(rows) == {tuple(rows.loc[place, KEYS]): pytest.approx(both) for place in (2, 3)}


def test_logits_of_a_trained_model_have_a_spread_of_their_own(here: Path) -> None:
    runs = fake_runs.text_suite().runs
    chosen = next(run for run in runs if run.benchmark == "glue_ood")
    edit(chosen, lambda content: content.update(probe={"logits": {"mean": 0.1, "projection": 0.5}}))
    found = present(runs, "mini")[0].rows
    names = found.loc[found["metric"].isin(["logits", "trained_logits"]), ["run", "metric"]]
    # glue_ood opens what runs of glue and glue_lora have trained
    assert {(run.partition(" ")[0], metric) for run, metric in names.itertuples(index=False)} == {
        ("glue", "logits"),
        ("glue_lora", "logits"),
        ("glue_ood", "trained_logits"),
    }


def test_first_losses_and_loads_give_a_swapped_method_away_on_another_machine(runs: list[Run], blessed: Path) -> None:
    metric = runs[0].spec["task"]["metric"]
    write_spreads(blessed, **{metric: 1.0}, loss=1.0, first_losses=1e-6, logits=1e-5, loads=0.0)
    for change in (
        lambda content: content["probe"].update(losses=["0.7001", *content["probe"]["losses"][1:]]),
        lambda content: content["probe"]["logits"].update(projection=0.51),
        lambda content: content["probe"].update(loads={"1": [12, 8, 10, 10]}),
    ):
        path = next(RUNS / run.folder for run in runs if run.spec["method"].get("name") == "emoe") / "metrics.json"
        before = path.read_text()
        content = json.loads(before)
        change(content)
        path.write_text(json.dumps(content))
        assert compare(runs, "mini", blessed, elsewhere=True).changed
        path.write_text(before)
    assert compare(runs, "mini", blessed, elsewhere=True).passed


def test_the_smoke_suites_spreads_count_too(tmp_path: Path) -> None:
    with pytest.raises(DefinitionError, match=r"mini_spread\.json does not exist"):
        read_tolerances("mini", tmp_path)
    write_spreads(tmp_path, accuracy=0.01, loss=0.03, first_losses=0.001)
    write_spreads(tmp_path, "smoke", accuracy=0.02, routing=0.05, **{"ood loss": 0.04})
    found = read_tolerances("mini", tmp_path)
    assert found.of("test", "accuracy") == FACTOR * 0.02
    assert found.of("test", "loss") == FACTOR * 0.03
    assert found.of("ood", "loss") == found.of("ood as emoe2vanilla", "loss") == FACTOR * 0.04
    assert found.of("test", "loss_3") == FACTOR * 0.001
    assert found.of("test", "class_information") == found.of("test", "drop_rate") == FACTOR * 0.05
    assert found.of("test", "f1") == ROUNDING  # not measured
    assert found.of("test", "f1", 0.5) == pytest.approx(0.5)
    assert found.of("test", "accuracy", 0.5) == pytest.approx(0.52)  # counted: one row more than was seen


def test_how_far_two_values_are_apart() -> None:
    assert deviation("accuracy", "0.5", "0.75") == 0.25
    assert deviation("loss", "10.0", "11.0") == 0.1
    assert deviation("loss_3", "0.5", "0.55") == pytest.approx(0.1)
    assert deviation("loads", "10 10", "11 9") == pytest.approx(0.05)
    assert deviation("loads", "10 10", "10 10 0") == math.inf
    assert deviation("logits", "1.0 0.001", "1.0 0.002") == pytest.approx(0.001)
    assert deviation("content", "rows 3", "rows 4") == math.inf
    assert deviation("parameters", "3", "4") == math.inf
    assert deviation("loss_1", "0.5", "nan") == math.inf
    assert deviation("loss_1", "nan", "nan") == 0


# files and messages


def test_the_reference_has_every_number_with_all_digits_and_its_machine(runs: list[Run], blessed: Path) -> None:
    found = read_reference("mini", blessed)
    run = runs[0]
    content = json.loads((RUNS / run.folder / "metrics.json").read_text())
    value = content["scores"]["test"][run.spec["task"]["name"]][run.spec["task"]["metric"]]
    theirs = found.rows[(found.rows["part"] == "test") & (found.rows["seed"] == run.spec["seed"])]
    assert repr(value) in set(theirs["value"])
    assert set(found.rows["machine"]) == set(found.machines)
    assert next(iter(found.machines.values())) == content["environment"]["fingerprint"]


def test_an_older_or_damaged_reference_says_to_bless_again(runs: list[Run], blessed: Path, tmp_path: Path) -> None:
    path = blessed / "mini.csv"
    with pytest.raises(DefinitionError, match=r"mini.csv does not exist: bless a run of the suite"):
        compare(runs, "mini", tmp_path / "none")
    text = path.read_text()
    path.write_text("benchmark,model,mean,n\nglue,bert,0.5,2\n")
    with pytest.raises(DefinitionError, match=r"an older form: bless a run of the suite \(`python -m benchmarks bless"):
        compare(runs, "mini", blessed)
    path.write_text(text + text.splitlines()[1] + "\n")
    with pytest.raises(DefinitionError, match="has two rows of"):
        compare(runs, "mini", blessed)
    path.write_text(text)
    (blessed / "mini.json").write_text("{")
    with pytest.raises(DefinitionError, match=r"mini.json is damaged"):
        compare(runs, "mini", blessed)
    (blessed / "mini.json").unlink()
    with pytest.raises(DefinitionError, match=r"has no mini.json beside it"):
        compare(runs, "mini", blessed)


def test_check_before_there_are_results_is_one_line_with_the_command(here: Path) -> None:
    message = "no run of the suite 'smoke' is finished below results/runs: `snakemake --cores all --config suite=smoke`"
    with pytest.raises(DefinitionError, match=f"^{message}$"):
        call("check", "--suite", "smoke")


def test_the_status_and_json_of_check(runs: list[Run], blessed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    score_of(runs[0], -0.25)
    found = compare(runs, "mini", blessed)
    monkeypatch.setattr("benchmarks.harness.results.regression.compare", lambda *args, **kwargs: found)
    content = json.loads(call("check", "--json", status=1))
    assert content["passed"] is False
    assert content["findings"][0]["status"] == "changed"
    assert content["findings"][0]["difference"] == pytest.approx(-0.25)
    assert content["tiers"][0]["name"] == "equal"
