"""Test runs on several tasks at once: rows as text, answers by likelihood, mixing, a run, and its tables."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.harness.base import RUNS, DataError, DefinitionError
from benchmarks.harness.config.benchmark import load_benchmark
from benchmarks.harness.config.catalogue import load_models, model_spec
from benchmarks.harness.config.runs import Run, run_from_spec
from benchmarks.harness.models.loading import load_seq2seq, load_tokenizer
from benchmarks.harness.report.presentation import present
from benchmarks.harness.report.table import MISSING
from benchmarks.multitask import pipeline, presentation
from benchmarks.multitask.definition import LearnedTask
from benchmarks.multitask.pipeline import MixedOrder, log_likelihoods, tokenise_answers
from benchmarks.multitask.presentation import MultitaskOutcomes
from tests import fake_runs
from tests.executed import finish, killed_and_resumed, prepare
from tests.planned import edited_benchmark, edited_part, paper_runs, paper_spec, smoke_run

BENCHMARK = load_benchmark("multitask")
TINY = model_spec("tiny-t5")


def task(name: str, prefix: str | None = None) -> LearnedTask:
    return LearnedTask(**BENCHMARK.tasks[name].spec(), prefix=prefix or name)


def test_answers_are_the_names_of_classes_with_their_end() -> None:
    tokenizer = load_tokenizer(TINY)
    tokens = tokenise_answers(tokenizer, task("rte"))
    assert [tokenizer.decode(answer[:-1]) for answer in tokens] == [
        "entailment",
        "not _ entailment",
    ]
    assert {answer[-1] for answer in tokens} == {tokenizer.eos_token_id}
    alike = task("rte").model_copy(
        update={"labels": ["Yes", "no", "yes"]}
    )  # the tokenizer is lower-case
    with pytest.raises(
        DataError, match="task 'rte': the tokenizer writes two of its classes Yes, no, yes alike"
    ):
        tokenise_answers(tokenizer, alike)


@torch.no_grad()
def test_likelihoods_equal_those_of_decoding_token_by_token() -> None:
    model, tokenizer = load_seq2seq(TINY).eval(), load_tokenizer(TINY)
    possible, texts = tokenise_answers(tokenizer, task("rte")), ["a fine film", "rain"]
    assert len({len(answer) for answer in possible}) == 2  # one is padded
    ranked = log_likelihoods(
        model, dict(tokenizer(texts, padding=True, return_tensors="pt")), possible
    )
    for row, text in enumerate(texts):
        alone = tokenizer([text], return_tensors="pt")
        for number, answer in enumerate(possible):
            answered, total = [model.config.decoder_start_token_id], 0.0
            for token in answer:
                logits = model(**alone, decoder_input_ids=torch.tensor([answered])).logits[0, -1]
                total += float(torch.log_softmax(logits.double(), -1)[token])
                answered.append(token)
            assert float(ranked[row, number]) == pytest.approx(total, abs=1e-4)


SIZES = {"large": 10, "small": 3}


def order(most: int | None, seed: int = 0) -> MixedOrder:
    lengths = {name: list(range(5, 5 + rows)) for name, rows in SIZES.items()}
    return MixedOrder(lengths, most, 4, seed, by_length=False)


def epoch(mixed_order: MixedOrder, number: int) -> list[int]:
    mixed_order.set_epoch(number)
    return list(mixed_order)


def test_an_epoch_mixes_tasks_up_to_a_limit_and_large_ones_go_through_all_rows() -> None:
    mixed = order(4)
    epochs = [epoch(mixed, number) for number in range(5)]
    assert {len(rows) for rows in epochs} == {len(mixed)} == {4 + 3}
    assert all({row for row in rows if row >= 10} == {10, 11, 12} for rows in epochs)
    assert set(Counter(row for rows in epochs for row in rows if row < 10).values()) == {
        2
    }  # 20 rows of 10
    assert (
        len({row for rows in epochs[:2] for row in rows if row < 10}) == 8
    )  # none twice before all had their turn
    # the order depends on seed and epoch alone
    assert epoch(order(4), 3) == epochs[3]
    assert epochs[1] != epochs[0] != epoch(order(4, seed=1), 0)
    assert sorted(epoch(order(None), 0)) == list(range(13))


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_numbers(
    workdir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = smoke_run("multitask", "emoe")
    whole = finish(prepare(run))
    assert (
        killed_and_resumed(run, 12) == whole
    )  # in the second epoch, after the checkpoint of step 8
    assert "resumed at step 8" in "".join(capfd.readouterr())
    assert set(whole["scores"]["test"]) == {"amazon", "amazon_strength"}
    assert set(whole["scores"]["ood"]) == {other["name"] for other in run.spec["ood"]}
    assert [entry["epoch"] for entry in whole["dev_curve"]] == [1.0, 2.0]


def test_encoder_and_decoder_compute_in_the_precision_of_the_run(
    workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """accelerate wraps only the model's own forward, and likelihoods call the encoder by itself."""
    dtypes = []

    def watched(model: Any, *arguments: Any) -> torch.Tensor:
        def note(_module: object, _inputs: object, output: torch.Tensor) -> None:
            dtypes.append(output.dtype)

        products = [
            model.encoder.block[0].layer[0].SelfAttention.q,
            model.decoder.block[0].layer[0].SelfAttention.q,
            model.lm_head,
        ]
        hooks = [product.register_forward_hook(note) for product in products]
        likelihoods = log_likelihoods(model, *arguments)
        for hook in hooks:
            hook.remove()
        return likelihoods

    monkeypatch.setattr(pipeline, "log_likelihoods", watched)
    run = smoke_run("multitask", "emoe")
    finish(prepare(run, "fp32"))
    assert set(dtypes) == {torch.float32}
    dtypes.clear()
    # a CPU can compute in bfloat16 too
    monkeypatch.setattr(pipeline, "available_precision", lambda requested: requested)
    training = {**run.spec["training"], "precision": "bf16"}
    finish(prepare(run_from_spec({**run.spec, "training": training}), "bf16"))
    assert set(dtypes) == {torch.bfloat16}


def test_the_papers_runs_train_and_read_other_sets_as_the_task_that_names_them(
    hub_here: Path,
) -> None:
    spec = paper_spec("multitask", task="nli", method="emoe")
    read_as = {other["name"]: other["read_as"] for other in spec["ood"]}
    assert read_as == {"snli": "mnli", "sick_entailment": "mnli", "scitail": "rte", "hans": "rte"}
    config = spec["method"]["config"]
    assert (config["num_experts"], config["top_k"], config["layers"]) == (32, 8, [10])
    result = finish(prepare(run_from_spec({**spec, "training": {**spec["training"], "epochs": 2}})))
    assert set(result["scores"]["ood"]) == set(read_as)
    assert (
        result["data"]["dev:rte"]["rows"] + result["data"]["train:rte"]["rows"] == 16
    )  # a tenth is held out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mixtures.six.tasks": ["mnlo"]}, r"six\.tasks' is 'mnlo'.*did you mean 'mnli'"),
        (
            {"mixtures.six.tasks": ["snli", "rte"]},
            r"six\.tasks' is 'snli'",
        ),  # it has no training rows
        # else the runs of the task alone could not be planned, and tables would mix up the titles
        (
            {"mixtures.rte": {"title": "RTE and MNLI", "tasks": ["rte", "mnli"]}},
            r"benchmark\.yaml: 'mixtures\.rte' has the name of a task",
        ),
        (
            {"methods": {"vanilla": {}, "block": {"layers": [1]}}},
            "methods.block' must train everything",
        ),
    ],
)
def test_unusable_tasks_and_methods_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(DefinitionError, match=message):
        edited_benchmark("multitask", change)


def test_a_suite_without_rows_for_selection_is_refused() -> None:
    part = edited_part("multitask", "smoke", {"training.validation_fraction": 0})
    with pytest.raises(DefinitionError, match=r"'\S+\.training\.validation_fraction' is 0, but"):
        list(BENCHMARK.specs(part, (), ()))


def test_sets_that_are_learned_are_not_out_of_domain_and_excluded_ones_are_not_read() -> None:
    part = edited_part("multitask", "smoke", {"grid.0.mixture": ["sentences"]})
    spec = next(BENCHMARK.specs(part, (), ()))
    read_as = {other["name"]: other["read_as"] for other in spec["ood"]}
    strength = {"tweets_strength": "amazon_strength", "nyt_strength": "amazon_strength"}
    assert read_as == {"tweets": "amazon", "nyt": "amazon", **strength}
    assert {learned["prefix"] for learned in spec["task"]["tasks"]} == {"sentiment", "strength"}
    without = next(BENCHMARK.specs(part, ("tweets",), ()))
    assert [other["name"] for other in without["ood"]] == ["nyt", "tweets_strength", "nyt_strength"]


def test_tables_have_means_over_tasks_the_papers_gains_and_the_transfer(here: Path) -> None:
    runs = fake_runs.write(RUNS, "paper", {"emoe": 0.05}, benchmarks=("multitask",))
    records = fake_runs.records(runs)
    outcomes = MultitaskOutcomes(BENCHMARK, records)
    scores = outcomes.seeds.set_index(["domain", "task", "eval_task", "method", "seed"])[
        "value"
    ].sort_index()
    tables = {
        table.name.removeprefix("multitask_"): table.frame
        for table in present(BENCHMARK, records).tables
    }
    gains = tables["gains"].set_index(["task", "method", "where"])
    # the paper's gains are those of its six tasks in domain, and of its two NLI sets out of domain
    with_paper = gains.index[gains["paper"].notna()]
    assert set(with_paper) == {("six", "emoe", "in domain"), ("nli", "emoe", "out of domain")}
    assert gains.loc[("nli", "emoe", "out of domain"), "paper"] == pytest.approx(0.0158)
    row = gains.loc[("six", "emoe", "in domain")]
    assert (row["paper"], row["n"], row["sets"]) == (pytest.approx(0.0756), 3, 6)
    assert row["mean"] == pytest.approx(scores.loc[("id", "six", slice(None), "emoe")].mean())
    by_seed = [
        scores.loc[("id", "six", slice(None), name)].groupby("seed").mean()
        for name in ("emoe", "vanilla")
    ]
    assert row["delta"] == pytest.approx((by_seed[0] - by_seed[1]).mean())
    assert row["low"] < row["delta"] < row["high"]
    assert np.isnan(gains.loc[("six", "gmoe", "in domain"), "paper"])
    transfer = tables["transfer"].set_index(["task", "eval_task", "method"])
    alone, together = (scores.loc[("id", task, "cola", "emoe")].mean() for task in ("cola", "six"))
    row = transfer.loc[("six", "cola", "emoe")]
    assert row["mean"] == pytest.approx(together - alone)
    assert row["low"] < row["delta"] < row["high"]
    task_of = {run.folder: run.spec["task"]["name"] for run in runs}
    assert {task_of[folder] for folder in row["runs"].split()} == {"six", "cola"}


def test_the_papers_gains_stand_only_at_its_model(here: Path) -> None:
    other_model = load_models()["tiny-t5"].spec("tiny-t5")
    runs = [run_from_spec({**run.spec, "model": other_model}) for run in paper_runs("multitask")]
    fake_runs.write_runs(runs)
    outcomes = MultitaskOutcomes(BENCHMARK, fake_runs.records(runs))
    assert presentation.gains(outcomes).frame["paper"].isna().all()


def runs_with_gmoe_on_two_seeds() -> list[Run]:
    """Return three seeds of the paper's runs, but two of GMoE, which also learns each task alone."""
    planned = paper_runs("multitask")
    gmoe = paper_spec("multitask", method="gmoe")["method"]
    runs = []
    for run in planned:
        method = run.spec["method"]["name"]
        is_first = run.spec["seed"] < 2
        if method != "gmoe" or is_first:
            runs.append(run)
        if method == "emoe" and is_first and run.spec["task"]["name"] in BENCHMARK.tasks:
            runs.append(run_from_spec({**run.spec, "method": gmoe}))
    return runs


@pytest.mark.parametrize("make", [presentation.gains, presentation.transfer])
def test_differences_count_their_own_seeds(here: Path, make: Any) -> None:
    runs = runs_with_gmoe_on_two_seeds()
    fake_runs.write_runs(runs, {"emoe": 0.05})
    outcomes = MultitaskOutcomes(BENCHMARK, fake_runs.records(runs))
    table = make(outcomes)
    rows = table.frame.set_index("method")
    assert set(rows["n"]) == {2}
    assert set(rows.loc["emoe", "pairs"]) == {"3"}
    assert set(rows.loc["gmoe", "pairs"]) == {"2"}
    assert set(rows.loc["vanilla", "pairs"]) == {MISSING}
    assert table.keys["pairs"] == "n of Δ"
    # the caption must not say that Δ uses only the n seeds
    assert outcomes.shared_note not in table.caption
    assert "over all seeds that" in table.caption or "Δ) use all seeds that" in table.caption


def test_captions_name_what_a_seed_of_t5_draws_and_how_transfer_is_biased(here: Path) -> None:
    runs = fake_runs.write(RUNS, "smoke", benchmarks=("multitask",))
    captions = {
        table.name: table.caption for table in present(BENCHMARK, fake_runs.records(runs)).tables
    }
    for name in ("gains", "tests", "transfer"):
        caption = captions[f"multitask_{name}"]
        assert "dropout" in caption
        assert "adapters" not in caption
        assert "head" not in caption
    assert "biases the difference downwards" in captions["multitask_transfer"]
