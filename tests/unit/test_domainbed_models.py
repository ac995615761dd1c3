"""DomainBed's runs with models of every library, from local folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from transformers import Dinov2Config, Dinov2Model, ViTConfig, ViTForImageClassification

from benchmarks.harness.base import MODEL_ROOT, DefinitionError
from benchmarks.harness.config.catalogue import load_models
from benchmarks.harness.config.runs import Run, run_from_spec
from benchmarks.harness.models.build import build_image_classifier
from tests.executed import finish, prepare
from tests.image_sets import pacs_run
from tests.planned import plan

pytestmark = pytest.mark.usefixtures("pacs_here")


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
def model_root(models: Path, pacs_here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model root with links to them."""
    root = pacs_here / "models"
    root.mkdir()
    for folder in models.iterdir():
        (root / folder.name).symlink_to(folder)
    monkeypatch.setenv(MODEL_ROOT, str(root))
    return root


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


@pytest.mark.parametrize(
    ("name", "size"), [("test-vit", 32), ("dinov2-small", 28), ("vit-large", 32)], ids=["timm", "dinov2", "vit"]
)
def test_vit_dropout_is_in_front_of_the_head_in_training_only(model_root: Path, name: str, size: int) -> None:
    """As DomainBed has it: of what the network gives to its classifier."""
    spec = with_model(name, "erm", image_size=size, drop_path=0.0).spec
    spec = {**spec, "hparams": {**spec["hparams"], "vit_dropout": 0.5}}
    model = build_image_classifier(spec, 3).model
    linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    head = next(module for module in linear if module.out_features == 3)
    seen: list[torch.Tensor] = []
    head.register_forward_pre_hook(lambda _head, args: seen.append(args[0].detach()))
    images = torch.randn(8, 3, size, size)
    for mode in (True, False, False):
        model.train(mode)(images)
    kept = seen[0] != 0
    assert 0.3 < kept.float().mean() < 0.7
    torch.testing.assert_close(seen[0][kept], 2 * seen[1][kept])
    assert torch.equal(seen[1], seen[2])


def test_a_model_without_stochastic_depth_says_so(model_root: Path) -> None:
    with pytest.raises(DefinitionError, match=r"'vit-large' has no drop_path; set training.drop_path to 0"):
        finish(prepare(with_model("vit-large", image_size=32)))


@pytest.mark.parametrize(
    ("method", "blocks", "groups"), [("gmoe", [1, 3], {"blocks", "routers"}), ("emoe_learn", [], {"routers"})]
)
def test_vit_large_by_adapters(model_root: Path, method: str, blocks: list[int], groups: set[str]) -> None:
    spec = next(run.spec for run in plan(["domainbed"], "domainbed_large") if run.spec["method"]["name"] == method)
    lora, tune = spec["training"]["lora"], {**spec["method"]["tune"], "blocks": blocks}
    run = with_model("vit-large", method, tune, image_size=32, drop_path=0.0, lora=lora)
    trained = finish(prepare(run))["model"]["trained"]
    assert set(trained) == {"adapters", "head", "also", *groups}
    assert trained["adapters"]["parameters"] == 4 * 3 * 2 * 32 * 32  # layers, projections, two factors of rank 32
