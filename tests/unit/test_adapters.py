"""LoRA rows: the parameters that each of them trains, and the learning rates."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.harness.base import DefinitionError
from benchmarks.harness.config.catalogue import ModelSpec, load_models
from benchmarks.harness.config.method_specs import TuneSpec
from benchmarks.harness.config.methods import LoRA
from benchmarks.harness.models.build import build_classifier
from benchmarks.harness.models.loading import load_tokenizer
from benchmarks.harness.models.trainable import Trainable
from benchmarks.harness.models.tuning import trained_groups, tune_
from benchmarks.harness.training.progress import Progress
from benchmarks.text.data import TextSplit
from benchmarks.text.definition import TextSpec
from benchmarks.text.training import TextTrainer
from emoe.errors import EMoEError
from tests import tiny_models
from tests.planned import plan

pytestmark = pytest.mark.usefixtures("here")
SMOKE = {run.spec["method"]["name"]: run.spec for run in plan(["glue_lora"], "smoke")}
ROWS = TextSplit(
    [(f"{word} film",) for word in ("a", "fine", "dull", "the") * 12], [0, 1, 0, 1] * 12
)


def spec_of(method: str, model: str = "tiny-gpt2", **training: Any) -> dict[str, Any]:
    spec = copy.deepcopy(SMOKE[method])
    spec["model"] = load_models()[model].spec(model)
    spec["training"] |= training
    return spec


def build_typed(spec: dict[str, Any]) -> Trainable:
    read = TextSpec.model_validate(spec)
    return build_classifier(read, len(read.task.labels), load_tokenizer(read.model))


def build(method: str, model: str = "tiny-gpt2", seed: int = 0) -> tuple[Trainable, dict[str, Any]]:
    spec = {**spec_of(method, model), "seed": seed}
    torch.manual_seed(seed)
    return build_typed(spec), spec


def trained(method: str, model: str) -> dict[str, set[str]]:
    classifier, spec = build(method, model)
    groups = trained_groups(classifier.model, TuneSpec(**spec["method"]["tune"]))
    return {group: {name for name, _ in parameters} for group, parameters in groups.items()}


ALSO_TRAINED = {
    "lora": set(),
    "lora_block": {"blocks"},
    "lora_gmoe": {"blocks", "routers"},
    "lora_emoe": set(),
    "lora_emoe_learn": {"routers"},
    "lora_all_experts": set(),
    "lora_gmoe_published": {"blocks", "routers", "also"},
    "lora_emoe_published": {"also"},
    "lora_emoe_learn_published": {"routers", "also"},
}


@pytest.mark.parametrize(
    ("model", "targets", "head", "also"),
    [
        ("tiny-bert", {"query", "value"}, {"classifier.weight", "classifier.bias"}, "pooler.dense"),
        ("tiny-gpt2", {"c_attn"}, {"score.weight"}, "ln_f"),
    ],
)
def test_every_method_trains_the_same_adapters_and_head_and_its_own_extras(
    model: str, targets: set[str], head: set[str], also: str
) -> None:
    rows = {method: trained(method, model) for method in ALSO_TRAINED}
    for method, groups in rows.items():
        assert groups["adapters"] == rows["lora"]["adapters"], method
        assert groups["head"] == head, method
        assert set(groups) - {"adapters", "head"} == ALSO_TRAINED[method], method
    assert {
        name.split(".lora_")[0].rpartition(".")[2] for name in rows["lora"]["adapters"]
    } == targets
    assert {
        name.rpartition(".")[0].split(".", 1)[1] for name in rows["lora_emoe_published"]["also"]
    } == {also}


def test_adapters_start_the_same_for_all_methods_and_differ_by_seed() -> None:
    def first(method: str, seed: int) -> dict[str, torch.Tensor]:
        named = build(method, seed=seed)[0].model.named_parameters()
        return {
            name: value.detach()
            for name, value in named
            if ".lora_" in name or name.startswith("score")
        }

    lora = first("lora", 0)
    for method in ("lora_block", "lora_gmoe", "lora_emoe_learn"):
        other = first(method, 0)
        assert all(torch.equal(other[name], value) for name, value in lora.items()), method
    assert any(not torch.equal(value, lora[name]) for name, value in first("lora", 1).items())


def trainer_of(method: str, folder: Path, **training: Any) -> TextTrainer:
    spec = spec_of(method, "tiny-bert", **training)
    for key in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
        spec["model"]["config"][key] = 0.0
    spec["training"]["lora"]["dropout"] = 0.0
    torch.manual_seed(0)
    tokenizer = load_tokenizer(ModelSpec(**spec["model"]))
    classifier = build_typed(spec)
    return TextTrainer(
        classifier, tokenizer, TextSpec.model_validate(spec), ROWS, ROWS, folder, Progress("test")
    )


def test_blocks_and_routers_learn_at_a_tenth_of_the_rate_and_frozen_weights_stay(
    tmp_path: Path,
) -> None:
    trainer = trainer_of("lora_gmoe_published", tmp_path, checkpoint_selection="last").trainer
    before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    groups = trainer.create_optimizer().param_groups
    rates = {names[id(parameter)]: group["lr"] for group in groups for parameter in group["params"]}
    for name, rate in rates.items():
        is_fast = ".lora_" in name or name.startswith("classifier")
        assert rate == pytest.approx(1e-2 if is_fast else 1e-3), name
    trainer.train()
    assert [group["lr"] for group in trainer.optimizer.param_groups] == pytest.approx(
        [0.0] * len(groups)
    )
    for name, value in trainer.model.named_parameters():
        assert torch.equal(value, before[name]) != (name in rates) == value.requires_grad, name


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        (
            "training",
            {"targets": {"gpt": ["c_attn"]}},
            r"has no layers for 'gpt2'; did you mean 'gpt'",
        ),
        ("training", {"targets": {"gpt2": ["c_atn"]}}, r"training\.lora\.targets\.gpt2: .*c_atn"),
        ("method", {"also": ["poolr"]}, "'also_train' names poolr, none of which the model has"),
    ],
)
def test_names_that_match_nothing_are_refused(
    section: str, values: dict[str, Any], message: str
) -> None:
    spec = spec_of("lora")
    spec[section]["lora" if section == "training" else "tune"] |= values
    with pytest.raises(EMoEError, match=message):
        build_typed(spec)


def test_adapters_of_layers_that_beit_never_calls_are_refused() -> None:
    """timm's Beit reads the weight of ``qkv`` itself, so an adapter there would never run."""
    tune = TuneSpec(blocks=[], also=[])
    model = tiny_models.build("Beit")
    lora = LoRA(rank=2, alpha=4, dropout=0.0, targets={"Beit": ["attn.qkv"]})
    with pytest.raises(DefinitionError, match=r"targets\.Beit names 'qkv', .* such as attn\.proj$"):
        tune_(model, lora, tune, seed=0)

    model = tiny_models.build("Beit")
    lora = LoRA(rank=2, alpha=4, dropout=0.0, targets={"Beit": ["attn.proj"]})
    _, groups = tune_(model, lora, tune, seed=0)
    model(torch.randn(1, 3, 32, 32)).sum().backward()
    assert all(parameter.grad is not None for _, parameter in groups["adapters"])
