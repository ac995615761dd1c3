"""A killed run starts again if its data or its model changed since, instead of mixing old and new."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from transformers import AutoModel

from benchmarks.harness.base import DATA_ROOT, MODEL_ROOT
from benchmarks.harness.config.runs import Run, run_from_spec
from tests.executed import finish, killed_at, prepare
from tests.image_sets import pacs_run
from tests.instruction_runs import tiny_run
from tests.planned import paper_spec

pytestmark = pytest.mark.slow


class Change(NamedTuple):
    """A change of the data or the model of a killed run."""

    run: Callable[[], Run]
    step: int  # at which the run is killed, after its first checkpoint
    change: Callable[[Path], None]  # gets the folder of the data and model roots
    changed: str  # what the warning names


def text_run() -> Run:
    spec = paper_spec("glue", task="rte", model="bert-base-cased", method="vanilla")
    training = {**spec["training"], "epochs": 2, "batch_size": 4}
    return run_from_spec({**spec, "ood": [], "training": training})


def mixture_run() -> Run:
    spec = paper_spec("multitask", task="nli", method="vanilla")
    training = {**spec["training"], "epochs": 2, "batch_size": 8}
    return run_from_spec({**spec, "ood": [], "training": training})


def replace_word(file: Path, old: str, new: str) -> None:
    text = file.read_text(encoding="utf-8")
    assert old in text
    file.write_text(text.replace(old, new), encoding="utf-8")


def replace_image(folder: Path) -> None:
    """Replace an image by another one of the same class and environment."""
    shutil.copyfile(folder / "000.jpg", folder / "001.jpg")


def replace_weights(folder: Path) -> None:
    """Replace a model by another one of the same form."""
    model = AutoModel.from_pretrained(folder)
    with torch.no_grad():
        model.embeddings.word_embeddings.weight.mul_(1.5)
    model.save_pretrained(folder)


CHANGES = {
    "texts": Change(
        text_run,
        6,
        lambda roots: replace_word(roots / "data/RTE/train.jsonl", "fell", "won"),
        "training rows",
    ),
    "weights": Change(
        text_run, 6, lambda roots: replace_weights(roots / "models/bert-base-cased"), "weights"
    ),
    "images": Change(
        lambda: pacs_run("erm"),
        6,
        lambda roots: replace_image(roots / "data/PACS/photo/dog"),
        "images",
    ),
    "instructions": Change(
        lambda: tiny_run("emoe", "lora"),
        5,
        lambda roots: replace_word(roots / "data/own.json", "Say the", "Tell the"),
        "held-out rows and training rows",
    ),
    "mixture": Change(
        mixture_run,
        9,
        lambda roots: replace_word(roots / "data/MNLI/train.jsonl", "won", "fell"),
        "training rows of mnli",
    ),
}


@pytest.fixture
def own_roots(roots: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Copy the data and model roots, so that a test can change them."""
    copies = here / "roots"
    shutil.copytree(roots, copies)
    monkeypatch.setenv(DATA_ROOT, str(copies / "data"))
    monkeypatch.setenv(MODEL_ROOT, str(copies / "models"))
    return copies


def kill(run: Run, step: int) -> Path:
    """Kill a run at a step after its first checkpoint, and return its ``run.json``."""
    path = prepare(run, "killed")
    with killed_at(step):
        finish(path)
    assert list(path.parent.glob("checkpoints/checkpoint-*"))
    return path


def warnings_in(capfd: pytest.CaptureFixture[str]) -> list[str]:
    """Return the warnings of a run, which did not resume."""
    log, _ = capfd.readouterr()
    assert "resumed at step" not in log
    return [line.partition("] ")[2] for line in log.splitlines() if "] warning: " in line]


@pytest.mark.parametrize("name", CHANGES)
def test_a_killed_run_starts_again_if_its_data_or_model_changed(
    name: str, own_roots: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    case = CHANGES[name]
    run = case.run()
    path = kill(run, case.step)
    case.change(own_roots)
    whole = finish(prepare(run, "whole"))
    expected = warnings_in(capfd)  # such as one about an unexpected number of rows
    assert finish(path) == whole
    origin = path.parent / "checkpoints" / "origin.json"
    warning = (
        f"warning: {case.changed} have changed since {origin} was written; "
        "the run starts again from the beginning"
    )
    assert sorted(warnings_in(capfd)) == sorted([*set(expected), warning])


def test_a_moved_data_root_changes_nothing(
    own_roots: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = kill(pacs_run("erm"), 6)
    moved = own_roots.rename(own_roots.with_name("moved"))
    monkeypatch.setenv(DATA_ROOT, str(moved / "data"))
    finish(path)
    assert "resumed at step 4" in "".join(capfd.readouterr())


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "cannot be read: No such file or directory"),  # older versions wrote none
        ("", "is damaged: 'the file': Invalid JSON: EOF while parsing a value at line 1 column 0"),
        (json.dumps({"training rows": 1}), "is damaged: 'training rows': Input should be a valid"),
    ],
)
def test_checkpoints_of_unknown_origin_are_not_used(
    content: str | None, problem: str, own_roots: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = kill(tiny_run("emoe", "lora"), 5)
    origin = path.parent / "checkpoints" / "origin.json"
    if content is None:
        origin.unlink()
    else:
        origin.write_text(content)
    capfd.readouterr()
    finish(path)
    (warning,) = [line for line in warnings_in(capfd) if "origin.json" in line]
    assert warning.startswith(f"warning: {origin} {problem}")
    assert warning.endswith("; the run starts again from the beginning")


def test_checkpoints_of_other_code_are_not_used(
    own_roots: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tiny_run("emoe", "lora")
    whole = finish(prepare(run, "whole"))
    path = kill(run, 5)
    origin = path.parent / "checkpoints" / "origin.json"
    content = json.loads(origin.read_text())
    origin.write_text(json.dumps({**content, "files of the code": "0" * 64}))
    capfd.readouterr()
    assert finish(path) == whole
    warning = (
        f"warning: files of the code have changed since {origin} was written; "
        "the run starts again from the beginning"
    )
    assert warning in warnings_in(capfd)
