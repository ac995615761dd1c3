"""MMLU as tasks of lm-eval: its test questions from a user's folder, and its development questions.

``mmlu`` and ``mmlu_continuation`` are lm-eval's own tasks. lm-eval reads their questions from the
hub. If the folder ``mmlu`` is below the data root, this module writes the same tasks for the
questions in that folder.

``mmlu_dev`` and ``mmlu_dev_continuation`` ask the few-shot development questions, which lm-eval
ships. There are 281 questions, about five per subject. Scores are not comparable with those of the
14,042 test questions.

Prompt, choices, metric and categories come from lm-eval's MMLU files, so the same code scores all
of them. Each question has two of lm-eval's forms. In one, the answer is the letter of a choice; in
the other (``_continuation``), it is the choice itself, as a continuation.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from codecs import BOM_UTF8
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import yaml
from filelock import FileLock
from pydantic import ValidationError

from benchmarks.harness.base import (
    QUESTIONS,
    DataError,
    derive_seed,
    first_line,
    first_problem_in_row,
    print_warning,
    read_bytes,
    read_json,
    write_json,
    write_text,
)
from benchmarks.harness.config.sets import SetPart
from benchmarks.harness.sources.hub import commit_of, hub_name
from benchmarks.harness.sources.local import expected_path, local_path
from benchmarks.harness.sources.packages import sha256
from benchmarks.llama.definition import Question
from emoe.errors import did_you_mean

MMLU = "mmlu"
MMLU_DEV = "mmlu_dev"
# the number of questions of each split of MMLU; few-shot examples come from the split `dev`
MMLU_ROWS = {"test": 14_042, "dev": 285}
_HUB = "cais/mmlu"
_FOLDER = {"folder": MMLU}
# lm-eval's folder of each form, and the suffix of the task names
_FORMS = {"default": "", "continuation": "_continuation"}
# "Which gland …?\n(A) Abdominal (B) Cranial (C) Pleural (D) Spinal" has five groups: the question,
# and the texts of the choices A to D
_QUESTION = re.compile(r"(?s)(.*?)\s*\(A\)\s(.*?)\s*\(B\)\s(.*?)\s*\(C\)\s(.*?)\s*\(D\)\s(.*)")
# the letter at the end of "… The answer is (B)."
_ANSWER = re.compile(r"\(([ABCD])\)\.?\s*$")
# one question of college chemistry has five choices, and the fifth is right
_FIFTH = "(E)"
# the only split of MMLU-dev
_SPLIT = "questions"
# in a folder of questions and tasks: the sha256 of the other files by name
_MANIFEST = "sha256.json"
# the digest of all subjects and questions in lm-eval 0.4.13
_SHA256 = "2bf5de78578617eb2fccbb25df2a86ab6682dfb19e822d4347450623d7756568"


@dataclass(frozen=True)
class TaskFolder:
    """A folder with tasks for lm-eval that this module wrote.

    Attributes:
        path: The folder.
        source: The source of the questions.
        note: A warning about an unexpected number of questions, or None.
    """

    path: Path
    source: str
    note: str | None = None


def is_mmlu(task: str) -> bool:
    """Return True if ``task`` names MMLU, or one of its categories or subjects, in either form."""
    name = _without_form(task)
    letters = _lm_eval_folder() / "default"
    # lm-eval has a file for each subject, and files such as `_mmlu_stem.yaml` for groups
    return (letters / f"{name}.yaml").exists() or (letters / f"_{name}.yaml").exists()


def is_mmlu_dev(task: str) -> bool:
    """Return True if ``task`` names MMLU-dev, or one of its categories or subjects."""
    return task == MMLU_DEV or task.startswith(f"{MMLU_DEV}_")


def write_tasks(task: str) -> TaskFolder | None:
    """Write the questions and lm-eval's tasks of MMLU or MMLU-dev, if they are missing.

    Args:
        task: The name of the task that will be evaluated.

    Returns:
        The folder of the tasks. None if lm-eval's own task is evaluated: ``task`` is neither MMLU
        nor MMLU-dev, or the data root has no folder ``mmlu``.

    Raises:
        DataError: MMLU's questions are missing or damaged, or the installed lm-eval has other
            development questions than lm-eval 0.4.13.
    """
    if is_mmlu_dev(task):
        return TaskFolder(ensure_mmlu_dev(), f"package lm-eval {version('lm-eval')}")
    data_folder = local_path(MMLU, _FOLDER)
    if data_folder is None or not is_mmlu(task):
        return None
    return _ensure_mmlu(data_folder)


def ensure_mmlu_dev() -> Path:
    """Write MMLU-dev's questions and tasks if they are missing, and return their folder.

    The questions are JSON lines. The tasks are YAML files for ``lm_eval --include_path``. Only one
    run writes them, while concurrent runs wait. The YAML has paths relative to the working
    directory, so that a copy of a checkout reads its own questions.

    Raises:
        DataError: The installed lm-eval has other questions than lm-eval 0.4.13.
    """
    folder = QUESTIONS / MMLU_DEV
    with _lock(folder):
        if not _is_written(folder):
            _write_dev(folder)
            _write_manifest(folder)
    return folder.resolve()


def describe_mmlu(split: str, _open_files: bool) -> Iterator[SetPart]:
    """Read a split of MMLU, ``test`` or ``dev``, and yield its description.

    The questions are always read as a whole, so ``_open_files`` is not used.
    """
    yield _describe_split(split)


def _describe_split(split: str) -> SetPart:
    """Describe a split of MMLU.

    If the split is missing or damaged, the description has the reason or the way to get it.
    """
    folder = local_path(MMLU, _FOLDER)
    try:
        if folder is None:
            return _describe_hub(split)
        by_subject = _read_questions(folder, split)
    except DataError as error:
        advice = f"{MMLU}: {first_line(error)}"
        # without a folder, the hub's error helps less than the ways to get MMLU
        if folder is None:
            advice = _advice()
        return SetPart(MMLU, split, rows=None, expected=MMLU_ROWS[split], advice=advice)
    return _describe_questions(folder, split, by_subject)


def draw_by_subject(sizes: Mapping[str, int], count: int) -> dict[str, list[int]]:
    """Draw questions of every subject, in proportion to the number of its questions.

    Every subject has at least one drawn question. The draw depends only on the names and sizes of
    the subjects. Both forms of a task have the same draw. A larger draw contains a smaller one.

    Args:
        sizes: The number of questions of each subject, by the name of the subject's task.
        count: The number of questions to draw, from one per subject to all.

    Returns:
        The indices of each subject's drawn questions, in ascending order, by the name of the task.
    """
    drawn = {}
    for name, drawn_count in _share_draw(sizes, count).items():
        # the order does not depend on the count, so that a larger draw contains a smaller one
        order = list(range(sizes[name]))
        random.Random(derive_seed("drawn questions", _without_form(name))).shuffle(order)
        drawn[name] = sorted(order[:drawn_count])
    return drawn


def _share_draw(sizes: Mapping[str, int], count: int) -> dict[str, int]:
    """Share the drawn questions among the subjects with Webster's method, at least one each.

    The arguments are those of :func:`draw_by_subject`.

    Returns:
        The number of questions to draw of each subject, by the name of the subject's task.
    """
    # sorted without the form, so that ties end in the same way for both forms
    names = sorted(sizes, key=_without_form)
    counts = dict.fromkeys(names, 1)
    num_left = count - len(names)
    for _ in range(num_left):
        # the subject with the lowest (2n + 1) / size gets the next question, where n is its count
        # so far; `min` returns the first of equal quotients
        quotients = {name: (2 * counts[name] + 1) / sizes[name] for name in names}
        next_name = min(names, key=lambda name: quotients[name])
        counts[next_name] += 1
    return counts


def _without_form(task: str) -> str:
    """Return the name of a task without the suffix of its form."""
    return task.removesuffix(_FORMS["continuation"])


def _lm_eval_folder() -> Path:
    """Return lm-eval's folder of MMLU's tasks."""
    import lm_eval

    return Path(lm_eval.__file__).parent / "tasks" / MMLU


def _subjects() -> list[str]:
    """Return the names of MMLU's subjects in alphabetical order."""
    files = (_lm_eval_folder() / "default").glob("mmlu_*.yaml")
    return sorted(file.stem.removeprefix("mmlu_") for file in files)


def _lock(folder: Path) -> FileLock:
    """Return the lock that a run holds while it writes the tasks in a folder."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(folder.with_name(f"{folder.name}.lock"))


def _ensure_mmlu(data_folder: Path) -> TaskFolder:
    """Write tasks for the questions in a user's folder if they are missing.

    The written folder is named after the digest of the questions, so edited questions get new
    tasks.

    Raises:
        DataError: A file is missing or damaged.
    """
    questions = {split: _read_questions(data_folder, split) for split in MMLU_ROWS}
    digest = _digest(questions)
    # prompts come from lm-eval, so another version gets other tasks, too
    folder = QUESTIONS / f"{MMLU}-{version('lm-eval')}-{digest}"
    with _lock(folder):
        if not _is_written(folder):
            _write_mmlu(folder, questions)
            _write_manifest(folder)
    source = f"{data_folder}, sha256 {digest} of test and dev"
    note = _describe_questions(data_folder, "test", questions["test"]).note
    return TaskFolder(folder.resolve(), source, note)


def _digest(questions: Mapping[str, Mapping[str, Sequence[Question]]]) -> str:
    """Return 16 hex digits of the hash of all questions, which are given by split and subject."""
    digest = hashlib.sha256()
    for by_subject in questions.values():
        for subject_questions in by_subject.values():
            for question in subject_questions:
                digest.update(question.model_dump_json().encode())
    return digest.hexdigest()[:16]


def _read_questions(data_folder: Path, split: str) -> dict[str, list[Question]]:
    """Read the questions of a split from JSON lines. Empty lines are skipped.

    Returns:
        The questions of every subject, in the order of the file.

    Raises:
        DataError: The file is missing or damaged, has an unknown subject, or lacks a subject.
    """
    file = data_folder / f"{split}.jsonl"
    if not file.exists():
        raise DataError(f"{data_folder} has no file for the split '{split}': wanted {split}.jsonl")
    by_subject: dict[str, list[Question]] = {subject: [] for subject in _subjects()}
    lines = read_bytes(file).removeprefix(BOM_UTF8).split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        try:
            question = Question.model_validate_json(line)
        except ValidationError as error:
            problem = first_problem_in_row(error)
            raise DataError(f"{where}: {problem}") from None
        if question.subject not in by_subject:
            near = did_you_mean(question.subject, by_subject)
            raise DataError(f"{where}: MMLU has no subject '{question.subject}'{near}")
        by_subject[question.subject].append(question)
    for subject, questions in by_subject.items():
        if not questions:
            raise DataError(f"{file} has no question of the subject '{subject}'")
    return by_subject


def _describe_questions(
    data_folder: Path, split: str, by_subject: Mapping[str, Sequence[Question]]
) -> SetPart:
    """Describe the questions of a split in the user's folder, which are given by subject."""
    rows = sum(len(questions) for questions in by_subject.values())
    return SetPart(
        MMLU,
        split,
        rows,
        expected=MMLU_ROWS[split],
        labels=f"{len(by_subject)} subjects",
        source=str(data_folder / f"{split}.jsonl"),
    )


def _describe_hub(split: str) -> SetPart:
    """Describe a split on the hub, which has a configuration for each subject.

    Raises:
        DataError: A subject cannot be loaded.
    """
    import datasets  # takes seconds, and planning does not need it

    rows = 0
    sources = set()
    subjects = _subjects()
    for subject in subjects:
        try:
            loaded = datasets.load_dataset(_HUB, subject, split=split)
        except Exception as error:  # the hub, the network and parsers raise many types
            raise DataError(f"could not load {_HUB} from the hub: {first_line(error)}") from error
        rows += len(loaded)
        sources.add(hub_name(_HUB, None, commit_of(loaded)))
    return SetPart(
        MMLU,
        split,
        rows,
        expected=MMLU_ROWS[split],
        labels=f"{len(subjects)} subjects",
        source=", ".join(sorted(sources)),
    )


def _advice() -> str:
    """Return instructions to get MMLU."""
    files = ", ".join(f"{split}.jsonl" for split in MMLU_ROWS)
    columns = ", ".join(Question.model_fields)
    return (
        f"{MMLU}: on the hub as {_HUB}; `python -m benchmarks data` or the first run downloads "
        f"it.\n    Folder: {expected_path(_FOLDER)} ({files}; hub columns {columns}). "
        f"Without it: ask `{MMLU_DEV}` in `evaluation.tasks`"
    )


def _write_mmlu(folder: Path, questions: Mapping[str, Mapping[str, Sequence[Question]]]) -> None:
    """Write MMLU's questions and tasks of all subjects, then the groups of tasks.

    ``questions`` has the questions by split and subject.
    """
    # settings of lm-eval's tasks: the split of evaluated questions, and that of few-shot examples
    splits = {"test_split": "test", "fewshot_split": "dev"}
    for subject in _subjects():
        files = {}  # by split
        for split, by_subject in questions.items():
            rows = [question.model_dump() for question in by_subject[subject]]
            file = folder / f"{subject}_{split}.jsonl"
            _write_rows(file, rows)
            files[split] = file
        _write_subject(folder, MMLU, subject, files, splits)
    _write_groups(folder, MMLU)


def _is_written(folder: Path) -> bool:
    """Return True if a folder has all questions and tasks as they were written.

    Prints a warning if one is missing or has changed. Folders of older versions have no manifest,
    so they are written again. Version 0.1 wrote absolute paths, so that a copied checkout read the
    questions of the original.
    """
    manifest = folder / _MANIFEST
    if not manifest.exists():
        return False
    try:
        digests = read_json(manifest, dict[str, str])
    except DataError as error:
        print_warning(f"{error}; the questions are written again")
        return False
    if not digests or digests != _digests_of_files(folder):
        print_warning(f"{folder} has changed since it was written; it is written again")
        return False
    return True


def _write_manifest(folder: Path) -> None:
    """Write the sha256 of all questions and tasks in a folder, when they are complete."""
    write_json(folder / _MANIFEST, _digests_of_files(folder))


def _digests_of_files(folder: Path) -> dict[str, str]:
    """Compute the sha256 of each file of questions or tasks in a folder, by name."""
    digests = {}
    for file in folder.iterdir():
        # the folder also has the manifest, and temporary files of killed processes
        if file.suffix in (".jsonl", ".yaml"):
            digests[file.name] = sha256(file)
    return digests


def _write_dev(folder: Path) -> None:
    """Write MMLU-dev's questions and tasks of all subjects, then the groups of tasks.

    Raises:
        DataError: The installed lm-eval has other questions than lm-eval 0.4.13.
    """
    # the few-shot examples of each subject, by name of lm-eval's file
    samples: dict[str, list[dict[str, str]]] = {}
    for file in sorted((_lm_eval_folder() / "flan_cot_fewshot").glob("mmlu_*.yaml")):
        task = _read_renamed(file, MMLU_DEV)
        samples[file.name] = task["fewshot_config"]["samples"]
    digest = hashlib.sha256(json.dumps(samples).encode()).hexdigest()
    if digest != _SHA256:
        raise DataError(
            f"the questions inside lm-eval {version('lm-eval')} are not those of lm-eval 0.4.13, "
            "from which MMLU-dev is made"
        )
    for file_name, samples_of_subject in samples.items():
        subject = file_name.removeprefix("mmlu_").removesuffix(".yaml")
        rows = []
        for sample in samples_of_subject:
            # a question with five choices does not fit MMLU's form
            if _FIFTH not in sample["question"]:
                rows.append(_convert(sample))
        questions = folder / f"{subject}.jsonl"
        _write_rows(questions, rows)
        # the few-shot examples are the other questions of the subject, because lm-eval omits the
        # evaluated question
        splits = {"test_split": _SPLIT, "fewshot_split": _SPLIT}
        _write_subject(folder, MMLU_DEV, subject, {_SPLIT: questions}, splits)
    _write_groups(folder, MMLU_DEV)


def _write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write questions as JSON lines."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    write_text(path, "".join(lines))


def _write_subject(
    folder: Path, name: str, subject: str, files: Mapping[str, Path], splits: Mapping[str, str]
) -> None:
    """Write the tasks of a subject: one for each form of answers.

    Args:
        folder: The folder of the tasks.
        name: ``mmlu`` or ``mmlu_dev``, with which the name of the task begins.
        subject: The name of the subject, such as ``anatomy``.
        files: The file of questions of each split.
        splits: Two names of splits: ``test_split`` for the evaluated questions, and
            ``fewshot_split`` for the few-shot examples.
    """
    data_files = {split: str(file) for split, file in files.items()}
    for form, ending in _FORMS.items():
        form_folder = _lm_eval_folder() / form
        task = {
            **_read_renamed(form_folder / f"_{form}_template_yaml", name),
            **_read_renamed(form_folder / f"mmlu_{subject}.yaml", name),
            "task_alias": subject,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": data_files},
            **splits,
        }
        # the template is merged already, and a JSON file has no named configuration
        del task["include"]
        del task["dataset_name"]
        _write_yaml(folder / f"{name}_{subject}{ending}.yaml", task)


def _write_groups(folder: Path, name: str) -> None:
    """Write the groups of tasks for each form of the questions.

    The groups are MMLU's categories and the group of all subjects. The name of a group begins with
    ``name``, which is ``mmlu`` or ``mmlu_dev``.
    """
    for form in _FORMS:
        files = (_lm_eval_folder() / form).glob("_mmlu*.yaml")
        groups = [_read_renamed(file, name) for file in files]
        for group in groups:
            _write_yaml(folder / f"{group['group']}.yaml", group)


def _read_renamed(file: Path, name: str) -> dict[str, Any]:
    """Read one of lm-eval's YAML files, and rename its groups, tasks and tags.

    ``mmlu`` at the beginning of a name becomes ``name``.
    """
    text = file.read_text(encoding="utf-8")
    # "mmlu" before "_" or at the end of a line, as in "task: mmlu_anatomy" and "group: mmlu"
    renamed = re.sub(r"(?m)\bmmlu(?=_|$)", name, text)
    content: dict[str, Any] = yaml.safe_load(renamed)
    return content


def _convert(sample: Mapping[str, str]) -> dict[str, Any]:
    """Convert a few-shot example to a row of MMLU.

    Returns:
        The ``question``, the four ``choices``, and the index of the right choice, ``answer``.
    """
    # the digest of all questions guarantees that both patterns match
    match = cast(re.Match[str], _QUESTION.fullmatch(sample["question"].strip()))
    answer = cast(re.Match[str], _ANSWER.search(sample["target"].strip()))
    texts = [text.strip() for text in match.groups()]
    return {"question": texts[0], "choices": texts[1:], "answer": "ABCD".index(answer[1])}


def _write_yaml(path: Path, content: Mapping[str, Any]) -> None:
    """Write a YAML file with the keys in the given order."""
    write_text(path, yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True))
