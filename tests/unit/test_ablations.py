"""Test ablations: plans, errors, table rows, and models that are evaluated as another method."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from benchmarks.harness.base import RUNS, DefinitionError
from benchmarks.harness.config.benchmark import load_benchmark
from benchmarks.harness.config.method_specs import remove_settings, setting_text
from benchmarks.harness.config.methods import ABLATION
from benchmarks.harness.report.presentation import present
from benchmarks.harness.results.records import Record
from benchmarks.text.ablations import ablation_rows, ablation_table, draw_differences
from benchmarks.text.data import TextSplit
from benchmarks.text.outcomes import TextOutcomes
from tests import fake_runs
from tests.drawn import saved_figures
from tests.executed import recorded
from tests.planned import edited_benchmark, edited_part, evaluations, paper_runs, plan, specs

LORA = load_benchmark("glue_lora")

# a part of the rows


def split_of(labels: list[Any]) -> TextSplit:
    return TextSplit([(str(number),) for number in range(len(labels))], labels)


def test_a_part_has_every_class_in_proportion_and_a_smaller_one_lies_within() -> None:
    whole = split_of([0] * 70 + [1] * 20 + [2] * 10)
    parts = {share: whole.stratified_sample(share, "t/train") for share in (0.1, 0.5)}
    counts = {share: Counter(part.labels) for share, part in parts.items()}
    assert counts == {0.1: {0: 7, 1: 2, 2: 1}, 0.5: {0: 35, 1: 10, 2: 5}}
    assert set(parts[0.1].texts) < set(parts[0.5].texts) < set(whole.texts)
    assert (
        parts[0.5]
        == whole.stratified_sample(0.5, "t/train")
        != whole.stratified_sample(0.5, "other/train")
    )
    assert parts[0.5].texts == sorted(
        parts[0.5].texts, key=lambda row: int(row[0])
    )  # in the order of the set
    assert (
        Counter(split_of([0] * 99 + [1]).stratified_sample(0.1, "x").labels)[1] == 1
    )  # of a rare class
    scores = split_of([0.1, 0.2] * 5 + [4.9, 5.0] * 5)
    assert len(scores.stratified_sample(0.2, "x")) == 4  # rounded scores are classes


# what is planned


def test_only_rows_of_ablations_are_trained_otherwise() -> None:
    part = edited_part("glue_lora", "mini", {"grid.0.train_share": [0.5]})
    with pytest.raises(
        DefinitionError,
        match=r"grid\[0\]\.train_share' is for rows with role: ablation, not 'lora'",
    ):
        specs(LORA, part)


MORE = {"title": "More", "trained": "vanilla", "used_as": "random_partition"}


@pytest.mark.parametrize(
    ("benchmark", "edits", "message"),
    [
        (
            "glue_lora",
            {"ablations.selection.rows": ["lora", "lora_botom"]},
            "did you mean 'lora_bottom'",
        ),
        (
            "glue_lora",
            {"ablations.selection.rows": ["lora_emoe", "lora_bottom"]},
            "must begin with the baseline",
        ),
        (
            "glue_lora",
            {"ablations.selection.paper": "selektion.csv"},
            r"did you mean 'selection\.csv'",
        ),
        (
            "glue_lora",
            {"ablations.data.rows": ["lora", "lora_emoe_part", "lora_emoe"]},
            r"data\.csv: 'lora_part' is not in .*'ablations\.data\.rows'; did you mean 'lora_emoe_part'",
        ),
        (
            "glue_ood",
            {"transformed.lora2emoe.used_as": "lora_emoe_learn"},
            "whose weights fit no other row",
        ),
        (
            "glue_ood",
            {"transformed.lora2emoe.trained": "lora_block"},
            "whose weights fit no other row",
        ),
        ("glue", {"transformed.more": MORE}, "two rows of 'transformed' are trained as 'vanilla'"),
    ],
)
def test_ablations_that_compare_nothing_sensible_are_refused(
    benchmark: str, edits: dict[str, Any], message: str
) -> None:
    with pytest.raises(DefinitionError, match=message):
        edited_benchmark(benchmark, edits)


# what is shown


@pytest.fixture(scope="module")
def finished(shared_here: Path) -> list[Record]:
    """Make up numbers of the default suite's adapters, and of every ablation on one task of the paper's."""
    runs = fake_runs.write(RUNS, "mini", benchmarks=("glue_lora",))
    more = [
        run for run in paper_runs("glue_lora") if run.spec["model"]["name"] == "bert-large-cased"
    ]
    more = [
        run
        for run in more
        if run.spec["task"]["name"] == "cola" and run.spec["protocol"] == "clean"
    ]
    more = [run for run in more if run.spec["learning_rate"] == 3.0e-4]
    fake_runs.write_runs(more)
    return fake_runs.records([*runs, *more])


@pytest.fixture(scope="module")
def adapted(finished: list[Record]) -> TextOutcomes:
    return TextOutcomes(LORA, finished)


@pytest.mark.parametrize("benchmark", ["glue", "glue_lora", "glue_ood", "multitask"])
def test_without_runs_the_tables_have_their_columns_and_no_row_of_ours(
    here: Path, benchmark: str
) -> None:
    shown = present(load_benchmark(benchmark), [])
    assert all(len(table.frame) == 0 for table in shown.tables[:2])
    assert all("Scores are , in" not in table.caption for table in shown.tables)
    assert shown.verdicts == []
    assert len(shown.outcomes.claim_numbers()) == 0


def test_runs_of_ablations_alone_have_rows_in_no_main_table(finished: list[Record]) -> None:
    methods = LORA.methods()
    ablations = [record for record in finished if methods[record.run.method].role == ABLATION]
    main = TextOutcomes(LORA, ablations)
    assert len(main.rows) == 0
    assert len(main.ablated.rows) > 0


def test_every_setting_is_a_row_and_main_tables_have_none(
    finished: list[Record], adapted: TextOutcomes
) -> None:
    rows = ablation_rows(adapted, LORA.definition.ablations["settings"])
    methods = [record.run.spec["method"] for record in finished]
    planned = [method["variant"] for method in methods if method["name"] == "lora_emoe_settings"]
    shown = {
        name.partition("|")[2] for name in rows["method"] if name.startswith("lora_emoe_settings|")
    }
    assert shown == {remove_settings(variant, {"L22", "L44"}) for variant in planned}
    main = present(LORA, finished).tables[0].frame
    assert {LORA.methods()[name].role for name in main["method"]}.isdisjoint({ABLATION})


def test_rows_with_equal_settings_have_different_titles(here: Path) -> None:
    runs = plan(["glue_lora"], "full")
    fake_runs.write_runs(runs)
    outcomes = TextOutcomes(LORA, fake_runs.records(runs))
    rows = ablation_rows(outcomes, LORA.definition.ablations["settings"])
    ours = rows[rows["is_ours"]]
    titles = ours.set_index("method")["method_title"]
    # the main row and a row of the ablation have the same N and k/N
    assert titles["lora_emoe"] == "LoRA + EMoE, N 16, k/N 0.25 (main)"
    assert titles["lora_emoe_settings|N16-k0.25"] == "LoRA + EMoE, N 16, k/N 0.25"
    assert titles["lora"] == "LoRA"
    # on CoLA, which the ablation does not show, half of the experts are used
    neurons = ours.set_index("method")["active_neurons"]
    assert neurons["lora_emoe"] == neurons["lora_emoe_settings|N16-k0.25"]
    assert not ours.duplicated(["protocol", "scope", "method_title"]).any()


def test_a_main_row_lists_its_runs_on_the_ablated_tasks_only(here: Path) -> None:
    runs = plan(["glue_lora"], "full")
    fake_runs.write_runs(runs)
    table = ablation_table(TextOutcomes(LORA, fake_runs.records(runs)), "settings")
    assert table.origins is not None
    # LoRA and EMoE were also trained on CoLA
    assert set(table.origins["task"]) == {"sst2"}


def test_rows_without_a_shared_seed_keep_their_differences(finished: list[Record]) -> None:
    seeds = {"lora_not_top": [0, 1, 2], "lora_bottom": [3, 4]}
    kept = []
    for record in finished:
        run = record.run
        if run.model == "minilm" and run.seed in seeds.get(run.method, [run.seed]):
            kept.append(record)
    rows = ablation_rows(TextOutcomes(LORA, kept), LORA.definition.ablations["selection"])
    ours = rows[rows["is_ours"]].set_index("method")
    assert (ours["n"] == 0).all()
    assert ours["mean"].isna().all()
    pairs = ours["pairs"].to_dict()
    assert (pairs["lora_emoe"], pairs["lora_not_top"], pairs["lora_bottom"]) == (5, 3, 2)
    assert ours.loc[["lora_emoe", "lora_not_top", "lora_bottom"], "delta"].notna().all()


# figures


@pytest.mark.parametrize(
    ("variant", "words"),
    [
        ("Lall", "all layers"),
        ("Llast:1", "last layer"),
        ("N16-Llast:2", "N 16, last 2 layers"),
        ("Llast-half:1-D0.8", "last half of the layers, 80 % of the rows"),
        ("Llast-quarter:4", "every fourth layer of the last quarter"),
        ("Llast-half:5", "every 5th layer of the last half"),
        ("L3+5", "layers 3, 5"),
        ("L-1", "layer -1"),
        ("L-2+-1", "layers -2, -1"),
        ("L28::2", "layers 28::2"),
    ],
)
def test_a_request_for_layers_is_described_in_words(variant: str, words: str) -> None:
    assert setting_text(variant) == words


def figure_of(outcomes: TextOutcomes, name: str, folder: Path) -> Figure:
    with saved_figures() as figures:
        draw_differences(outcomes, folder / name, name)
    (figure,) = figures
    return figure


def titles_of(figure: Figure) -> list[str]:
    """Return the titles of all panels, with single blanks for line breaks and no-break spaces."""
    return [" ".join(axis.get_title().split()) for axis in figure.axes]


@pytest.fixture
def tiny(here: Path) -> TextOutcomes:
    """Make up numbers of the smallest suite's adapters, which have one seed."""
    runs = fake_runs.write(RUNS, "smoke", benchmarks=("glue_lora",))
    return TextOutcomes(LORA, fake_runs.records(runs))


def test_marks_in_domain_are_filled_also_those_of_the_authors_settings(
    tiny: TextOutcomes, here: Path
) -> None:
    (axis,) = figure_of(tiny, "steps", here).axes
    # lines without a marker are intervals, and those without data are for the legend
    marks = [line for line in axis.lines if line.get_marker() != "None" and len(line.get_xdata())]
    assert len(marks) == len(LORA.definition.ablations["steps"].rows) - 1
    assert all(mark.get_markerfacecolor() != "white" for mark in marks)


def test_panels_say_whose_numbers_they_have_and_the_axis_names_the_baseline(
    tiny: TextOutcomes, here: Path
) -> None:
    figure = figure_of(tiny, "settings", here)
    assert titles_of(figure) == [
        "tiny GPT-2 (random weights), n = 1 seed, no intervals: they need 3 seeds",
        "BERT-large (the paper)",
        "GPT2-XL (the paper)",
    ]
    last_axis = figure.axes[-1]
    assert last_axis.get_xlabel() == "Difference to LoRA (points)"
    (line,) = [label.get_text().replace("\n", " ") for label in last_axis.get_yticklabels()]
    assert line == "LoRA + EMoE, every second layer of the last half"


def test_panels_with_several_seeds_count_them_and_papers_rows_may_lack_a_model(
    adapted: TextOutcomes, tmp_path: Path
) -> None:
    titles = titles_of(figure_of(adapted, "selection", tmp_path))
    assert "MiniLM-L6 (22.7 M), n = 5 seeds, 95 % intervals" in titles
    assert "the paper" in titles


PAPER = """model,scope,method,setting,value,status,source
bert-large-cased,CoLA,lora,,60,published,x
bert-large-cased,MRPC,lora,,80,published,x
bert-large-cased,CoLA,lora_emoe_settings,N16-k0.25,61,published,x
bert-large-cased,MRPC,lora_emoe_settings,N16-k0.25,83,published,x
bert-large-cased,CoLA,lora_emoe_settings,N16-k0.5,62,published,x
bert-large-cased,MRPC,lora_emoe_settings,N16-k0.5,,unknown,x
bert-large-cased,CoLA,lora_emoe_settings,N32-k0.5,63,published,x
"""


def test_the_papers_average_is_left_out_if_it_lacks_a_number_of_a_task(here: Path) -> None:
    file = here / "paper.csv"
    file.write_text(PAPER)
    benchmark = edited_benchmark("glue_lora", {})
    ablations = benchmark.definition.ablations
    ablations["settings"] = ablations["settings"].model_copy(update={"paper": str(file)})
    runs = fake_runs.write(RUNS, "smoke", benchmarks=("glue_lora",))
    figure = figure_of(TextOutcomes(benchmark, fake_runs.records(runs)), "settings", here)
    (axis,) = [axis for axis in figure.axes if axis.get_title() == "BERT-large (the paper)"]
    crosses = [line for line in axis.lines if line.get_marker() == "x"]
    drawn = [value for cross in crosses for value in cross.get_xdata()]
    assert drawn == pytest.approx([2])


# trained as one thing, used as another


def test_the_same_weights_are_used_with_and_without_experts(workdir: Path) -> None:
    runs = [
        run
        for run in plan(["glue_lora"], "smoke")
        if run.spec["method"]["name"] in ("lora", "lora_emoe")
    ]
    trained = {run.spec["method"]["name"]: recorded(run) for run in runs}
    evaluated = {run.spec["method"]["name"]: recorded(run) for run in evaluations(runs)}
    losses = {
        name: result["scores"]["test"]["tweets"]["loss"] for name, result in evaluated.items()
    }
    # as it was trained: the numbers of the training run
    for name in ("lora", "lora_emoe"):
        assert losses[name] == pytest.approx(
            trained[name]["scores"]["test"]["tweets"]["loss"], abs=1e-6
        )
    # otherwise: others, of the same rows
    assert losses["lora2emoe"] != pytest.approx(losses["lora"], abs=1e-6)
    assert losses["emoe2lora"] != pytest.approx(losses["lora_emoe"], abs=1e-6)
    assert len({result["data"]["test"]["digest"] for result in evaluated.values()}) == 1
    assert evaluated["lora2emoe"]["probe"]["loads"]
    assert not evaluated["emoe2lora"]["probe"]["loads"]


# the paper's numbers


def test_the_papers_cells_stand_in_the_rows_of_the_suite_that_is_made_for_them(here: Path) -> None:
    shown = LORA.definition.ablations["settings"]
    runs = [run for run in paper_runs("glue_lora") if run.spec["method"]["name"] in shown.rows]
    runs = [run for run in runs if run.spec["task"]["name"] in ("cola", "mrpc", "rte")]
    runs = [run for run in runs if run.spec["model"]["name"] == "bert-large-cased"]
    fake_runs.write_runs(runs)
    rows = ablation_rows(TextOutcomes(LORA, fake_runs.records(runs)), shown)
    rows = rows[rows["model"] == "bert-large-cased"]
    assert rows["paper"].notna().sum() == 39
    assert rows.loc[rows["paper"].notna(), "is_ours"].all()
    cell = rows[
        (rows["scope"] == "RTE")
        & (rows["method"] == "lora_emoe_settings|N16-k0.125")
        & rows["paper"].notna()
    ]
    assert cell["paper_delta"].tolist() == [pytest.approx(0.016889, abs=1e-5)]


# steps


def test_every_step_adds_one_thing_until_all_are_the_published_settings() -> None:
    planned = {
        run.spec["method"]["name"]: run.spec["method"] for run in plan(["glue_lora"], "smoke")
    }
    configs = [planned[name]["config"] for name in LORA.definition.ablations["steps"].rows[1:]]
    added = [
        {key for key in after if after[key] != before[key]}
        for before, after in itertools.pairwise(configs)
    ]
    steps = [
        {"expert_dropout", "dropout_position"},
        {"output_bias"},
        {"capacity_factor", "count_padding"},
    ]
    assert added == [*steps, {"router_noise"}, {"aux_loss_coefficient", "balance_loss"}, set()]
    # the last step also trains the parameters that the authors' code trains
    assert planned["lora_balance"]["tune"] != planned["lora_emoe_published"]["tune"]


def test_a_step_is_compared_with_the_row_above(adapted: TextOutcomes) -> None:
    ablation, seeds = LORA.definition.ablations["steps"], adapted.ablated.seeds
    is_part = (
        (seeds["model"] == "bert-large-cased")
        & (seeds["protocol"] == "clean")
        & (seeds["domain"] == "id")
    )
    seeds = seeds[is_part].set_index(["method", "seed"])["value"]
    rows = ablation_rows(adapted, ablation)
    rows = rows[rows["model"] == "bert-large-cased"].groupby("method").first()
    for before, after in itertools.pairwise(
        ablation.rows[:-1]
    ):  # the last one is no row of this suite
        assert rows.loc[after, "delta"] == pytest.approx(
            (seeds[after] - seeds[before]).dropna().mean()
        )


def test_a_step_with_several_settings_is_compared_with_the_row_above_in_the_table(
    finished: list[Record],
) -> None:
    edits = {"ablations.settings.steps": True, "ablations.settings.paper": None}
    benchmark = edited_benchmark("glue_lora", edits)
    # the runs of N 32 come before those of N 16, but the table is sorted by number
    outcomes = TextOutcomes(benchmark, finished[::-1])
    rows = ablation_rows(outcomes, benchmark.definition.ablations["settings"])
    ours = rows[(rows["model"] == "minilm") & (rows["domain"] == "id")]
    seeds = outcomes.ablated.seeds
    is_clean = (seeds["model"] == "minilm") & (seeds["protocol"] == "clean")
    scores = seeds[is_clean].set_index(["method", "seed"])["value"]
    in_order = ours["method"].tolist()
    assert in_order[2:4] == ["lora_emoe_settings|N16-k0.5", "lora_emoe_settings|N32-k0.25"]
    for before, after in itertools.pairwise(in_order):
        shown = ours.set_index("method").loc[after, "delta"]
        assert shown == pytest.approx((scores[after] - scores[before]).mean())


def test_steps_of_a_single_row_have_no_differences(finished: list[Record]) -> None:
    benchmark = edited_benchmark("glue_lora", {"ablations.steps.rows": ["lora"]})
    outcomes = TextOutcomes(benchmark, finished)
    assert ablation_rows(outcomes, benchmark.definition.ablations["steps"]).empty
