"""Names of MMLU-dev: MMLU's development questions as tasks of lm-eval, asked by letters and by continuations."""

from __future__ import annotations

from pathlib import Path

from benchmarks.harness.base.paths import QUESTIONS

MMLU_DEV = "mmlu_dev"
CONTINUATION = "continuation"
"""Last word of the tasks in which answers are not letters, but continue the question."""


def is_mmlu_dev(task: str) -> bool:
    """Whether a task of lm-eval is made of MMLU's development questions: all of them, a category, or a subject."""
    return task == MMLU_DEV or task.startswith(f"{MMLU_DEV}_")


def mmlu_dev_file(task: str) -> Path:
    """The file that is there when such a task is; the workflow writes it."""
    form = f"_{CONTINUATION}" if task.endswith(f"_{CONTINUATION}") else ""
    return QUESTIONS / MMLU_DEV / f"{MMLU_DEV}{form}.yaml"
