"""Ablations: rows of their own tables, parts of the training rows, models that are trained as one thing and used as another."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.harness.base.errors import DefinitionError
from benchmarks.harness.base.paths import RUNS
from benchmarks.harness.config import definition
from benchmarks.harness.config.definition import load_benchmark
from benchmarks.harness.config.runs import Run, plan
from benchmarks.harness.config.shared import ABLATION
from benchmarks.harness.config.variants import without
from benchmarks.harness.report.presentation import Presentation, present
from benchmarks.text.ablations import Ablations, ablation_rows
from benchmarks.text.figures import panels_of
from benchmarks.text.outcomes import TextOutcomes
from tests import fake_runs
from tests.executed import recorded
from tests.planned import evaluations, paper_runs

LORA, OOD = load_benchmark("glue_lora"), load_benchmark("glue_ood")
TABLES = [("glue", "settings"), ("glue_lora", "selection"), ("glue_lora", "settings"), ("glue_lora", "data")]
TABLES += [("glue_lora", "steps"), ("glue_lora", "controls"), ("glue", "transformation")]
TABLES.append(("glue_ood", "transformation"))


# what is shown


@pytest.fixture(scope="module")
def finished(shared_here: Path) -> list[Run]:
    """The default suite's text, and of the night's a part of every ablation."""
    gains = {"lora_bottom": -0.05, "emoe2lora": 0.04}
    runs = fake_runs.write(RUNS, "mini", gains, ("glue", "glue_lora", "glue_ood"))
    known = {run.id for run in runs}
    more = [
        run
        for run in plan(["glue_lora"], "mini_full")
        if run.spec["task"]["name"] == "tweets"
        and run.spec["learning_rate"] == 4.0e-3
        and run.spec["seed"] < 3
        and run.id not in known
    ]
    fake_runs.write_runs(more, gains)
    return [*runs, *more]


@pytest.fixture(scope="module")
def paper(shared_here: Path) -> list[Run]:
    """The paper's ablations by adapters, on made-up numbers: two of three rates and of three seeds, which takes half the time."""
    rows = {row for ablation in LORA.definition.ablations.values() for row in ablation.rows}
    runs = [run for run in paper_runs("glue_lora") if run.spec["method"]["name"] in rows]
    rates = {
        model: sorted({run.spec["learning_rate"] for run in runs if run.spec["model"]["name"] == model})[:2]
        for model in {run.spec["model"]["name"] for run in runs}
    }
    runs = [
        run for run in runs if run.spec["seed"] < 2 and run.spec["learning_rate"] in rates[run.spec["model"]["name"]]
    ]
    fake_runs.write_runs(runs, {"lora_bottom": -0.05})
    return runs


def of(runs: list[Run], benchmark: str) -> list[Run]:
    return [run for run in runs if run.benchmark == benchmark]


@pytest.fixture(scope="module")
def presented(finished: list[Run]) -> Callable[[str], Presentation]:
    """What a benchmark shows of the finished runs; made once, and only looked at."""
    return functools.cache(lambda name: present(load_benchmark(name), of(finished, name)))


@pytest.fixture(scope="module")
def ablated(finished: list[Run]) -> TextOutcomes:
    """The finished runs by adapters, every setting a row."""
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
        assert not {name for name in rows if benchmark.kind.row_titles(benchmark.definition).get(name) is None}
        methods = definition.resolve_methods(benchmark.definition)
        assert ABLATION not in {methods[name].role for name in rows}


@pytest.mark.parametrize(("benchmark", "name"), TABLES)
def test_ablations_are_tables_and_figures(presented, benchmark: str, name: str) -> None:
    shown = presented(benchmark)
    (table,) = (table for table in shown.tables if table.name == f"{benchmark}_{name}")
    assert all((table.markdown(), table.latex(), table.html()))
    assert f"{benchmark}_{name}" in shown.figures  # which test_figures.py draws


def test_a_row_says_what_its_runs_say_and_the_paper_stands_beside(ablated: TextOutcomes) -> None:
    rows = ablation_rows(ablated, LORA.definition.ablations["selection"])
    own = rows[rows["is_ours"]].groupby("method")["delta"].mean()
    assert own["lora_bottom"] == pytest.approx(-0.05, abs=0.02)
    assert rows.loc[rows["method"] == "lora", "delta"].isna().all()
    paper = rows[~rows["is_ours"]].set_index("method")
    assert paper.loc["lora_bottom", "paper_delta"] == pytest.approx(-0.0048)
    assert paper.loc["lora_emoe", "method_title"] == "LoRA + EMoE"


@pytest.mark.parametrize("suite", ["finished", "paper"])
def test_every_setting_is_a_row_with_its_own_choice_of_rate(suite: str, request: pytest.FixtureRequest) -> None:
    runs = of(request.getfixturevalue(suite), "glue_lora")
    outcomes = TextOutcomes(LORA, runs, ablated=True)
    rows = ablation_rows(outcomes, LORA.definition.ablations["settings"])
    planned = {
        without(run.spec["method"]["variant"], {"L22", "L44"})
        for run in runs
        if run.spec["method"]["name"] == "lora_emoe_settings"
    }
    shown = {outcomes.settings[name][1] for name in rows["method"] if name.startswith("lora_emoe_settings|")}
    assert shown == planned
    assert "" not in shown
    assert {"N", "k", "L", "D", "kind"} <= set(rows)
    assert set(rows.loc[rows["method"].str.startswith("lora_emoe_settings|"), "kind"]) == {"emoe"}


def test_an_average_is_over_what_all_rows_have(paper: list[Run]) -> None:
    rows = ablation_rows(TextOutcomes(LORA, paper, ablated=True), LORA.definition.ablations["selection"])
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
    shown.figures["settings"](None, here / "figure")
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
        ("gpt2-xl,CoLA,lora,,60,published,x\ngpt2-xl,CoLA,lora,,61,published,x", "stands there twice"),
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


def test_gmoe_has_as_many_experts_as_emoe_where_that_is_asked() -> None:
    for suite in ("smoke", "mini_full", "paper"):
        configs: dict[str, set[tuple[int, int]]] = {}
        for run in plan(["glue_lora"], suite):
            config, name = run.spec["method"]["config"], run.spec["method"]["name"]
            if name in ("lora_emoe", "lora_gmoe_same"):
                configs.setdefault(name, set()).add((config["num_experts"], config["top_k"]))
        assert configs["lora_gmoe_same"] == configs["lora_emoe"]
