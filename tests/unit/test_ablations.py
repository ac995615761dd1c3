"""Ablations: what is planned and refused, rows of their own tables, and models that are used as another method."""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness.base import RUNS, DefinitionError
from benchmarks.harness.config.benchmark import load_benchmark
from benchmarks.harness.config.methods import ABLATION, without
from benchmarks.harness.config.runs import Run
from benchmarks.harness.report.presentation import Presentation, present
from benchmarks.text.ablations import Ablations, ablation_rows
from benchmarks.text.data import TextSplit
from benchmarks.text.figures import panels_of
from benchmarks.text.outcomes import TextOutcomes
from tests import fake_runs
from tests.executed import recorded
from tests.planned import edited_benchmark, edited_part, evaluations, paper_runs, plan, specs

LORA, OOD = load_benchmark("glue_lora"), load_benchmark("glue_ood")

# a part of the rows


def split_of(labels: list[Any]) -> TextSplit:
    return TextSplit([(str(number),) for number in range(len(labels))], labels)


def test_a_part_has_every_class_in_proportion_and_a_smaller_one_lies_within() -> None:
    whole = split_of([0] * 70 + [1] * 20 + [2] * 10)
    parts = {share: whole.part(share, "t/train") for share in (0.1, 0.5, 0.8)}
    assert {share: Counter(part.labels) for share, part in parts.items()} == {
        0.1: {0: 7, 1: 2, 2: 1},
        0.5: {0: 35, 1: 10, 2: 5},
        0.8: {0: 56, 1: 16, 2: 8},
    }
    assert set(parts[0.1].texts) < set(parts[0.5].texts) < set(parts[0.8].texts) < set(whole.texts)
    assert parts[0.5].texts == whole.part(0.5, "t/train").texts != whole.part(0.5, "other/train").texts
    assert parts[0.5].texts == sorted(parts[0.5].texts, key=lambda row: int(row[0]))  # in the order of the set


def test_a_part_keeps_a_row_of_a_rare_class_and_divides_scores_by_their_whole_part() -> None:
    assert Counter(split_of([0] * 99 + [1]).part(0.1, "x").labels)[1] == 1
    assert Counter(split_of([0.1, 0.2] * 5 + [4.9, 5.0] * 5).part(0.2, "x").labels).total() == 4


# what is planned


def test_rows_of_ablations_keep_the_others_runs_and_stand_in_their_suites() -> None:
    planned = plan(["glue_lora", "glue_ood"], "mini")
    rows = Counter((run.benchmark, run.spec["method"]["name"], run.spec["method"]["variant"]) for run in planned)
    for row in ("lora_not_top", "lora_bottom"):
        assert rows["glue_lora", row, ""] == 5
    assert rows["glue_lora", "lora_emoe_part", "D0.8"] == rows["glue_lora", "lora_part", "D0.8"] == 5
    settings = {variant: count for (_, row, variant), count in rows.items() if row == "lora_emoe_settings"}
    assert settings == {"N16-k0.5": 5, "N32-k0.25": 5}
    # the chosen runs of another benchmark are evaluated, not those of its ablations
    evaluated = {row for benchmark, row, _ in rows if benchmark == "glue_ood"}
    trained = {"lora", "lora_block", "lora_gmoe", "lora_emoe", "lora_emoe_learn", "lora_random"}
    assert evaluated == {*trained, "lora2emoe", "emoe2lora"}


@pytest.mark.parametrize("key", ["train_share", "epochs_factor"])
def test_only_rows_of_ablations_are_trained_otherwise(key: str) -> None:
    part = edited_part("glue_lora", "mini", {f"grid.0.{key}": [0.5]})
    with pytest.raises(DefinitionError, match=rf"grid\[0\]\.{key}' varies 'lora', whose runs would compete"):
        specs(LORA, part)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": ["lora", "lora_botom"]}, r"ablations\.selection\.rows' is 'lora_botom'.* did you mean 'lora_bottom'"),
        ({"rows": ["lora_emoe", "lora_bottom"]}, r"ablations\.selection\.rows' must begin with the baseline, 'lora'"),
        ({"rows": ["lora", "lora_emoe"]}, r"'methods\.lora_not_top' is an ablation, but no 'ablations' has it"),
        (
            {"paper": "selektion.csv"},
            r"ablations\.selection\.paper' is 'selektion\.csv'.*did you mean 'selection\.csv'",
        ),
    ],
)
def test_ablations_compare_what_exists(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DefinitionError, match=message):
        edited_benchmark("glue_lora", {f"ablations.selection.{key}": value for key, value in changes.items()})


def test_a_model_is_used_as_one_row_and_not_as_several() -> None:
    row = OOD.definition.transformed["lora2emoe"].model_copy(update={"used_as": "lora_emoe_search"})
    with pytest.raises(DefinitionError, match=r"transformed\.lora2emoe\.used_as' runs with several N, k or layers"):
        evaluations(plan(["glue_lora"], "smoke"), transformed={"lora2emoe": row})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"trained": "lora", "used_as": "lora_gmoe"}, "must name a dense row and one with experts that are parts"),
        (
            {"trained": "lora", "used_as": "lora_emoe_learn"},
            r"used_as' is 'LoRA \+ EMoE-learn', whose router has state",
        ),
        ({"trained": "lora_block", "used_as": "lora_emoe"}, r"trained' is 'LoRA \+ Block', which trains another part"),
        ({"trained": "lora", "used_as": "lora_bottom"}, r"used_as' is 'lora_bottom', which does not exist"),
    ],
)
def test_weights_of_one_row_must_mean_the_same_in_the_other(row: dict[str, str], message: str) -> None:
    rows = [*OOD.definition.ablations["transformation"].rows, "odd"]
    edits = {"transformed.odd": {"title": "Odd", **row}, "ablations.transformation.rows": rows}
    with pytest.raises(DefinitionError, match=r"'transformed\.odd.*" + message):
        edited_benchmark("glue_ood", edits)


TABLES = [("glue", "settings"), ("glue_lora", "selection"), ("glue_lora", "settings"), ("glue_lora", "data")]
TABLES += [("glue_lora", "steps"), ("glue_lora", "controls"), ("glue", "transformation")]
TABLES.append(("glue_ood", "transformation"))


# what is shown


@pytest.fixture(scope="module")
def finished(shared_here: Path) -> list[Run]:
    """Make up numbers of the default suite's text, and of a part of every ablation of the nightly suite."""
    gains = {"lora_bottom": -0.05, "emoe2lora": 0.04}
    runs = fake_runs.write(RUNS, "mini", gains, ("glue", "glue_lora", "glue_ood"))
    known = {run.id for run in runs}
    more = [run for run in plan(["glue_lora"], "mini_full") if run.spec["learning_rate"] == 4.0e-3]
    more = [run for run in more if run.spec["task"]["name"] == "tweets" and run.spec["seed"] < 3]
    more = [run for run in more if run.id not in known]
    fake_runs.write_runs(more, gains)
    return [*runs, *more]


def of(runs: list[Run], benchmark: str) -> list[Run]:
    return [run for run in runs if run.benchmark == benchmark]


@pytest.fixture(scope="module")
def presented(finished: list[Run]) -> Callable[[str], Presentation]:
    """Present the finished runs of a benchmark once; tests only read it."""
    return functools.cache(lambda name: present(load_benchmark(name), of(finished, name)))


@pytest.fixture(scope="module")
def ablated(finished: list[Run]) -> TextOutcomes:
    """Collect the finished runs by adapters, every setting a row."""
    return TextOutcomes(LORA, of(finished, "glue_lora"), ablated=True)


def test_main_tables_have_no_row_of_an_ablation(presented) -> None:
    for benchmark in (LORA, OOD):
        shown = presented(benchmark.name)
        usual = [
            table
            for table in shown.tables
            if (benchmark.name, table.name.removeprefix(f"{benchmark.name}_")) not in TABLES
        ]
        rows = {name for table in usual if "method" in table.frame for name in table.frame["method"]}
        assert rows
        assert not {name for name in rows if benchmark.row_titles.get(name) is None}
        methods = benchmark.methods()
        assert ABLATION not in {methods[name].role for name in rows}


def test_a_row_says_what_its_runs_say_and_the_paper_stands_beside(ablated: TextOutcomes) -> None:
    rows = ablation_rows(ablated, LORA.definition.ablations["selection"])
    own = rows[rows["is_ours"]].groupby("method")["delta"].mean()
    assert own["lora_bottom"] == pytest.approx(-0.05, abs=0.02)
    assert rows.loc[rows["method"] == "lora", "delta"].isna().all()
    paper = rows[~rows["is_ours"]].set_index("method")
    assert paper.loc["lora_bottom", "paper_delta"] == pytest.approx(-0.0048)
    assert paper.loc["lora_emoe", "method_title"] == "LoRA + EMoE"


def test_every_setting_is_a_row_with_its_own_choice_of_rate(finished: list[Run], ablated: TextOutcomes) -> None:
    runs, outcomes = of(finished, "glue_lora"), ablated
    rows = ablation_rows(outcomes, LORA.definition.ablations["settings"])
    planned = {
        without(run.spec["method"]["variant"], {"L22", "L44"})
        for run in runs
        if run.spec["method"]["name"] == "lora_emoe_settings"
    }
    shown = {name.partition("|")[2] for name in rows["method"] if name.startswith("lora_emoe_settings|")}
    assert shown == planned
    assert "" not in shown
    assert {"N", "k", "L", "D", "kind"} <= set(rows)
    assert set(rows.loc[rows["method"].str.startswith("lora_emoe_settings|"), "kind"]) == {"emoe"}


def test_an_average_is_over_what_all_rows_have(shared_here: Path) -> None:
    selection = LORA.definition.ablations["selection"]
    runs = [run for run in paper_runs("glue_lora") if run.spec["method"]["name"] in selection.rows]
    runs = [run for run in runs if run.spec["model"]["name"] == "bert-large-cased" and run.spec["seed"] < 2]
    fake_runs.write_runs(runs, {"lora_bottom": -0.05})
    rows = ablation_rows(TextOutcomes(LORA, runs, ablated=True), selection)
    average = rows[rows["scope"].str.startswith("average of") & rows["is_ours"]]
    assert set(average["scope"]) == {"average of CoLA, MRPC, RTE"}
    one = average[(average["model"] == "bert-large-cased") & (average["method"] == "lora_bottom")].iloc[0]
    parts = rows[
        (rows["model"] == "bert-large-cased")
        & (rows["method"] == "lora_bottom")
        & (rows["protocol"] == one["protocol"])
        & rows["scope"].isin(["CoLA", "MRPC", "RTE"])
    ]
    assert one["mean"] == pytest.approx(parts["mean"].mean())
    assert one["delta"] == pytest.approx(parts["delta"].mean())


def test_a_suite_without_these_runs_says_so(here: Path) -> None:
    runs = fake_runs.write(here / "results" / "runs", "mini", {}, ("glue",))
    glue = load_benchmark("glue")
    shown = Ablations(glue, runs)
    frame = shown.tables["settings"](None).frame
    assert not frame["is_ours"].any()
    assert len(frame) == 39
    shown.figures["settings"].draw(None, here / "figure")
    assert (here / "figure.png").exists()


def test_claims_find_ablations_and_settings(presented) -> None:
    numbers = presented("glue_lora").compared()
    keys = [column for column in numbers if column != "value"]
    assert not numbers.duplicated(keys).any()
    parts = numbers[numbers["method"] == "lora_emoe_part"]
    assert "D0.8" in set(parts["setting"])
    assert "" not in set(parts["setting"])
    assert set(numbers.loc[numbers["method"] == "lora_bottom", "setting"]) == {""}
    evaluated = presented("glue_ood").compared()
    assert {"id", "ood_mean"} <= set(evaluated.loc[evaluated["method"] == "emoe2lora", "domain"])


# trained as one thing, used as another


def test_the_same_weights_are_used_with_and_without_experts(workdir: Path) -> None:
    runs = [run for run in plan(["glue_lora"], "smoke") if run.spec["method"]["name"] in ("lora", "lora_emoe")]
    trained = {run.spec["method"]["name"]: recorded(run) for run in runs}
    found = {run.spec["method"]["name"]: recorded(run) for run in evaluations(runs)}
    losses = {name: result["scores"]["test"]["tweets"]["loss"] for name, result in found.items()}
    # as it was trained: the numbers of the training run
    for name in ("lora", "lora_emoe"):
        assert losses[name] == pytest.approx(trained[name]["scores"]["test"]["tweets"]["loss"], abs=1e-6)
    # otherwise: others, of the same rows
    assert losses["lora2emoe"] != pytest.approx(losses["lora"], abs=1e-6)
    assert losses["emoe2lora"] != pytest.approx(losses["lora_emoe"], abs=1e-6)
    assert len({result["data"]["test"]["digest"] for result in found.values()}) == 1
    assert found["lora2emoe"]["probe"]["loads"]
    assert not found["emoe2lora"]["probe"]["loads"]


# the paper's numbers


def test_the_papers_cells_stand_in_the_rows_of_the_suite_that_is_made_for_them(here: Path) -> None:
    glue = load_benchmark("glue")
    shown = glue.definition.ablations["settings"]
    runs = [run for run in paper_runs("glue") if run.spec["method"]["name"] in shown.rows]
    runs = [run for run in runs if run.spec["task"]["name"] in ("cola", "mrpc", "rte")]
    fake_runs.write_runs([run for run in runs if run.spec["model"]["name"] == "bert-large-cased"])
    runs = [run for run in runs if run.spec["model"]["name"] == "bert-large-cased"]
    rows = ablation_rows(TextOutcomes(glue, runs, ablated=True), shown)
    assert rows["paper"].notna().sum() == 39
    assert rows.loc[rows["paper"].notna(), "is_ours"].all()
    cell = rows[(rows["scope"] == "RTE") & (rows["method"] == "emoe_settings|N16-k0.125") & rows["paper"].notna()]
    assert cell["paper_delta"].tolist() == [pytest.approx(0.016889, abs=1e-5)]
    # and in panels of their own of the figure
    panels = dict(panels_of(rows))
    ours, paper = (panels[f"{who}BERT-large{more}\nRTE"] for who, more in (("", ", authors'"), ("the paper, ", "")))
    assert len(paper) == 13
    assert set(paper["score"]) == set(rows.loc[rows["paper"].notna() & (rows["scope"] == "RTE"), "paper"])
    assert set(ours["score"]) == set(ours["mean"])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("gpt2-xl,CoLA,lora_any,,60,published,x", "'method' is 'lora_any'|method' is 'lora_any'"),
        ("gpt2-x,CoLA,lora,,60,published,x", r"model' is 'gpt2-x'.*did you mean 'gpt2-xl'"),
        ("gpt2-xl,SST2,lora,,60,published,x", r"scope' is 'SST2'.*did you mean 'SST-2'"),
    ],
)
def test_wrong_cells_of_an_ablation_are_named(ablated: TextOutcomes, line: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "data.csv"
    file.write_text(f"model,scope,method,setting,value,status,source\n{line}\n")
    wrong = LORA.definition.ablations["data"].model_copy(update={"paper": str(file)})
    with pytest.raises(DefinitionError, match=message):
        ablation_rows(ablated, wrong)


# steps


def test_every_step_adds_one_thing_until_all_are_the_published_settings() -> None:
    planned = {run.spec["method"]["name"]: run.spec["method"] for run in plan(["glue_lora"], "smoke")}
    rows = LORA.definition.ablations["steps"].rows[1:]
    configs = [planned[name]["config"] for name in rows]
    added = [{key for key in after if after[key] != before[key]} for before, after in itertools.pairwise(configs)]
    assert added == [
        {"expert_dropout", "dropout_position"},
        {"output_bias"},
        {"capacity_factor", "count_padding"},
        {"router_noise"},
        {"aux_loss_coefficient", "balance_loss"},
        set(),  # what the authors' code trains beside
    ]
    assert planned["lora_balance"]["tune"] != planned["lora_emoe_published"]["tune"]


def test_a_step_is_compared_with_the_row_above(ablated: TextOutcomes) -> None:
    outcomes = ablated
    ablation = LORA.definition.ablations["steps"]
    own = outcomes.seeds[outcomes.seeds["protocol"].isin(outcomes.run_protocols) & (outcomes.seeds["domain"] == "id")]
    seeds = own.set_index(["method", "seed"])["value"]

    def difference(row: str, reference: str) -> float:
        return float((seeds[row] - seeds[reference]).dropna().mean())  # over the seeds of both

    rows = ablation_rows(outcomes, ablation).groupby("method").first()
    ran = ablation.rows[:-1]  # the last one is no row of this suite
    for before, after in itertools.pairwise(ran):
        assert rows.loc[after, "delta"] == pytest.approx(difference(after, before))
    usual = ablation_rows(outcomes, ablation.model_copy(update={"steps": None})).groupby("method").first()
    assert usual.loc["lora_noise", "delta"] == pytest.approx(difference("lora_noise", "lora"))
