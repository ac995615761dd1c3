"""Plan runs of instruction tuning on a few rows, and write the rows to disk."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lm_eval
import pytest

from benchmarks.harness.config.runs import Run, run_from_spec
from benchmarks.llama import evaluation
from tests.planned import plan


def _row(number: int) -> dict[str, str]:
    """Make up an instruction. Every third one has no input, and outputs have several lengths."""
    context = ""
    if number % 3:
        context = f"It comes after {number - 1}."
    return {
        "instruction": f"Say the number {number}.",
        "input": context,
        "output": f"The number is {number}. " * (1 + number % 4),
    }


ROWS = [_row(number) for number in range(40)]


def write_rows(root: Path) -> None:
    """Write a set called ``own`` below a data root."""
    root.mkdir(exist_ok=True)
    (root / "own.json").write_text(json.dumps(ROWS, indent=1))


def write_mmlu(root: Path) -> Path:
    """Write made-up questions of all 57 subjects below a data root, in the fields of the hub.

    Each subject has 3 test questions and 2 dev questions. Answers in algebra have one digit.
    Returns the folder.
    """
    folder = root / "mmlu"
    folder.mkdir(parents=True)
    for split, count in {"test": 3, "dev": 2}.items():
        lines = []
        for subject in _subjects():
            for number in range(count):
                row = _question(subject, split, number)
                lines.append(json.dumps(row, ensure_ascii=False) + "\n")
        (folder / f"{split}.jsonl").write_text("".join(lines))
    return folder


def _subjects() -> list[str]:
    """Return the names of MMLU's subjects, which lm-eval has a file for."""
    files = (Path(lm_eval.__file__).parent / "tasks/mmlu/default").glob("mmlu_*.yaml")
    return sorted(file.stem.removeprefix("mmlu_") for file in files)


def _question(subject: str, split: str, number: int) -> dict[str, Any]:
    """Make up a question with four different choices."""
    choices = [f"“{subject}” {number} plus {choice}" for choice in range(4)]
    if subject == "abstract_algebra":
        choices = [str(number + choice) for choice in range(4)]
    return {
        "question": f" What is {split} question {number} of {subject}? ",
        "subject": subject,
        "choices": choices,
        "answer": (number + len(subject)) % 4,
    }


def offer_only(folder: str, patch: pytest.MonkeyPatch) -> None:
    """Restrict lm-eval's list to the tasks of one folder.

    Reading its nine thousand files takes five seconds.
    """
    from lm_eval.tasks import _index

    # the function without its cache, so that other tests see the whole list
    patch.setattr(evaluation, "_manager", evaluation._manager.__wrapped__)
    shipped = Path(_index.__file__).parent
    list_files = _index.TaskIndex._iter_yaml_files

    def list_files_of_folder(root: Path) -> Any:
        # our own tasks are in another root
        if Path(root) == shipped:
            return list_files(root / folder)
        return list_files(root)

    patch.setattr(_index.TaskIndex, "_iter_yaml_files", list_files_of_folder)


def tiny_run(
    method: str = "emoe",
    tuning: str = "lora",
    changes: Mapping[str, Any] | None = None,
    **sections: Any,
) -> Run:
    """Return a run of the smoke suite on the set ``own``, with no task of lm-eval.

    Args:
        method: The name of the method.
        tuning: The name of the fine-tuning; ``base`` for none.
        changes: Values to change in the spec, by section. A section that is no dictionary is
            replaced.
        **sections: The same as ``changes``.
    """
    spec = copy.deepcopy(_planned_spec(method, tuning))
    spec["task"] = {"name": "own", "source": {}}
    spec["data"].update({"max_length": 48, "train_rows": 12, "held_out_rows": 6})
    spec["evaluation"].update({"tasks": [], "generations": 1})
    if "steps" in spec["training"]:
        spec["training"].update(
            {"epochs": 2, "batch_size": 4, "per_device_train_batch_size": 2, "save_steps": 2}
        )
    for section, values in {**(changes or {}), **sections}.items():
        if isinstance(values, dict):
            spec[section] = {**spec[section], **values}
        else:
            spec[section] = values
    return run_from_spec(spec)


def _planned_spec(method: str, tuning: str) -> dict[str, Any]:
    """Return the spec of the first run of a method and a fine-tuning in the smoke suite."""
    for run in plan(["llama"], "smoke"):
        if run.method == method and run.spec["finetuning"] == tuning:
            return run.spec
    raise LookupError(f"the smoke suite has no run of {method} with the fine-tuning {tuning}")
