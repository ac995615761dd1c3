"""Evaluate a tuned model: tasks of lm-eval, held-out loss, and generated answers."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import math
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate.utils import send_to_device
from lm_eval import evaluate
from lm_eval.tasks import TaskManager
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.harness.base import DataError, DefinitionError, first_line
from benchmarks.harness.models.prefix import Prefix
from benchmarks.harness.sources.hub import commit_of, hub_name
from benchmarks.harness.training.trainer import autocast
from benchmarks.llama.definition import NATS, EvaluationTask, Instruction
from benchmarks.llama.encoding import IGNORED, EncodedRows, collator, without_prompt_logits
from benchmarks.llama.questions import draw_by_subject, is_mmlu, is_mmlu_dev, write_tasks
from benchmarks.llama.shared_prompt import SharedPromptLM
from benchmarks.llama.templates import Template
from emoe.errors import did_you_mean

# lm-eval's names of metrics
_ACCURACY = "acc"
_ACCURACY_BY_LENGTH = "acc_norm"
# the default seeds of lm-eval's command: the first for Python, the second for NumPy, torch and
# few-shot examples
_PYTHON_SEED = 0
_SEED = 1234


@dataclass(frozen=True)
class LoadedTask:
    """A task or group of lm-eval that can be evaluated once.

    Attributes:
        content: What lm-eval's task manager returns.
        tasks: The tasks by name: the task itself, or all tasks of the group.
        drawn: The indices of the drawn questions, by name of the task; None without a draw.
        sources: A text for each source of the questions, then a description of the draw, if any.
        note: A warning about an unexpected number of questions, or None.
    """

    content: Mapping[str, Any]
    tasks: Mapping[str, Any]
    drawn: dict[str, list[int]] | None
    sources: Sequence[str]
    note: str | None


def load_task(entry: EvaluationTask) -> LoadedTask:
    """Load a task or group of lm-eval, draw its questions, and check that it can be evaluated.

    Raises:
        DefinitionError: The task does not exist, executes code, or needs images. The requested
            few-shot examples are forbidden, or MMLU or MMLU-dev has too few. ``draw`` is below the
            number of tasks or above the number of questions. The tasks share no metric.
        DataError: The data of the task cannot be loaded.
    """
    where = f"'evaluation.tasks' names '{entry.task}'"  # the beginning of error messages
    # the folder of tasks that this suite writes for MMLU; None if lm-eval's own task is evaluated
    written = write_tasks(entry.task)
    manager = _manager(written.path if written else None)
    content = _load_content(entry.task, manager, where)
    # in a group, each subject is a task of its own
    tasks: dict[str, Any] = content["tasks"]
    for subject, task in tasks.items():
        _check_subject(entry, subject, task, where)
    metrics_of_tasks = [list(task.aggregation()) for task in tasks.values()]
    if _shared_metric(metrics_of_tasks) is None:
        raise DefinitionError(
            f"{where}, whose tasks are scored by different metrics; name them one by one"
        )

    if written is None:
        sources = _hub_sources(tasks)
        note = None
    else:
        sources = [written.source]
        note = written.note
    drawn = None
    if entry.draw is not None:
        drawn = _draw(entry.draw, tasks, where)
        sources.append(_describe_draw(drawn, tasks))
    return LoadedTask(content=content, tasks=tasks, drawn=drawn, sources=sources, note=note)


def _load_content(name: str, manager: TaskManager, where: str) -> dict[str, Any]:
    """Load a task or group by name with lm-eval's task manager.

    ``where`` is the beginning of an error message, which names the setting.

    Raises:
        DefinitionError: The manager has no such task.
        DataError: The data of the task cannot be loaded.
    """
    if name not in manager.all_tasks:
        raise DefinitionError(
            f"{where}, which lm-eval does not have{did_you_mean(name, manager.all_tasks)}"
        )
    try:
        content: dict[str, Any] = manager.load([name])
    except Exception as error:  # the hub, parsers and the task's own code raise many types
        raise DataError(f"lm-eval cannot load '{name}': {first_line(error)}") from error
    return content


def _draw(count: int, tasks: Mapping[str, Any], where: str) -> dict[str, list[int]]:
    """Draw questions of all tasks.

    Args:
        count: The number of questions.
        tasks: The tasks of lm-eval by name.
        where: The beginning of an error message, which names the setting.

    Returns:
        The indices of the drawn questions, by name of the task.

    Raises:
        DefinitionError: ``count`` is below the number of tasks or above the number of questions.
    """
    sizes = {name: len(task.eval_docs) for name, task in tasks.items()}
    available = sum(sizes.values())
    if count < len(tasks) or count > available:
        raise DefinitionError(
            f"{where} with 'draw: {count}', but it takes {len(tasks)} (one for each task) to "
            f"{available} questions"
        )
    return draw_by_subject(sizes, count)


def _describe_draw(drawn: Mapping[str, Sequence[int]], tasks: Mapping[str, Any]) -> str:
    """Describe the drawn questions by their number and a digest of their content."""
    digest = hashlib.sha256()
    count = 0
    available = 0
    for name, indices in drawn.items():
        questions = tasks[name].eval_docs
        for index in indices:
            content = json.dumps(questions[index], sort_keys=True, default=str)
            digest.update(content.encode())
        count += len(indices)
        available += len(questions)
    return f"{count:,} of {available:,} questions drawn, sha256 {digest.hexdigest()[:16]}"


def _check_subject(entry: EvaluationTask, subject: str, task: Any, where: str) -> None:
    """Check that one task of a group can be evaluated.

    Args:
        entry: The task or group in the run's settings.
        subject: The name of the task in lm-eval, such as a subject of MMLU.
        task: The task of lm-eval.
        where: The beginning of an error message, which names the setting.

    Raises:
        DefinitionError: The task executes code, needs images, or forbids the few-shot examples
            that ``entry`` requests. Or a subject of MMLU or MMLU-dev has fewer examples.
    """
    if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
        raise DefinitionError(f"{where}, but '{subject}' executes generated code or needs images")
    shots = entry.num_fewshot
    # 0 in lm-eval's own settings means that the task forbids few-shot examples
    if shots and task.get_config("num_fewshot") == 0:
        raise DefinitionError(
            f"{where} with {shots} shots, but '{subject}' has none in lm-eval; set 0"
        )
    if is_mmlu_dev(entry.task):
        # the few-shot examples are the subject's questions, without the evaluated question
        available = len(list(task.fewshot_docs())) - 1
        noun = "other questions"
    elif is_mmlu(entry.task):
        available = len(list(task.fewshot_docs()))
        noun = "few-shot questions"
    else:
        # other tasks may draw examples from a whole training split, which would take long to list
        return
    if shots > available:
        raise DefinitionError(f"{where} with {shots} shots, but '{subject}' has {available} {noun}")


def _hub_sources(tasks: Mapping[str, Any]) -> list[str]:
    """Return the repositories that lm-eval's tasks read, with their revisions or commits.

    The commit is recorded because lm-eval pins few of its sources.
    """
    sources = set()
    for task in tasks.values():
        loading_options = task.get_config("dataset_kwargs") or {}
        revision = loading_options.get("revision")
        sources.add(hub_name(task.DATASET_PATH, revision, commit_of(task.dataset)))
    return sorted(sources)


def _shared_metric(metrics_of_tasks: Sequence[Sequence[str]]) -> str | None:
    """Return the metric that all tasks share, preferably accuracy; None if they share none.

    Each task has a list of the names of its metrics.
    """
    # a metric that all tasks share is among the metrics of the first task
    for metric in (_ACCURACY, *metrics_of_tasks[0]):
        if all(metric in metrics for metrics in metrics_of_tasks):
            return metric
    return None


@functools.cache
def _manager(folder: Path | None) -> Any:
    """Return lm-eval's task manager for the tasks in a folder.

    If ``folder`` is None, it manages the tasks that lm-eval ships.
    """
    if folder is None:
        return TaskManager()
    # reading lm-eval's own list takes seconds
    return TaskManager(include_path=str(folder), include_defaults=False)


def run_task(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    entry: EvaluationTask,
    loaded: LoadedTask,
    batch_size: int,
    precision: str,
    prefix: Prefix | None = None,
) -> dict[str, Any]:
    """Evaluate one task or group of lm-eval.

    It does what ``lm_eval.simple_evaluate`` does, but does not load the task again.

    Args:
        model: The language model.
        tokenizer: The model's tokenizer.
        entry: The task or group in the run's settings.
        loaded: The result of :func:`load_task`.
        batch_size: The rows per batch.
        precision: The precision of the forward pass.
        prefix: The frozen layers of the model, if any.

    Returns:
        The summary of :func:`summarise`, and in ``source`` the list :attr:`LoadedTask.sources`.
    """
    mixed_precision_dtype = None
    if precision == "bf16":
        mixed_precision_dtype = torch.bfloat16
    wrapped = SharedPromptLM(
        prefix=prefix,
        pretrained=model,
        tokenizer=tokenizer,
        batch_size=batch_size,
        mixed_precision_dtype=mixed_precision_dtype,
    )
    # the seeds of lm-eval's command, so that it chooses the same few-shot examples
    random.seed(_PYTHON_SEED)
    np.random.seed(_SEED)
    torch.manual_seed(_SEED)
    for task in loaded.tasks.values():
        # 0 means that the task forbids few-shot examples, so it stays 0
        if task.get_config("num_fewshot") != 0:
            task.set_config(key="num_fewshot", value=entry.num_fewshot)
        task.set_fewshot_seed(seed=_SEED)
    result = evaluate(
        lm=wrapped,
        task_dict=loaded.content,
        limit=entry.limit,
        samples=loaded.drawn,
        log_samples=True,
        bootstrap_iters=0,  # no standard errors, because `summarise` omits them
        fewshot_as_multiturn=True,
    )
    return {**summarise(result), "source": list(loaded.sources)}


@dataclass(frozen=True)
class _Subjects:
    """The tasks (subjects) of an lm-eval result, without the groups of tasks.

    Attributes:
        counts: The number of questions of each task.
        metrics: The metrics of each task, by name.
    """

    counts: Mapping[str, int]
    metrics: Mapping[str, Mapping[str, float]]

    def count(self, names: Iterable[str]) -> int:
        """Count the questions of some tasks."""
        return sum(self.counts[name] for name in names)

    def mean(self, metric: str, names: Sequence[str]) -> float:
        """Average a metric over all questions of some tasks."""
        # a task's metric is a mean over its questions, so the product is their sum
        sums = [self.metrics[name][metric] * self.counts[name] for name in names]
        return sum(sums) / self.count(names)


def summarise(result: Mapping[str, Any]) -> dict[str, Any]:
    """Summarise lm-eval's result of a task or a group of tasks.

    Returns:
        - ``questions``: the number of questions.
        - ``metric``: lm-eval's name of the main metric, which is accuracy if all tasks have it.
        - ``categories``: the main metric of each category, which is a subgroup.
        - ``subjects``: all metrics of each subject, which is a task of the group.
        - ``scores``: means over all questions.
        - ``correct`` and ``nats_per_byte``: the results of single questions, by subject.
    """
    # "n-samples" has the tasks (subjects) only; groups of tasks are not in it
    counts = {name: int(count["effective"]) for name, count in result["n-samples"].items()}
    names = list(counts)
    values_by_subject = {name: _metric_values(result["results"][name]) for name in names}
    subjects = _Subjects(counts, values_by_subject)
    metrics_of_subjects = [list(values) for values in values_by_subject.values()]
    metric = _shared_metric(metrics_of_subjects)
    assert metric is not None  # noqa: S101  load_task checked it

    subjects_by_title = {}
    for name, values in values_by_subject.items():
        subjects_by_title[_title(result, name)] = {**values, "questions": counts[name]}
    summary = {
        "questions": subjects.count(names),
        "metric": metric,
        "categories": _summarise_categories(result, subjects, metric),
        "subjects": subjects_by_title,
    }
    # results of single questions are recorded only for tasks with an accuracy
    if metric == _ACCURACY:
        samples = {_title(result, name): result["samples"][name] for name in names}
        return {**summary, **_summarise_answers(subjects, samples)}
    task_score = subjects.mean(metric, names)
    return {**summary, "scores": {"task_score": task_score}, "correct": {}}


def _summarise_answers(
    subjects: _Subjects, samples: Mapping[str, Sequence[Mapping[str, Any]]]
) -> dict[str, Any]:
    """Summarise the answers to questions that are scored by accuracy.

    Args:
        subjects: The tasks, which all have an accuracy.
        samples: lm-eval's samples of each task, by title of the task.

    Returns:
        - ``scores``: the accuracies of :func:`_accuracies`, and the mean ``nats_per_byte``.
        - ``correct``: the digits of :func:`_correct_by_subject`.
        - ``nats_per_byte``: the numbers of :func:`nats_per_byte`, by title of the task. If a task
          has none, this key is missing, here and in ``scores``.
    """
    # a copy whose type allows None, because the mean nats may be None
    scores: dict[str, float | None] = {**_accuracies(subjects)}
    correct = _correct_by_subject(samples)
    nats = _nats_by_subject(samples)
    if nats is None:
        return {"scores": scores, "correct": correct}
    scores[NATS] = _mean_nats(nats)
    return {"scores": scores, "correct": correct, NATS: nats}


def _summarise_categories(
    result: Mapping[str, Any], subjects: _Subjects, metric: str
) -> dict[str, dict[str, float]]:
    """Average a metric over the questions of each category, and count these questions.

    A category is a group that has some of the tasks, but not all. Returns the metric (under its
    name) and the number of ``questions`` of each category, by its title.
    """
    categories = {}
    members_of_group = result.get("group_subtasks", {})
    for group in members_of_group:
        # a set, because a task in two subgroups is listed twice
        listed = set(_leaves(group, members_of_group))
        # each task once, in the order of the result
        members = [task for task in subjects.counts if task in listed]
        has_all_tasks = len(members) == len(subjects.counts)
        if members and not has_all_tasks:
            categories[_title(result, group)] = {
                metric: subjects.mean(metric, members),
                "questions": subjects.count(members),
            }
    return categories


def _accuracies(subjects: _Subjects) -> dict[str, float]:
    """Return the accuracies of all tasks together.

    Returns:
        - ``accuracy``: the mean over all questions.
        - ``accuracy_macro``: the mean of the accuracies of the tasks, if there are several.
        - ``accuracy_norm``: the mean over all questions of lm-eval's ``acc_norm`` (the accuracy if
          likelihoods are divided by the length of answers), if all tasks have it.
    """
    names = list(subjects.counts)
    accuracies = {"accuracy": subjects.mean(_ACCURACY, names)}
    if len(names) > 1:
        by_subject = [values[_ACCURACY] for values in subjects.metrics.values()]
        accuracies["accuracy_macro"] = sum(by_subject) / len(by_subject)
    if all(_ACCURACY_BY_LENGTH in values for values in subjects.metrics.values()):
        accuracies["accuracy_norm"] = subjects.mean(_ACCURACY_BY_LENGTH, names)
    return accuracies


def _correct_by_subject(samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, str]:
    """Return a text for each subject, with ``1`` for each right answer and ``0`` for a wrong one.

    The dictionary is empty if the accuracy of any question is neither 0 nor 1.
    """
    correct = {}
    for subject, rows in samples.items():
        digits = _correct_digits(rows)
        if digits is None:
            return {}
        correct[subject] = digits
    return correct


def _correct_digits(samples: Sequence[Mapping[str, Any]]) -> str | None:
    """Return a text with a digit per question: ``1`` for a right answer, ``0`` for a wrong one.

    The result is None if an accuracy is another number, as in truthfulqa_mc2.
    """
    accuracies = [float(sample[_ACCURACY]) for sample in _in_order(samples)]
    if not set(accuracies) <= {0.0, 1.0}:
        return None
    return "".join(str(int(accuracy)) for accuracy in accuracies)


def _nats_by_subject(
    samples: Mapping[str, Sequence[Mapping[str, Any]]],
) -> dict[str, list[float | None]] | None:
    """Return the nats per byte of each subject's right answers.

    The result is None if any subject has none, or if all answers of all subjects are single
    letters.
    """
    nats = {}
    for subject, rows in samples.items():
        values = nats_per_byte(rows)
        if values is None:
            return None
        nats[subject] = values
    # A letter only names a choice, so its likelihood is not that of the choice's text. All subjects
    # are checked together, because the choices of a small subject may all be numbers of one digit.
    all_samples = itertools.chain(*samples.values())
    has_only_letters = all(_answers_are_letters(sample) for sample in all_samples)
    if has_only_letters:
        return None
    return nats


def _mean_nats(nats: Mapping[str, Sequence[float | None]]) -> float | None:
    """Average nats per byte over all questions; None if a value is not finite."""
    values = list(itertools.chain.from_iterable(nats.values()))
    finite = [value for value in values if value is not None]
    if len(finite) < len(values):
        return None
    return sum(finite) / len(finite)


def nats_per_byte(samples: Sequence[Mapping[str, Any]]) -> list[float | None] | None:
    """Return the negative log-likelihood of each right answer, divided by the answer's bytes.

    As in lm-eval's ``acc_bytes``, blanks around an answer are not counted.

    Args:
        samples: The samples of one task of lm-eval.

    Returns:
        A number for each question, in the order of the questions. A number that is not finite is
        replaced by None. The whole result is None if the questions are not multiple-choice.
    """
    in_order = _in_order(samples)
    if not all(_is_choice(sample) for sample in in_order):
        return None
    nats = []
    for sample in in_order:
        right = sample["target"]  # the index of the right choice
        _prompt, right_answer = sample["arguments"][right]
        log_likelihood, _is_greedy = sample["filtered_resps"][right]
        value = -float(log_likelihood) / _count_bytes(right_answer)
        # JSON has no numbers that are not finite
        nats.append(round(value, 6) if math.isfinite(value) else None)
    return nats


def _in_order(samples: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Sort samples by the number of their question."""
    return sorted(samples, key=lambda sample: int(sample["doc_id"]))


def _is_choice(sample: Mapping[str, Any]) -> bool:
    """Return True if a sample has one prompt and several answers, and its target is one of them."""
    # the target must be a number; in other tasks it is a text, or True, which is also an int
    right = sample.get("target")
    if type(right) is not int:
        return False
    # there must be a request for each choice; other tasks have a single request
    requests = sample.get("arguments", ())
    if len(requests) < 2:
        return False
    # the number must be the index of a choice; otherwise lm-eval counts every answer as wrong
    if right not in range(len(requests)):
        return False
    # each request must be a prompt and an answer; others have only a text, or also an image
    if any(len(request) != 2 for request in requests):
        return False
    # all requests must have the same prompt; winogrande has the same answer to different prompts
    prompts = {prompt for prompt, _ in requests}
    if len(prompts) > 1:
        return False
    # the right answer must have a byte, because its likelihood is divided by its bytes
    _, right_answer = requests[right]
    return _count_bytes(right_answer) > 0


def _answers_are_letters(sample: Mapping[str, Any]) -> bool:
    """Return True if each answer of a sample is one ASCII character, such as ``A``."""
    return all(_count_bytes(answer) == 1 for _, answer in sample["arguments"])


def _count_bytes(answer: str) -> int:
    """Count the bytes of an answer without surrounding blanks."""
    return len(answer.strip().encode())


def _leaves(group: str, members_of_group: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """Yield the tasks of a group, including those of its subgroups."""
    for member in members_of_group.get(group, ()):
        if members_of_group.get(member):
            yield from _leaves(member, members_of_group)
        else:
            yield member


def _title(result: Mapping[str, Any], name: str) -> str:
    """Return lm-eval's title of a task or group, without the dashes that indent it."""
    values = result["results"].get(name, {})
    title = str(values.get("alias", name))
    return title.strip(" -")


def _metric_values(values: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics of a task by name, without standard errors.

    lm-eval's keys name a metric and a filter, such as ``acc,none``. The filter ``none`` is removed.
    """
    metrics = {}
    for key, value in values.items():
        # other keys, such as "alias", have no comma
        is_metric = "," in key and "_stderr" not in key
        if is_metric and isinstance(value, int | float):
            metrics[key.removesuffix(",none")] = float(value)
    return metrics


@torch.no_grad()
def held_out_loss(
    model: PreTrainedModel,
    rows: EncodedRows,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    precision: str,
) -> float | None:
    """Return the mean loss per response token of the rows, in nats; None if the model diverged."""
    model.eval()
    collate = without_prompt_logits(collator(tokenizer), model)
    # batches of rows with similar lengths have little padding
    lengths = rows.lengths
    shortest_first = sorted(range(len(rows)), key=lambda number: lengths[number])  # row numbers
    total_loss = 0.0
    total_tokens = 0
    for start in range(0, len(rows), batch_size):
        numbers = shortest_first[start : start + batch_size]
        batch = collate([rows[number] for number in numbers])
        inputs = send_to_device(dict(batch), model.device)
        # the logits of a token predict the next token, so the first label and the last logits
        # have no partner
        labels = inputs.pop("labels")[:, 1:]
        with autocast(model, precision):
            logits = model(**inputs).logits[:, :-1]
        # summed, because batches have different numbers of response tokens
        loss = F.cross_entropy(
            logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="sum"
        )
        total_loss += loss.item()
        total_tokens += int((labels != IGNORED).sum())
    mean = total_loss / total_tokens
    return mean if math.isfinite(mean) else None


@torch.no_grad()
def generate_answers(
    model: PreTrainedModel,
    template: Template,
    instructions: Sequence[Instruction],
    new_tokens: int,
    precision: str,
) -> list[dict[str, str]]:
    """Generate greedy answers, one instruction at a time.

    Returns:
        For each instruction, the texts ``instruction``, ``input``, ``reference`` and ``answer``.
    """
    model.eval()
    tokenizer = template.tokenizer
    answers = []
    for row in instructions:
        encoded = tokenizer(
            template.prompt(row), return_tensors="pt", add_special_tokens=template.special_tokens
        ).to(model.device)
        encoded.pop("token_type_ids", None)  # language models have no such input
        with autocast(model, precision):
            output = cast(Any, model).generate(
                **encoded,
                max_new_tokens=new_tokens,
                do_sample=False,
                use_cache=True,
                eos_token_id=template.end_tokens,
                pad_token_id=tokenizer.pad_token_id,
            )
        # the output begins with the prompt
        prompt_length = encoded["input_ids"].shape[1]
        answer = tokenizer.decode(output[0, prompt_length:], skip_special_tokens=True)
        answers.append(
            {
                "instruction": row.instruction,
                "input": row.input,
                "reference": row.output,
                "answer": str(answer),
            }
        )
    return answers
