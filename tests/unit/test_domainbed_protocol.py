"""DomainBed's protocol: seeds, splits, draws, MNIST's variants and batches, against its definitions written out."""

from __future__ import annotations

import hashlib
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import rotate, to_tensor
from transformers import TrainerControl, TrainerState

from benchmarks.domainbed.batches import EnvironmentBatches
from benchmarks.domainbed.mnist import colored_mnist, rotated_mnist
from benchmarks.domainbed.protocol import hyper_parameters, seed_hash, split_environment, sweep_seed
from benchmarks.domainbed.training import EvaluationSteps
from benchmarks.harness.base import DefinitionError
from benchmarks.harness.config.benchmark import load_benchmark
from tests.planned import edited_part, paper_runs, specs


def md5_of(text: str) -> int:
    return int(hashlib.md5(text.encode(), usedforsecurity=False).hexdigest(), 16) % 2**31


def test_seeds_are_the_md5_of_the_tuples_text() -> None:
    assert seed_hash(0, 3) == md5_of("(0, 3)") == 1796103049
    assert seed_hash(1) == md5_of("(1,)") == 1051079061
    assert sweep_seed("PACS", "ERM", (2,), 0, 1) == md5_of("('PACS', 'ERM', [2], 0, 1)")


@pytest.mark.parametrize("rows", [1, 7, 10, 833])
@pytest.mark.parametrize(("trial", "env"), [(0, 0), (0, 3), (2, 1)])
def test_an_environment_is_split_by_the_hash_of_trial_and_number(
    rows: int, trial: int, env: int
) -> None:
    keys = list(range(rows))
    np.random.RandomState(md5_of(f"({trial}, {env})")).shuffle(keys)
    split = split_environment(rows, env, trial, is_test=False)
    assert split.out == keys[: int(rows * 0.2)]
    assert split.within == keys[int(rows * 0.2) :]


def test_a_held_out_environments_rows_are_shuffled_once_more() -> None:
    plain, test = (split_environment(50, 1, 0, is_test=is_test) for is_test in (False, True))
    again = list(range(40))
    np.random.RandomState(md5_of("(0, 1)")).shuffle(again)
    assert (test.out, test.within) == (plain.out, [plain.within[key] for key in again])


def test_default_hyper_parameters() -> None:
    shared = {
        "data_augmentation": True,
        "resnet18": False,
        "resnet_dropout": 0.0,
        "class_balanced": False,
    }
    shared |= {"nonlinear_classifier": False, "vit_dropout": 0.0}
    for dataset, lr, batch_size in (("PACS", 5e-5, 32), ("ColoredMNIST", 1e-3, 64)):
        expected = {**shared, "lr": lr, "weight_decay": 0.0, "batch_size": batch_size}
        assert hyper_parameters("domainbed", dataset, 0, 5) == expected
    assert "vit_dropout" not in hyper_parameters("emoe", "PACS", 0, 5)


def drawn_state(name: str, hparams_seed: int = 7, trial: int = 2) -> np.random.RandomState:
    """Return the random state from which DomainBed draws a hyper-parameter."""
    return np.random.RandomState(md5_of(f"({md5_of(f'({hparams_seed}, {trial})')}, '{name}')"))


def test_the_authors_hyper_parameters_by_set() -> None:
    authors = {"PACS": (3e-5, 1e-6), "VLCS": (3e-5, 1e-6), "OfficeHome": (1e-5, 1e-6)}
    authors |= {"TerraIncognita": (5e-5, 1e-4), "DomainNet": (5e-5, 0.0)}
    for dataset, values in authors.items():
        usual, drawn = (
            hyper_parameters("emoe", dataset, 0, 0),
            hyper_parameters("emoe", dataset, 7, 2),
        )
        assert (usual["lr"], usual["weight_decay"], usual["batch_size"]) == (*values, 32)
        assert (drawn["weight_decay"], drawn["lr"]) == (
            0,
            10 ** drawn_state("lr").uniform(-4.5, -2.5),
        )


def test_every_hyper_parameter_is_drawn_from_a_state_of_its_own() -> None:
    drawn, small = (
        hyper_parameters("domainbed", dataset, 7, 2) for dataset in ("OfficeHome", "RotatedMNIST")
    )
    assert drawn["lr"] == 10 ** drawn_state("lr").uniform(-5, -3.5)
    assert drawn["weight_decay"] == 10 ** drawn_state("weight_decay").uniform(-6, -2)
    assert (small["lr"], small["weight_decay"]) == (10 ** drawn_state("lr").uniform(-4.5, -2.5), 0)
    for name in ("resnet_dropout", "vit_dropout"):
        assert drawn[name] == drawn_state(name).choice([0.0, 0.1, 0.5])
    for dataset, largest in (("OfficeHome", 5.5), ("RotatedMNIST", 9), ("DomainNet", 5)):
        size = int(2 ** drawn_state("batch_size").uniform(3, largest))
        assert hyper_parameters("domainbed", dataset, 7, 2)["batch_size"] == size


DIGITS = torch.randint(0, 256, (60, 28, 28), generator=torch.Generator().manual_seed(1)).to(
    torch.uint8
)
LABELS = torch.arange(60) % 10


def test_rotated_mnist_is_domainbeds() -> None:
    angles = [0, 15, 30, 45, 60, 75]
    environments = rotated_mnist(DIGITS, LABELS, angles, 123)
    torch.manual_seed(123)
    order = torch.randperm(60)
    for env, (angle, (x, y)) in enumerate(zip(angles, environments, strict=True)):
        assert torch.equal(y, LABELS[order][env::6])
        image = Image.fromarray(DIGITS[order][env::6][3].numpy())
        assert torch.equal(
            x[3],
            to_tensor(rotate(image, angle, fill=[0], interpolation=InterpolationMode.BILINEAR)),
        )
        assert x.shape == (10, 1, 28, 28)


def test_colored_mnist_is_domainbeds() -> None:
    flips = [0.1, 0.2, 0.9]
    environments = colored_mnist(DIGITS, LABELS, flips, 9)
    torch.manual_seed(9)
    order = torch.randperm(60)
    for env, (flip, (x, y)) in enumerate(zip(flips, environments, strict=True)):
        pixels, digit = DIGITS[order][env::3], LABELS[order][env::3]
        label = (digit < 5).float()
        label = (label - (torch.rand(20) < 0.25).float()).abs()
        colour = (label - (torch.rand(20) < flip).float()).abs()
        expected = torch.stack([pixels, pixels], dim=1).float() / 255
        expected[torch.arange(20), (1 - colour).long()] = 0
        assert torch.equal(y, label.long())
        assert torch.equal(x, expected)


def test_a_step_draws_the_same_number_of_rows_of_every_environment_by_the_seed_alone() -> None:
    first, again, other = (
        list(EnvironmentBatches([10, 40], batch_size=3, steps=200, seed=n)) for n in (4, 4, 5)
    )
    assert first == again != other
    assert [number for number, _, _ in first] == list(range(200 * 3 * 2))
    assert [env for _, env, _ in first[:12]] == [0, 0, 0, 1, 1, 1] * 2
    rows = Counter(row for _, env, row in first if env == 0)
    assert set(rows) == set(range(10))  # with replacement: 600 draws of ten rows
    assert max(rows.values()) < 100


@pytest.mark.parametrize(
    ("steps", "every", "expected"),
    [(5001, 300, [*range(0, 5001, 300), 5000]), (31, 15, [0, 15, 30]), (10, 4, [0, 4, 8, 9])],
)
def test_evaluations_are_at_domainbeds_steps(steps: int, every: int, expected: list[int]) -> None:
    callback, evaluated = EvaluationSteps(every), []
    for step in range(1, steps + 1):
        control, state = TrainerControl(), TrainerState(global_step=step, max_steps=steps)
        callback.on_step_end(None, state, control)
        if control.should_evaluate:
            evaluated.append(step - 1)
            assert control.should_save == (step > 1)
    assert evaluated == expected


def test_the_papers_protocol() -> None:
    runs = paper_runs("domainbed")
    training = {
        "steps": 5001,
        "eval_every": 300,
        "eval_batch_size": 64,
        "image_size": 224,
        "drop_path": 0.1,
    }
    training |= {"val_augment": True, "evaluate": "all", "eval_rows": None}
    for run in runs:
        assert run.spec["training"] | training == run.spec["training"]
        assert (run.spec["hparams"]["batch_size"], run.spec["hparams"]["data_augmentation"]) == (
            32,
            True,
        )
    cells = {(run.spec["model"]["name"], *run.spec["test_envs"], run.id) for run in runs}
    assert len(cells) == len(runs) == 2 * 4 * 11 * 4 * 3
    configs = {run.spec["method"]["name"]: run.spec["method"]["config"] for run in runs}
    assert configs.pop("erm") is None
    keys = ("num_experts", "top_k", "layers")
    experts = {name: tuple(config[key] for key in keys) for name, config in configs.items()}
    # the README of EMoE's authors (num_inter 1), and GMoE's own code
    assert experts.pop("gmoe") == experts.pop("gmoe_published") == (6, 2, [10])
    assert experts.pop("gmoe_upstream") == (6, 1, [8, 10])
    assert experts.pop("all_experts") == (24, 24, [8, 10])
    assert set(map(str, experts.values())) == {str((24, 4, [8, 10]))}
    for name in ("gmoe", "emoe", "emoe_learn"):
        published = configs[f"{name}_published"]
        assert (published["capacity_factor"], published["dropout_position"]) == (1.5, "after")
        assert published["output_bias"] == ("per_expert_whole" if name == "gmoe" else "per_expert")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("hparams", {"lrr": 1e-3}, r"training\.hparams': unknown key 'lrr'; did you mean 'lr'"),
        ("frozen_layers", 1, r"training\.frozen_layers' needs hparams\.data_augmentation: false"),
    ],
)
def test_wrong_training_settings_are_named(key: str, value: Any, message: str) -> None:
    with pytest.raises(DefinitionError, match=message):
        specs(
            load_benchmark("domainbed"),
            edited_part("domainbed", "paper", {f"training.{key}": value}),
        )
