"""A frozen prefix runs once for each row, and nothing else changes by that."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, T5Config, T5EncoderModel
from transformers.models.bert.modeling_bert import BertLayer

from benchmarks.domainbed import pipeline as images
from benchmarks.harness.base import DATA_ROOT, MODEL_ROOT, PREFIXES, DefinitionError, RunError
from benchmarks.harness.config.benchmark import load_benchmark
from benchmarks.harness.config.methods import check_frozen
from benchmarks.harness.config.runs import Run, run_from_spec
from benchmarks.harness.config.yaml import parse
from benchmarks.harness.models.build import Trainable, build_classifier, build_language_model, reopen
from benchmarks.harness.models.loading import load_tokenizer
from benchmarks.harness.models.prefix import STATES, Prefix
from benchmarks.llama import pipeline as instructions
from benchmarks.llama.export import export
from benchmarks.text import pipeline as texts
from benchmarks.text.data import load_part
from benchmarks.text.definition import TextSpec
from benchmarks.text.evaluation import TextEvaluator
from tests.executed import finish, killed_at, prepare
from tests.image_sets import pacs_run, write_pacs
from tests.instruction_runs import tiny_run, write_rows
from tests.planned import paper_spec
from tests.tiny_hub import write_data, write_models

FROZEN = {"frozen_layers": 2}
BUILDERS = {texts: "build_classifier", images: "build_image_classifier", instructions: "build_language_model"}


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("roots")
    write_models(root / "models", ["bert-base-cased", "gpt2"])
    write_rows(root / "data")
    write_data(root / "data")
    write_pacs(root / "data")
    return root


@pytest.fixture(autouse=True)
def workdir(roots: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MODEL_ROOT, str(roots / "models"))
    monkeypatch.setenv(DATA_ROOT, str(roots / "data"))


def text_run(method: str, model: str = "bert-base-cased", **training: Any) -> Run:
    spec = paper_spec("glue", task="rte", model=model, method=method)
    training = {**spec["training"], "epochs": 2, "batch_size": 4, "frozen_layers": 8, **training}
    return run_from_spec({**spec, "ood": [], "training": training})


def image_run(method: str) -> Run:
    spec = copy.deepcopy(pacs_run(method, **FROZEN, drop_path=0.1).spec)
    spec["hparams"]["data_augmentation"] = False
    return run_from_spec(spec)


RUNS: dict[str, tuple[Any, Callable[[], Run]]] = {
    "bert": (texts, lambda: text_run("vanilla")),
    "gpt2, EMoE": (texts, lambda: text_run("emoe", "gpt2")),
    "ViT, EMoE": (images, lambda: image_run("emoe")),
    "Llama, recomputed": (instructions, lambda: llama_run("full", gradient_checkpointing=True)),
    "Llama, adapters, packed": (instructions, lambda: llama_run("lora", packing=True)),
}


def llama_run(tuning: str, **training: Any) -> Run:
    return tiny_run("emoe", tuning, training={**FROZEN, **training})


def watched(
    pipeline: Any, monkeypatch: pytest.MonkeyPatch, *, cached: bool = True
) -> list[tuple[Trainable, dict[str, torch.Tensor]]]:
    """Record the models that a pipeline builds, with copies of their parameters; uncached rows have no prefix."""
    build, models = getattr(pipeline, BUILDERS[pipeline]), []

    def spy(*args: Any, **kwargs: Any) -> Trainable:
        built = build(*args, **kwargs)
        models.append((built, {name: values.clone() for name, values in built.model.named_parameters()}))
        return built if cached else replace(built, prefix=None)

    monkeypatch.setattr(pipeline, BUILDERS[pipeline], spy)
    return models


def assert_close(result: Any, expected: Any) -> None:
    """Check that all numbers are the same but for rounding."""
    if isinstance(expected, dict):
        assert result.keys() == expected.keys()
        for key in expected:
            assert_close(result[key], expected[key])
    elif isinstance(expected, list):
        for pair in zip(result, expected, strict=True):
            assert_close(*pair)
    elif isinstance(expected, str) and re.fullmatch(r"-?[0-9]+[.][0-9]+", expected):  # a loss with all its digits
        assert_close(float(result), float(expected))
    else:
        assert result == (pytest.approx(expected, rel=1e-5, abs=1e-5) if isinstance(expected, float) else expected)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_the_same_without_cache_and_after_damage_and_a_kill(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline, make = RUNS[name]
    run = make()
    with monkeypatch.context() as patch:
        built = watched(pipeline, patch)
        whole = finish(prepare(run, "cached"))
    files = {file: file.read_bytes() for file in PREFIXES.glob("*.npy")}
    with monkeypatch.context() as patch:
        plain = watched(pipeline, patch, cached=False)
        assert_close(finish(prepare(run, "plain")), whole)
    ((trainable, before),) = built
    for pair in zip(trainable.model.parameters(), plain[0][0].model.parameters(), strict=True):
        assert torch.allclose(*pair, rtol=1e-3, atol=1e-4)
    _check_changes(trainable, before, run.spec["training"]["frozen_layers"])
    for file in files:  # the machine went down during a write
        file.write_bytes(file.read_bytes()[:-8])
    path = prepare(run, "killed")
    with killed_at(5):
        finish(path)
    computed: list[object] = []
    output = Prefix.output
    monkeypatch.setattr(Prefix, "output", lambda self, inputs: computed.append(inputs) or output(self, inputs))
    assert finish(path) == whole
    assert files == {file: file.read_bytes() for file in PREFIXES.glob("*.npy")}
    if pipeline is texts:  # the killed run had restored all files
        assert not computed


def _check_changes(trainable: Trainable, before: dict[str, torch.Tensor], layers: int) -> None:
    """Check that frozen parameters are unchanged, and that all others may be trained."""
    assert trainable.prefix is not None
    now = dict(trainable.model.named_parameters())
    trained = {key for key in now if now[key].requires_grad}
    frozen = {key for key in now if key.removeprefix("network.") in trainable.prefix.names}
    assert len(frozen) == len(trainable.prefix.names)
    assert {int(match[1]) for key in frozen if (match := re.search(r"\.(\d+)\.", key))} == set(range(layers))
    changed = {key for key in now if not torch.equal(now[key], before[key])}
    assert changed
    assert changed <= trained
    assert not trained & frozen
    if trainable.adapters is None:
        assert trained | frozen == set(now)


def test_an_evaluation_of_kept_weights_begins_where_they_were_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    run = text_run("emoe", keep_weights=True)
    path = prepare(run)
    recorded = finish(path)
    tokenizer = load_tokenizer(run.spec["model"])
    weights = recorded["model"]["source"]["weights"]
    task = parse(run.spec, TextSpec, "run.json").task
    split = load_part(task, "dev", None)
    called = []
    forward = BertLayer.forward
    monkeypatch.setattr(
        BertLayer, "forward", lambda self, *args, **kwargs: called.append(self) or forward(self, *args, **kwargs)
    )
    for frozen in (True, False):
        classifier = reopen(partial(build_classifier, tokenizer=tokenizer), run.spec, weights, path.parent / "model")
        classifier = classifier if frozen else replace(classifier, prefix=None)
        evaluator = TextEvaluator(classifier, tokenizer, task, 4, 128, "fp32", Path())
        called.clear()
        assert_close(evaluator.evaluate(split), recorded["scores"]["dev"]["rte"])
        layers = classifier.model.bert.encoder.layer
        assert [layer in called for layer in layers] == [not frozen] * 8 + [True] * (len(layers) - 8)


def test_an_exported_model_is_whole() -> None:
    path = prepare(llama_run("lora", keep_weights=True))
    finish(path)
    export(path, Path("dense"), "dense")
    before = build_language_model(tiny_run("dense", "base").spec).model.state_dict()
    after = load_file("dense/model.safetensors")
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed == {f"model.layers.{i}.self_attn.{name}_proj.weight" for i in (2, 3) for name in "qv"}


def bert(**config: Any) -> nn.Module:
    small = {"vocab_size": 60, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(**small, num_hidden_layers=3, **config))


def test_a_model_goes_on_from_given_states_and_is_whole_without() -> None:
    model = bert().eval()
    inputs = {"input_ids": torch.randint(3, 60, (2, 7)), "attention_mask": torch.ones(2, 7, dtype=torch.long)}
    wanted = model(**inputs).logits
    prefix = Prefix(model, model, 2)
    prefix.freeze_()
    states = prefix.output(inputs).clone()
    assert torch.allclose(model(**inputs, **{STATES: states}).logits, wanted, atol=1e-6)
    assert not torch.allclose(model(**inputs, **{STATES: states.flip(0)}).logits, wanted, atol=1e-6)
    with pytest.raises(RuntimeError):
        model(**inputs, **{STATES: states[..., :5]})
    assert torch.equal(model(**inputs).logits, wanted)  # also after a pass that failed
    model.train()
    assert [layer.training for layer in model.bert.encoder.layer] == [False, False, True]


def test_the_digest_is_of_the_frozen_weights_and_settings() -> None:
    models = [bert(), bert(), bert(layer_norm_eps=1e-3), bert()]
    with torch.no_grad():
        models[1].bert.encoder.layer[2].output.dense.bias[0] += 1  # above the frozen layers
        models[3].bert.encoder.layer[1].output.dense.bias[0] += 1
    digests = [Prefix(model, model, 2).digest for model in models]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


@pytest.mark.parametrize(
    ("layers", "wrong"), [([2, 4], 2), ("all", 0), ("1::2", 1), ([3], None), ("3::2", None), ([-1], None)]
)
def test_a_method_below_the_frozen_layers_is_refused_in_the_plan(layers: Any, wrong: int | None) -> None:
    for method in ({"config": {"layers": layers}, "tune": None}, {"config": None, "tune": {"blocks": layers}}):
        if wrong is None:
            check_frozen({"frozen_layers": 3}, {"name": "mine", **method}, "b.yaml: 'grid[0]")
            continue
        with pytest.raises(DefinitionError, match=rf"method 'mine' \w+ layer {wrong}, .*is 3.*from 3 on"):
            check_frozen({"frozen_layers": 3}, {"name": "mine", **method}, "b.yaml: 'grid[0]")


def test_unknown_architectures_and_too_many_layers_are_refused() -> None:
    model = bert()
    with pytest.raises(DefinitionError, match="frozen_layers is 4, but the model has 3 layers"):
        Prefix(model, model, 4)
    t5 = T5EncoderModel(T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, vocab_size=60))
    with pytest.raises(DefinitionError, match="unknown which modules come before the layers of 't5'"):
        Prefix(t5, t5, 1)


def test_frozen_layers_need_one_process() -> None:
    run = tiny_run("emoe", "full", training=FROZEN)
    with pytest.raises(RunError, match="frozen_layers is not spread over several processes"):
        load_benchmark("llama").check_processes(run.spec, 2, "ddp")
