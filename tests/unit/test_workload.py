"""What runs compute, counted by hand; and the sizes of models that are not here, against those of transformers."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from benchmarks.harness.config.catalogue import load_models
from benchmarks.harness.config.definition import load_benchmark
from benchmarks.harness.config.devices import find_device
from benchmarks.harness.config.kinds import kind_of
from benchmarks.harness.config.runs import Run, plan, run_from_spec
from benchmarks.harness.config.shapes import shape_of_config
from benchmarks.harness.config.workload import Passes, Workload, model_size, padded
from benchmarks.harness.models.loading import load_tokenizer
from benchmarks.harness.training.samplers import EpochOrder
from benchmarks.text.datasets import load_split
from benchmarks.text.tokenization import TokenisedRows
from benchmarks.text.workload import find_part

HOUR = 3600
MINILM = {"width": 384, "neurons": 1536, "vocab": 30522, "positions": 512}
BLOCK = 4 * 384**2 + 2 * 384 * 1536  # of MiniLM and of a ViT-S
FFN = 2 * 384 * 1536


@functools.cache
def runs_of(benchmarks: tuple[str, ...], suite: str) -> list[Run]:
    return plan(list(benchmarks), suite)


def find_run(*benchmarks: str, suite: str = "mini", **wanted: object) -> Run:
    """The first run of the last benchmark whose spec has these values, nested ones by ``key__key``."""

    def value(spec: Any, path: str) -> object:
        for key in path.split("__"):
            spec = spec[key]
        return spec

    found = [run for run in runs_of(benchmarks, suite) if run.benchmark == benchmarks[-1]]
    return next(run for run in found if all(value(run.spec, key) == wish for key, wish in wanted.items()))


def workload(run: Run, specs: Mapping[str, Any] | None = None) -> Workload:
    found = kind_of(run.benchmark).workload(run.spec, load_benchmark(run.benchmark).tasks, specs or {})
    assert found is not None
    return found


def length(row_bytes: float, most: float, special: int = 2) -> float:
    return min(row_bytes / 4.4 + special, most)


TWEETS, AMAZON, MOVIE, NYT = (length(size, 48) for size in (79, 90, 112, 110))


def test_a_run_of_text_classification_counts_rows_epochs_padding_and_evaluations() -> None:
    run = find_run("glue", method__name="vanilla", task__name="tweets", seed=0)
    found = workload(run)
    # one epoch of 640 rows, like two rows that are padded together; 32 rows of 5 sets for gradients, without padding
    assert found.tokens_trained == pytest.approx(640 * TWEETS * 1.24 + 5 * 32 * TWEETS)
    ends = 400 * TWEETS + 250 * (AMAZON + MOVIE + NYT)
    assert "used_as" in run.spec  # evaluated as it was trained, and as another model
    assert found.tokens_read == pytest.approx(100 * TWEETS + 2 * ends)
    assert (found.updates, found.training.count) == (80, 80)
    assert found.size.trained == found.size.parameters == 6 * BLOCK + (30522 + 512) * 384
    assert found.training.operations == 2 * found.tokens_trained * 3 * 6 * BLOCK  # 6 N a token
    # the second time from the last of six layers on: what reaches it is kept
    reading = 2 * BLOCK * (6 * (100 * TWEETS + ends) + ends)
    assert found.operations == pytest.approx(found.training.operations + reading)


def test_adapters_need_no_gradients_of_weights_and_frozen_layers_no_passes() -> None:
    found = workload(find_run("glue_lora", method__name="lora", seed=0))
    adapters = 3 * 2 * 8 * (384 + 384)  # rank 8 on query and value of the three layers above the frozen ones
    assert found.size.trained == adapters == 36864  # as finished runs record them
    assert found.training.parameters == 2 * 3 * BLOCK + adapters
    assert {passes.parameters for passes in found.reading} == {3 * BLOCK}
    assert found.keeps
    assert sum(size for name, size in found.caches if name.startswith("states")) == pytest.approx(
        (1280 + 300) * TWEETS * 384 * 4
    )


def test_copies_of_a_layer_are_held_trained_and_computed() -> None:
    dense = workload(find_run("glue_lora", method__name="lora_block", seed=0)).size
    copied = workload(find_run("glue_lora", method__name="lora_gmoe", seed=0)).size
    assert dense.trained == 36864 + BLOCK
    assert (
        copied.trained - dense.trained == copied.parameters - dense.parameters == copied.above - dense.above == 7 * FFN
    )
    parts = workload(find_run("glue_lora", method__name="lora_emoe", seed=0)).size
    assert (parts.trained, parts.above) == (36864, 3 * BLOCK)  # experts that are parts add nothing


def test_an_evaluation_has_the_model_of_what_it_evaluates() -> None:
    specs = {run.folder: run.spec for run in runs_of(("glue_lora", "glue_ood"), "mini")}

    def of(method: str, rows: int) -> Workload:
        spec = find_run("glue_lora", "glue_ood", method__name=method, seed=0).spec
        return workload(run_from_spec({**spec, "evaluation": {**spec["evaluation"], "rows": rows}}), specs)

    plain, copied, other = (of(method, 300) for method in ("lora", "lora_gmoe", "emoe2lora"))
    assert plain.tokens_read == pytest.approx(300 * (AMAZON + MOVIE + NYT))  # its own set is as it was when trained
    assert plain.operations == pytest.approx(2 * 3 * BLOCK * plain.tokens_read)
    # whose routing nobody recorded by row: its own set too
    assert copied.tokens_read == pytest.approx(300 * (TWEETS + AMAZON + MOVIE + NYT))
    assert copied.operations == pytest.approx(2 * (3 * BLOCK + 7 * FFN) * copied.tokens_read)
    assert other.tokens_read - plain.tokens_read == pytest.approx(300 * TWEETS)
    # other rows than when it was trained: its own set too
    assert of("lora", 500).tokens_read == pytest.approx(500 * (TWEETS + AMAZON + MOVIE + NYT))
    assert (plain.updates, plain.size.trained, plain.tokens_trained) == (0, 0, 0)


def test_reading_counts_every_task_three_times() -> None:
    found = workload(find_run("modularity", method__name="emoe"))
    once = 100 * (TWEETS + AMAZON + MOVIE + NYT)
    assert found.tokens_read == pytest.approx(3 * once)
    assert found.operations == pytest.approx(2 * BLOCK * (6 + 1 + 1) * once)  # with experts in the last layer alone


def test_what_has_no_room_is_counted_again() -> None:
    shape = load_models()["minilm"].shape
    assert shape is not None
    some, many = (Passes(1, tokens, 6.0, 6).again(shape, 5).parameters for tokens in (1e5, 1e6))
    assert some == pytest.approx(1)
    assert many == pytest.approx(6 - 5 * 2**29 / (1e6 * 384 * 4))


def test_several_tasks_count_the_rows_of_an_epoch_and_what_the_encoder_computes() -> None:
    run = find_run("multitask", suite="mini_full", method__name="vanilla", task__name="sentences", seed=0)
    found = workload(run)
    training = run.spec["training"]
    rows = 4 * training["rows_per_epoch"]  # each of its tasks has more
    assert found.updates == training["epochs"] * math.ceil(rows / training["batch_size"])
    alone = workload(find_run("multitask", suite="mini_full", method__name="vanilla", task__name="amazon", seed=0))
    assert alone.updates == training["epochs"] * math.ceil(training["rows_per_epoch"] / training["batch_size"])
    assert 3 < found.tokens_trained / alone.tokens_trained < 6  # sentences of movies are longer
    assert found.training.parameters == 3 * found.size.above
    assert found.size.above == found.size.forward / 2


def test_images_count_patches_environments_and_evaluations() -> None:
    found = workload(find_run("domainbed", method__name="erm", seed=0))
    tokens = (56 // 14) ** 2 + 1
    assert found.tokens_trained == 121 * 8 * 5 * tokens  # five of six environments
    out, inside = 5000 / 6 * 0.2, 200  # 200 images at most
    # after step 0 and step 120, the last; then the out splits once more
    assert found.tokens_read == pytest.approx((2 * (6 * out + inside) + 6 * out) * tokens)
    assert found.size.trained == 4 * BLOCK == found.size.above


def test_instructions_count_whole_steps_questions_and_answers() -> None:
    run = find_run("llama", suite="paper", model__name="llama2-7b", finetuning="lora", method__name="dense", seed=0)
    found = workload(run)
    block = 4 * 4096**2 + 3 * 4096 * 11008
    assert found.updates == (52002 - 500) // 128 * 3
    assert found.training.count == found.updates * 128
    assert found.size.trained == 32 * 2 * 8 * 2 * 4096 == 4194304
    row = found.tokens_trained / found.training.count
    assert 100 < row < 200  # Alpaca's rows with the prompt; one at a time is not padded
    assert found.training.parameters == 2 * (32 * block + 4096 * 32000) + 4194304
    shots = 14042 * (6 + 1) * 417 / 4.4
    assert found.tokens_read == pytest.approx(500 * row + shots + 8 * 256)


def test_a_measurement_counts_rounds_and_candidates() -> None:
    found = workload(find_run("speed", suite="speed", task__name="step", model__name="bert-base-model"))
    block = 4 * 768**2 + 2 * 768 * 3072
    assert found.operations == 2 * 3 * 12 * block * 8 * 128 * 4 * 3  # three rounds and one before, three models
    layer = workload(find_run("speed", suite="speed", task__name="layer", model__name="bert-base"))
    assert layer.operations == 2 * 3 * 2 * 768 * 3072 * 2048 * 6 * 6  # five rounds and one before, six candidates
    run = find_run("speed", suite="speed", task__name="partition")
    assert kind_of("speed").workload(run.spec, load_benchmark("speed").tasks, {}) is None


def test_early_stopping_is_counted_to_the_end_and_said() -> None:
    run = find_run("glue", suite="paper", task__name="cola", protocol="published", model__name="bert-base-cased")
    found = workload(run)
    assert found.updates == math.ceil(8551 / 32) * 10
    assert found.least == 0.5  # four epochs without a new best after the first, of ten
    row, compared = length(57, 128), 32 * (2 + len(run.spec["ood"])) if run.spec["ood"] else 0
    assert found.tokens_trained == pytest.approx(8551 * 10 * row * (1 + 0.24 * 5) + compared * row)
    clean = workload(
        find_run("glue", suite="paper", task__name="cola", protocol="clean", model__name="bert-base-cased")
    )
    assert clean.updates == math.ceil((8551 - 855) / 32) * 10


def test_what_is_not_known_is_said() -> None:
    run = find_run("glue", method__name="vanilla", task__name="tweets", seed=0)
    model = {"name": "somebody-elses", "hub": "somebody/else"}
    assert model_size({**run.spec, "model": model}) is None
    tasks = dict(load_benchmark("glue").tasks)
    tasks["tweets"] = tasks["tweets"].model_copy(update={"size": type(tasks["tweets"].size)()})
    found = kind_of("glue").workload(run.spec, tasks, {})
    assert found is not None
    assert found.assumed == ("rows of tweets as long as they may be",) * 2
    assert found.tokens_trained == 640 * 48 + 5 * 32 * 48
    spec = dict(find_run("llama", method__name="dense", finetuning="base").spec)
    spec["evaluation"] = {**spec["evaluation"], "tasks": [{"task": "arc_easy", "num_fewshot": 0, "limit": None}]}
    asked = kind_of("llama").workload(spec, load_benchmark("llama").tasks, {})
    assert asked is not None
    assert asked.assumed == ("lm-eval's arc_easy not counted",)


CONFIGS = {
    "bert": {
        "model_type": "bert",
        "vocab_size": 28996,
        "hidden_size": 64,
        "num_hidden_layers": 12,
        "intermediate_size": 256,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
    },
    "gpt2": {"model_type": "gpt2", "vocab_size": 50257, "n_embd": 128, "n_layer": 12, "n_head": 4, "n_positions": 1024},
    "vit": {"model_type": "vit", "hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536},
    "llama": {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 256,
        "num_hidden_layers": 8,
        "intermediate_size": 688,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "tie_word_embeddings": False,
    },
    "tied": {
        "model_type": "qwen2",
        "vocab_size": 32000,
        "hidden_size": 256,
        "num_hidden_layers": 8,
        "intermediate_size": 688,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
}


@pytest.mark.parametrize("name", CONFIGS)
def test_shapes_count_the_parameters_of_transformers(name: str) -> None:
    config = AutoConfig.for_model(**CONFIGS[name])
    loader = AutoModelForCausalLM if name in ("llama", "tied") else AutoModel
    with torch.device("meta"):
        model = loader.from_config(config)
    counted = sum(parameter.numel() for parameter in model.parameters())
    assert shape_of_config(CONFIGS[name]).parameters == pytest.approx(counted, rel=0.025)


# as their makers, or the hub, count them
PUBLISHED = {
    "minilm": 22.7e6,
    "bert-base-cased": 108.3e6,
    "bert-large-cased": 333.6e6,
    "gpt2": 124.4e6,
    "gpt2-xl": 1557.6e6,
    "deit-small": 22.05e6,
    "deit-base": 86.57e6,
    "vit-large": 304.3e6,
    "smollm2-135m": 134.5e6,
    "smollm2-1.7b": 1711.4e6,
    "llama-7b": 6738.4e6,
    "llama2-7b": 6738.4e6,
    "llama2-13b": 13015.9e6,
    "llama-30b": 32528.9e6,
    "llama3.2-1b": 1235.8e6,
    "llama3.1-8b": 8030.3e6,
    "mistral-7b": 7248.0e6,
    "qwen2.5-0.5b": 494.0e6,
}


def test_models_have_the_parameters_that_their_makers_count() -> None:
    models = load_models()
    for name, counted in PUBLISHED.items():
        shape = models[name].shape
        assert shape is not None, name
        assert shape.parameters == pytest.approx(counted, rel=0.025), name
    assert {name for name, model in models.items() if model.shape is None and model.config is None} == set()


def test_a_shape_is_no_part_of_a_runs_identity() -> None:
    assert "shape" not in load_models()["minilm"].spec("minilm")
    assert "size" not in load_benchmark("glue").tasks["cola"].spec("cola")


# medians of the seconds that finished runs of the mini suite recorded, on one core of a machine on which nothing of this was fitted run by run
TOOK = {
    ("glue", "vanilla"): 33.1,
    ("glue", "gmoe"): 36.4,
    ("glue_lora", "lora"): 14.4,
    ("glue_lora", "lora_block"): 17.1,
    ("glue_lora", "lora_gmoe"): 24.9,
    ("glue_ood", "lora"): 4.0,
    ("glue_ood", "lora_gmoe"): 6.6,
    ("domainbed", "erm"): 56.6,
    ("domainbed", "gmoe"): 98.9,
}


@pytest.mark.parametrize(("benchmark", "method"), TOOK)
def test_the_mini_suite_took_what_is_counted(benchmark: str, method: str) -> None:
    """Without any correction: half the tokens, or twice as many, would be seen."""
    specs = {run.folder: run.spec for run in runs_of(("glue_lora", "glue_ood"), "mini")}
    before = ("glue_lora",) if benchmark == "glue_ood" else ()
    said = find_device("cpu").seconds(workload(find_run(*before, benchmark, method__name=method), specs))
    # all of GMoE's copies are counted, which the mask computes, as on accelerators; on a CPU the chosen ones are
    most = 2.2 if "gmoe" in method else 1.6
    assert 1 / 1.6 < said / TOOK[benchmark, method] < most


@pytest.mark.parametrize("name", ["tweets", "amazon", "movie", "nyt"])
def test_tokens_of_a_row_are_about_those_of_a_tokenizer(name: str, workdir: Path) -> None:
    model = load_models()["minilm"].spec("minilm")
    tasks = load_benchmark("glue").tasks
    split = load_split(tasks[name].as_run(name), "train")
    rows = TokenisedRows(split, load_tokenizer(model), 48, by_length=False)
    counted = find_part(tasks, name, "train", len(split), 48)
    assert counted is not None
    assert counted.tokens == pytest.approx(sum(rows.lengths) / len(rows), rel=0.15)
    order = list(EpochOrder(rows.lengths, 8, 0, by_length=False))
    longest = [max(rows.lengths[place] for place in order[start : start + 8]) for start in range(0, len(order), 8)]
    assert padded(counted.tokens, 8, 48) == pytest.approx(sum(longest) / len(longest), rel=0.2)


def test_llama_takes_about_as_long_as_others_found() -> None:
    """Stanford's Alpaca: three hours on eight A100 with 80 GB, in full; alpaca-lora: "within hours" on one RTX 4090."""
    full = workload(find_run("llama", suite="paper", model__name="llama2-7b", finetuning="full", method__name="dense"))
    lora = workload(find_run("llama", suite="paper", model__name="llama2-7b", finetuning="lora", method__name="dense"))
    assert 1 < find_device("a100").seconds(full, processes=8, sharded=True) / HOUR < 9
    assert 1 < find_device("rtx4090").seconds(lora) / HOUR < 12


def test_four_bits_and_bf16_take_less_on_an_accelerator_alone() -> None:
    run = find_run("llama", suite="paper", model__name="llama2-7b", finetuning="lora", method__name="dense")
    half = model_size(run.spec)
    whole = model_size({**run.spec, "model": {**run.spec["model"], "weights": "fp32"}})
    four = model_size({**run.spec, "model": {**run.spec["model"], "quantize": "nf4"}})
    assert half
    assert whole
    assert four
    sizes = [size.state_bytes(on_cpu=False) for size in (whole, half, four)]
    assert sizes[0] / sizes[1] == pytest.approx(2, rel=0.01)
    assert sizes[1] / sizes[2] == pytest.approx(2 / 0.55, rel=0.05)
    assert len({size.state_bytes(on_cpu=True) for size in (whole, half, four)}) == 1
