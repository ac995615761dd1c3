"""Scores, selection, statistics, tables, figures, report, mirror: on made-up runs."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from mlflow.tracking import MlflowClient
from scipy import stats

from benchmarks.harness.base.errors import DefinitionError
from benchmarks.harness.planning.definition import load_benchmark
from benchmarks.harness.planning.kinds import Benchmark
from benchmarks.harness.planning.runs import Run, run_from_spec
from benchmarks.harness.planning.suite import Suite, load_suite
from benchmarks.harness.reporting.presentation import present
from benchmarks.harness.reporting.rendering import Column, Table
from benchmarks.harness.results import tracking
from benchmarks.harness.results.records import collect, read_metrics, scores_of
from benchmarks.harness.results.statistics import (
    confidence_interval,
    critical_difference,
    friedman_ranks,
    holm,
    mean_difference,
    nemenyi,
    paired_differences,
)
from benchmarks.harness.training.metrics import SCORES, score
from benchmarks.text.figures import rank_diagram
from benchmarks.text.outcomes import TextOutcomes, ranked
from benchmarks.text.paper_tables import paper as paper_table
from benchmarks.text.paper_tables import ranks
from benchmarks.text.selection import choices, reported, select
from benchmarks.text.tables import chosen, results, tasks
from benchmarks.text.tables import tests as paired_tests
from tests import fake_runs


@pytest.fixture
def finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Suite:
    """The mini suite, finished with made-up numbers, in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    benchmarks = ("glue", "glue_lora", "glue_ood")
    fake_runs.write(
        tmp_path / "results" / "runs", gains={"emoe": 0.05, "random_partition": -0.1}, benchmarks=benchmarks
    )
    return load_suite({"benchmarks": list(benchmarks)})


def outcomes_of(runs: list[Run], benchmark: str = "glue") -> TextOutcomes:
    return TextOutcomes(load_benchmark(benchmark), [run for run in runs if run.benchmark == benchmark])


# scores


def test_scores_by_hand() -> None:
    labels, logits = np.array([0, 0, 0, 1]), np.array([[2, 1], [2, 1], [1, 2], [1, 2]])
    assert score("accuracy", logits, labels) == 0.75
    assert score("balanced_accuracy", logits, labels) == pytest.approx((2 / 3 + 1) / 2)
    assert score("f1", logits, labels) == pytest.approx(2 / 3)
    assert score("accuracy_f1", logits, labels) == pytest.approx((0.75 + 2 / 3) / 2)
    assert score("mcc", logits, labels) == pytest.approx((1 * 2 - 1 * 0) / math.sqrt(2 * 1 * 3 * 2))
    targets, predictions = np.array([0.0, 1.0, 2.0, 5.0]), np.array([[0.1], [0.9], [3.0], [2.5]])
    expected = (stats.pearsonr(targets, predictions[:, 0])[0] + stats.spearmanr(targets, predictions[:, 0])[0]) / 2
    assert score("pearson_spearman", predictions, targets) == pytest.approx(expected)


def test_collapsed_models_have_a_score() -> None:
    labels = np.array([0, 1, 1, 0])
    for metric in SCORES:
        logits = np.ones((4, 1)) if metric == "pearson_spearman" else np.array([[1.0, 0.0]] * 4)
        assert math.isfinite(score(metric, logits, labels))


# statistics


def test_a_difference_is_scipys_paired_t_test_over_the_seeds_that_both_have() -> None:
    ours, base = [0.8, 0.9, 0.7, 0.85], [0.75, 0.8, 0.72, 0.8, 0.1]
    scores = pd.DataFrame(
        {"method": ["ours"] * 4 + ["base"] * 5, "seed": [0, 1, 2, 3, 0, 1, 2, 3, 9], "value": ours + base}
    )
    (found,) = paired_differences(scores, ["method"], {"method": "base"}, "seed").to_dict("records")
    expected = stats.ttest_rel(ours, base[:4])
    assert (found["method"], found["n"], found["p"]) == ("ours", 4, pytest.approx(expected.pvalue))
    assert (found["low"], found["high"]) == pytest.approx(tuple(expected.confidence_interval()))


def test_values_of_one_pair_are_averaged_over_what_both_have() -> None:
    rows = [("ours", 0, "a", 0.9), ("ours", 0, "b", 0.7), ("ours", 1, "a", 0.6), ("ours", 1, "c", 0.0)]
    rows += [("base", 0, "a", 0.5), ("base", 0, "b", 0.5), ("base", 1, "a", 0.5), ("base", 2, "a", 0.1)]
    scores = pd.DataFrame(rows, columns=["method", "seed", "env", "value"])
    (found,) = paired_differences(scores, ["method"], {"method": "base"}, "seed").to_dict("records")
    assert (found["delta"], found["n"], found["values"]) == (pytest.approx((0.3 + 0.1) / 2), 2, 3)
    (found,) = paired_differences(scores, ["method"], {"method": "base"}, "seed", ["seed"]).to_dict("records")
    means = {"a": (0.5 + 0.5 + 0.1) / 3, "b": 0.5}
    first, second = (0.9 + 0.7 - means["a"] - means["b"]) / 2, 0.6 - means["a"]
    assert found["delta"] == pytest.approx((first + second) / 2)


def test_differences_without_spread_or_with_one_pair() -> None:
    one = mean_difference(np.array([0.1]))
    assert one.mean == pytest.approx(0.1)
    assert math.isnan(one.low)
    equal = mean_difference(np.array([0.125, 0.125]))
    assert equal.mean == 0.125
    assert math.isnan(equal.low)  # two equal differences are no certainty
    same = mean_difference(np.zeros(2))
    assert (same.mean, same.low, same.high) == (0, 0, 0)
    assert confidence_interval(np.array([0.3])) == (0.3, 0.3)


def test_friedman_ranks() -> None:
    table = pd.DataFrame({"x": [0.9, 0.8, 0.7], "y": [0.5, 0.6, 0.4], "z": [0.3, 0.3, 0.1]}, index=["a", "b", "c"])
    found = friedman_ranks(table)
    assert found.ranks.to_dict() == pytest.approx({"a": 4.5 / 3, "b": 4.5 / 3, "c": 3})
    assert found.p == pytest.approx(stats.friedmanchisquare(*table.to_numpy()).pvalue)
    assert math.isnan(friedman_ranks(table.head(2)).p)


def test_holm_by_hand() -> None:
    p = pd.Series([0.01, math.nan, 0.04, 0.03], index=list("abcd"))
    assert holm(p).fillna(-1).to_dict() == pytest.approx({"a": 0.03, "b": -1, "c": 0.06, "d": 0.06})
    assert holm(pd.Series([math.nan])).isna().all()


def test_critical_differences_are_demsars() -> None:
    # Demšar (2006), section 3.2.2 and table 5: four classifiers on fourteen sets
    assert critical_difference(4, 14) == pytest.approx(1.25, abs=0.005)


def test_nemenyi_tells_apart_what_is_further_apart_than_the_critical_difference() -> None:
    generator = np.random.default_rng(0)
    scores = pd.DataFrame(generator.normal(size=(5, 12)) + np.arange(5)[:, None], index=list("abcde"))
    ranks, p, limit = friedman_ranks(scores).ranks, nemenyi(scores), critical_difference(5, 12)
    for one in scores.index:
        for other in scores.index:
            assert (p.loc[one, other] < 0.05) == (abs(ranks[one] - ranks[other]) > limit)


def test_ties_everywhere_have_no_test() -> None:
    found = friedman_ranks(pd.DataFrame(np.ones((3, 4)), index=list("abc")))
    assert found.ranks.tolist() == [2, 2, 2]
    assert math.isnan(found.p)


# selection


def test_selection_takes_the_best_mean_dev_score_of_each_cell() -> None:
    """Of a task with a test split: by the kept epoch, or, as the authors would, by the best dev epoch, which they report."""
    rows = []
    for rate, values in ((1e-5, (0.8, 0.8)), (2e-5, (0.7, 0.95)), (3e-5, (0.9, 0.6))):
        for seed, value in enumerate(values):
            run = {"benchmark": "b", "model": "m", "task": "t", "method": "x", "protocol": "clean", "variant": ""}
            run |= {
                "learning_rate": rate,
                "seed": seed,
                "run_id": f"{rate}{seed}",
                "eval_task": "t",
                "metric": "accuracy",
            }
            for part, number in (("dev", value), ("dev_best", 1 - value), ("test", rate)):
                rows.append({**run, "part": part, "value": number, "is_score": True})
    records = pd.DataFrame(rows)
    table = choices(records, "clean")
    assert table.loc[table["chosen"], "learning_rate"].tolist() == [2e-5]
    assert reported(records, "clean")["value"].tolist() == [2e-5, 2e-5]
    assert scores_of(select(records, "published"), "test")["value"].tolist() == [3e-5, 3e-5]
    assert reported(records, "published")["value"].tolist() == pytest.approx([0.1, 0.4])


# records


def test_records_name_unfinished_damaged_and_foreign_files(finished: Suite) -> None:
    run, other = finished.runs[:2]
    path = Path("results/runs") / run.folder / "metrics.json"
    text = path.read_text()
    path.write_text((Path("results/runs") / other.folder / "metrics.json").read_text())
    with pytest.raises(DefinitionError, match=f"belongs to the run '{other.id}'"):
        read_metrics(run)
    path.write_text(text[:50])
    with pytest.raises(DefinitionError, match="is damaged"):
        read_metrics(run)
    path.unlink()
    with pytest.raises(DefinitionError, match="is not finished"):
        read_metrics(run)


# tables and figures


def test_results_table_says_what_was_put_in(finished: Suite) -> None:
    frame = results(outcomes_of(finished.runs)).frame.set_index(["task", "method"])
    assert len(frame) == 7
    assert frame.loc[("tweets", "vanilla"), "n"] == 8
    assert frame.loc[("tweets", "gmoe"), "n"] == 5
    assert frame.loc[("tweets", "emoe"), "id_delta"] == pytest.approx(0.05, abs=0.03)
    assert frame.loc[("tweets", "random_partition"), "ood_delta"] < -0.05
    assert math.isnan(frame.loc[("tweets", "vanilla"), "id_delta"])
    assert frame.loc[("tweets", "emoe"), "ood_rank"] == 1
    assert frame.loc[("tweets", "random_partition"), "ood_rank"] == 5


def test_ranks_and_marks_compare_the_seeds_that_all_rows_have(finished: Suite) -> None:
    for run in finished.runs:  # one that trains exactly like the dense model
        if run.spec["method"]["name"] == "random_partition":
            twin = next(
                other
                for other in finished.runs
                if (other.spec["method"]["name"], other.spec["task"]["name"], other.spec["seed"])
                == ("vanilla", run.spec["task"]["name"], run.spec["seed"])
            )
            content = json.loads((Path("results/runs") / twin.folder / "metrics.json").read_text())
            (Path("results/runs") / run.folder / "metrics.json").write_text(json.dumps({**content, "run_id": run.id}))
    frame = results(outcomes_of(finished.runs)).frame.set_index(["task", "method"])
    for column in ("id_common", "ood_common", "ood_rank"):
        assert frame.loc[("tweets", "random_partition"), column] == frame.loc[("tweets", "vanilla"), column]
    assert frame.loc[("tweets", "random_partition"), "id_mean"] != frame.loc[("tweets", "vanilla"), "id_mean"]


def test_choices_name_the_best_one_for_all_tasks(finished: Suite) -> None:
    frame = chosen(outcomes_of(finished.runs)).frame
    joint = frame[(frame["task_title"] == "all") & (frame["method"] == "emoe")]
    joint = joint[joint["protocol"] == "clean"]
    own = frame[(frame["task_title"] != "all") & (frame["method"] == "emoe") & (frame["protocol"] == "clean")]
    assert len(own) == 2
    assert joint["mean"].tolist() == pytest.approx([own["mean"].mean()])


def test_a_test_counts_the_seeds_that_both_have(finished: Suite) -> None:
    runs = finished.runs_of("glue")
    lost = next(run for run in runs if run.spec["method"]["name"] == "vanilla")
    frame = paired_tests(outcomes_of([run for run in runs if run is not lost])).frame
    pairs = frame[(frame["method"] == "emoe") & (frame["task"] == lost.spec["task"]["name"])]["n"]
    seeds = {run.spec["seed"] for run in runs if run.spec["method"]["name"] == "emoe"}
    assert set(pairs) == {len(seeds) - 1}


def test_differences_are_paired_by_seed(finished: Suite) -> None:
    records = collect(finished.runs)
    test = scores_of(records, "test")
    test = test[test["task"] == "tweets"]
    by_seed = {m: test[test["method"] == m].set_index("seed")["value"] for m in ("gmoe", "vanilla")}
    expected = (by_seed["gmoe"] - by_seed["vanilla"]).dropna().mean()  # five of vanilla's eight seeds
    frame = results(outcomes_of(finished.runs)).frame.set_index(["task", "method"])
    assert frame.loc[("tweets", "gmoe"), "id_delta"] == pytest.approx(expected)


def test_paper_table_puts_published_numbers_beside_ours(finished: Suite) -> None:
    table = paper_table(outcomes_of(finished.runs), "id")
    frame = table.frame.set_index(["model", "scope", "method"])
    published = frame.loc[("bert-base-cased", "average", "emoe")]
    assert published["value"] == pytest.approx(0.8046)
    assert published["paper_delta"] == pytest.approx(0.0088)
    assert published["status"] == "published"
    assert math.isnan(published["clean"])
    ours = frame.loc[("minilm", "Tweets, Amazon", "emoe")]
    assert ours["clean_delta"] > 0
    assert ours["published_delta"] > 0
    assert math.isnan(ours["value"])
    assert ("minilm", "Tweets", "gmoe") in frame.index
    # what was not found is not shown where we have no number either
    assert ("gpt2", "CoLA", "emoe") not in frame.index
    assert "inferred" in table.markdown()
    # long texts stand after the numbers
    assert table.texts().columns[-1] == "Source of the paper's number"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("gpt2,CoLA,emoe,1.0,publshed,Fig. 9", "line 2: status is 'publshed'; did you mean 'published'"),
        ("gpt2,CoLA,emoe,,published,Fig. 9", "line 2: a value is given where it is known, and only there"),
        ("gpt2,CoLA,emoe,1.0,unknown,", "line 2: a value is given where it is known, and only there"),
    ],
)
def test_wrong_cells_of_the_paper_are_named(finished: Suite, tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "paper.csv"
    path.write_text(f"model,scope,method,value,status,source\n{line}\n")
    outcomes = outcomes_of(finished.runs)
    changed = outcomes.benchmark.definition.model_copy(update={"paper": str(path)})
    outcomes.benchmark = replace(outcomes.benchmark, definition=changed)
    with pytest.raises(DefinitionError, match=message):
        paper_table(outcomes, "id")


# both selections, on GLUE's own tasks


@pytest.fixture(scope="module")
def paper(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Run]]:
    """A part of the paper suite with made-up numbers: two models' LoRA rows on all tasks, and GLUE-X."""
    root = tmp_path_factory.mktemp("paper") / "results" / "runs"
    return root, fake_runs.write(root, "paper", {"lora_emoe": 0.05}, ("glue_lora", "glue_ood"))


@pytest.fixture(scope="module")
def adapted(paper: tuple[Path, list[Run]]) -> TextOutcomes:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(paper[0].parents[1])
        return outcomes_of(paper[1], "glue_lora")


@pytest.fixture(scope="module")
def evaluated(paper: tuple[Path, list[Run]]) -> TextOutcomes:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(paper[0].parents[1])
        return outcomes_of(paper[1], "glue_ood")


def test_published_and_clean_runs_stand_side_by_side(adapted: TextOutcomes) -> None:
    frame = tasks(adapted).frame
    assert set(frame["selection"]) == {"clean", "authors'"}
    by = frame.set_index(["model", "protocol", "method"])
    assert len(by.loc["gpt2-xl"].loc["published"]) == 12  # all rows; the paper's five were trained clean too
    assert len(by.loc["gpt2-xl"].loc["clean"]) == 5
    # the authors' numbers: best learning rate by its mean over seeds, that mean, and the population's standard deviation
    rows = adapted.records
    rows = rows[
        (rows["model"] == "gpt2-xl")
        & (rows["task"] == "cola")
        & (rows["method"] == "lora")
        & (rows["protocol"] == "published")
    ]
    dev = rows[(rows["part"] == "dev") & rows["is_score"]].groupby("learning_rate")["value"].mean()
    test = rows[(rows["part"] == "test") & rows["is_score"] & (rows["learning_rate"] == dev.idxmax())]["value"]
    cell = by.loc[("gpt2-xl", "published", "lora")]
    assert cell["CoLA mean"] == pytest.approx(test.mean())
    assert cell["CoLA std"] == pytest.approx(np.std(test))
    assert cell["average"] == pytest.approx(
        by.loc[("gpt2-xl", "published", "lora"), [c for c in by if c.endswith(" mean")]].mean()
    )


def test_an_average_is_over_all_tasks_or_not_given(paper, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(paper[0].parents[1])
    some = [
        run
        for run in paper[1]
        if not (run.spec["method"]["name"] == "lora_block" and run.spec["task"]["name"] == "cola")
    ]
    by = tasks(outcomes_of(some, "glue_lora")).frame.set_index(["model", "protocol", "method"])
    assert math.isnan(by.loc[("gpt2-xl", "clean", "lora_block"), "average"])
    assert not math.isnan(by.loc[("gpt2-xl", "clean", "lora"), "average"])


def test_p_values_are_corrected_over_the_tasks_of_a_method(adapted: TextOutcomes) -> None:
    frame = paired_tests(adapted).frame
    family = frame[(frame["model"] == "gpt2-xl") & (frame["protocol"] == "clean") & (frame["method"] == "lora_emoe")]
    assert len(family) == 8
    ordered = family.sort_values("p")
    steps = [min(1.0, p * (8 - place)) for place, p in enumerate(ordered["p"])]
    assert ordered["p_holm"].tolist() == pytest.approx(np.maximum.accumulate(steps).tolist())
    for row in frame.itertuples():
        if row.p_holm >= 0.05:
            assert row.verdict == "within noise"
        elif row.p_holm < 0.05:
            assert row.verdict == ("better" if row.delta > 0 else "worse")
    assert set(family["verdict"]) <= {"better", "within noise"}


def test_ranks_state_what_was_ranked(evaluated: TextOutcomes) -> None:
    outcomes = evaluated
    methods = outcomes.benchmark.definition.ranked
    rankings = list(ranked(outcomes, methods, ["protocol", "model"]))
    assert len(rankings) == 4
    for one in rankings:
        assert one.scores.shape == (5, 15)
        assert one.ranking.ranks.sum() == pytest.approx(15)  # 1 + 2 + 3 + 4 + 5
        assert one.ranking.ranks.idxmin() == "lora_emoe"
    table = ranks(outcomes, rankings)
    assert "of 5 rows: LoRA, LoRA + Block, LoRA + GMoE, LoRA + EMoE, LoRA + EMoE-learn" in table.caption
    assert "Sets (15): " in table.caption
    assert "critical difference 1.57" in table.caption  # 2.728 * sqrt(5 * 6 / (6 * 15)), Demšar's table
    frame = table.frame.set_index(["model", "protocol", "method"])
    assert frame.loc[("gpt2-xl", "published", "lora_emoe"), "paper"] == 3.88


def test_a_rank_at_the_edge_of_the_diagram_is_drawn_whole(
    evaluated: TextOutcomes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    rankings = list(ranked(evaluated, evaluated.benchmark.definition.ranked, ["protocol", "model"]))
    rank_diagram(evaluated, tmp_path / "ranks", rankings)
    marks = [(axis, mark) for axis in drawn[0].axes for mark in axis.collections]
    edge = [mark for axis, mark in marks if set(mark.get_offsets()[:, 0]) & set(axis.get_xlim())]
    assert edge
    assert not any(mark.get_clip_on() for mark in edge)


def test_own_metrics_stand_beside_the_papers(evaluated: TextOutcomes) -> None:
    headings = tasks(evaluated, "ood").texts().columns
    assert "CoLA → Grammar Test (%)" in headings
    assert "CoLA → Grammar Test, Matthews correlation (%)" in headings
    for pair in ("MRPC → QQP", "MRPC → Twitter-PIT", "QQP → MRPC", "QQP → Twitter-PIT"):
        assert f"{pair}, F1 (%)" in headings


def test_rows_that_train_other_things_are_not_compared(finished: Suite) -> None:
    from benchmarks.glue_lora.presentation import present

    runs = [run for run in finished.runs if run.benchmark == "glue_lora"]
    present(load_benchmark("glue_lora"), runs)
    path = Path("results/runs") / runs[-1].folder / "metrics.json"
    content = json.loads(path.read_text())
    content["model"]["trained"]["head"]["names"] = "other"
    path.write_text(json.dumps(content))
    with pytest.raises(
        DefinitionError, match=f"{re.escape(runs[-1].folder)} and .* train other adapters or another head"
    ):
        present(load_benchmark("glue_lora"), runs)


TABLE = Table(
    "A & B",
    "50 % of_it",
    {"g": "Group", "name": "Name"},
    [
        Column("accuracy", "a", std="s", best="a"),
        Column("loss", "l", best="l"),
        Column("accuracy", "d", "Δ", interval=("lo", "hi"), signed=True),
    ],
    pd.DataFrame(
        {
            "g": ["x", "x", "y"],
            "name": ["one", "two_<b>", "three"],
            "a": [0.9999, 0.09999, 0.5],
            "s": [0.01, math.nan, 0.0],
            "l": [2.0, 10.0, math.nan],
            "d": [-0.00001, 0.02, math.nan],
            "lo": [-0.01, math.nan, math.nan],
            "hi": [0.01, math.nan, math.nan],
        }
    ),
    group=("g",),
)


def test_cells_and_the_best_by_number() -> None:
    texts = TABLE.texts()
    assert texts["Accuracy (%)"].tolist() == ["100.0 ± 1.0", "10.0", "50.0 ± 0.0"]
    assert texts["Δ (%)"].tolist() == ["+0.0 [-1.0, +1.0]", "+2.0", "–"]
    best = TABLE.best()
    assert best["Accuracy (%)"].tolist() == [True, False, False]  # a group of one has no best
    assert best["Loss"].tolist() == [True, False, False]  # 2 is better than 10, though "10" sorts first


def test_every_format_escapes() -> None:
    assert "**100.0 ± 1.0**" in TABLE.markdown()
    latex = TABLE.latex()
    for text in (
        r"\toprule",
        r"\textbf{100.0 $\pm$ 1.0}",
        r"\caption{A \& B.}",
        "% How to read it: 50 % of_it",
        r"two\_",
    ):
        assert text in latex
    assert "two_&lt;b&gt;" in TABLE.html()
    assert "<strong>100.0 ± 1.0</strong>" in TABLE.html()


def test_markdown_escapes_what_would_end_a_cell_or_begin_a_tag() -> None:
    frame = pd.DataFrame({"name": ["a | b\n\n# c <script>x</script>"], "a": [0.5]})
    said = "p < 0.05 | `a|b`<br>"
    table = Table("T <b>", said, {"name": "N | M"}, [Column("accuracy", "a", label="L|<i>")], frame)
    title, _, heading, _, row, _, caption = table.markdown().splitlines()
    assert title == "### T \\<b>"
    for line in (heading, row):
        assert len(re.findall(r"(?<!\\)\|", line)) == 3
    assert "N \\| M" in heading
    assert "a \\| b # c \\<script>x\\</script>" in row
    assert caption == "p < 0.05 \\| `a|b`\\<br>"


def test_an_empty_table_is_still_a_table(tmp_path: Path) -> None:
    empty = Table(
        "E", "", {"name": "Name"}, [Column("accuracy", "a", best="a")], pd.DataFrame({"name": [], "a": []}), name="e"
    )
    empty.write(tmp_path)
    assert "Accuracy" in (tmp_path / "e.md").read_text()


# presentation


def test_a_text_benchmark_without_a_presentation_takes_the_usual_one(finished: Suite, tmp_path: Path) -> None:
    real = load_benchmark("glue")
    changes = {"tables": ["tests", "choices"], "figures": {"ood": "Scores."}}
    mine = Benchmark("mine", real.definition.model_copy(update=changes), real.tasks)
    presented = present(mine, finished.runs_of("glue"))
    assert [table.name for table in presented.tables] == ["mine_tests", "mine_choices"]
    presented.draw(tmp_path)
    assert [path.name for path in sorted(tmp_path.glob("mine*"))] == ["mine_ood.pdf", "mine_ood.png"]


# MLflow


def test_mirroring_twice_adds_nothing_and_a_new_number_replaces(finished: Suite, tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    runs = [run for run in finished.runs_of("glue") if run.spec["task"]["name"] == "tweets"]
    runs = [
        run
        for name in ("vanilla", "emoe")
        for run in runs
        if run.spec["method"]["name"] == name and run.spec["seed"] < 2
    ]
    assert tracking.mirror(runs, uri) == {"added": 4, "replaced": 0, "unchanged": 0}
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("glue").experiment_id
    # two seeds of two methods, each method with a parent
    assert len(client.search_runs([experiment])) == 4 + 2
    assert tracking.mirror(runs, uri) == {"added": 0, "replaced": 0, "unchanged": 4}
    assert len(client.search_runs([experiment])) == 4 + 2

    path = Path("results/runs") / runs[0].folder / "metrics.json"
    content = json.loads(path.read_text())
    content["scores"]["test"]["tweets"]["balanced_accuracy"] = 0.123
    path.write_text(json.dumps(content))
    assert tracking.mirror(runs, uri) == {"added": 0, "replaced": 1, "unchanged": 3}
    found = client.search_runs([experiment], filter_string=f"tags.`emoe.run_id` = '{runs[0].id}'")
    assert [run.data.metrics["test.tweets.balanced_accuracy"] for run in found] == [0.123]
    assert found[0].data.params["learning_rate"] == "0.0001"
    assert len(client.search_runs([experiment])) == 4 + 2

    # a mirror that was killed between making a run and writing its numbers
    client.delete_tag(found[0].info.run_id, "emoe.content")
    assert tracking.mirror(runs, uri) == {"added": 0, "replaced": 1, "unchanged": 3}


def test_a_run_that_diverged_is_mirrored_with_all_its_settings(finished: Suite, tmp_path: Path) -> None:
    trained, evaluated = finished.runs[0], next(run for run in finished.runs if "candidates" in run.spec)
    path = Path("results/runs") / trained.folder / "metrics.json"
    content = json.loads(path.read_text())
    content["epochs"][1]["loss"] = content["scores"]["dev"]["tweets"]["loss"] = None
    path.write_text(json.dumps(content))
    many = run_from_spec(
        {
            **evaluated.spec,
            "candidates": evaluated.spec["candidates"] * 20,
            "more": dict.fromkeys(["+90%", *map(str, range(150))], 1),
        }
    )
    fake_runs.write_runs([many])

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    assert tracking.mirror([trained, many], uri)["added"] == 2
    client = MlflowClient(uri)
    ids = {
        found.data.tags["emoe.run_id"]: found.info.run_id
        for name in ("glue", "glue_ood")
        for found in client.search_runs([client.get_experiment_by_name(name).experiment_id])
    }
    assert [point.step for point in client.get_metric_history(ids[trained.id], "epoch.loss")] == [1]
    assert len(client.get_metric_history(ids[trained.id], "epoch.balanced_accuracy")) == 2
    parameters = client.get_run(ids[many.id]).data.params
    assert {"more._90_", *(f"more.{number}" for number in range(150))} < set(parameters)
    assert parameters["candidates"] == str(many.spec["candidates"])
    assert "tweets" in client.get_run(ids[trained.id]).data.params["task.name"]
    assert set(parameters) >= {"ood", "seed"}
