"""Execute one run: locks, logs, resumption, determinism, messages."""

from __future__ import annotations

import copy
import io
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from filelock import FileLock
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

from benchmarks.__main__ import main
from benchmarks.harness.base import WEIGHTS
from benchmarks.harness.config.runs import read_run, run_from_spec
from benchmarks.harness.run import execution
from benchmarks.harness.training import progress as progress_module
from benchmarks.harness.training.checkpoints import MarkComplete, keep_complete_checkpoints
from benchmarks.harness.training.progress import Progress
from benchmarks.harness.training.samplers import EpochOrder
from benchmarks.text.data import TextSplit, load_whole_part
from benchmarks.text.definition import RunTask
from benchmarks.text.training import TextTrainer
from emoe.errors import EMoEError
from tests.executed import finish, killed_at
from tests.executed import prepare as write_run
from tests.planned import plan

SMOKE = plan(["glue", "glue_lora"], "smoke")
SPEC = SMOKE[0].spec


def prepare(method: str, folder: str = "runs", **training: object) -> Path:
    """Write the ``run.json`` of a small smoke run."""
    spec = next(run.spec for run in SMOKE if run.spec["method"]["name"] == method)
    run = run_from_spec(
        {**spec, "training": {**spec["training"], "train_rows": 48, "eval_rows": 30, **training}}
    )
    return write_run(run, folder)


@pytest.mark.slow
def test_a_second_process_waits_for_a_run_and_keeps_its_numbers(workdir: Path) -> None:
    path = prepare("emoe")
    command = [sys.executable, "-m", "benchmarks", "run", str(path)]
    with FileLock(path.parent / ".lock"):
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=workdir
        )
        assert process.stderr
        assert "another process works on this run" in process.stderr.readline()
        assert not (path.parent / "log.txt").exists()
    stdout, stderr = process.communicate()
    assert (process.returncode, stdout) == (0, "")
    assert len(stderr.splitlines()) == 1  # off a terminal
    assert "finished in" in stderr
    stamp = (path.parent / "metrics.json").stat().st_mtime_ns
    numbers = finish(path)  # which another one has finished
    assert (path.parent / "metrics.json").stat().st_mtime_ns == stamp
    log = (path.parent / "log.txt").read_text()
    assert "eval_loss" in log
    assert "training, 18 steps" in log
    assert set(numbers["scores"]["ood"]) == {"amazon", "movie", "nyt"}
    assert numbers["routing"]["experts_per_token"] == 2
    assert not (path.parent / "checkpoints").exists()


@pytest.mark.parametrize("pair", [("vanilla", "all_experts"), ("lora", "lora_all_experts")])
def test_all_experts_train_exactly_like_the_dense_model(
    workdir: Path, monkeypatch: pytest.MonkeyPatch, pair: tuple[str, str]
) -> None:
    seen: list[list[int]] = []
    step = Trainer.training_step

    def spy(self: Trainer, model: torch.nn.Module, inputs: dict, *args: object) -> torch.Tensor:
        seen.append(inputs["input_ids"].tolist())
        return step(self, model, inputs, *args)

    monkeypatch.setattr(Trainer, "training_step", spy)
    dense, routed = (finish(prepare(method, sampling="group_by_length")) for method in pair)
    half = len(seen) // 2
    assert seen[:half] == seen[half:]
    assert half == dense["epochs"][-1]["epoch"] * 6
    for part, by_task in dense["scores"].items():
        for task, scores in by_task.items():
            assert routed["scores"][part][task] == pytest.approx(scores, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "keep", "sampling", "incomplete", "resumed_at"),
    [
        ("gmoe", "last", "group_by_length", [], 12),
        ("emoe_published", "best", "group_by_length", [12], 6),
        ("lora_emoe_learn", "last", "random", [], 12),
    ],
)
def test_a_killed_run_resumes_from_the_last_complete_checkpoint_to_the_same_numbers(
    workdir: Path,
    capfd: pytest.CaptureFixture[str],
    method: str,
    keep: str,
    sampling: str,
    incomplete: list[int],
    resumed_at: int,
) -> None:
    settings = {"checkpoint_selection": keep, "sampling": sampling, "epochs": 3}
    whole = finish(prepare(method, "whole", **settings))
    killed = prepare(method, "killed", **settings)
    with killed_at(14):  # in the third epoch of three
        finish(killed)
    assert not (killed.parent / "metrics.json").exists()
    checkpoints = killed.parent / "checkpoints"
    (checkpoints / "checkpoint-18").mkdir()  # half-written when the power went
    for step in incomplete:
        (checkpoints / f"checkpoint-{step}" / "complete").unlink()
    assert finish(killed) == whole
    assert f"resumed at step {resumed_at}" in "".join(capfd.readouterr())


def test_incomplete_checkpoints_are_removed_and_the_newest_complete_one_is_used(
    tmp_path: Path,
) -> None:
    arguments = TrainingArguments(str(tmp_path))
    for step in (6, 12, 100):
        state = TrainerState(global_step=step)
        (tmp_path / f"checkpoint-{step}").mkdir()
        for name in ("trained.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
            (tmp_path / f"checkpoint-{step}" / name).touch()
        state.save_to_json(str(tmp_path / f"checkpoint-{step}" / "trainer_state.json"))
        MarkComplete().on_save(arguments, state, TrainerControl())
    for step, newest in ((100, "checkpoint-12"), (12, "checkpoint-6"), (6, None)):
        (tmp_path / f"checkpoint-{step}" / "complete").unlink()
        assert keep_complete_checkpoints(tmp_path, print) == (newest and tmp_path / newest)
        assert not (tmp_path / f"checkpoint-{step}").exists()


def test_the_best_epochs_weights_are_kept_and_patience_ends_the_run(
    workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"checkpoint_selection": "best", "patience": 2, "epochs": 12}
    again: list[dict[str, float | None]] = []
    evaluate = TextTrainer.evaluate

    def spy(
        self: TextTrainer, split: TextSplit, task: object = None, recorder: object = None
    ) -> dict:
        again.append(
            evaluate(
                self,
                load_whole_part(RunTask.model_validate(SPEC["task"]), "dev").sample(
                    30, "tweets/dev"
                ),
            )
        )
        return evaluate(self, split, task, recorder)

    with monkeypatch.context() as patch:
        patch.setattr(TextTrainer, "evaluate", spy)
        whole = finish(prepare("vanilla", "whole", **settings))
    assert whole["epochs"][-1] != {**whole["epochs"][-1], **whole["scores"]["dev"]["tweets"]}
    # the weights after training are the kept epoch's
    of_evaluation = {name: value for name, value in again[0].items() if name != "loss_calibrated"}
    assert of_evaluation == pytest.approx(whole["scores"]["dev"]["tweets"], abs=1e-6)
    scores = [entry["balanced_accuracy"] for entry in whole["epochs"]]
    best = scores.index(max(scores))
    assert len(scores) == best + 3 < 12
    assert whole["scores"]["dev"]["tweets"] == {
        k: whole["epochs"][best][k] for k in ("balanced_accuracy", "loss")
    }

    # killed after it had stopped, while evaluating: the best weights are loaded again and nothing is trained
    killed = prepare("vanilla", "killed", **settings)
    with monkeypatch.context() as patch:
        patch.setattr(
            TextTrainer,
            "evaluate",
            lambda *_args, **_options: (_ for _ in ()).throw(KeyboardInterrupt),
        )
        with pytest.raises(KeyboardInterrupt):
            finish(killed)
    assert finish(killed) == whole
    cost = json.loads((killed.parent / "metrics.json").read_text())["cost"]
    assert cost["steps"] == 6 * len(scores)
    assert cost["train_seconds"] > 0


def test_a_clean_run_of_a_task_without_a_test_split_holds_rows_out_to_choose_by(
    workdir: Path,
) -> None:
    """Score the epochs by held-out rows, because the dev split is the reported one."""
    spec = copy.deepcopy(SPEC)
    spec["task"]["splits"]["test"] = None
    spec["training"] |= {"train_rows": 54, "dev_rows": 6, "eval_rows": 30, "epochs": 2}
    spec["training"] |= {"validation_fraction": 0.1, "checkpoint_selection": "best"}
    metrics = finish(write_run(run_from_spec(spec)))
    assert [metrics["data"][part]["rows"] for part in ("train", "dev", "test")] == [54, 6, 30]
    kept = metrics["scores"]["dev"]["tweets"]
    assert kept in [
        {k: epoch[k] for k in ("balanced_accuracy", "loss")} for epoch in metrics["epochs"]
    ]
    dev = load_whole_part(RunTask.model_validate(spec["task"]), "dev").sample(30, "tweets/dev")
    assert metrics["data"]["test"] == dev.summary()


def test_a_run_that_lost_the_weights_that_it_keeps_is_computed_again(workdir: Path) -> None:
    path = prepare("emoe", keep_weights=True)
    whole = finish(path)
    weights = path.parent / WEIGHTS
    weights.unlink()
    assert finish(path) == whole
    assert weights.exists()


def test_each_seed_draws_its_own_training_rows_and_all_are_scored_on_the_same(
    workdir: Path,
) -> None:
    def digests(method: str, seed: int) -> dict[str, str]:
        spec = next(run.spec for run in SMOKE if run.spec["method"]["name"] == method)
        spec = copy.deepcopy(spec)
        spec["task"]["splits"]["test"] = None
        small = {"train_rows": 40, "dev_rows": 20, "eval_rows": 30, "epochs": 1}
        spec["training"] |= {**small, "validation_fraction": 0.1}
        data = finish(write_run(run_from_spec(spec | {"seed": seed})))["data"]
        assert [data[part]["rows"] for part in ("train", "dev", "test")] == [40, 20, 30]
        return {part: data[part]["digest"] for part in ("train", "dev", "test")}

    first, other = digests("vanilla", seed=0), digests("vanilla", seed=1)
    assert first["train"] != other["train"]
    assert (first["dev"], first["test"]) == (other["dev"], other["test"])
    # methods are paired by seed
    assert digests("emoe", seed=0) == first


@pytest.mark.parametrize("by_length", [False, True])
def test_the_order_of_rows_depends_on_seed_and_epoch_alone(by_length: bool) -> None:
    lengths = [3 + (7 * i) % 31 for i in range(64)]

    def order(seed: int, epoch: int, noise: int = 0) -> list[int]:
        torch.manual_seed(noise)
        sampler = EpochOrder(lengths, 8, seed, by_length=by_length)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert sorted(order(0, 0)) == list(range(64))
    assert order(0, 1) == order(0, 1, noise=5)
    assert len({tuple(order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4


def test_a_diverged_run_is_recorded_as_such(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = SPEC | {"learning_rate": 1e30}
    run = run_from_spec(
        {**spec, "training": {**spec["training"], "train_rows": 48, "eval_rows": 30}}
    )
    metrics = finish(write_run(run))
    assert metrics["scores"]["test"]["tweets"]["loss"] is None
    assert 0 <= metrics["scores"]["test"]["tweets"]["balanced_accuracy"] <= 1
    # weights that are nan are not converted
    (made,) = metrics["transformed"].values()
    assert made["scores"] == {part: metrics["scores"][part] for part in ("test", "ood")}


def test_a_truncated_file_is_not_taken_for_an_interruption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / SMOKE[0].id / "run.json"
    path.parent.mkdir()
    path.write_text(SMOKE[0].to_json())
    monkeypatch.setattr(execution, "execute", mock.Mock(side_effect=EOFError("Ran out of input")))
    monkeypatch.setattr(sys, "argv", ["benchmarks", "run", str(path)])
    with pytest.raises(EOFError, match="Ran out of input"):
        main()


def test_a_run_file_that_was_changed_by_hand_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text(SMOKE[0].to_json().replace('"learning_rate":0.003', '"learning_rate":0.004'))
    with pytest.raises(EMoEError, match=r"run\.json.* was changed by hand.*; delete it, and "):
        read_run(path)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_has_the_name_of_the_run_and_the_time_left_for_its_training(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = iter([0.0, 0.0, 20.0, 25.0, 40.0])
    times = SimpleNamespace(monotonic=lambda: next(now))
    monkeypatch.setattr(progress_module, "time", times)
    stream = Terminal()
    progress = Progress("bert-d", stream)
    state, args, control = TrainerState(max_steps=100), TrainingArguments(), TrainerControl()
    progress.on_train_begin(args, state, control)
    for step in (20, 25, 40):  # none is shown after 5 s
        state.global_step = step
        progress.on_step_end(args, state, control)
    progress.finish(3725)
    assert stream.getvalue().splitlines() == [
        f"[bert-d] {line}"
        for line in (
            "training, 100 steps",
            "step 20/100, 0:01:20 of training left",
            "step 40/100, 0:01:00 of training left",
            "finished in 1:02:05",
        )
    ]
