"""Names of MMLU-dev: MMLU's development questions as tasks of lm-eval."""

from __future__ import annotations

from benchmarks.harness.base.paths import QUESTIONS

MMLU_DEV = "mmlu_dev"
MMLU_DEV_FILE = QUESTIONS / MMLU_DEV / f"{MMLU_DEV}.yaml"  # the workflow writes it


def is_mmlu_dev(task: str) -> bool:
    """Whether a task of lm-eval is made of MMLU's development questions: all of them, a category, or a subject."""
    return task == MMLU_DEV or task.startswith(f"{MMLU_DEV}_")
