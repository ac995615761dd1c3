"""One run: locks, logs, resumption, determinism, messages."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from benchmarks.harness import progress as progress_module
from benchmarks.harness.definition import DefinitionError
from benchmarks.harness.execution import execute, read_run
from benchmarks.harness.progress import Progress, clock
from benchmarks.harness.rated import ARCHIVE
from benchmarks.harness.runs import Run, plan, run_from_spec
from benchmarks.harness.seeds import derive_seed
from benchmarks.harness.training import last_complete_checkpoint


@pytest.fixture
def workdir(tmp_path: Path, archive: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory with the real sentences."""
    (tmp_path / ARCHIVE).parent.mkdir(parents=True)
    (tmp_path / ARCHIVE).symlink_to(archive)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def prepare(method: str, folder: str = "runs", **training: object) -> Path:
    """The ``run.json`` of a small smoke run."""
    spec = next(run.spec for run in plan(["glue"], "smoke") if run.spec["method"]["name"] == method)
    run = run_from_spec({**spec, "training": {**spec["training"], "train_rows": 48, "eval_rows": 30, **training}})
    path = Path(folder) / run.id / "run.json"
    path.parent.mkdir(parents=True)
    path.write_text(run.to_json())
    return path


def finish(path: Path) -> dict:
    output = execute(path, threads=1, log=path.parent / "log.txt")
    content = json.loads(output.read_text())
    return {key: content[key] for key in ("scores", "epochs", "routing", "model")}


def test_a_run_leaves_numbers_and_a_log_and_says_little(workdir: Path) -> None:
    path = prepare("emoe")
    shown = subprocess.run(
        [sys.executable, "-m", "benchmarks", "run", str(path)], capture_output=True, text=True, check=True
    )
    numbers = finish(path)
    assert shown.stdout == ""
    lines = shown.stderr.splitlines()
    assert "training, 18 steps" in lines[0]
    assert "finished in" in lines[-1]
    assert len(lines) <= 6
    assert "eval_loss" in (path.parent / "log.txt").read_text()
    assert set(numbers["scores"]["ood"]) == {"amazon", "movie", "nyt"}
    assert numbers["routing"]["experts_per_token"] == 2
    assert not (path.parent / "checkpoints").exists()


def test_same_input_same_numbers_and_a_finished_run_is_not_repeated(workdir: Path) -> None:
    first, second = prepare("emoe_learn", "a"), prepare("emoe_learn", "b")
    assert finish(first) == finish(second)
    stamp = (first.parent / "metrics.json").stat().st_mtime_ns
    finish(first)
    assert (first.parent / "metrics.json").stat().st_mtime_ns == stamp


def test_all_experts_train_exactly_like_the_dense_model(workdir: Path) -> None:
    dense, routed = finish(prepare("vanilla")), finish(prepare("all_experts"))
    for part, by_task in dense["scores"].items():
        for task, scores in by_task.items():
            assert routed["scores"][part][task] == pytest.approx(scores, abs=1e-4)


@pytest.mark.parametrize("method", ["vanilla", "gmoe", "emoe", "emoe_learn"])
@pytest.mark.parametrize("keep", ["last", "best"])
def test_a_killed_run_resumes_to_the_same_numbers(
    workdir: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], method: str, keep: str
) -> None:
    whole = finish(prepare(method, "whole", keep=keep))

    def die(
        self: Progress, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if state.global_step == 14:  # in the third epoch of three
            raise KeyboardInterrupt

    killed = prepare(method, "killed", keep=keep)
    with monkeypatch.context() as patch:
        patch.setattr(Progress, "on_step_end", die)
        with pytest.raises(KeyboardInterrupt):
            finish(killed)
    assert not (killed.parent / "metrics.json").exists()
    (killed.parent / "checkpoints" / "checkpoint-18").mkdir()  # half-written when the power went
    assert finish(killed) == whole
    assert "resumed at step 12" in capfd.readouterr().err


def test_checkpoints_that_are_not_complete_are_left_out(tmp_path: Path) -> None:
    for step in (6, 12):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        for name in ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
            (folder / name).write_text("x")
        (folder / "trainer_state.json").write_text('{"global_step": 6}' if step == 6 else '{"global_st')
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-6")
    assert not (tmp_path / "checkpoint-12").exists()
    shutil.rmtree(tmp_path / "checkpoint-6")
    assert last_complete_checkpoint(tmp_path) is None


def test_two_processes_never_share_a_run(workdir: Path) -> None:
    path = prepare("vanilla")
    command = [sys.executable, "-m", "benchmarks", "run", str(path)]
    both = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    output = [process.communicate()[1] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sum("training, 18 steps" in text for text in output) == 1
    assert sum("another process works on this run" in text for text in output) == 1


def test_wrong_run_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "x" / "run.json"
    with pytest.raises(DefinitionError, match="does not exist; the workflow writes it"):
        read_run(path)
    path.parent.mkdir()
    path.write_text("{")
    with pytest.raises(DefinitionError, match="is no run specification"):
        read_run(path)
    path.write_text(plan(["glue"], "smoke")[0].to_json())
    with pytest.raises(DefinitionError, match="was changed by hand"):
        read_run(path)


def test_command_line_errors_are_one_line(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks", "run", str(tmp_path / "run.json")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.splitlines()) == 1


def test_progress_says_which_run_step_and_time_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run: Run = plan(["glue"], "smoke")[0]
    monkeypatch.chdir(tmp_path)
    plan_file = {"started": 1000.0, "done": 0, "runs": ["glue/done-0", "glue/open-1", run.folder]}
    Path("plan.json").write_text(json.dumps(plan_file))
    Path("results/runs/glue/done-0").mkdir(parents=True)
    Path("results/runs/glue/done-0/metrics.json").write_text("{}")
    monkeypatch.setenv("EMOE_PLAN", "plan.json")
    now = iter([0.0, 0.0, 20.0, 25.0, 40.0])
    monkeypatch.setattr(progress_module, "time", SimpleNamespace(monotonic=lambda: next(now), time=lambda: 1060.0))
    stream = io.StringIO()
    progress = Progress(run.id, stream)
    state, args, control = TrainerState(max_steps=100), TrainingArguments(), TrainerControl()
    progress.on_train_begin(args, state, control)
    for step in (20, 25, 40):
        state.global_step = step
        progress.on_step_end(args, state, control)
    lines = stream.getvalue().splitlines()
    assert lines[0] == f"[1 of 3 runs done, 2:00 left; {run.id}] training, 100 steps"
    assert lines[1] == f"[1 of 3 runs done, 2:00 left; {run.id}] step 20/100, 1:20 of training left"
    assert [line.split("] ")[1] for line in lines[2:]] == ["step 40/100, 1:00 of training left"]  # none after 5 s
    assert clock(3725) == "1:02:05"


def test_seeds_depend_on_every_part() -> None:
    assert derive_seed("order", 0) == derive_seed("order", 0)
    assert (
        len({derive_seed(*parts) for parts in (("order", 0), ("order", 1), ("head", 0), ("order0",), ("order", 0, ""))})
        == 5
    )
