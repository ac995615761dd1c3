"""Test runs on several tasks at once: rows as text, answers by likelihood, mixing, a run, and its tables."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score

from benchmarks.harness.base import DATA_ROOT, MODEL_ROOT, DataError, DefinitionError
from benchmarks.harness.config.benchmark import load_benchmark
from benchmarks.harness.config.catalogue import load_models
from benchmarks.harness.config.runs import canonical_json, run_from_spec
from benchmarks.harness.config.yaml import parse
from benchmarks.harness.models.loading import load_seq2seq, load_seq2seq_tokenizer
from benchmarks.harness.report.presentation import present
from benchmarks.harness.sources.vader import load_vader
from benchmarks.multitask.definition import MultitaskSpec, WrittenTask
from benchmarks.multitask.outcomes import MultitaskOutcomes
from benchmarks.multitask.rows import MixedOrder, answers, as_text
from benchmarks.multitask.training import MultitaskTrainer, log_likelihoods
from benchmarks.text.data import TextSplit, load_part
from benchmarks.text.tokenization import TokenisedRows
from tests import fake_runs
from tests.executed import finish, killed_at, prepare
from tests.planned import edited_benchmark, paper_spec, plan, smoke_run
from tests.text_sets import write_glue, write_own
from tests.tiny_hub import write_seq2seq

BENCHMARK = load_benchmark("multitask")
TINY = load_models()["tiny-t5"].spec("tiny-t5")


def task(name: str, prefix: str | None = None) -> WrittenTask:
    return WrittenTask(**BENCHMARK.tasks[name].spec(), prefix=prefix or name)


# rows as text


def test_a_row_is_its_tasks_prefix_and_its_named_texts() -> None:
    for texts, learned, row in (
        (("He ran.", "He moved."), task("mnli"), "mnli premise: He ran. hypothesis: He moved."),
        (("Fine: very.",), task("amazon", "sentiment"), "sentiment text: Fine: very."),
    ):
        assert as_text(TextSplit([texts], [0]), learned).texts == [(row,)]


def test_answers_are_the_names_of_classes_with_their_end() -> None:
    tokenizer = load_seq2seq_tokenizer(TINY)
    found = answers(tokenizer, task("rte"))
    assert [tokenizer.decode(answer[:-1]) for answer in found] == ["entailment", "not _ entailment"]
    assert {answer[-1] for answer in found} == {tokenizer.eos_token_id}
    alike = task("rte").model_copy(update={"labels": ["Yes", "no", "yes"]})  # the tokenizer knows no capitals
    with pytest.raises(DataError, match="task 'rte': the tokenizer writes two of its classes Yes, no, yes alike"):
        answers(tokenizer, alike)


def test_the_same_sentences_have_another_label_where_strength_is_asked(workdir: Path) -> None:
    sign, strength = (load_part(task(name), "test", None) for name in ("amazon", "amazon_strength"))
    assert sign.texts == strength.texts
    assert 0.4 < np.mean(strength.labels) < 0.7
    assert sign.labels != strength.labels
    assert strength.source.endswith("amazon, strength, test")
    assert strength.labels == load_vader("amazon", "test", strength=True)[1]


# answers by likelihood


@torch.no_grad()
def test_likelihoods_are_those_of_the_answers_said_one_token_after_the_other() -> None:
    model, tokenizer = load_seq2seq(TINY).eval(), load_seq2seq_tokenizer(TINY)
    found = answers(tokenizer, task("rte"))
    assert len({len(answer) for answer in found}) == 2  # one is padded
    batch = tokenizer(["a fine film", "rain"], padding=True, return_tensors="pt")
    ranked = log_likelihoods(model, dict(batch), found)
    for row, text in enumerate(["a fine film", "rain"]):
        alone = tokenizer([text], return_tensors="pt")
        for number, answer in enumerate(found):
            said, total = [model.config.decoder_start_token_id], 0.0
            for token in answer:
                logits = model(**alone, decoder_input_ids=torch.tensor([said])).logits[0, -1]
                total += float(torch.log_softmax(logits.double(), -1)[token])
                said.append(token)
            assert float(ranked[row, number]) == pytest.approx(total, abs=1e-4)


# how tasks are mixed

SIZES = {"large": 10, "small": 3}


def order(most: int | None, seed: int = 0) -> MixedOrder:
    lengths = {name: list(range(5, 5 + rows)) for name, rows in SIZES.items()}
    return MixedOrder(lengths, most, 4, seed, by_length=False)


def epoch(found: MixedOrder, number: int) -> list[int]:
    found.set_epoch(number)
    return list(found)


def test_an_epoch_mixes_tasks_up_to_a_limit_and_large_ones_go_through_all_rows() -> None:
    mixed = order(4)
    assert len(mixed) == 4 + 3
    epochs = [epoch(mixed, number) for number in range(5)]
    for rows in epochs:
        assert len(rows) == 7
        assert {row for row in rows if row >= 10} == {10, 11, 12}
    assert set(Counter(row for rows in epochs for row in rows if row < 10).values()) == {2}  # 20 rows of 10
    assert len({row for rows in epochs[:2] for row in rows if row < 10}) == 8  # none twice before all had their turn
    flags = [[row >= 10 for row in epoch(order(4, seed), 0)] for seed in range(5)]
    assert any(is_small not in (sorted(is_small), sorted(is_small, reverse=True)) for is_small in flags)
    # the order depends on seed and epoch alone
    assert epoch(order(4), 3) == epochs[3]
    assert epochs[0] != epochs[1]
    assert epochs[0] != epoch(order(4, seed=1), 0)
    assert sorted(epoch(order(None), 0)) == list(range(13))


# a run


@pytest.mark.parametrize("method", ["emoe", "gmoe"])
def test_a_killed_run_resumes_to_the_same_numbers(
    workdir: Path, capfd: pytest.CaptureFixture[str], method: str
) -> None:
    run = smoke_run("multitask", method)
    whole = finish(prepare(run))
    killed = prepare(run, "killed")
    with killed_at(12):  # in the second epoch, after the checkpoint of step 8
        finish(killed)
    assert not (killed.parent / "metrics.json").exists()
    assert finish(killed) == whole
    assert "resumed at step 8" in "".join(capfd.readouterr())
    assert set(whole["scores"]["test"]) == {"amazon", "amazon_strength"}
    assert set(whole["scores"]["ood"]) == {other["name"] for other in run.spec["ood"]}
    assert [entry["epoch"] for entry in whole["dev_curve"]] == [1.0, 2.0]
    assert whole["data"]["test:amazon"]["rows"] == 40
    assert whole["model"]["conversion"][0]["index"] == 1


def test_scores_are_of_the_likelier_answers_and_the_best_epoch_is_kept(workdir: Path, monkeypatch) -> None:
    def known(trainer: object, rows: TokenisedRows, answers: object = ()) -> Any:
        return np.where(np.arange(len(rows))[:, None] % 3 == np.array([[0, 1]]), 1.0, 0.0)

    monkeypatch.setattr(MultitaskTrainer, "_ranked", known)
    run = smoke_run("multitask", "vanilla", checkpoint_selection="best")
    found = finish(prepare(run))
    amazon = task("amazon", "sentiment")
    split = as_text(load_part(amazon, "test", 40), amazon)
    rows = TokenisedRows(split, load_seq2seq_tokenizer(TINY), 32, by_length=True, labelled=False)
    predicted = known(None, rows).argmax(-1)
    assert found["scores"]["test"]["amazon"]["balanced_accuracy"] == balanced_accuracy_score(rows.labels, predicted)
    means = [np.mean([entry["amazon"], entry["amazon_strength"]]) for entry in found["dev_curve"]]
    assert [entry["mean_score"] for entry in found["dev_curve"]] == pytest.approx(means)
    assert found["kept_epoch"] == 1.0  # of equal ones the first


def test_the_papers_runs_train_and_read_other_sets_as_the_task_that_names_them(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models, data = here / "models", here / "data"
    data.mkdir()
    write_seq2seq(models, "t5-base", 12)
    for name in ("mnli", "rte"):
        write_glue(data, name, train=True, copies=8)
    for name in ("snli", "sick_entailment", "scitail", "hans"):
        write_own(data, name)
    monkeypatch.setenv(MODEL_ROOT, str(models))
    monkeypatch.setenv(DATA_ROOT, str(data))
    spec = paper_spec("multitask", task="nli", method="emoe")
    read_as = {other["name"]: other["read_as"] for other in spec["ood"]}
    assert read_as == {"snli": "mnli", "sick_entailment": "mnli", "scitail": "rte", "hans": "rte"}
    config = spec["method"]["config"]
    assert (config["num_experts"], config["top_k"], config["layers"]) == (32, 8, [10])
    found = finish(prepare(run_from_spec({**spec, "training": {**spec["training"], "epochs": 2}})))
    assert set(found["scores"]["ood"]) == {"snli", "sick_entailment", "scitail", "hans"}
    assert set(found["scores"]["dev"]["mnli"]) == {"accuracy", "loss"}
    assert found["data"]["dev:rte"]["rows"] + found["data"]["train:rte"]["rows"] == 16  # a tenth is held out
    (layer,) = found["model"]["conversion"]
    assert layer["index"] == 10


# what is planned, and what is not


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mixtures": {"six": {"title": "x", "tasks": ["mnlo"]}}}, r"six\.tasks' is 'mnlo'.*did you mean 'mnli'"),
        ({"mixtures": {"rte": {"title": "x", "tasks": ["rte", "mnli"]}}}, "mixtures.rte' has the name of a task"),
        ({"mixtures": {"six": {"title": "x", "tasks": ["stsb", "rte"]}}}, "has 'stsb', a regression"),
        ({"mixtures": {"six": {"title": "x", "tasks": ["snli", "rte"]}}}, "has 'snli', which has no split to train on"),
        ({"methods": {"vanilla": {}, "block": {"layers": [1]}}}, "methods.block' trains a part of the model"),
        ({"methods": {"vanilla": {}, "emoe": {"partition": "coactivation"}}}, "emoe' groups neurons by co-activation"),
    ],
)
def test_what_cannot_be_learned_so_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(DefinitionError, match=message):
        edited_benchmark("multitask", change)


def test_sets_that_are_learned_are_not_out_of_domain_and_excluded_ones_are_not_read() -> None:
    run = next(run for run in plan(["multitask"], "mini_full") if run.spec["task"]["name"] == "sentences")
    read_as = {other["name"]: other["read_as"] for other in run.spec["ood"]}
    strength = {"tweets_strength": "amazon_strength", "nyt_strength": "amazon_strength"}
    assert read_as == {"tweets": "amazon", "nyt": "amazon", **strength}
    assert {one["prefix"] for one in run.spec["task"]["tasks"]} == {"sentiment", "strength"}
    without = next(iter(plan(["multitask"], "mini_full", exclude=["tweets"])))
    assert [other["name"] for other in without.spec["ood"]] == ["nyt", "tweets_strength", "nyt_strength"]


def test_a_spec_is_read_back_as_it_is_hashed() -> None:
    for run in [*plan(["multitask"], "smoke"), *plan(["multitask"], "mini_full")]:
        assert canonical_json(parse(run.spec, MultitaskSpec, "run.json").model_dump()) == run.to_json()


# what is shown


@pytest.fixture(scope="module")
def outcomes(shared_here: Path) -> MultitaskOutcomes:
    return MultitaskOutcomes(BENCHMARK, fake_runs.write(Path("results/runs"), "mini_full", benchmarks=("multitask",)))


def test_means_are_over_the_tasks_of_a_seed(outcomes: MultitaskOutcomes) -> None:
    rows = outcomes.rows.set_index(["domain", "task", "eval_task", "method"])
    tasks = outcomes.benchmark.definition.mixtures["sentences"].tasks
    mean = rows.loc[("id_mean", "sentences", "", "emoe"), "mean"]
    assert mean == pytest.approx(np.mean([rows.loc[("id", "sentences", name, "emoe"), "mean"] for name in tasks]))
    seeds = outcomes.seeds[(outcomes.seeds["task"] == "sentences") & (outcomes.seeds["domain"] == "id")]
    by_seed = seeds.pivot_table(index="seed", columns="method", values="value")
    row = rows.loc[("id_mean", "sentences", "", "emoe")]
    assert row["delta"] == pytest.approx((by_seed["emoe"] - by_seed["vanilla"]).mean())
    assert row["pairs"] == 3


def test_transfer_is_together_less_alone_by_seed(outcomes: MultitaskOutcomes) -> None:
    row = outcomes.transfer.set_index(["method", "eval_task"]).loc[("vanilla", "movie")]
    own = outcomes.seeds[(outcomes.seeds["eval_task"] == "movie") & (outcomes.seeds["method"] == "vanilla")]
    own = own[own["domain"] == "id"].pivot_table(index="seed", columns="task", values="value")
    assert row["alone"] == pytest.approx(own["movie"].mean())
    assert row["delta"] == pytest.approx((own["sentences"] - own["movie"]).mean())
    assert row["n"] == 3


def test_claims_are_of_mixtures_alone(outcomes: MultitaskOutcomes) -> None:
    found = outcomes.compared()
    assert set(found.loc[found["domain"] == "id", "task"]) == {"sentences"}
    assert set(found["domain"]) == {"id", "ood", "ood_mean", "model"}


def test_the_papers_gains_stand_beside_ours(here: Path) -> None:
    runs = fake_runs.write(Path("results/runs"), "paper", {"emoe": 0.05}, benchmarks=("multitask",))
    found = present(BENCHMARK, runs)
    gains = found.tables[0].frame.set_index(["task", "method", "where"])
    assert gains.loc[("six", "emoe", "in domain"), "paper"] == pytest.approx(0.0756)
    assert gains.loc[("nli", "emoe", "out of domain"), "paper"] == pytest.approx(0.0158)
    assert np.isnan(gains.loc[("six", "gmoe", "in domain"), "paper"])
    row = gains.loc[("six", "emoe", "in domain")]
    assert row["low"] < row["delta"] < row["high"]
    assert row["best"] > row["delta"]
    assert (row["n"], row["sets"]) == (3, 6)
    transfer = next(table for table in found.tables if table.name == "multitask_transfer").frame
    assert transfer.loc[transfer["method"] == "emoe", "less_delta"].notna().all()
    assert all(
        "multitask/t5-base-six-" in runs and "multitask/t5-base-rte-" in runs
        for runs in transfer.loc[transfer["eval_task"] == "rte", "runs"][:1]
    )
    assert any("six GLUE tasks, EMoE (n = 3): in domain +" in sentence for sentence in found.verdicts)


def test_a_suite_without_single_tasks_has_an_empty_table_of_transfer(outcomes: MultitaskOutcomes) -> None:
    runs = [run for run in outcomes.runs if run.spec["task"]["name"] == "sentences"]
    table = next(table for table in present(BENCHMARK, runs).tables if table.name == "multitask_transfer")
    assert table.frame.empty
    assert "Learned together" in table.markdown()
