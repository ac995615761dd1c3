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
from typing import Any

import yaml

from benchmarks.harness.base import DataError, hold, write_text

MMLU_DEV = "mmlu_dev"
_CHOICES = re.compile(r"(?s)(.*?)\s*\(A\)\s(.*?)\s*\(B\)\s(.*?)\s*\(C\)\s(.*?)\s*\(D\)\s(.*)")
_ANSWER = re.compile(r"\(([ABCD])\)\.?\s*$")
_FIFTH = "(E)"  # one question of college chemistry has five choices, and the fifth is right
_SPLIT = "questions"
_SHA256 = "5a94b761c7aa948a3d5117848440662f6cd9a2a44821344f95f550d02f4bf8bf"  # of all subjects and questions
# lm-eval's folder of each form, and the suffix of our task names
_FORMS = {"default": "", "continuation": "_continuation"}


def ensure_mmlu_dev(folder: Path) -> None:
    """Write the tasks into a folder unless they exist; concurrent runs wait."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with hold(folder.with_suffix(".lock")):
        if not all((folder / f"{MMLU_DEV}{ending}.yaml").exists() for ending in _FORMS.values()):
            write_mmlu_dev(folder)


def write_mmlu_dev(folder: Path) -> int:
    """Write the tasks' YAML (``lm_eval --include_path``) and the questions as JSON lines; return their number.

    Raises:
        DataError: lm-eval's questions are not those of lm-eval 0.4.13.
    """
    import lm_eval

    mmlu = Path(lm_eval.__file__).parent / "tasks" / "mmlu"
    shots = sorted((mmlu / "flan_cot_fewshot").glob("mmlu_*.yaml"))
    count, everything = 0, hashlib.sha256()
    for file in shots:
        subject = file.stem.removeprefix("mmlu_")
        samples = _read(file)["fewshot_config"]["samples"]
        questions = [_question(sample, file) for sample in samples if _FIFTH not in sample["question"]]
        count += len(questions)
        everything.update(json.dumps([subject, questions]).encode())
        lines = (json.dumps(question, ensure_ascii=False) + "\n" for question in questions)
        write_text(folder / f"{subject}.jsonl", "".join(lines))
        for form, ending in _FORMS.items():
            template, task = (_read(mmlu / form / name) for name in (f"_{form}_template_yaml", file.name))
            _write_task(folder / f"{MMLU_DEV}_{subject}{ending}.yaml", _subject(template, task, subject, folder))
    if everything.hexdigest() != _SHA256:
        raise DataError(
            f"the questions inside lm-eval {lm_eval.__version__} are not those of lm-eval 0.4.13, "
            "from which MMLU-dev is made"
        )
    for form, ending in _FORMS.items():
        groups = [_rename_to_dev(_read(file)) for file in sorted((mmlu / form).glob("_mmlu*.yaml"))]
        # the group of all subjects is last, because its file marks the folder as complete
        for group in sorted(groups, key=lambda group: group["group"] == f"{MMLU_DEV}{ending}"):
            _write_task(folder / f"{group['group']}.yaml", group)
    return count


def _read(file: Path) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
    return content


def _question(sample: Mapping[str, str], file: Path) -> dict[str, Any]:
    """Convert a few-shot example to MMLU's form: question, choices and number of the answer."""
    match, answer = _CHOICES.fullmatch(sample["question"].strip()), _ANSWER.search(sample["target"].strip())
    if match is None or answer is None:
        raise DataError(f"{file}: cannot read the question '{sample['question'][:60]}…'")
    question, *choices = (text.strip() for text in match.groups())
    return {"question": question, "choices": choices, "answer": "ABCD".index(answer[1])}


def _subject(template: Mapping[str, Any], task: Mapping[str, Any], subject: str, folder: Path) -> dict[str, Any]:
    task = {key: value for key, value in task.items() if key not in ("include", "dataset_name")}
    return {
        **template,
        "task_alias": subject,
        **_rename_to_dev(task),
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {_SPLIT: str((folder / f"{subject}.jsonl").resolve())}},
        # shots are the other questions of the subject: lm-eval leaves out the one that is asked
        "test_split": _SPLIT,
        "fewshot_split": _SPLIT,
    }


def _rename_to_dev(content: Any) -> Any:
    """Rename groups, tasks and tags in lm-eval's definitions: ``mmlu_…`` becomes ``mmlu_dev_…``."""
    if isinstance(content, Mapping):
        return {
            key: _rename_to_dev(value) if key in ("group", "task", "tag") else value for key, value in content.items()
        }
    if isinstance(content, list):
        return [_rename_to_dev(value) for value in content]
    return re.sub(r"^mmlu(?=_|$)", MMLU_DEV, content)


def _write_task(path: Path, content: Mapping[str, Any]) -> None:
    write_text(path, yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True))


def is_mmlu_dev(task: str) -> bool:
    """Return True if a task of lm-eval is MMLU-dev, one of its categories or one of its subjects."""
    return task == MMLU_DEV or task.startswith(f"{MMLU_DEV}_")
