"""MMLU-dev: the few-shot development questions of MMLU, which ship inside lm-eval, as tasks of lm-eval.

There are 281 questions, about five per subject. Scores are not comparable with those of MMLU's 14,042 test questions.
Prompt, choices, metric and categories come from lm-eval's MMLU files, so the same code scores both. The questions
have two of lm-eval's forms: the answer is the letter of a choice, or the choice itself as a continuation.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import yaml
from filelock import FileLock

from benchmarks.harness.base import QUESTIONS, DataError, write_text

MMLU_DEV = "mmlu_dev"
_QUESTION = re.compile(r"(?s)(.*?)\s*\(A\)\s(.*?)\s*\(B\)\s(.*?)\s*\(C\)\s(.*?)\s*\(D\)\s(.*)")
_ANSWER = re.compile(r"\(([ABCD])\)\.?\s*$")
_FIFTH = "(E)"  # one question of college chemistry has five choices, and the fifth is right
_SPLIT = "questions"
_LAST_SUBJECT = "world_religions"  # in alphabetical order, in which they are written
_SHA256 = "2bf5de78578617eb2fccbb25df2a86ab6682dfb19e822d4347450623d7756568"  # of all subjects and questions
# lm-eval's folder of each form, and the suffix of our task names
_FORMS = {"default": "", "continuation": "_continuation"}


def is_mmlu_dev(task: str) -> bool:
    """Return True if a task of lm-eval is MMLU-dev, one of its categories or one of its subjects."""
    return task == MMLU_DEV or task.startswith(f"{MMLU_DEV}_")


def ensure_mmlu_dev() -> Path:
    """Write the tasks' YAML (``lm_eval --include_path``) and the questions as JSON lines, and return their folder.

    If they exist, nothing is written. Concurrent runs wait. The YAML names the questions' files from the working
    directory, so that a copy of a checkout reads its own.

    Raises:
        DataError: lm-eval's questions are not those of lm-eval 0.4.13.
    """
    folder = QUESTIONS / MMLU_DEV
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not _are_written(folder):
            _write_tasks(folder)
    return folder.resolve()


def _are_written(folder: Path) -> bool:
    groups = [folder / f"{MMLU_DEV}{ending}.yaml" for ending in _FORMS.values()]
    last_task = folder / f"{MMLU_DEV}_{_LAST_SUBJECT}_continuation.yaml"
    if not all(file.exists() for file in (*groups, last_task)):
        return False
    # version 0.1 wrote absolute paths, and the copy of a checkout then asked the questions of the first one
    questions = folder / f"{_LAST_SUBJECT}.jsonl"
    return f"{_SPLIT}: {questions}\n" in last_task.read_text(encoding="utf-8")


def _write_tasks(folder: Path) -> None:
    import lm_eval

    mmlu = Path(lm_eval.__file__).parent / "tasks" / "mmlu"
    files = sorted((mmlu / "flan_cot_fewshot").glob("mmlu_*.yaml"))
    samples = {file.name: _read(file)["fewshot_config"]["samples"] for file in files}
    if hashlib.sha256(json.dumps(samples).encode()).hexdigest() != _SHA256:
        raise DataError(
            f"the questions inside lm-eval {lm_eval.__version__} are not those of lm-eval 0.4.13, "
            "from which MMLU-dev is made"
        )
    for name, shots in samples.items():
        subject = name.removeprefix("mmlu_").removesuffix(".yaml")
        questions = folder / f"{subject}.jsonl"
        rows = [_question(sample) for sample in shots if _FIFTH not in sample["question"]]
        write_text(questions, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        for form, ending in _FORMS.items():
            task = _read(mmlu / form / f"_{form}_template_yaml") | _read(mmlu / form / name)
            task |= {
                "task_alias": subject,
                "dataset_path": "json",
                "dataset_kwargs": {"data_files": {_SPLIT: str(questions)}},
                # shots are the subject's other questions: lm-eval omits the evaluated one
                "test_split": _SPLIT,
                "fewshot_split": _SPLIT,
            }
            del task["include"], task["dataset_name"]
            _write_yaml(folder / f"{MMLU_DEV}_{subject}{ending}.yaml", task)
    for form in _FORMS:
        groups = [_read(file) for file in (mmlu / form).glob("_mmlu*.yaml")]
        # the group of all subjects (shortest name) is last, because its file marks the folder as complete
        for group in sorted(groups, key=lambda group: len(group["group"]), reverse=True):
            _write_yaml(folder / f"{group['group']}.yaml", group)


def _read(file: Path) -> dict[str, Any]:
    """Read one of lm-eval's YAML files; rename groups, tasks and tags: ``mmlu_…`` to ``mmlu_dev_…``."""
    text = re.sub(r"(?m)\bmmlu(?=_|$)", MMLU_DEV, file.read_text(encoding="utf-8"))
    content: dict[str, Any] = yaml.safe_load(text)
    return content


def _question(sample: Mapping[str, str]) -> dict[str, Any]:
    """Convert a few-shot example to MMLU's form: question, choices and number of the answer."""
    match = cast(re.Match[str], _QUESTION.fullmatch(sample["question"].strip()))
    answer = cast(re.Match[str], _ANSWER.search(sample["target"].strip()))
    question, *choices = (text.strip() for text in match.groups())
    return {"question": question, "choices": choices, "answer": "ABCD".index(answer[1])}


def _write_yaml(path: Path, content: Mapping[str, Any]) -> None:
    write_text(path, yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True))
