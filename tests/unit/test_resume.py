"""A killed run whose checkpoints are damaged, or moved, ends with the numbers of an uninterrupted one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness.config.runs import Run, run_from_spec
from benchmarks.harness.sources.packages import find_package
from benchmarks.harness.training.checkpoints import keep_complete_checkpoints
from benchmarks.text.training import TextTrainer
from tests.executed import finish, killed_and_resumed, killed_at, prepare
from tests.planned import plan

pytestmark = pytest.mark.slow

SMOKE = {run.spec["method"]["name"]: run.spec for run in plan(["glue"], "smoke")}
FILES = (
    "complete",
    "optimizer.pt",
    "rng_state.pth",
    "scheduler.pt",
    "trained.safetensors",
    "trainer_state.json",
)
Numbers = dict[str, Any]
Damage = Callable[[Path], None]


def small_run(**training: object) -> Run:
    """Return a run of three epochs of six steps, without OOD sets."""
    spec = SMOKE["gmoe"]
    small = {"train_rows": 48, "eval_rows": 30, "epochs": 3}
    return run_from_spec({**spec, "ood": [], "training": {**spec["training"], **small, **training}})


@pytest.fixture(scope="module")
def sentences(shared_here: Path, archive: Path) -> None:
    """Change to a folder with the real sentences, which the tests of this module share."""
    path = find_package("vaderSentiment").path
    path.parent.mkdir(parents=True)
    path.symlink_to(archive)


@pytest.fixture(scope="module")
def whole(sentences: None) -> Numbers:
    """Return the numbers of an uninterrupted run."""
    return finish(prepare(small_run(), "whole"))


@pytest.fixture(scope="module")
def killed(sentences: None) -> Path:
    """Kill the same run in its third epoch, and return its ``run.json``."""
    path = prepare(small_run(), "killed")
    with killed_at(14):
        finish(path)
    return path


@pytest.fixture(scope="module")
def whole_best(sentences: None) -> Numbers:
    """Return the numbers of an uninterrupted run that keeps its best epoch, which is the first one."""
    numbers = finish(prepare(small_run(checkpoint_selection="best"), "whole"))
    assert numbers["kept_epoch"] == 1
    return numbers


@pytest.fixture(scope="module")
def killed_best(sentences: None) -> Path:
    """Kill that run after its training, and return its ``run.json``."""
    return killed_after_training(small_run(checkpoint_selection="best"))


def killed_after_training(run: Run) -> Path:
    """Kill a run when its training has ended, and return its ``run.json``."""
    path = prepare(run, "killed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TextTrainer, "evaluate", raise_interrupt)
        with pytest.raises(KeyboardInterrupt):
            finish(path)
    return path


def raise_interrupt(*_args: object, **_options: object) -> None:
    raise KeyboardInterrupt


def copied(path: Path, folder: Path) -> Path:
    """Copy the folder of a killed run into another folder, and return the copy's ``run.json``."""
    copy = folder / path
    shutil.copytree(path.parent, copy.parent)
    return copy


def delete(path: Path) -> None:
    path.unlink()


def truncate(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def flip_a_bit(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def empty(path: Path) -> None:
    path.write_bytes(b"")


DAMAGES = (delete, truncate, flip_a_bit, empty)


@dataclass(frozen=True)
class Output:
    """What a run printed to its log, and the warnings among it, which the terminal has too."""

    log: str
    warnings: list[str]


def read_output(capfd: pytest.CaptureFixture[str]) -> Output:
    """Read what a run has printed. pytest takes what would go to ``log.txt``."""
    log, terminal = capfd.readouterr()
    warnings = warnings_in(log)
    assert warnings_in(terminal) == warnings
    return Output(log, warnings)


def warnings_in(text: str) -> list[str]:
    """Return the warnings in a text, without the line's beginning."""
    return [line.partition("] ")[2] for line in text.splitlines() if "] warning: " in line]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(
    name: str,
    damage: Damage,
    whole: Numbers,
    killed: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    path = copied(killed, tmp_path)
    last = path.parent / "checkpoints" / "checkpoint-12"
    assert sorted(file.name for file in last.iterdir()) == list(FILES)
    damage(last / name)
    assert finish(path) == whole
    output = read_output(capfd)
    (warning,) = output.warnings
    assert warning.startswith(f"warning: {last / name} ")
    assert warning.endswith("; the run goes on from checkpoint-6")
    assert "resumed at step 6" in output.log


@pytest.mark.parametrize("name", ["complete", "rng_state.pth"])
def test_a_run_without_an_undamaged_checkpoint_starts_again(
    name: str, whole: Numbers, killed: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Older versions wrote an empty file ``complete``."""
    path = copied(killed, tmp_path)
    damaged = [
        path.parent / "checkpoints" / checkpoint / name
        for checkpoint in ("checkpoint-6", "checkpoint-12")
    ]
    for file in damaged:
        empty(file)
    assert finish(path) == whole
    output = read_output(capfd)
    for file, warning in zip(damaged, output.warnings, strict=True):
        assert warning.startswith(f"warning: {file} ")
        assert warning.endswith("; the run starts again from the beginning")
    assert "resumed at step" not in output.log


@pytest.mark.parametrize("listed", [(), *(tuple(set(FILES) - {name}) for name in FILES[1:])])
def test_a_checkpoint_that_lists_too_few_files_is_not_used(
    listed: tuple[str, ...], killed: Path, tmp_path: Path
) -> None:
    checkpoints = copied(killed, tmp_path).parent / "checkpoints"
    complete = checkpoints / "checkpoint-12" / "complete"
    digests = json.loads(complete.read_text())
    few = {name: digest for name, digest in digests.items() if name in listed}
    complete.write_text(json.dumps(few))
    warnings: list[str] = []
    newest = keep_complete_checkpoints(checkpoints, warnings.append)
    assert newest == checkpoints / "checkpoint-6"
    missing = [name for name in FILES[1:] if name not in few]
    (warning,) = warnings
    assert warning.startswith(f"{complete} is damaged: it does not list ")
    assert all(Path(name).stem in warning for name in missing)
    assert warning.endswith("; the run goes on from checkpoint-6")


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_run_whose_best_checkpoint_is_damaged_starts_again(
    damage: Damage,
    whole_best: Numbers,
    killed_best: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    path = copied(killed_best, tmp_path)
    checkpoints = path.parent / "checkpoints"
    damage(checkpoints / "checkpoint-6" / "trained.safetensors")
    assert finish(path) == whole_best
    first, second = read_output(capfd).warnings
    assert first.startswith(f"warning: {checkpoints / 'checkpoint-6' / 'trained.safetensors'} ")
    assert second.startswith(
        f"warning: {checkpoints / 'checkpoint-18'} is of no use without checkpoint-6"
    )


@pytest.mark.parametrize("patience", [None, 2])
def test_a_run_that_was_moved_after_its_training_keeps_its_best_weights(
    patience: int | None, workdir: Path
) -> None:
    """With patience the run trains nothing more: it has stopped early, although after as many epochs here."""
    run = small_run(checkpoint_selection="best", patience=patience)
    whole = finish(prepare(run, "whole"))
    assert whole["kept_epoch"] == 1
    path = killed_after_training(run)
    moved = Path("moved").absolute() / path
    shutil.move(path.parent, moved.parent)
    assert finish(moved) == whole


@pytest.mark.parametrize("patience", [None, 2])
def test_a_method_that_chooses_experts_at_random_resumes_to_the_same_numbers(
    patience: int | None, workdir: Path
) -> None:
    """A run that was killed after its training draws nothing more before its evaluation."""
    (spec,) = (
        run.spec for run in plan(["glue_lora"], "smoke") if run.spec["method"]["name"] == "lora_any"
    )
    changes: dict[str, object] = {"train_rows": 48, "eval_rows": 30, "epochs": 3}
    if patience is not None:
        changes |= {"checkpoint_selection": "best", "patience": patience}
    run = run_from_spec({**spec, "training": {**spec["training"], **changes}})
    whole = finish(prepare(run, "whole"))
    assert killed_and_resumed(run, 14) == whole  # in the last epoch
    shutil.rmtree("killed")
    assert finish(killed_after_training(run)) == whole
