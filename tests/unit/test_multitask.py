"""Test runs on several tasks at once: rows as text, answers by likelihood, mixing, a run, and its tables."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score

from benchmarks.harness.base import DATA_ROOT, MODEL_ROOT, RUNS, DataError, DefinitionError
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
from benchmarks.text.data import load_part
from benchmarks.text.tokenization import TokenisedRows
from tests import fake_runs
from tests.executed import finish, killed_at, prepare
from tests.planned import edited_benchmark, edited_part, paper_spec, plan, smoke_run
from tests.text_sets import write_glue, write_own
from tests.tiny_hub import write_seq2seq

BENCHMARK = load_benchmark("multitask")
TINY = load_models()["tiny-t5"].spec("tiny-t5")


def task(name: str, prefix: str | None = None) -> WrittenTask:
    return WrittenTask(**BENCHMARK.tasks[name].spec(), prefix=prefix or name)


# rows as text


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
    assert sign.labels != strength.labels == load_vader("amazon", "test", strength=True)[1]


# answers by likelihood


@torch.no_grad()
def test_likelihoods_are_those_of_the_answers_said_one_token_after_the_other() -> None:
    model, tokenizer = load_seq2seq(TINY).eval(), load_seq2seq_tokenizer(TINY)
    possible, texts = answers(tokenizer, task("rte")), ["a fine film", "rain"]
    assert len({len(answer) for answer in possible}) == 2  # one is padded
    ranked = log_likelihoods(model, dict(tokenizer(texts, padding=True, return_tensors="pt")), possible)
    for row, text in enumerate(texts):
        alone = tokenizer([text], return_tensors="pt")
        for number, answer in enumerate(possible):
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
    epochs = [epoch(mixed, number) for number in range(5)]
    assert {len(rows) for rows in epochs} == {len(mixed)} == {4 + 3}
    assert all({row for row in rows if row >= 10} == {10, 11, 12} for rows in epochs)
    assert set(Counter(row for rows in epochs for row in rows if row < 10).values()) == {2}  # 20 rows of 10
    assert len({row for rows in epochs[:2] for row in rows if row < 10}) == 8  # none twice before all had their turn
    # the order depends on seed and epoch alone
    assert epoch(order(4), 3) == epochs[3]
    assert epochs[1] != epochs[0] != epoch(order(4, seed=1), 0)
    assert sorted(epoch(order(None), 0)) == list(range(13))


# a run


def test_a_killed_run_resumes_to_the_same_numbers(workdir: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = smoke_run("multitask", "emoe")
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
    result = finish(prepare(run_from_spec({**spec, "training": {**spec["training"], "epochs": 2}})))
    assert set(result["scores"]["ood"]) == set(read_as)
    assert result["data"]["dev:rte"]["rows"] + result["data"]["train:rte"]["rows"] == 16  # a tenth is held out


# what is planned, and what is not


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mixtures.six.tasks": ["mnlo"]}, r"six\.tasks' is 'mnlo'.*did you mean 'mnli'"),
        ({"mixtures.six.tasks": ["stsb", "rte"]}, "has 'stsb', a regression"),
        ({"mixtures.six.tasks": ["snli", "rte"]}, "has 'snli', which has no split to train on"),
        ({"methods": {"vanilla": {}, "block": {"layers": [1]}}}, "methods.block' trains a part of the model"),
    ],
)
def test_what_cannot_be_learned_so_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(DefinitionError, match=message):
        edited_benchmark("multitask", change)


def test_sets_that_are_learned_are_not_out_of_domain_and_excluded_ones_are_not_read() -> None:
    part = edited_part("multitask", "smoke", {"grid.0.mixture": ["sentences"]})
    spec = next(BENCHMARK.specs(part, (), ()))
    read_as = {other["name"]: other["read_as"] for other in spec["ood"]}
    strength = {"tweets_strength": "amazon_strength", "nyt_strength": "amazon_strength"}
    assert read_as == {"tweets": "amazon", "nyt": "amazon", **strength}
    assert {one["prefix"] for one in spec["task"]["tasks"]} == {"sentiment", "strength"}
    without = next(BENCHMARK.specs(part, ("tweets",), ()))
    assert [other["name"] for other in without["ood"]] == ["nyt", "tweets_strength", "nyt_strength"]


def test_a_spec_is_read_back_as_it_is_hashed() -> None:
    for run in [*plan(["multitask"], "smoke"), *plan(["multitask"], "paper")]:
        assert canonical_json(parse(run.spec, MultitaskSpec, "run.json").model_dump()) == run.to_json()


# what is shown


@pytest.fixture(scope="module")
def outcomes(shared_here: Path) -> MultitaskOutcomes:
    return MultitaskOutcomes(BENCHMARK, fake_runs.write(RUNS, "paper", benchmarks=("multitask",)))


def test_means_are_over_the_tasks_of_a_seed(outcomes: MultitaskOutcomes) -> None:
    rows = outcomes.rows.set_index(["domain", "task", "eval_task", "method"])
    tasks = outcomes.benchmark.definition.mixtures["six"].tasks
    mean = rows.loc[("id_mean", "six", "", "emoe"), "mean"]
    assert mean == pytest.approx(np.mean([rows.loc[("id", "six", name, "emoe"), "mean"] for name in tasks]))
    seeds = outcomes.seeds[(outcomes.seeds["task"] == "six") & (outcomes.seeds["domain"] == "id")]
    by_seed = seeds.pivot_table(index="seed", columns="method", values="value")
    row = rows.loc[("id_mean", "six", "", "emoe")]
    assert row["delta"] == pytest.approx((by_seed["emoe"] - by_seed["vanilla"]).mean())
    assert row["pairs"] == 3


def test_transfer_is_together_less_alone_by_seed(outcomes: MultitaskOutcomes) -> None:
    row = outcomes.transfer.set_index(["task", "method", "eval_task"]).loc[("six", "vanilla", "rte")]
    seeds = outcomes.seeds[(outcomes.seeds["eval_task"] == "rte") & (outcomes.seeds["method"] == "vanilla")]
    scores = seeds[(seeds["domain"] == "id") & (seeds["protocol"] == "clean")].pivot_table(
        index="seed", columns="task", values="value"
    )
    assert row["alone"] == pytest.approx(scores["rte"].mean())
    assert row["delta"] == pytest.approx((scores["six"] - scores["rte"]).mean())
    assert row["n"] == 3


def test_the_papers_gains_stand_beside_ours(here: Path) -> None:
    runs = fake_runs.write(RUNS, "paper", {"emoe": 0.05}, benchmarks=("multitask",))
    tables = {table.name.removeprefix("multitask_"): table.frame for table in present(BENCHMARK, runs).tables}
    gains, transfer = tables["gains"].set_index(["task", "method", "where"]), tables["transfer"]
    row = gains.loc[("six", "emoe", "in domain")]
    assert (row["paper"], row["n"], row["sets"]) == (pytest.approx(0.0756), 3, 6)
    assert row["low"] < row["delta"] < row["high"]
    assert np.isnan(gains.loc[("six", "gmoe", "in domain"), "paper"])
    assert transfer.loc[transfer["method"] == "emoe", "less_delta"].notna().all()
