"""Image models: of every library from local folders, with heads by seed, clustered as they are trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from transformers import Dinov2Config, Dinov2Model, ViTConfig, ViTForImageClassification

import emoe
from benchmarks.harness.base import MODEL_ROOT
from benchmarks.harness.config.catalogue import load_models
from benchmarks.harness.config.runs import Run, run_from_spec
from benchmarks.harness.models.image import load_image_classifier, load_image_network
from emoe.partitioning import partition_key
from tests.executed import finish, prepare
from tests.image_sets import pacs_run
from tests.planned import plan

pytestmark = pytest.mark.usefixtures("hub_here")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small models with random weights, as folders under the real names, that tests only read."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    small = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
    vit = ViTConfig(**small, intermediate_size=64, image_size=48, patch_size=16, num_labels=5)
    ViTForImageClassification(vit).save_pretrained(root / "vit-large")
    Dinov2Model(Dinov2Config(**small, image_size=42, patch_size=14)).save_pretrained(root / "dinov2-small")
    timm_model = timm.create_model("deit_small_patch16_224", num_classes=1000)
    (root / "deit-small").mkdir()
    save_file(timm_model.state_dict(), root / "deit-small" / "model.safetensors")
    return root


@pytest.fixture
def model_root(models: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(MODEL_ROOT, str(models))
    return models


def with_model(name: str, method: str = "emoe", tune: dict[str, Any] | None = None, **changes: Any) -> Run:
    spec = pacs_run(method).spec
    config = spec["method"]["config"]
    layers = {"layers": [1, 3]} if config else {}
    method_spec = {**spec["method"], "config": {**config, **layers} if config else None, "tune": tune}
    model = load_models()[name].spec(name)
    training = {**spec["training"], "steps": 2, "eval_every": 1, "eval_rows": 4, **changes}
    return run_from_spec({**spec, "model": model, "method": method_spec, "training": training})


@pytest.mark.parametrize(
    ("name", "size", "drop_path"), [("dinov2-small", 28, 0.1), ("vit-large", 32, 0.0), ("deit-small", 32, 0.1)]
)
def test_every_library_of_models_trains_from_a_local_folder(
    model_root: Path, name: str, size: int, drop_path: float
) -> None:
    metrics = finish(prepare(with_model(name, image_size=size, drop_path=drop_path)))
    assert metrics["model"]["source"]["from"] == str(model_root / name)
    assert [layer["index"] for layer in metrics["model"]["conversion"]] == [1, 3]


def test_vit_large_is_trained_by_adapters(model_root: Path) -> None:
    spec = next(run.spec for run in plan(["domainbed"], "domainbed_large") if run.spec["method"]["name"] == "gmoe")
    lora, tune = spec["training"]["lora"], {**spec["method"]["tune"], "blocks": [1, 3]}
    run = with_model("vit-large", "gmoe", tune, image_size=32, drop_path=0.0, lora=lora)
    trained = finish(prepare(run))["model"]["trained"]
    assert set(trained) == {"adapters", "head", "also", "blocks", "routers"}
    assert trained["adapters"]["parameters"] == 4 * 3 * 2 * 32 * 32  # layers, projections, two factors of rank 32


TEST_VIT = load_models()["test-vit"].spec("test-vit")


def test_the_head_hangs_on_its_seed_and_the_rest_does_not() -> None:
    first, same, other = (load_image_classifier(TEST_VIT, 7, 32, 0.1, seed).network for seed in (1, 1, 2))
    assert torch.equal(first.head.weight, same.head.weight)
    assert not torch.equal(first.head.weight, other.head.weight)
    assert torch.equal(first.blocks[3].mlp.fc1.weight, other.blocks[3].mlp.fc1.weight)


def test_a_partition_is_of_the_weights_that_are_trained_at_any_size() -> None:
    config = emoe.EMoEConfig(num_experts=8, top_k=2, layers=[2])
    keys = {partition_key(load_image_classifier(TEST_VIT, 7, size, 0.1, 0).network, config) for size in (32, 160)}
    assert keys == {partition_key(load_image_network(TEST_VIT), config)}


def test_random_weights_do_not_depend_on_the_release_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's ``trunc_normal_`` draws other numbers from one release to the next."""
    wanted = load_image_classifier(TEST_VIT, 10, 32, 0.0, 3).state_dict()

    def other(tensor: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        with torch.no_grad():
            return tensor.uniform_(-1, 1)

    torch.rand(7)
    monkeypatch.setattr(torch.nn.init, "trunc_normal_", other)
    monkeypatch.setattr("timm.models.vision_transformer.trunc_normal_", other)
    weights = load_image_classifier(TEST_VIT, 10, 32, 0.0, 3).state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in weights.items())
