"""GLUE-X end to end: trained, chosen, opened again and evaluated, on tiny models and made-up rows in the real files."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy import stats
from sklearn import metrics

from benchmarks.harness.base import MODEL_ROOT, RUNS, DataError
from benchmarks.harness.config.benchmark import load_benchmark
from benchmarks.harness.config.runs import Run, run_from_spec
from benchmarks.text.data import load_part
from benchmarks.text.definition import RunTask
from benchmarks.text.training import TextEvaluator, score_and_loss
from tests import fake_runs
from tests.executed import recorded, reopened
from tests.planned import evaluations, paper_runs
from tests.text_sets import MEANING, TASKS

GLUE_OOD = load_benchmark("glue_ood")


def trainings(model: str, task: str, method: str, *, rates: int = 1, seeds: int = 1) -> list[Run]:
    """Plan the paper's runs of one cell, cut to one epoch, and to a few learning rates and seeds."""
    specs = [run.spec for run in paper_runs("glue_lora") if run.spec["protocol"] == "published"]
    names = {"model": model, "task": task, "method": method}
    cell = [spec for spec in specs if {part: spec[part]["name"] for part in names} == names]
    first = sorted({spec["learning_rate"] for spec in cell})[:rates]
    return [
        run_from_spec({**spec, "training": {**spec["training"], "epochs": 1, "patience": None}})
        for spec in cell
        if spec["learning_rate"] in first and spec["seed"] < seeds
    ]


PAIRS = [
    (name, other)
    for name in TASKS
    for other in TASKS[name]["ood"]
    if "vader_sentiment" not in TASKS[other]["source"]
]


@pytest.mark.slow
@pytest.mark.parametrize("task", sorted({name for name, _ in PAIRS}))
def test_every_pair_is_evaluated_as_the_libraries_would(hub_here: Path, task: str) -> None:
    """Compare: scores are scikit-learn's and scipy's on predictions of the plain model, labels those of the sets'
    documentation."""
    model = "gpt2-xl" if task in ("cola", "stsb", "rte") else "bert-large-cased"
    runs = trainings(model, task, "lora_emoe" if task in ("cola", "mnli", "rte") else "lora_gmoe")
    trained = recorded(runs[0])
    (evaluation,) = evaluations(runs, "paper")
    result = recorded(evaluation)
    assert set(result["scores"]["ood"]) == {other for name, other in PAIRS if name == task}
    assert result["chosen"]["run"] == runs[0].folder

    opened, tokenizer = reopened(runs[0], trained)
    network = opened.model.eval()
    for other in map(RunTask.model_validate, evaluation.spec["ood"]):
        split, scores = load_part(other, "test", None), result["scores"]["ood"][other.name]
        labels = split.labels
        if other.name in MEANING:
            assert labels == MEANING[other.name][0]
        with torch.no_grad():  # one by one, without padding
            rows = [
                network(**tokenizer(*texts, return_tensors="pt")).logits[0] for texts in split.texts
            ]
        logits = torch.stack(rows)
        if task == "stsb":
            plain = logits[:, 0].numpy()
            expected = (stats.pearsonr(labels, plain)[0] + stats.spearmanr(labels, plain)[0]) / 2
            assert scores["pearson_spearman"] == pytest.approx(expected, abs=1e-3)
            continue
        predicted, expected = logits.argmax(-1), {}
        expected["accuracy"] = metrics.accuracy_score(labels, predicted)
        expected["loss"] = float(torch.nn.functional.cross_entropy(logits, torch.tensor(labels)))
        if "f1" in scores:
            expected["f1"] = metrics.f1_score(labels, predicted, zero_division=0.0)
        if "mcc" in scores:
            expected["mcc"] = metrics.matthews_corrcoef(labels, predicted)
        assert {name: scores[name] for name in expected} == pytest.approx(expected, abs=1e-5)


def test_the_chosen_runs_of_all_seeds_are_evaluated(hub_here: Path) -> None:
    runs = trainings("bert-large-cased", "mrpc", "lora_emoe", rates=2, seeds=2)
    rates = sorted({run.spec["learning_rate"] for run in runs})
    # made-up dev scores: one rate has the best single run, the other the best mean over seeds
    values = {(rates[0], 0): 0.9, (rates[0], 1): 0.5, (rates[1], 0): 0.8, (rates[1], 1): 0.8}
    for run in runs:
        recorded(run)
        value = values[run.spec["learning_rate"], run.spec["seed"]]
        fake_runs.edit(
            run,
            lambda content, value=value: content["scores"]["dev"]["mrpc"].update(accuracy_f1=value),
        )
    seed_of = {run.folder: run.spec["seed"] for run in runs}
    for evaluation in evaluations(runs, "paper"):
        chosen = recorded(evaluation)["chosen"]
        assert chosen["learning_rate"] == rates[1]
        assert seed_of[chosen["run"]] == evaluation.spec["seed"]


def test_a_model_is_converted_to_the_setting_that_the_other_method_chose(hub_here: Path) -> None:
    dense = trainings("bert-large-cased", "mrpc", "lora")
    usual = trainings("bert-large-cased", "mrpc", "lora_emoe")[0]
    fewer = copy.deepcopy(usual.spec)
    fewer["variant"] = fewer["method"]["variant"] = "k0.125"
    fewer["method"]["config"]["top_k"] //= 4
    experts = [usual, run_from_spec(fewer)]
    for run in [*dense, *experts]:
        recorded(run)
    (converted,) = [
        run for run in evaluations([*dense, *experts], "paper") if run.method == "lora2emoe"
    ]
    losses = []
    for better in experts:
        for run in experts:
            score = 0.9 if run is better else 0.5
            fake_runs.edit(
                run,
                lambda content, score=score: content["scores"]["dev"]["mrpc"].update(
                    accuracy_f1=score
                ),
            )
        (RUNS / converted.folder / "metrics.json").unlink(missing_ok=True)
        losses.append(recorded(converted)["scores"]["test"]["mrpc"]["loss"])
    assert losses[0] != losses[1]


def test_weights_that_are_gone_or_changed_are_named_with_the_remedy(
    hub_here: Path, roots: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = trainings("bert-large-cased", "rte", "lora_emoe")
    recorded(runs[0])
    (evaluation,) = evaluations(runs, "paper")
    kept = RUNS / runs[0].folder / "model" / "trained.safetensors"
    whole = kept.read_bytes()
    kept.write_bytes(whole[:-8])
    with pytest.raises(
        DataError, match=f"damaged.*delete {RUNS / runs[0].folder / 'metrics.json'}"
    ):
        recorded(evaluation)
    kept.write_bytes(whole)
    changed = shutil.copytree(roots / "models", tmp_path / "models")
    weights = changed / "bert-large-cased" / "model.safetensors"
    state = load_file(weights)
    state["embeddings.word_embeddings.weight"][0, 0] += 1
    save_file(state, weights, metadata={"format": "pt"})
    monkeypatch.setenv(MODEL_ROOT, str(changed))
    with pytest.raises(
        DataError, match="the weights of 'bert-large-cased' changed since the run was trained"
    ):
        recorded(evaluation)


def test_a_row_is_evaluated_alone_as_in_a_batch(hub_here: Path) -> None:
    (run,) = trainings("bert-large-cased", "cola", "lora_gmoe")
    opened, tokenizer = reopened(run, recorded(run))
    task = RunTask.model_validate(run.spec["task"])
    evaluators = (
        TextEvaluator(opened, tokenizer, task, size, 128, "fp32", hub_here) for size in (1, 8, 32)
    )
    alone, *in_batches = (
        evaluator.evaluate(load_part(task, "train", None), task) for evaluator in evaluators
    )
    assert in_batches == [pytest.approx(alone, abs=1e-6)] * 2


# classes that differ in number


def test_a_three_way_model_on_a_two_way_set_and_the_other_way_round() -> None:
    mnli, hans, snli, rte = (GLUE_OOD.tasks[name] for name in ("mnli", "hans", "snli", "rte"))
    three, two = (
        np.array([[3, 1, 2], [0, 2, 1], [0, 1, 2], [2, 0, 1]]),
        np.array([[1, 0], [0, 1], [0, 1]]),
    )
    assert score_and_loss(three, np.array([0, 1, 1, 1]), mnli, hans, ["accuracy"]) == {
        "accuracy": 0.75
    }
    assert score_and_loss(two, np.array([0, 1, 2]), rte, snli, ["accuracy"]) == {"accuracy": 1.0}
    assert "loss" in score_and_loss(three, np.array([0, 1, 2, 0]), mnli, snli, ["accuracy"])
