"""GLUE-X end to end: trained, chosen, opened again and evaluated, on tiny models and made-up rows in the real files."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy import stats
from sklearn import metrics

import emoe
from benchmarks.harness.base import DATA_ROOT, MODEL_ROOT, RUNS, DataError, DefinitionError
from benchmarks.harness.config.benchmark import load_benchmark
from benchmarks.harness.config.runs import Run, run_from_spec
from benchmarks.harness.training.label_mapping import LabelMapping, label_mapping
from benchmarks.harness.training.metrics import score
from benchmarks.text.data import load_part
from benchmarks.text.definition import RunTask
from benchmarks.text.evaluation import TextEvaluator
from tests import fake_runs
from tests.executed import recorded, reopened
from tests.planned import evaluations, paper_runs, plan
from tests.text_sets import MEANING, TASKS
from tests.tiny_hub import write_data, write_glue_x, write_models

GLUE_OOD = load_benchmark("glue_ood")


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Write a model root with BERT-large and GPT2-XL, and a data root with GLUE and GLUE-X."""
    model_root, data_root = tmp_path_factory.mktemp("models"), tmp_path_factory.mktemp("data")
    write_models(model_root, ["bert-large-cased", "gpt2-xl"])
    write_data(data_root)
    write_glue_x(data_root)
    return model_root, data_root


@pytest.fixture
def workdir(roots: tuple[Path, Path], here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(MODEL_ROOT, str(roots[0]))
    monkeypatch.setenv(DATA_ROOT, str(roots[1]))
    return here


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
    (name, other) for name in TASKS for other in TASKS[name]["ood"] if "vader_sentiment" not in TASKS[other]["source"]
]


@pytest.mark.parametrize("task", sorted({name for name, _ in PAIRS}))
def test_every_pair_is_evaluated_as_the_libraries_would(workdir: Path, task: str) -> None:
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
            rows = [network(**tokenizer(*texts, return_tensors="pt")).logits[0] for texts in split.texts]
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


def test_the_chosen_runs_of_all_seeds_are_evaluated(workdir: Path) -> None:
    runs = trainings("bert-large-cased", "mrpc", "lora_emoe", rates=2, seeds=2)
    rates = sorted({run.spec["learning_rate"] for run in runs})
    # made-up dev scores: one rate has the best single run, the other the best mean over seeds
    values = {(rates[0], 0): 0.9, (rates[0], 1): 0.5, (rates[1], 0): 0.8, (rates[1], 1): 0.8}
    for run in runs:
        recorded(run)
        value = values[run.spec["learning_rate"], run.spec["seed"]]
        fake_runs.edit(run, lambda content, value=value: content["scores"]["dev"]["mrpc"].update(accuracy_f1=value))
    for evaluation in evaluations(runs, "paper"):
        chosen = recorded(evaluation)["chosen"]
        assert chosen["learning_rate"] == rates[1]
        assert f"-s{evaluation.spec['seed']}-" in chosen["run"]


def test_weights_that_are_gone_or_changed_are_named_with_the_remedy(
    workdir: Path, roots: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = trainings("bert-large-cased", "rte", "lora_emoe")
    recorded(runs[0])
    (evaluation,) = evaluations(runs, "paper")
    kept = RUNS / runs[0].folder / "model" / "trained.safetensors"
    whole = kept.read_bytes()
    kept.write_bytes(whole[:-8])
    with pytest.raises(DataError, match=f"is damaged.*delete {RUNS / runs[0].folder / 'metrics.json'}"):
        recorded(evaluation)
    kept.write_bytes(whole)
    grouping = kept.with_name("partition.safetensors")  # without it, the model would be routed in another way
    moved = grouping.rename(grouping.with_suffix(".away"))
    with pytest.raises(DataError, match=r"partition\.safetensors does not exist"):
        recorded(evaluation)
    moved.rename(grouping)

    changed = shutil.copytree(roots[0], tmp_path / "models")
    weights = changed / "bert-large-cased" / "model.safetensors"
    state = load_file(weights)
    state["embeddings.word_embeddings.weight"][0, 0] += 1
    save_file(state, weights, metadata={"format": "pt"})
    monkeypatch.setenv(MODEL_ROOT, str(changed))
    with pytest.raises(DataError, match="the weights of 'bert-large-cased' changed since the run was trained"):
        recorded(evaluation)


@pytest.mark.parametrize(("method", "dropping"), [("lora_gmoe", False), ("lora_emoe_published", True)])
def test_the_evaluation_batch_size_changes_no_number_unless_experts_drop_tokens(
    workdir: Path, method: str, dropping: bool
) -> None:
    """As published, experts are full when a batch is, and choices are dropped."""
    (run,) = trainings("bert-large-cased", "cola", method)
    if dropping:  # so that few sentences fill the experts
        config = {**run.spec["method"]["config"], "capacity_factor": 0.5}
        run = run_from_spec({**run.spec, "method": {**run.spec["method"], "config": config}})
    opened, tokenizer = reopened(run, recorded(run))
    task = RunTask.model_validate(run.spec["task"])
    split, rates, scores = load_part(task, "train", None), [], []
    for size in (1, 8, 32):
        with emoe.record_routing(opened.model) as record:
            evaluator = TextEvaluator(opened, tokenizer, task, size, 128, "fp32", workdir)
            scores.append(evaluator.evaluate(split, task))
        rates.append(record.summary()["drop_rate"])
    if dropping:
        assert rates[0] != rates[2]
    else:
        assert scores[1:] == [pytest.approx(scores[0], abs=1e-6)] * 2


# classes that differ in number


def test_a_three_way_model_on_a_two_way_set_and_the_other_way_round() -> None:
    mnli, hans, snli, rte = (GLUE_OOD.tasks[name] for name in ("mnli", "hans", "snli", "rte"))
    three_on_two = label_mapping(mnli, hans, "hans")
    assert three_on_two == LabelMapping(predictions=(0, 1, 1))
    logits = np.array([[3, 1, 2], [0, 2, 1], [0, 1, 2], [2, 0, 1]])
    assert score("accuracy", logits, np.array([0, 1, 1, 1]), three_on_two) == 0.75
    two_on_three = label_mapping(rte, snli, "snli")
    assert two_on_three == LabelMapping(labels=(0, 1, 1))
    assert score("accuracy", np.array([[1, 0], [0, 1], [0, 1]]), np.array([0, 1, 2]), two_on_three) == 1.0
    assert not two_on_three.same
    assert label_mapping(mnli, snli, "snli").same


# plans


def test_sets_that_one_cannot_obtain_are_left_out() -> None:
    runs = plan(["glue_ood"], "paper", exclude=["flipkart", "newsqa_qnli"])
    sets = {other["name"] for run in runs for other in run.spec["ood"]}
    assert {"imdb", "hans"} <= sets
    assert not {"flipkart", "newsqa_qnli"} & sets
    assert not any(run.spec["task"]["name"] == "qnli" for run in runs)
    with pytest.raises(DefinitionError, match="has an OOD set left"):
        plan(["glue_ood"], "mini", exclude=["amazon", "movie", "nyt"])


def test_an_evaluation_waits_for_all_runs_of_its_cell() -> None:
    runs = paper_runs("glue_lora", "glue_ood")
    trained = {run.folder: run.spec for run in runs if run.benchmark == "glue_lora"}
    for spec in (run.spec for run in runs if run.benchmark == "glue_ood"):
        candidates, method = [trained[folder] for folder in spec["candidates"]], spec["method"]["name"]
        row = GLUE_OOD.definition.transformed.get(method)
        cells = {(candidate["method"]["name"], candidate["protocol"]) for candidate in candidates}
        assert cells == {(row.trained if row else method, spec["protocol"])}
        assert len(candidates) == 9 * (3 if method == "lora_emoe_search" else 1)
