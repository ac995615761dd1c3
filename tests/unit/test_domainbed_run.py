"""A run of domain generalisation from end to end, on a small PACS that is written to disk."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Trainer

from benchmarks.domainbed import pipeline
from benchmarks.domainbed.batches import EvaluationRows
from benchmarks.domainbed.definition import ImageSpec
from benchmarks.domainbed.protocol import best_record
from benchmarks.harness.base import DATA_ROOT
from benchmarks.harness.config.benchmark import load_benchmark
from benchmarks.harness.config.runs import Run
from benchmarks.harness.results.statistics import mutual_information
from tests.executed import finish, killed_at, prepare
from tests.image_sets import pacs_run, write_pacs
from tests.planned import edited_part, specs

pytestmark = pytest.mark.usefixtures("pacs_here")


@pytest.fixture
def own_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PACS that a test may change."""
    monkeypatch.setenv(DATA_ROOT, str(tmp_path / "data"))
    return write_pacs(tmp_path / "data")


class Finished:
    """Runs that several tests compare with, each trained once."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._found = folder, {}

    def __call__(self, run: Run) -> dict[str, Any]:
        """A run's numbers."""
        return self._of(run)[0]

    def images(self, run: Run) -> list[torch.Tensor]:
        """What it was trained on, step by step."""
        return self._of(run)[1]

    def _of(self, run: Run) -> tuple[dict[str, Any], list[torch.Tensor]]:
        if run.id not in self._found:
            seen: list[torch.Tensor] = []
            step = Trainer.training_step

            def spy(self: Trainer, model: object, inputs: dict, *args: object) -> torch.Tensor:
                seen.append(inputs["pixel_values"].clone())
                return step(self, model, inputs, *args)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Trainer, "training_step", spy)
                self._found[run.id] = finish(prepare(run, str(self._folder))), seen
        return self._found[run.id]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return Finished(tmp_path_factory.mktemp("whole"))


def test_a_run_has_domainbeds_records(capfd: pytest.CaptureFixture[str]) -> None:
    run = pacs_run("emoe", held_out=2)
    path = prepare(run)
    found = finish(path)
    records = found["records"]
    assert [record["step"] for record in records] == [0, 3, 6]
    names = {f"env{env}_{part}_acc" for env in range(4) for part in ("in", "out")}
    assert all(names | {"step", "epoch", "loss"} == set(record) for record in records)
    # 24 images an environment: 4 out, 20 in; 4 of them in a step
    assert [record["epoch"] for record in records] == [0.0, 3 / 5, 6 / 5]
    assert {name: data["rows"] for name, data in found["data"].items()} == {
        f"{env} {part}": rows for env in "ACPS" for part, rows in (("in", 20), ("out", 4))
    }
    best = best_record(records, [2])
    assert found["scores"]["dev"] == {"pacs": {"accuracy": best.value}}
    assert found["scores"]["train"] == {"pacs": {"loss": best.record["loss"]}}
    assert found["scores"]["test"] == {"P": {"accuracy": best.record["env2_in_acc"]}}
    loads = torch.tensor(found["routing"]["loads"]["2"])
    assert loads.shape == (4, 3, 8)
    assert loads.sum() == 16 * 5 * 2  # out images, their tokens (four patches and a class token), experts of each
    routing = found["routing"]
    for name, axis in (("class", 0), ("environment", 1)):
        told = [mutual_information(np.array(loads).sum(axis)) for loads in routing["loads"].values()]
        assert routing[f"{name}_information"] == pytest.approx(np.mean(told))
        for layer in ("2", "4"):
            mean, high = routing["chance"][layer][name]
            assert 0 < mean < high
        assert routing[f"{name}_information_chance"] < routing[f"{name}_information_chance_95"]
    assert all(sum(map(sum, matrix)) == 4 for matrix in found["confusion"].values())
    said, warned = capfd.readouterr()
    assert said.index("S: 24 images, 3 classes, 8 to 8 each") < said.index(
        "training, 7 steps"
    )  # counts come before training
    assert "warning: pacs (all): 96 rows, its makers count 9,991: another version, or not all of it" in warned
    assert "held out: P; trained on: A, C, S" in said
    assert not (path.parent / "checkpoints").exists()

    lines = [json.loads(line) for line in (path.parent / "results.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 3, 6]
    assert re.fullmatch(r"emoe-[0-9a-f]{6}@test-vit", lines[0]["args"].pop("algorithm"))
    seeds = {"hparams_seed": 0, "trial_seed": 0, "seed": run.spec["data_seed"]}
    task = {"dataset": "PACS", "test_envs": [2], "task": "domain_generalization"}
    assert lines[0]["args"] == {**seeds, **task, "holdout_fraction": 0.2, "steps": 7}
    assert lines[0]["hparams"]["batch_size"] == 4


def test_domainbeds_scripts_merge_the_runs_of_a_sweep_and_no_others() -> None:
    """They group by dataset, algorithm, test_envs, trial_seed and hparams_seed, and average an algorithm over all of
    them.
    """
    benchmark = load_benchmark("domainbed")

    def algorithms(**settings: Any) -> set[str]:
        block = {"model": ["test-vit"], "method": ["random_partition"], "test_envs": "single", "trial": [0, 1]}
        block |= {"set": ["pacs", "domain_net", "rotated_mnist"], "hparams_seed": [0, 3], **settings.pop("grid", {})}
        methods = {"random_partition": settings.pop("method", {})}
        edits = {"grid_defaults": {}, "grid": [block], "method_defaults": {}, "methods": methods, "training": settings}
        planned = specs(benchmark, edited_part("domainbed", "smoke", edits))
        return {
            pipeline.sweep_arguments(ImageSpec.model_validate(spec | {"files": {}}))["algorithm"] for spec in planned
        }

    (own,) = algorithms()  # also of sets that are evaluated at other steps
    assert re.fullmatch(r"random_partition-[0-9a-f]{6}@test-vit", own)
    assert algorithms(grid={"set": ["rotated_mnist_5k"]}) == {f"{own}@rotated_mnist_5k"}
    others: list[dict[str, Any]] = [{"image_size": 28}, {"eval_every": 7}, {"val_augment": False}]
    others += [{"registry": "domainbed"}, {"hparams": {"lr": 0.1}}, {"grid": {"num_experts": [48]}}]
    assert len({own}.union(*(algorithms(**settings) for settings in others))) == 1 + len(others)


def test_all_experts_train_exactly_like_the_dense_model(whole: Finished) -> None:
    dense, routed = (whole(pacs_run(method))["records"] for method in ("erm", "all_experts"))
    for ours, theirs in zip(routed, dense, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)


@pytest.mark.parametrize("method", ["gmoe", "emoe_published"])
def test_a_killed_run_resumes_to_the_same_numbers(
    whole: Finished, capfd: pytest.CaptureFixture[str], method: str
) -> None:
    run = pacs_run(method)
    killed = prepare(run, "killed")
    with killed_at(6):  # after the records of steps 0 and 3
        finish(killed)
    assert not (killed.parent / "metrics.json").exists()
    assert finish(killed) == whole(run)
    assert "resumed at step 4" in "".join(capfd.readouterr())


def test_methods_train_on_the_same_images_drawn_alike(whole: Finished) -> None:
    erm, gmoe = (whole.images(pacs_run(method)) for method in ("erm", "gmoe"))
    assert len(erm) == 7
    assert erm[0].shape == (12, 3, 32, 32)  # three environments, four images of each
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(erm, gmoe, strict=True))


def test_held_out_images_are_never_trained_on(own_data: Path) -> None:
    """Other held-out images give other test scores and nothing else."""
    before = finish(prepare(pacs_run(held_out=3), "before"))
    for path in sorted((own_data / "sketch").rglob("*.jpg")):
        path.write_bytes((own_data / "photo/dog/000.jpg").read_bytes())
    after = finish(prepare(pacs_run(held_out=3), "after"))
    for ours, theirs in zip(before["records"], after["records"], strict=True):
        same = {name: value for name, value in ours.items() if not name.startswith("env3")}
        assert same == {name: value for name, value in theirs.items() if not name.startswith("env3")}
    assert before["confusion"]["S"] != after["confusion"]["S"]


def test_augmentation_of_validation_images_is_drawn_anew_at_every_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in DomainBed's code and the authors': of training environments only, both splits."""
    seen: dict[tuple[str, bool], list[torch.Tensor]] = {}
    look = EvaluationRows.__getitem__

    def spy(self: EvaluationRows, place: int) -> dict[str, Any]:
        found = look(self, place)
        if place == 0:
            seen.setdefault((self.environment.name, len(self) == 20), []).append(found["pixel_values"])
        return found

    monkeypatch.setattr(EvaluationRows, "__getitem__", spy)
    finish(prepare(pacs_run(held_out=2)))
    assert set(seen) == set(itertools.product("ACPS", (False, True)))
    for (name, _), pixels in seen.items():
        steps = pixels[:3]  # of three evaluations; the last look, after training, is a plain one
        assert [torch.equal(one, steps[0]) for one in steps] == [True, *[name == "P"] * 2]


def test_worker_processes_give_the_same_numbers(whole: Finished, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = whole(pacs_run("emoe"))
    monkeypatch.setattr("benchmarks.domainbed.training.reading_workers", lambda: 2)
    assert finish(prepare(pacs_run("emoe"), "workers")) == alone


def test_adam_decays_every_parameter(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[torch.optim.Optimizer] = []
    monkeypatch.setattr(
        Trainer, "training_step", lambda self, *args: found.append(self.optimizer) or torch.zeros(()).requires_grad_()
    )
    finish(prepare(pacs_run()))
    optimizer = found[0].optimizer
    assert type(optimizer) is torch.optim.Adam
    groups = [group for group in optimizer.param_groups if group["params"]]
    assert [(group["weight_decay"], group["lr"]) for group in groups] == [(1e-6, 1e-3)]
    assert len(groups[0]["params"]) > 70  # biases and norms too
