"""The paper's protocol, line by line, in the resolved ``run.json`` of every run of the paper suite."""

from __future__ import annotations

import itertools
from typing import Any

import pandas as pd
import pytest

from benchmarks.harness.config.benchmark import load_benchmark, resolve_methods
from benchmarks.harness.config.methods import ABLATION
from benchmarks.text.training import Patience
from tests.planned import paper_runs

TASKS = {"cola", "mrpc", "rte", "stsb", "sst2", "qnli", "qqp", "mnli"}
METRIC = {"cola": "mcc", "mrpc": "accuracy_f1", "qqp": "accuracy_f1", "stsb": "pearson_spearman"}
LONG = {"mnli", "qqp", "qnli"}
ROWS = {
    "glue": {"vanilla", "noisy_tuning", "gmoe", "emoe", "emoe_learn"},
    "glue_lora": {"lora", "lora_block", "lora_gmoe", "lora_emoe", "lora_emoe_learn"},
}
MODELS = {
    "glue": {"bert-base-cased", "bert-large-cased", "gpt2"},
    "glue_lora": {"bert-large-cased", "gpt2-xl"},
}
# the converted block: layer 10 of 12, BERT-large's counterpart, the authors' for GPT2-XL
LAYER = {"bert-base-cased": 10, "gpt2": 10, "bert-large-cased": 22, "gpt2-xl": 44}


def of(benchmark: str, protocol: str | None = None) -> list[dict[str, Any]]:
    """Return the specs of a benchmark's main rows, without ablations."""
    return [
        run.spec
        for run in paper_runs("glue", "glue_lora", "glue_ood")
        if run.benchmark == benchmark
        and protocol in (None, run.spec["protocol"])
        and run.spec["method"]["name"] not in ABLATIONS
    ]


ABLATIONS = {
    row
    for benchmark in ("glue", "glue_lora", "glue_ood")
    for row, method in resolve_methods(load_benchmark(benchmark).definition).items()
    if method.role == ABLATION
}


def test_ablations_are_trained_as_main_rows_are() -> None:
    specs = [
        run.spec
        for run in paper_runs("glue", "glue_lora")
        if run.spec["method"]["name"] in ABLATIONS
    ]
    assert {spec["task"]["name"] for spec in specs} == {"cola", "mrpc", "rte"}
    for spec in specs:
        training = {key: value for key, value in spec["training"].items() if key != "train_share"}
        training["epochs"] /= 2 if "E2" in spec["method"]["variant"].split("-") else 1
        assert training == published_training(spec)


@pytest.mark.parametrize(
    ("benchmark", "rates"), [("glue", [2e-5, 3e-5, 5e-5]), ("glue_lora", [2e-4, 3e-4, 5e-4])]
)
@pytest.mark.parametrize("protocol", ["published", "clean"])
def test_models_tasks_methods_seeds_and_rates_are_all_combined(
    benchmark: str, rates: list[float], protocol: str
) -> None:
    planned = {
        (
            *(spec[part]["name"] for part in ("model", "task", "method")),
            spec["learning_rate"],
            spec["seed"],
        )
        for spec in of(benchmark, protocol)
    }
    assert planned >= {
        *itertools.product(MODELS[benchmark], TASKS, ROWS[benchmark], rates, [0, 1, 2])
    }
    assert {row[0] for row in planned} == MODELS[benchmark]
    assert {row[3:] for row in planned} == {*itertools.product(rates, [0, 1, 2])}


def published_training(spec: dict[str, Any]) -> dict[str, Any]:
    """Return the training settings that the paper's facts 2.1 and 2.2 give for a run."""
    lora, long, xl = (
        spec["benchmark"] == "glue_lora",
        spec["task"]["name"] in LONG,
        spec["model"]["name"] == "gpt2-xl",
    )
    adapters = {"rank": 8, "alpha": 16, "dropout": 0.1, "base_lr_ratio": 0.1}
    adapters["targets"] = {"bert": ["query", "value"], "gpt2": ["c_attn"]}
    fixed = {
        "eval_batch_size": 8,
        "max_length": 128,
        "weight_decay": 0.0,
        "warmup": 0.0,
        "sampling": "random",
    }
    fixed |= {"checkpoint_selection": "best", "patience": 4, "train_rows": None, "eval_rows": None}
    return {
        **fixed,
        "epochs": (5 if lora else 3) if long else (20 if lora else 10),
        "batch_size": 8 if xl else 16 if lora else 32,
        "gradient_accumulation_steps": 2 if xl else 1,
        "precision": "fp16" if xl else "fp32",
        "validation_fraction": 0.1 if spec["protocol"] == "clean" else 0.0,
        "lora": adapters if lora else None,
        "keep_weights": lora,
    }


@pytest.mark.parametrize("benchmark", ["glue", "glue_lora"])
def test_training_of_every_run_is_the_published_one(benchmark: str) -> None:
    for spec in of(benchmark):
        assert spec["training"] == published_training(spec)


@pytest.mark.parametrize("benchmark", ["glue", "glue_lora"])
def test_tasks_metrics_and_splits(benchmark: str) -> None:
    for spec in of(benchmark):
        task = spec["task"]
        assert task["metric"] == METRIC.get(task["name"], "accuracy")
        dev = "validation_matched" if task["name"] == "mnli" else "validation"
        assert task["splits"] == {"train": "train", "dev": dev, "test": None}
    labels = {spec["task"]["name"]: spec["task"]["labels"] for spec in of(benchmark)}
    assert labels["mnli"] == ["entailment", "neutral", "contradiction"]
    assert labels["qnli"] == labels["rte"] == ["entailment", "not_entailment"]
    assert labels["stsb"] == []


@pytest.mark.parametrize(
    ("scores", "stops"),
    [
        ([0.0] * 10, 4),  # collapsed: nothing is above the 0 that the authors' best begins with
        ([0.1, 0.1, 0.1, 0.1, 0.1, 0.1], 5),
        ([0.1, 0.2, 0.3, 0.1, 0.2, 0.3, 0.1, 0.4], 7),
        ([0.0, 0.0, 0.0, 0.1, 0.0, 0.0, 0.0, 0.2], None),
    ],
)
def test_a_run_stops_where_the_authors_would(scores: list[float], stops: int | None) -> None:
    patience = Patience("mcc", 4)
    logs = ([{"eval_mcc": score} for score in scores[:epochs]] for epochs in range(len(scores) + 1))
    assert next((len(log) for log in logs if patience.is_over(log)), None) == stops


EXPERTS = {  # N and each k
    ("glue", "emoe"): (64, {16}),
    ("glue", "emoe_learn"): (64, {16}),
    ("glue", "gmoe_published"): (6, {1}),
    ("glue_lora", "lora_emoe"): (64, {32}),
    ("glue_lora", "lora_emoe_learn"): (64, {32}),
    ("glue_lora", "lora_emoe_search"): (64, {16, 32, 48}),
    ("glue_lora", "lora_gmoe"): (8, {2}),
    ("glue_lora", "lora_gmoe_published"): (8, {2}),
}


@pytest.mark.parametrize("row", EXPERTS)
def test_a_row_has_the_papers_experts(row: tuple[str, str]) -> None:
    configs = [spec["method"]["config"] for spec in of(row[0]) if spec["method"]["name"] == row[1]]
    assert {config["num_experts"] for config in configs} == {EXPERTS[row][0]}
    assert {config["top_k"] for config in configs} == EXPERTS[row][1]
    if "emoe" in row[1]:
        routers = {("cosine" if "learn" in row[1] else "avg_k", "kmeans", None)}
        assert {
            (config["router"], config["partition"], config["capacity_factor"]) for config in configs
        } == routers


@pytest.mark.parametrize("benchmark", ["glue", "glue_lora"])
def test_one_block_is_converted_and_rows_as_published_have_the_authors_settings(
    benchmark: str,
) -> None:
    published = {"capacity_factor": 1.5, "router_noise": 1.0, "aux_loss_coefficient": 0.01}
    published |= {"expert_dropout": 0.1, "dropout_position": "before", "output_bias": "per_expert"}
    for spec in of(benchmark):
        config, name = spec["method"]["config"], spec["method"]["name"]
        if config:
            assert config["layers"] == [LAYER[spec["model"]["name"]]]
            assert name.endswith("_published") == (
                {key: config.get(key) for key in published} == published
            )
        assert spec["method"]["noise"] == (0.15 if name == "noisy_tuning" else 0.0)


def test_what_adapted_rows_tune_beside_the_adapters() -> None:
    for spec in of("glue_lora"):
        name, tune = spec["method"]["name"], spec["method"]["tune"]
        trains_block = name.startswith(("lora_block", "lora_gmoe"))
        assert tune["blocks"] == ([LAYER[spec["model"]["name"]]] if trains_block else [])
        assert tune["also"] == (["pooler", "ln_f"] if name.endswith("_published") else [])


# train task, OOD set, split, fields, labels in order, the paper's metric
PAIRS = [
    ("cola", "grammar_test", "test", ["sentence"], 2, "accuracy"),
    ("sst2", "imdb", "test", ["text"], 2, "accuracy"),
    ("sst2", "yelp_polarity", "test", ["text"], 2, "accuracy"),
    ("sst2", "amazon_polarity", "test", ["content"], 2, "accuracy"),
    ("sst2", "flipkart", "test", ["sentence"], 2, "accuracy"),
    ("mrpc", "qqp", "validation", ["question1", "question2"], 2, "accuracy"),
    ("mrpc", "twitter_pit", "train+validation+test", ["sentence1", "sentence2"], 2, "accuracy"),
    ("qqp", "mrpc", "validation", ["sentence1", "sentence2"], 2, "accuracy"),
    ("qqp", "twitter_pit", "train+validation+test", ["sentence1", "sentence2"], 2, "accuracy"),
    ("stsb", "sick_relatedness", "test", ["sentence_A", "sentence_B"], 0, "pearson_spearman"),
    ("mnli", "snli", "test", ["premise", "hypothesis"], 3, "accuracy"),
    ("mnli", "sick_entailment", "test", ["sentence_A", "sentence_B"], 3, "accuracy"),
    ("qnli", "newsqa_qnli", "test", ["question", "sentence"], 2, "accuracy"),
    ("rte", "scitail", "train+validation+test", ["sentence1", "sentence2"], 2, "accuracy"),
    ("rte", "hans", "validation", ["premise", "hypothesis"], 2, "accuracy"),
]
BESIDE = {"grammar_test": "mcc", "mrpc": "f1", "qqp": "f1", "twitter_pit": "f1"}


def test_the_fifteen_pairs_of_glue_x() -> None:
    pairs = set()
    for spec in of("glue_ood"):
        for other in spec["ood"]:
            split = other["splits"]["test"] or other["splits"]["dev"]
            row = (
                spec["task"]["name"],
                other["name"],
                split,
                str(other["fields"]),
                len(other["labels"]),
            )
            pairs.add((*row, other["ood_metrics"][0]))
            assert other["ood_metrics"][1:] == (
                [BESIDE[other["name"]]] if other["name"] in BESIDE else []
            )
    assert pairs == {
        (a, b, split, str(fields), classes, metric)
        for a, b, split, fields, classes, metric in PAIRS
    }


def test_glue_x_is_evaluated_on_the_chosen_models_of_every_row_and_seed() -> None:
    evaluated, trained = (
        {
            (
                *(spec[part]["name"] for part in ("model", "task", "method")),
                spec["protocol"],
                spec["seed"],
            )
            for spec in rows
        }
        for rows in (of("glue_ood"), of("glue_lora"))
    )
    assert evaluated == trained
    for spec in of("glue_ood"):
        assert [spec["evaluation"][key] for key in ("batch_size", "max_length", "rows")] == [
            32,
            128,
            None,
        ]


# the paper's numbers


@pytest.mark.parametrize("name", ["glue", "glue_lora", "glue_ood"])
def test_every_cell_of_the_papers_tables_has_its_provenance(name: str) -> None:
    benchmark = load_benchmark(name)
    cells = pd.read_csv(benchmark.folder / "paper.csv", keep_default_na=False)
    trained = {"glue_ood": "glue_lora"}.get(name, name)
    title = {key: task.title for key, task in benchmark.tasks.items()}
    scopes = {*(title[task] for task in TASKS), "average"}
    if name == "glue_ood":
        scopes = {*(f"{title[a]} → {title[b]}" for a, b, *_ in PAIRS), "OOD Friedman rank"}
    rows = {*itertools.product(MODELS[trained], scopes, ROWS[trained])}
    assert set(cells[["model", "scope", "method"]].itertuples(index=False, name=None)) == rows
    assert len(cells) == len(rows)
    assert ((cells["status"] == "unknown") == (cells["value"] == "")).all()
    assert (cells.loc[cells["status"] != "unknown", "source"] != "").all()
