"""Resume from the newest checkpoint that is complete: with the numbers of a run that was never interrupted."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness.base import RUNS
from benchmarks.harness.training.checkpoints import last_complete_checkpoint
from tests.executed import finish, killed_at, prepare
from tests.planned import smoke_run


@pytest.fixture(scope="module")
def runs(shared_here: Path, archive: Path) -> tuple[dict[str, Any], Path]:
    """Finish a run, and kill it in its last epoch of three; return the numbers and the ``run.json`` of the killed one."""
    from benchmarks.harness.sources.vader import ARCHIVE

    ARCHIVE.parent.mkdir(parents=True)
    ARCHIVE.symlink_to(archive)
    run = smoke_run("glue", "emoe_learn", train_rows=48, eval_rows=20, epochs=3, checkpoint_selection="best")
    killed = prepare(run, "killed")
    with killed_at(14):
        finish(killed)
    return finish(prepare(run, str(RUNS))), killed


def copy_checkpoints(killed: Path, folder: Path) -> Path:
    shutil.copytree(killed.parent, folder)
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["checkpoint-12", "checkpoint-6"]
    return folder / "checkpoints"


def test_an_incomplete_checkpoint_is_removed_and_the_previous_one_is_used(
    runs: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    checkpoints = copy_checkpoints(runs[1], tmp_path / "run")
    for step, expected in ((12, checkpoints / "checkpoint-6"), (6, None)):
        (checkpoints / f"checkpoint-{step}" / "complete").unlink()
        assert last_complete_checkpoint(checkpoints) == expected
        assert not (checkpoints / f"checkpoint-{step}").exists()


@pytest.mark.parametrize("incomplete", [0, 1, 2])
def test_resumed_runs_equal_uninterrupted_ones(
    runs: tuple[dict[str, Any], Path], tmp_path: Path, incomplete: int, capfd: pytest.CaptureFixture[str]
) -> None:
    whole, killed = runs
    path = tmp_path / killed.parent.name / "run.json"
    checkpoints = copy_checkpoints(killed, path.parent)
    for step in (12, 6)[:incomplete]:
        (checkpoints / f"checkpoint-{step}" / "complete").unlink()
    assert finish(path) == whole
    log = "".join(capfd.readouterr())
    assert ("resumed at step" in log) == (incomplete < 2)
