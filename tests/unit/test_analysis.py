"""Test scores, selection and tables on made-up runs, and the paper's traces of routing."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from benchmarks.glue_ood.ranks import ranked_scores, ranks
from benchmarks.harness.base import RUNS, DefinitionError
from benchmarks.harness.config.benchmark import load_benchmark
from benchmarks.harness.config.suite import load_suite
from benchmarks.harness.report.claims import Comparison
from benchmarks.harness.report.evidence import find_evidence
from benchmarks.harness.results.records import Record, scores_of
from benchmarks.harness.training.metrics import SCORES, score
from benchmarks.text.ablations import ablation_table
from benchmarks.text.outcomes import TextOutcomes, choices, reported_scores, select_runs
from benchmarks.text.routing import draw_traces, published_traces
from benchmarks.text.tables import ood_table, paper_table, results_table, tasks_table
from benchmarks.text.tables import tests_table as paired_tests_table
from benchmarks.text.traces import trace_numbers
from tests import fake_runs
from tests.drawn import saved_figures
from tests.planned import edited_benchmark


@pytest.fixture(scope="module")
def glue(shared_here: Path) -> TextOutcomes:
    """Finish full fine-tuning of the mini suite with made-up numbers and a gain of EMoE."""
    runs = load_suite({"benchmarks": ["glue"]}).runs
    fake_runs.write_runs(runs, {"emoe": 0.05, "random_partition": -0.1})
    return outcomes_of(fake_runs.records(runs), "glue")


def outcomes_of(records: list[Record], benchmark: str) -> TextOutcomes:
    return TextOutcomes(
        load_benchmark(benchmark),
        [record for record in records if record.run.benchmark == benchmark],
    )


# scores


def test_scores_by_hand() -> None:
    labels, logits = np.array([0, 0, 0, 1]), np.array([[2, 1], [2, 1], [1, 2], [1, 2]])
    assert score("accuracy", logits, labels) == 0.75
    assert score("balanced_accuracy", logits, labels) == pytest.approx((2 / 3 + 1) / 2)
    assert score("f1", logits, labels) == pytest.approx(2 / 3)
    assert score("accuracy_f1", logits, labels) == pytest.approx((0.75 + 2 / 3) / 2)
    assert score("mcc", logits, labels) == pytest.approx((1 * 2 - 1 * 0) / math.sqrt(2 * 1 * 3 * 2))
    targets, predictions = np.array([0.0, 1.0, 2.0, 5.0]), np.array([[0.1], [0.9], [3.0], [2.5]])
    expected = (
        stats.pearsonr(targets, predictions[:, 0])[0]
        + stats.spearmanr(targets, predictions[:, 0])[0]
    ) / 2
    assert score("pearson_spearman", predictions, targets) == pytest.approx(expected)
    for metric in SCORES:  # a model that predicts one class or number alone has a score too
        constant = np.ones((4, 1)) if metric == "pearson_spearman" else np.array([[1.0, 0.0]] * 4)
        assert math.isfinite(score(metric, constant, np.array([0, 1, 1, 0])))


# selection


def test_selection_takes_the_best_mean_dev_score_of_each_cell() -> None:
    """Choose by the kept epoch, or, as the authors do, by the best dev epoch, which they report."""
    rows = []
    cell = {
        "benchmark": "b",
        "model": "m",
        "task": "t",
        "method": "x",
        "protocol": "clean",
        "variant": "",
    }
    cell |= {"eval_task": "t", "metric": "accuracy", "is_score": True}
    for rate, values in ((1e-5, (0.8, 0.8)), (2e-5, (0.7, 0.95)), (3e-5, (0.9, 0.6))):
        for seed, value in enumerate(values):
            run = {**cell, "learning_rate": rate, "seed": seed, "run_id": f"{rate}{seed}"}
            parts = {"dev": value, "dev_best": 1 - value, "test": rate}
            rows += [{**run, "part": part, "value": number} for part, number in parts.items()]
    records = pd.DataFrame(rows)
    table = choices(records, "clean")
    assert table.loc[table["chosen"], "learning_rate"].tolist() == [2e-5]
    assert reported_scores(select_runs(records, "clean"))["value"].tolist() == [2e-5, 2e-5]
    assert scores_of(select_runs(records, "published"), "test")["value"].tolist() == [3e-5, 3e-5]
    assert reported_scores(select_runs(records, "published"))["value"].tolist() == pytest.approx(
        [0.1, 0.4]
    )


# tables and figures


def test_results_table_says_what_was_put_in(glue: TextOutcomes) -> None:
    frame = results_table(glue).frame.set_index(["task", "method"])
    assert len(frame) == 7
    assert frame["n"].to_dict() == {row: "5" if row[0] == "tweets" else "8" for row in frame.index}
    assert frame.loc[("tweets", "emoe"), "id_delta"] == pytest.approx(0.05, abs=0.03)
    assert frame.loc[("tweets", "random_partition"), "ood_delta"] < -0.05
    assert math.isnan(frame.loc[("tweets", "vanilla"), "id_delta"])


def test_scores_use_the_seeds_of_all_rows_and_differences_those_of_both(
    glue: TextOutcomes,
) -> None:
    # vanilla and EMoE have eight seeds, the others five
    rows = results_table(glue).frame.set_index(["task", "method"]).loc["tweets"]
    assert set(rows["n"]) == {"5"}
    assert rows["pairs"].to_dict() == {
        "vanilla": "–",
        "gmoe": "5",
        "emoe": "8",
        "emoe_learn": "5",
        "random_partition": "5",
    }
    # a method with fewer seeds does not change the difference of another
    both = [run for run in glue.runs if run.method in ("vanilla", "emoe")]
    alone = outcomes_of(fake_runs.records(both), "glue")
    alone_rows = results_table(alone).frame.set_index(["task", "method"]).loc["tweets"]
    columns = ["id_delta", "id_low", "ood_delta", "published_delta"]
    assert rows.loc["emoe", columns].tolist() == alone_rows.loc["emoe", columns].tolist()
    gap = alone_rows.loc["emoe", "id_mean"] - alone_rows.loc["vanilla", "id_mean"]
    assert rows.loc["emoe", "id_delta"] == pytest.approx(gap)
    tested = paired_tests_table(glue).frame.set_index(["task", "method"])["n"]
    assert set(tested.loc[("tweets", "emoe")]) == {8}


def test_tasks_with_other_experts_are_averaged_and_compared(shared_here: Path) -> None:
    # in `full`, EMoE on MRPC and RTE has k/N 1/2, on the other tasks 1/4
    runs = load_suite({"suite": "full", "benchmarks": ["glue"]}).runs
    fake_runs.write_runs(runs)
    outcomes = outcomes_of(fake_runs.records(runs), "glue")
    rows = ablation_table(outcomes, "transformation").frame
    clean = rows[rows["protocol"] == "clean"]
    assert set(clean["method"]) == {"vanilla", "emoe", "emoe2vanilla", "vanilla2emoe"}
    assert "average of 5 tasks" in set(clean["scope"])
    assert not clean["method_title"].str.contains("k/N").any()
    claimed = outcomes.claim_numbers()
    folded = claimed[(claimed["method"] == "emoe2vanilla") & (claimed["selection"] == "clean")]
    assert set(folded["setting"]) == {""}
    assert set(folded["task"]) == {"sst2", "stsb", "cola", "mrpc", "rte"}


def test_changes_of_loads_are_compared_between_equal_numbers_of_experts(shared_here: Path) -> None:
    # in `full`, EMoE has k/N 1/4 and EMoE-learn 1/2; in `mini` they are equal
    compare = Comparison(
        benchmark="glue",
        method="emoe",
        against="emoe_learn",
        selection="clean",
        domain="training",
        metric="load_change",
        direction="lower",
    )
    for suite, is_comparable in (("full", False), ("mini", True)):
        runs = load_suite({"suite": suite, "benchmarks": ["glue"]}).runs
        fake_runs.write_runs(runs)
        numbers = outcomes_of(fake_runs.records(runs), "glue").claim_numbers()
        assert numbers["metric"].eq("load_change").any()
        assert (find_evidence(numbers, compare) is not None) == is_comparable


def test_paper_table_puts_published_numbers_beside_ours(glue: TextOutcomes) -> None:
    table = paper_table(glue, "id")
    frame = table.frame.set_index(["model", "scope", "method"])
    published = frame.loc[("bert-base-cased", "average", "emoe")]
    assert published[["value", "paper_delta"]].tolist() == pytest.approx([0.8046, 0.0088])
    assert (published["status"], math.isnan(published["clean"])) == ("published", True)
    ours = frame.loc[("minilm", "Tweets", "emoe")]
    assert min(ours["clean_delta"], ours["published_delta"]) > 0
    assert math.isnan(ours["value"])
    assert ("gpt2", "CoLA", "emoe") not in frame.index  # neither published nor ours


# both selections, on GLUE's own tasks


@pytest.fixture(scope="module")
def paper(shared_here: Path) -> list[Record]:
    """Make up numbers of a part of the paper suite: two models' LoRA rows on all tasks, and GLUE-X."""
    return fake_runs.records(
        fake_runs.write(RUNS, "paper", {"lora_emoe": 0.05}, ("glue_lora", "glue_ood"))
    )


@pytest.fixture(scope="module")
def adapted(paper: list[Record]) -> TextOutcomes:
    return outcomes_of(paper, "glue_lora")


@pytest.fixture(scope="module")
def evaluated(paper: list[Record]) -> TextOutcomes:
    return outcomes_of(paper, "glue_ood")


def test_published_and_clean_runs_stand_side_by_side(adapted: TextOutcomes) -> None:
    by_row = tasks_table(adapted).frame.set_index(["model", "protocol", "method"])
    assert len(by_row.loc["gpt2-xl"].loc["published"]) == 12  # all rows
    assert len(by_row.loc["gpt2-xl"].loc["clean"]) == 6  # the paper's five, and a random partition
    # the authors' selection: the learning rate with the best mean over seeds, and the population's deviation
    keys = ["model", "task", "method", "protocol"]
    records = adapted.recorded_numbers.set_index(keys).sort_index()
    records = records.loc[("gpt2-xl", "cola", "lora", "published")]
    scores = records[records["is_score"]]
    rate = scores[scores["part"] == "dev"].groupby("learning_rate")["value"].mean().idxmax()
    test = scores.loc[(scores["part"] == "test") & (scores["learning_rate"] == rate), "value"]
    row = by_row.loc[("gpt2-xl", "published", "lora")]
    assert (row["CoLA mean"], row["CoLA std"]) == pytest.approx((test.mean(), np.std(test)))
    assert row["average"] == pytest.approx(
        row[[name for name in by_row if name.endswith(" mean")]].mean()
    )


def test_an_average_is_over_all_tasks_or_not_given(paper: list[Record]) -> None:
    lost = ("lora_block", "cola")
    kept = [
        record
        for record in paper
        if (record.run.spec["method"]["name"], record.run.spec["task"]["name"]) != lost
    ]
    by_row = tasks_table(outcomes_of(kept, "glue_lora")).frame.set_index(
        ["model", "protocol", "method"]
    )
    assert math.isnan(by_row.loc[("gpt2-xl", "clean", "lora_block"), "average"])
    assert not math.isnan(by_row.loc[("gpt2-xl", "clean", "lora"), "average"])


def test_the_papers_average_leaves_out_methods_without_a_seed_that_all_rows_have(
    paper: list[Record],
) -> None:
    def is_kept(record: Record) -> bool:
        # on CoLA, the dense row and the others have different seeds
        spec = record.run.spec
        if spec["task"]["name"] != "cola":
            return True
        return (spec["method"]["name"] == "lora") == (spec["seed"] == 0)

    kept = [record for record in paper if is_kept(record)]
    ours = {}
    for name, records in (("all", paper), ("kept", kept)):
        frame = paper_table(outcomes_of(records, "glue_lora"), "id").frame
        by_row = frame.set_index(["model", "scope", "method"])
        ours[name] = by_row.loc[("gpt2-xl", "average", "lora_emoe"), "published"]
    assert not math.isnan(ours["all"])
    assert math.isnan(ours["kept"])


def test_the_papers_average_has_no_difference_if_a_task_has_no_baseline(
    paper: list[Record],
) -> None:
    def is_kept(record: Record) -> bool:
        return (record.run.spec["task"]["name"], record.run.method) != ("cola", "lora")

    kept = [record for record in paper if is_kept(record)]
    by_row = paper_table(outcomes_of(kept, "glue_lora"), "id").frame.set_index(
        ["model", "scope", "method"]
    )
    average = by_row.loc[("gpt2-xl", "average", "lora_emoe")]
    assert not math.isnan(average["published"])
    assert math.isnan(average["published_delta"])


def test_captions_name_the_metrics_in_and_out_of_domain(evaluated: TextOutcomes) -> None:
    # CoLA has Matthews' correlation, and its set out of domain has the accuracy
    def sentence(outcomes: TextOutcomes) -> str:
        caption = ood_table(outcomes).caption
        return caption[caption.index("Scores are ") :]

    only_out = sentence(evaluated)
    assert "Grammar Test" in only_out[only_out.index("accuracy (") : only_out.index(")")]
    both = sentence(evaluated.ablated)
    in_domain, out_of_domain = both.split(" in domain, and ")
    assert "matthews correlation (CoLA)" in in_domain
    assert "CoLA" not in out_of_domain
    assert out_of_domain == only_out.removeprefix("Scores are ").replace(
        ", in %.", " out of domain, in %."
    )


def test_ranks_state_what_was_ranked(evaluated: TextOutcomes) -> None:
    assert [scores.shape for scores in ranked_scores(evaluated).values()] == [(5, 15)] * 4
    table = ranks(evaluated)
    assert (
        "critical difference 1.57" in table.caption
    )  # 2.728 * sqrt(5 * 6 / (6 * 15)), Demšar's table
    frame = table.frame.set_index(["model", "protocol", "method"])
    assert frame.loc[("gpt2-xl", "published", "lora_emoe"), "paper"] == 3.88
    assert set(frame["rank"].groupby(["model", "protocol"]).idxmin().str[2]) == {"lora_emoe"}


def test_a_single_ranked_row_has_no_critical_difference(paper: list[Record]) -> None:
    of_lora = [record for record in paper if record.run.method == "lora"]
    table = ranks(outcomes_of(of_lora, "glue_ood"))
    assert set(table.frame["rank"]) == {1.0}
    assert "GPT2-XL, clean selection: no test of a single row" in table.caption
    assert "nan" not in table.caption


LORA = load_benchmark("glue_lora")


@pytest.fixture
def outcomes(here: Path) -> TextOutcomes:
    return TextOutcomes(
        LORA, fake_runs.records(fake_runs.write(RUNS, "smoke", benchmarks=("glue_lora",)))
    )


@pytest.mark.parametrize(
    ("method", "entropy", "busiest", "change"),
    [
        ("lora_emoe", 0.923, 2.21, 0.025),
        ("lora_emoe_learn", 0.997, 1.28, 0.040),
        ("lora_gmoe", 0.994, 1.56, 0.048),
    ],
)
def test_the_papers_traces_have_the_numbers_that_are_known_of_them(
    outcomes: TextOutcomes, method: str, entropy: float, busiest: float, change: float
) -> None:
    """Section 3.7 of the paper's facts: entropy, busiest expert and change of its three panels."""
    numbers = trace_numbers(published_traces(outcomes)[method])
    assert numbers["load_entropy"] == pytest.approx(entropy, abs=6e-4)
    assert numbers["load_max_over_mean"] == pytest.approx(busiest, abs=6e-3)
    assert numbers["load_change"] == pytest.approx(change, abs=6e-4)


def test_a_damaged_trace_of_the_paper_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "trace.csv"
    file.write_text("0.5,0.5\n0.25,many\n")
    benchmark = edited_benchmark("glue_lora", {"published_traces.rows.lora_emoe": str(file)})
    with pytest.raises(DefinitionError, match=f"^{file} has no numbers: could not convert"):
        published_traces(TextOutcomes(benchmark, []))


def test_a_row_of_traces_has_a_heading_and_a_label_of_one_line(
    outcomes: TextOutcomes, here: Path
) -> None:
    with saved_figures() as figures:
        draw_traces(outcomes, here / "traces")
    (figure,) = figures
    first_panels = [axis for axis in figure.axes if axis.get_ylabel() == "step"]
    headings = [text.get_text() for axis in first_panels for text in axis.texts]
    # blank texts reserve the height of headings
    headings = [heading for heading in headings if heading.strip()]
    # a number stays in the line of its name by a no-break space
    assert headings == ["tiny GPT-2 (random weights), Tweets, layer\u00a01", "the paper"]
    # only the colour bar has another label
    assert {axis.get_ylabel() for axis in figure.axes} == {"", "step", "load ÷ mean load"}
