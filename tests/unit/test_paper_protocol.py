"""The paper's protocol, line by line, in the resolved ``run.json`` of every run of the paper suite."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import pandas as pd
import pytest

from benchmarks.harness.config.benchmark import load_benchmark, resolve_methods
from benchmarks.harness.config.catalogue import load_models
from benchmarks.harness.config.methods import ABLATION
from benchmarks.text.training import Patience
from tests.planned import paper_runs, plan

TASKS = {"cola", "mrpc", "rte", "stsb", "sst2", "qnli", "qqp", "mnli"}
METRIC = {"cola": "mcc", "mrpc": "accuracy_f1", "qqp": "accuracy_f1", "stsb": "pearson_spearman"}
LONG = {"mnli", "qqp", "qnli"}
ROWS = {
    "glue": {"vanilla", "noisy_tuning", "gmoe", "emoe", "emoe_learn"},
    "glue_lora": {"lora", "lora_block", "lora_gmoe", "lora_emoe", "lora_emoe_learn"},
}
MODELS = {"glue": {"bert-base-cased", "bert-large-cased", "gpt2"}, "glue_lora": {"bert-large-cased", "gpt2-xl"}}
# the converted block: layer 10 of 12, its like in BERT-large, and the authors' own for GPT2-XL
LAYER = {"bert-base-cased": 10, "gpt2": 10, "bert-large-cased": 22, "gpt2-xl": 44}


def of(benchmark: str, protocol: str | None = None) -> list[dict[str, Any]]:
    """The specs of a benchmark's main rows; ablations differ from them in what they are about."""
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
    found = [
        run.spec
        for run in paper_runs("glue", "glue_lora", "glue_ood")
        if run.spec["method"]["name"] in ABLATIONS and "training" in run.spec
    ]
    assert {spec["task"]["name"] for spec in found} == {"cola", "mrpc", "rte"}
    for spec in found:
        training = {key: value for key, value in spec["training"].items() if key != "train_share"}
        training["epochs"] /= 2 if "E2" in spec["method"]["variant"].split("-") else 1
        assert training == published_training(spec)


def values(specs: Iterable[dict[str, Any]], *keys: str) -> set[Any]:
    found = set()
    for spec in specs:
        value: Any = spec
        for key in keys:
            value = value[key]
        found.add(str(value) if isinstance(value, dict | list) else value)
    return found


@pytest.mark.parametrize("benchmark", ["glue", "glue_lora"])
@pytest.mark.parametrize("protocol", ["published", "clean"])
def test_models_tasks_methods_seeds_and_rates_are_all_combined(benchmark: str, protocol: str) -> None:
    rates = {"glue": [2e-5, 3e-5, 5e-5], "glue_lora": [2e-4, 3e-4, 5e-4]}[benchmark]
    found = {
        (s["model"]["name"], s["task"]["name"], s["method"]["name"], s["learning_rate"], s["seed"])
        for s in of(benchmark, protocol)
    }
    wanted = set(itertools.product(MODELS[benchmark], TASKS, ROWS[benchmark], rates, [0, 1, 2]))
    assert wanted <= found
    assert {row[3] for row in found} == set(rates)
    assert {row[4] for row in found} == {0, 1, 2}
    assert {row[0] for row in found} == MODELS[benchmark]


def published_training(spec: dict[str, Any]) -> dict[str, Any]:
    """What facts 2.1 and 2.2 say of a run."""
    lora, long, xl = spec["benchmark"] == "glue_lora", spec["task"]["name"] in LONG, spec["model"]["name"] == "gpt2-xl"
    adapters = {
        "rank": 8,
        "alpha": 16,
        "dropout": 0.1,
        "targets": {"bert": ["query", "value"], "gpt2": ["c_attn"]},
        "base_lr_ratio": 0.1,
    }
    return {
        "epochs": (5 if lora else 3) if long else (20 if lora else 10),
        "batch_size": 8 if xl else 16 if lora else 32,
        "gradient_accumulation_steps": 2 if xl else 1,
        "precision": "fp16" if xl else "fp32",
        "eval_batch_size": 8,
        "max_length": 128,
        "weight_decay": 0.0,
        "warmup": 0.0,
        "sampling": "random",
        "checkpoint_selection": "best",
        "patience": 4,
        "train_rows": None,
        "eval_rows": None,
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
        ([-0.1, -0.2, 0.0, -0.1, 0.3], 4),
        ([0.1, 0.1, 0.1, 0.1, 0.1, 0.1], 5),
        ([0.1, 0.2, 0.3, 0.1, 0.2, 0.3, 0.1, 0.4], 7),
        ([0.0, 0.0, 0.0, 0.1, 0.0, 0.0, 0.0, 0.2], None),
    ],
)
def test_a_run_stops_where_the_authors_would(scores: list[float], stops: int | None) -> None:
    patience = Patience("mcc", 4)
    logs = ([{"eval_mcc": score} for score in scores[:epochs]] for epochs in range(len(scores) + 1))
    assert next((len(log) for log in logs if patience.is_over(log)), None) == stops


def test_the_search_has_the_cells_of_figure_5() -> None:
    found = {
        (spec["model"]["name"], spec["task"]["name"], config["num_experts"], config["top_k"])
        for run in plan(["glue"], "paper_search")
        for spec in [run.spec]
        for config in [spec["method"]["config"]]
    }
    wanted = itertools.product(
        MODELS["glue"], ["mrpc", "cola", "rte"], [(16, 2), (16, 4), (16, 8), (32, 4), (32, 8), (32, 16)]
    )
    assert {(model, task, *choice) for model, task, choice in wanted} <= found


def configs(benchmark: str, method: str) -> list[dict[str, Any]]:
    return [spec for spec in of(benchmark) if spec["method"]["name"] == method]


@pytest.mark.parametrize("spec_of", ["glue", "glue_lora"])
def test_one_block_is_converted(spec_of: str) -> None:
    for spec in of(spec_of):
        if spec["method"]["config"]:
            assert spec["method"]["config"]["layers"] == [LAYER[spec["model"]["name"]]]


def test_experts_of_full_fine_tuning() -> None:
    for method in ("emoe", "emoe_learn"):
        for spec in configs("glue", method):
            config = spec["method"]["config"]
            assert (config["num_experts"], config["top_k"], config["partition"]) == (64, 16, "kmeans")
            assert config["router"] == ("cosine" if method == "emoe_learn" else "avg_k")
            assert config["capacity_factor"] is None
    assert {
        (c["num_experts"], c["top_k"]) for s in configs("glue", "gmoe_published") for c in [s["method"]["config"]]
    } == {(6, 1)}
    assert values(configs("glue", "noisy_tuning"), "method", "noise") == {0.15}


def test_experts_of_adapted_models() -> None:
    for method in ("lora_emoe", "lora_emoe_learn"):
        assert values(configs("glue_lora", method), "method", "config", "num_experts") == {64}
        assert values(configs("glue_lora", method), "method", "config", "top_k") == {32}
    assert values(configs("glue_lora", "lora_emoe_search"), "method", "config", "top_k") == {16, 32, 48}
    for method in ("lora_gmoe", "lora_gmoe_published"):
        assert values(configs("glue_lora", method), "method", "config", "num_experts") == {8}
        assert values(configs("glue_lora", method), "method", "config", "top_k") == {2}


def test_rows_as_published_have_the_authors_settings() -> None:
    for benchmark, method in itertools.product(("glue", "glue_lora"), ("emoe", "emoe_learn", "gmoe")):
        name = f"{method}_published" if benchmark == "glue" else f"lora_{method}_published"
        for spec in configs(benchmark, name):
            config = spec["method"]["config"]
            assert (config["capacity_factor"], config["router_noise"], config["aux_loss_coefficient"]) == (
                1.5,
                1.0,
                0.01,
            )
            assert (config["expert_dropout"], config["dropout_position"], config["output_bias"]) == (
                0.1,
                "before",
                "per_expert",
            )
            if benchmark == "glue_lora":
                assert spec["method"]["tune"]["also"] == ["pooler", "ln_f"]


def test_what_adapted_rows_tune_beside_the_adapters() -> None:
    for spec in of("glue_lora"):
        blocks = (
            [LAYER[spec["model"]["name"]]] if spec["method"]["name"].startswith(("lora_block", "lora_gmoe")) else []
        )
        assert spec["method"]["tune"]["blocks"] == blocks
        assert bool(spec["method"]["tune"]["also"]) == spec["method"]["name"].endswith("_published")


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
    found = set()
    for spec in of("glue_ood"):
        for other in spec["ood"]:
            split = other["splits"]["test"] or other["splits"]["dev"]
            row = (spec["task"]["name"], other["name"], split, str(other["fields"]), len(other["labels"]))
            found.add((*row, other["ood_metrics"][0]))
            assert other["ood_metrics"][1:] == ([BESIDE[other["name"]]] if other["name"] in BESIDE else [])
    assert found == {(a, b, split, str(fields), classes, metric) for a, b, split, fields, classes, metric in PAIRS}


def test_glue_x_is_evaluated_on_the_chosen_models_of_every_row_and_seed() -> None:
    evaluated = {
        (s["model"]["name"], s["task"]["name"], s["method"]["name"], s["protocol"], s["seed"]) for s in of("glue_ood")
    }
    trained = {
        (s["model"]["name"], s["task"]["name"], s["method"]["name"], s["protocol"], s["seed"]) for s in of("glue_lora")
    }
    assert evaluated == trained
    assert values(of("glue_ood"), "evaluation", "batch_size") == {32}
    assert values(of("glue_ood"), "evaluation", "max_length") == {128}
    assert values(of("glue_ood"), "evaluation", "rows") == {None}


def test_sources_are_pinned() -> None:
    """By a commit, but for two sets whose hub copy is loadable as its conversion only, and those fetched by hand."""
    sources = {task["name"]: task["source"] for spec in of("glue_ood") for task in [spec["task"], *spec["ood"]]}
    branches = {name for name, source in sources.items() if "hub" in source and len(source["revision"]) != 40}
    assert branches == {"sick_relatedness", "sick_entailment", "hans"}
    assert {name for name, source in sources.items() if "hub" not in source} == {
        "grammar_test",
        "flipkart",
        "twitter_pit",
        "newsqa_qnli",
    }
    assert all(len(load_models()[name].revision or "") == 40 for names in MODELS.values() for name in names)


# the paper's numbers


@pytest.mark.parametrize("name", ["glue", "glue_lora", "glue_ood"])
def test_every_cell_of_the_papers_tables_has_its_provenance(name: str) -> None:
    benchmark = load_benchmark(name)
    cells = pd.read_csv(benchmark.folder / "paper.csv", keep_default_na=False)
    trained = {"glue_ood": "glue_lora"}.get(name, name)
    assert set(cells["method"]) == ROWS[trained]
    assert set(cells["model"]) == MODELS[trained]
    title = {key: task.title for key, task in benchmark.tasks.items()}
    scopes = (
        {f"{title[a]} → {title[b]}" for a, b, *_ in PAIRS} | {"OOD Friedman rank"}
        if name == "glue_ood"
        else {title[t] for t in TASKS} | {"average"}
    )
    assert set(cells["scope"]) == scopes
    assert len(cells) == len(scopes) * len(ROWS[trained]) * len(MODELS[trained])
    assert ((cells["status"] == "unknown") == (cells["value"] == "")).all()
    assert (cells.loc[cells["status"] != "unknown", "source"] != "").all()


def test_published_numbers_are_those_of_the_reference() -> None:
    def cell(benchmark: str, model: str, scope: str, method: str) -> str:
        cells = pd.read_csv(load_benchmark(benchmark).folder / "paper.csv", dtype=str, keep_default_na=False)
        return str(cells.set_index(["model", "scope", "method"]).loc[(model, scope, method), "value"])

    assert [cell("glue", "bert-large-cased", "average", m) for m in ("vanilla", "gmoe", "emoe")] == [
        "82.70",
        "82.79",
        "83.32",
    ]
    assert [cell("glue_lora", "gpt2-xl", "average", m) for m in ("lora", "lora_gmoe", "lora_emoe")] == [
        "84.61",
        "85.34",
        "85.45",
    ]
    assert [cell("glue_ood", "gpt2-xl", "OOD Friedman rank", m) for m in ("lora", "lora_gmoe", "lora_emoe")] == [
        "5.61",
        "4.33",
        "3.88",
    ]
    assert cell("glue_ood", "gpt2-xl", "RTE → HANS", "lora_emoe") == "61.56"
