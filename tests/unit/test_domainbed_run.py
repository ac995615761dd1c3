"""Runs of domain generalisation from end to end, on a small PACS that is written to disk; their models."""

from __future__ import annotations

import functools
import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from transformers import Dinov2Config, Dinov2Model, Trainer, ViTConfig, ViTForImageClassification

import emoe
from benchmarks.domainbed.batches import EvaluationRows
from benchmarks.domainbed.protocol import best_record
from benchmarks.harness.base import DATA_ROOT, MODEL_ROOT
from benchmarks.harness.config.catalogue import load_models, model_spec
from benchmarks.harness.config.runs import Run, run_from_spec
from benchmarks.harness.models.image import load_image_classifier, load_image_network
from benchmarks.harness.models.partitions import partition_keys
from benchmarks.harness.results.statistics import mutual_information
from tests.executed import finish, killed_and_resumed, prepare
from tests.image_sets import pacs_run, write_images
from tests.planned import plan

pytestmark = pytest.mark.usefixtures("hub_here")


def test_a_run_has_domainbeds_records_and_augments_validation_images_anew_at_every_evaluation(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Augment both splits of the training environments only, as DomainBed's code and the authors' do."""
    first_images: dict[tuple[str, bool], list[torch.Tensor]] = {}
    read = EvaluationRows.__getitem__

    def spy(self: EvaluationRows, index: int) -> dict[str, Any]:
        row = read(self, index)
        if index == 0:
            first_images.setdefault((self.environment.name, len(self) == 20), []).append(
                row["pixel_values"]
            )
        return row

    monkeypatch.setattr(EvaluationRows, "__getitem__", spy)
    run = pacs_run("emoe", held_out=2)
    path = prepare(run)
    metrics = finish(path)
    assert set(first_images) == set(itertools.product("ACPS", (False, True)))
    for (name, _), images in first_images.items():
        steps = images[
            :3
        ]  # of three evaluations; the last evaluation, after training, is a plain one
        assert [torch.equal(image, steps[0]) for image in steps] == [True, *[name == "P"] * 2]
    records, routing = metrics["records"], metrics["routing"]
    names = {f"env{env}_{split}_acc" for env in range(4) for split in ("in", "out")}
    assert all(names | {"step", "epoch", "loss"} == set(record) for record in records)
    # 24 images an environment: 4 out, 20 in; 4 of them in a step
    assert [(record["step"], record["epoch"]) for record in records] == [
        (0, 0.0),
        (3, 3 / 5),
        (6, 6 / 5),
    ]
    rows = {f"{env} {split}": count for env in "ACPS" for split, count in (("in", 20), ("out", 4))}
    assert {name: data["rows"] for name, data in metrics["data"].items()} == rows
    best = best_record(records, [2])
    assert metrics["scores"]["dev"] == {"pacs": {"accuracy": best.value}}
    assert metrics["scores"]["test"] == {"P": {"accuracy": best.record["env2_in_acc"]}}
    loads = torch.tensor(routing["loads"]["2"])
    assert loads.shape == (4, 3, 8)
    assert (
        loads.sum() == 16 * 5 * 2
    )  # out images, their tokens (four patches and a class token), experts of each
    for name, axis in (("class", 0), ("environment", 1)):
        bits = [
            mutual_information(np.array(loads).sum(axis)) for loads in routing["loads"].values()
        ]
        assert routing[f"{name}_information"] == pytest.approx(np.mean(bits))
        assert 0 < routing[f"{name}_information_chance"] < routing[f"{name}_information_chance_95"]
    assert all(sum(map(sum, matrix)) == 4 for matrix in metrics["confusion"].values())
    assert "warning: pacs (all): 96 rows, its makers count 9,991" in capfd.readouterr().err

    lines = [json.loads(line) for line in (path.parent / "results.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 3, 6]
    assert re.fullmatch(r"emoe-[0-9a-f]{6}@test-vit", lines[0]["args"].pop("algorithm"))
    seeds = {"hparams_seed": 0, "trial_seed": 0, "seed": run.spec["data_seed"]}
    task = {"dataset": "PACS", "test_envs": [2], "task": "domain_generalization"}
    assert lines[0]["args"] == {**seeds, **task, "holdout_fraction": 0.2, "steps": 7}


@pytest.fixture(scope="module")
def recorded(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], tuple[dict[str, Any], list[torch.Tensor], Any]]:
    """Return a function that trains a method once, and returns its numbers, the images of each step and the optimizer."""
    folder, step = tmp_path_factory.mktemp("whole"), Trainer.training_step

    @functools.cache
    def train(method: str) -> tuple[dict[str, Any], list[torch.Tensor], Any]:
        images: list[torch.Tensor] = []
        optimizers: list[Any] = []

        def spy(self: Trainer, model: object, inputs: dict, *args: object) -> torch.Tensor:
            images.append(inputs["pixel_values"].clone())
            optimizers.append(self.optimizer)
            return step(self, model, inputs, *args)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Trainer, "training_step", spy)
            return finish(prepare(pacs_run(method), str(folder))), images, optimizers[0].optimizer

    return train


def test_all_experts_train_exactly_like_the_dense_model_on_the_same_images(recorded) -> None:
    (dense, images, _), (routed, same, _) = (recorded(method) for method in ("erm", "all_experts"))
    assert [image.shape for image in images] == [
        (12, 3, 32, 32)
    ] * 7  # three environments, four images of each
    assert all(torch.equal(*pair) for pair in zip(images, same, strict=True))
    for ours, theirs in zip(routed["records"], dense["records"], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_numbers_also_with_worker_processes(
    recorded, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _, _ = recorded("gmoe_published")
    monkeypatch.setattr("benchmarks.domainbed.training.reading_workers", lambda: 2)
    assert (
        killed_and_resumed(pacs_run("gmoe_published"), 6) == whole
    )  # after the records of steps 0 and 3
    assert "resumed at step 4" in "".join(capfd.readouterr())


def test_held_out_images_are_never_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other held-out images give other test scores and nothing else."""
    monkeypatch.setenv(DATA_ROOT, str(tmp_path / "data"))
    pacs = write_images(tmp_path / "data", "pacs", rows=8)
    before = finish(prepare(pacs_run(held_out=3), "before"))
    for path in sorted((pacs / "sketch").rglob("*.jpg")):
        path.write_bytes((pacs / "photo/dog/000.jpg").read_bytes())
    after = finish(prepare(pacs_run(held_out=3), "after"))
    for metrics in zip(before["records"], after["records"], strict=True):
        others = [
            {name: value for name, value in record.items() if "env3" not in name}
            for record in metrics
        ]
        assert others[0] == others[1]
    assert before["confusion"]["S"] != after["confusion"]["S"]


def test_adam_decays_every_parameter(recorded) -> None:
    _, _, optimizer = recorded("erm")
    (group,) = (group for group in optimizer.param_groups if group["params"])
    assert (type(optimizer), group["weight_decay"], group["initial_lr"]) == (
        torch.optim.Adam,
        1e-6,
        1e-3,
    )
    assert len(group["params"]) > 70  # biases and norms too


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write small random models, which tests only read, into folders with the real names."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    small = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
    vit = ViTConfig(**small, intermediate_size=64, image_size=48, patch_size=16, num_labels=5)
    ViTForImageClassification(vit).save_pretrained(root / "vit-large")
    Dinov2Model(Dinov2Config(**small, image_size=42, patch_size=14)).save_pretrained(
        root / "dinov2-small"
    )
    timm_model = timm.create_model("deit_small_patch16_224", num_classes=1000)
    (root / "deit-small").mkdir()
    save_file(timm_model.state_dict(), root / "deit-small" / "model.safetensors")
    return root


@pytest.fixture
def model_root(models: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(MODEL_ROOT, str(models))
    return models


def with_model(
    name: str, method: str = "emoe", tune: dict[str, Any] | None = None, **changes: Any
) -> Run:
    spec = pacs_run(method).spec
    config = spec["method"]["config"]
    layers = {"layers": [1, 3]} if config else {}
    method_spec = {
        **spec["method"],
        "config": {**config, **layers} if config else None,
        "tune": tune,
    }
    model = load_models()[name].spec(name)
    training = {**spec["training"], "steps": 2, "eval_every": 1, "eval_rows": 4, **changes}
    return run_from_spec({**spec, "model": model, "method": method_spec, "training": training})


@pytest.mark.parametrize(
    ("name", "size", "drop_path"),
    [("dinov2-small", 28, 0.1), ("vit-large", 32, 0.0), ("deit-small", 32, 0.1)],
)
def test_every_library_of_models_trains_from_a_local_folder(
    model_root: Path, name: str, size: int, drop_path: float
) -> None:
    metrics = finish(prepare(with_model(name, image_size=size, drop_path=drop_path)))
    assert metrics["model"]["source"]["from"] == str(model_root / name)
    assert [layer["index"] for layer in metrics["model"]["conversion"]] == [1, 3]


def test_vit_large_is_trained_by_adapters(model_root: Path) -> None:
    spec = next(
        run.spec
        for run in plan(["domainbed"], "domainbed_large")
        if run.spec["method"]["name"] == "gmoe"
    )
    lora, tune = spec["training"]["lora"], {**spec["method"]["tune"], "blocks": [1, 3]}
    run = with_model("vit-large", "gmoe", tune, image_size=32, drop_path=0.0, lora=lora)
    trained = finish(prepare(run))["model"]["trained"]
    assert set(trained) == {"adapters", "head", "also", "blocks", "routers"}
    assert (
        trained["adapters"]["parameters"] == 4 * 3 * 2 * 32 * 32
    )  # layers, projections, two factors of rank 32


def test_timms_models_are_trained_by_adapters_and_in_some_blocks() -> None:
    """timm's models have no configuration, so the names of their class and head are used."""
    tune = {"blocks": [1, 3], "also": []}
    lora = {"rank": 2, "alpha": 4, "dropout": 0.0, "targets": {"VisionTransformer": ["qkv"]}}
    expected = {"adapters", "head", "blocks"}
    for adapters, groups in ((None, expected - {"adapters"}), (lora, expected)):
        run = with_model("test-vit", "gmoe", tune, image_size=32, lora=adapters)
        trained = finish(prepare(run))["model"]["trained"]
        assert set(trained) == groups | {"routers"}
        # the weights and biases of the head: 64 values for each of three classes
        assert trained["head"]["parameters"] == 3 * (64 + 1)


TEST_VIT = model_spec("test-vit")


def test_the_head_hangs_on_its_seed_and_the_rest_does_not() -> None:
    first, same, other = (
        load_image_classifier(TEST_VIT, 7, 32, 0.1, seed).network for seed in (1, 1, 2)
    )
    assert torch.equal(first.head.weight, same.head.weight)
    assert not torch.equal(first.head.weight, other.head.weight)
    assert torch.equal(first.blocks[3].mlp.fc1.weight, other.blocks[3].mlp.fc1.weight)


def test_a_partition_is_of_the_weights_that_are_trained_at_any_size() -> None:
    config = emoe.EMoEConfig(num_experts=8, top_k=2, layers=[2])
    keys = partition_keys(load_image_network(TEST_VIT), config)
    for size in (32, 160):
        assert (
            partition_keys(load_image_classifier(TEST_VIT, 7, size, 0.1, 0).network, config) == keys
        )


def test_random_weights_do_not_depend_on_the_release_of_torch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
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
