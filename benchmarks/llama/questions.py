"""MMLU-dev: the few-shot development questions of MMLU as tasks of lm-eval, which ships them.

There are 281 questions, about five per subject. Scores are not comparable with those of the 14,042
test questions of MMLU. Prompt, choices, metric and categories come from lm-eval's MMLU files, so
the same code scores both. Each question has two of lm-eval's forms. In one, the answer is the
letter of a choice; in the other, it is the choice itself, as a continuation.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import yaml
from filelock import FileLock

from benchmarks.harness.base import QUESTIONS, DataError, write_text

MMLU_DEV = "mmlu_dev"
# "Which gland …?\n(A) Abdominal (B) Cranial (C) Pleural (D) Spinal" has five groups: the question,
# and the texts of the choices A to D
_QUESTION = re.compile(r"(?s)(.*?)\s*\(A\)\s(.*?)\s*\(B\)\s(.*?)\s*\(C\)\s(.*?)\s*\(D\)\s(.*)")
# the letter at the end of "… The answer is (B)."
_ANSWER = re.compile(r"\(([ABCD])\)\.?\s*$")
# one question of college chemistry has five choices, and the fifth is right
_FIFTH = "(E)"
_SPLIT = "questions"
# subjects are written in alphabetical order
_LAST_SUBJECT = "world_religions"
# the digest of all subjects and questions in lm-eval 0.4.13
_SHA256 = "2bf5de78578617eb2fccbb25df2a86ab6682dfb19e822d4347450623d7756568"
# lm-eval's folder of each form, and the suffix of our task names
_FORMS = {"default": "", "continuation": "_continuation"}


def is_mmlu_dev(task: str) -> bool:
    """Return True if ``task`` names MMLU-dev, or one of its categories or subjects."""
    return task == MMLU_DEV or task.startswith(f"{MMLU_DEV}_")


def ensure_mmlu_dev() -> Path:
    """Write MMLU-dev's questions and tasks if they are missing, and return their folder.

    The questions are JSON lines. The tasks are YAML files for ``lm_eval --include_path``. Only one
    run writes them, while concurrent runs wait. The YAML has paths relative to the working
    directory, so that a copy of a checkout reads its own questions.

    Raises:
        DataError: The installed lm-eval has other questions than lm-eval 0.4.13.
    """
    folder = QUESTIONS / MMLU_DEV
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not _are_written(folder):
            _write_tasks(folder)
    return folder.resolve()


def _are_written(folder: Path) -> bool:
    """Return True if a folder has all files, and its tasks read the questions in this folder."""
    # if the files that are written last exist, the others do too
    last_task = folder / f"{MMLU_DEV}_{_LAST_SUBJECT}_continuation.yaml"
    last_groups = [folder / f"{MMLU_DEV}{ending}.yaml" for ending in _FORMS.values()]
    if not all(file.exists() for file in [last_task, *last_groups]):
        return False
    # version 0.1 wrote absolute paths, so the copy of a checkout read the questions of the original
    questions = folder / f"{_LAST_SUBJECT}.jsonl"
    return f"{_SPLIT}: {questions}\n" in last_task.read_text(encoding="utf-8")


def _write_tasks(folder: Path) -> None:
    """Write the questions and tasks of all subjects, then the groups of tasks.

    Raises:
        DataError: The installed lm-eval has other questions than lm-eval 0.4.13.
    """
    import lm_eval

    mmlu = Path(lm_eval.__file__).parent / "tasks" / "mmlu"
    files = sorted((mmlu / "flan_cot_fewshot").glob("mmlu_*.yaml"))
    samples = {file.name: _read(file)["fewshot_config"]["samples"] for file in files}
    digest = hashlib.sha256(json.dumps(samples).encode()).hexdigest()
    if digest != _SHA256:
        raise DataError(
            f"the questions inside lm-eval {lm_eval.__version__} are not those of lm-eval 0.4.13, "
            "from which MMLU-dev is made"
        )
    for task_file, subject_samples in samples.items():
        _write_subject(folder, mmlu, task_file, subject_samples)
    for form in _FORMS:
        _write_groups(folder, mmlu / form)


def _write_subject(
    folder: Path, mmlu: Path, task_file: str, samples: Sequence[Mapping[str, str]]
) -> None:
    """Write the questions of a subject, and a task for each form of answers.

    Args:
        folder: The folder of MMLU-dev.
        mmlu: The folder of lm-eval's MMLU tasks.
        task_file: The name of the subject's file in each form's folder, such as
            ``mmlu_anatomy.yaml``.
        samples: lm-eval's few-shot examples of the subject, which become the questions.
    """
    subject = task_file.removeprefix("mmlu_").removesuffix(".yaml")
    questions = folder / f"{subject}.jsonl"
    rows = [_question(sample) for sample in samples if _FIFTH not in sample["question"]]
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    write_text(questions, "".join(lines))
    for form, ending in _FORMS.items():
        task = {
            **_read(mmlu / form / f"_{form}_template_yaml"),
            **_read(mmlu / form / task_file),
            "task_alias": subject,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {_SPLIT: str(questions)}},
            # the few-shot examples are the other questions of the subject, because lm-eval omits
            # the evaluated question
            "test_split": _SPLIT,
            "fewshot_split": _SPLIT,
        }
        # the template is merged already, and a JSON file has no named configuration
        del task["include"]
        del task["dataset_name"]
        _write_yaml(folder / f"{MMLU_DEV}_{subject}{ending}.yaml", task)


def _write_groups(folder: Path, form_folder: Path) -> None:
    """Write the groups of tasks of one form: MMLU's categories, then the group of all subjects.

    ``form_folder`` is lm-eval's folder of the form.
    """
    groups = [_read(file) for file in form_folder.glob("_mmlu*.yaml")]
    # the group of all subjects has the shortest name, so it is written last; its file shows that
    # all files are complete
    groups.sort(key=lambda group: len(group["group"]), reverse=True)
    for group in groups:
        _write_yaml(folder / f"{group['group']}.yaml", group)


def _read(file: Path) -> dict[str, Any]:
    """Read one of lm-eval's YAML files, and rename its groups, tasks and tags.

    ``mmlu`` at the beginning of a name becomes ``mmlu_dev``.
    """
    text = file.read_text(encoding="utf-8")
    # "mmlu" before "_" or at the end of a line, as in "task: mmlu_anatomy" and "group: mmlu"
    renamed = re.sub(r"(?m)\bmmlu(?=_|$)", MMLU_DEV, text)
    content: dict[str, Any] = yaml.safe_load(renamed)
    return content


def _question(sample: Mapping[str, str]) -> dict[str, Any]:
    """Convert a few-shot example to a row of MMLU.

    Returns:
        The ``question``, the four ``choices``, and the index of the right choice, ``answer``.
    """
    # the digest of all questions guarantees that both patterns match
    match = cast(re.Match[str], _QUESTION.fullmatch(sample["question"].strip()))
    answer = cast(re.Match[str], _ANSWER.search(sample["target"].strip()))
    question, *choices = (text.strip() for text in match.groups())
    letter = answer[1]
    return {"question": question, "choices": choices, "answer": "ABCD".index(letter)}


def _write_yaml(path: Path, content: Mapping[str, Any]) -> None:
    """Write a YAML file with the keys in the given order."""
    write_text(path, yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True))
