"""Evaluate a tuned model: tasks of lm-eval, held-out loss, and generated answers."""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
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
from benchmarks.llama.questions import ensure_mmlu_dev, is_mmlu_dev
from benchmarks.llama.shared_prompt import SharedPromptLM
from benchmarks.llama.templates import Template
from emoe.errors import did_you_mean

_ACCURACY, _BY_LENGTH = "acc", "acc_norm"
_SEED, _OTHER_SEED = (
    0,
    1234,
)  # defaults of lm-eval's command: Python; NumPy, torch and few-shot examples


def load_task(entry: EvaluationTask) -> dict[str, Any]:
    """Load a task of lm-eval, and check that it can be evaluated. The result can be evaluated only once.

    Raises:
        DefinitionError: The task does not exist, executes code, needs images, or has too few few-shot examples.
        DataError: The data of the task cannot be loaded.
    """
    name, shots, is_dev = entry.task, entry.num_fewshot, is_mmlu_dev(entry.task)
    manager = _manager(ensure_mmlu_dev() if is_dev else None)
    where = f"'evaluation.tasks' names '{name}'"
    if name not in manager.all_tasks:
        raise DefinitionError(
            f"{where}, which lm-eval does not have{did_you_mean(name, manager.all_tasks)}"
        )
    try:
        loaded: dict[str, Any] = manager.load([name])
    except Exception as error:  # the hub, parsers and the task's own code raise many types
        raise DataError(f"lm-eval cannot load '{name}': {first_line(error)}") from error
    tasks = loaded["tasks"]
    for subject, task in tasks.items():
        if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
            raise DefinitionError(
                f"{where}, but '{subject}' executes generated code or needs images"
            )
        if shots and task.get_config("num_fewshot") == 0:
            raise DefinitionError(
                f"{where} with {shots} shots, but '{subject}' has none in lm-eval; set 0"
            )
        if is_dev and shots > (
            others := len(list(task.fewshot_docs())) - 1
        ):  # except the question itself
            raise DefinitionError(
                f"{where} with {shots} shots, but '{subject}' has {others} other questions"
            )
    if _shared_metric([list(task.aggregation()) for task in tasks.values()]) is None:
        raise DefinitionError(
            f"{where}, whose tasks are scored by different metrics; name them one by one"
        )
    return loaded


def _source(name: str, task: Any) -> str:
    """Return the source of a task's questions, with its revision or commit; lm-eval pins few of them."""
    if is_mmlu_dev(name):
        return f"package lm-eval {version('lm-eval')}"
    revision = (task.get_config("dataset_kwargs") or {}).get("revision")
    return hub_name(task.DATASET_PATH, revision, commit_of(task.dataset))


def _shared_metric(metrics: Sequence[Sequence[str]]) -> str | None:
    """Return the metric that all tasks share, preferably accuracy; None if they share none."""
    shared = [metric for metric in metrics[0] if all(metric in names for names in metrics)]
    return _ACCURACY if _ACCURACY in shared else next(iter(shared), None)


@functools.cache
def _manager(folder: Path | None) -> Any:
    # reading lm-eval's own list takes seconds
    return (
        TaskManager()
        if folder is None
        else TaskManager(include_path=str(folder), include_defaults=False)
    )


def run_task(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    entry: EvaluationTask,
    loaded: Mapping[str, Any],
    batch_size: int,
    precision: str,
    prefix: Prefix | None = None,
) -> dict[str, Any]:
    """Evaluate one task or group of lm-eval, like ``lm_eval.simple_evaluate`` but without loading the task again.

    Returns:
        ``scores``, ``metric``, the number of ``questions``, all metrics of the ``subjects`` and the ``categories``
        (subgroups), ``correct`` (a digit per question) and ``nats_per_byte`` by subject, and ``source``. The scores are
        ``accuracy`` over all questions, ``accuracy_macro`` over subjects, and ``accuracy_norm`` and ``nats_per_byte``
        if the task has them; a task without accuracy has only ``task_score``.
    """
    wrapped = SharedPromptLM(
        prefix=prefix,
        pretrained=model,
        tokenizer=tokenizer,
        batch_size=batch_size,
        mixed_precision_dtype=torch.bfloat16 if precision == "bf16" else None,
    )
    random.seed(_SEED)
    np.random.seed(_OTHER_SEED)
    torch.manual_seed(_OTHER_SEED)
    tasks = loaded["tasks"].values()
    for task in tasks:
        if task.get_config("num_fewshot") != 0:  # 0 means that the task forbids few-shot examples
            task.set_config(key="num_fewshot", value=entry.num_fewshot)
        task.set_fewshot_seed(seed=_OTHER_SEED)
    result = evaluate(
        lm=wrapped,
        task_dict=loaded,
        limit=entry.limit,
        log_samples=True,
        bootstrap_iters=0,
        fewshot_as_multiturn=True,
    )
    return {**summarise(result), "source": sorted({_source(entry.task, task) for task in tasks})}


def summarise(result: Mapping[str, Any]) -> dict[str, Any]:
    """Summarise lm-eval's result by subject and category; see :func:`run_task`."""
    counts = {
        name: int(samples["effective"]) for name, samples in result["n-samples"].items()
    }  # groups have none
    subjects = {name: _metric_values(result["results"][name]) for name in counts}
    metric = _shared_metric([list(values) for values in subjects.values()])
    assert metric is not None  # noqa: S101  load_task checked it

    def mean(names: Iterable[str], of: str = metric) -> float:
        return sum(subjects[name][of] * counts[name] for name in names) / sum(
            counts[name] for name in names
        )

    members, categories = result.get("group_subtasks", {}), {}
    for group in members:
        leaves = [leaf for leaf in _leaves(group, members) if leaf in counts]
        if 0 < len(leaves) < len(counts):
            questions = sum(counts[leaf] for leaf in leaves)
            categories[_alias(result, group)] = {metric: mean(leaves), "questions": questions}
    summary = {
        "questions": sum(counts.values()),
        "metric": metric,
        "categories": categories,
        "subjects": {
            _alias(result, name): values | {"questions": counts[name]}
            for name, values in subjects.items()
        },
    }
    if metric != _ACCURACY:
        return {**summary, "scores": {"task_score": mean(counts)}, "correct": {}}
    scores: dict[str, float | None] = {"accuracy": mean(counts)}
    if len(counts) > 1:
        scores["accuracy_macro"] = sum(values[metric] for values in subjects.values()) / len(
            subjects
        )
    if all(_BY_LENGTH in values for values in subjects.values()):
        scores["accuracy_norm"] = mean(counts, _BY_LENGTH)
    samples = {_alias(result, name): result["samples"][name] for name in counts}
    correct = {subject: _correct_digits(rows) for subject, rows in samples.items()}
    summary |= {"scores": scores, "correct": correct if None not in correct.values() else {}}
    nats = {subject: nats_per_byte(rows) for subject, rows in samples.items()}
    if None not in nats.values():
        every = [value for values in nats.values() for value in values or ()]
        scores[NATS] = sum(cast(list[float], every)) / len(every) if None not in every else None
        summary[NATS] = nats
    return summary


def _correct_digits(samples: Sequence[Mapping[str, Any]]) -> str | None:
    """Return a text with ``1`` or ``0`` per question; None if accuracies are not binary (truthfulqa_mc2)."""
    values = [
        float(sample[_ACCURACY])
        for sample in sorted(samples, key=lambda sample: int(sample["doc_id"]))
    ]
    return "".join(str(int(value)) for value in values) if set(values) <= {0.0, 1.0} else None


def nats_per_byte(samples: Sequence[Mapping[str, Any]]) -> list[float | None] | None:
    """Return the negative log-likelihood of each right answer, divided by its bytes.

    It differs between models even if their accuracy is at chance.

    Args:
        samples: The samples of one task of lm-eval.

    Returns:
        A number per question in order, None if it is not finite. Instead of the list, None if questions do not have
        several answers to one prompt, or answers are letters. As in ``acc_bytes``, surrounding blanks do not count.
    """
    in_order = sorted(samples, key=lambda sample: int(sample["doc_id"]))
    if not all(_is_choice(sample) for sample in in_order):
        return None
    if all(_bytes(answer) == 1 for sample in in_order for _, answer in sample["arguments"]):
        return None
    nats = []
    for sample in in_order:
        right = sample["target"]
        value = -float(sample["filtered_resps"][right][0]) / _bytes(sample["arguments"][right][1])
        nats.append(round(value, 6) if math.isfinite(value) else None)
    return nats


def _is_choice(sample: Mapping[str, Any]) -> bool:
    """Return True if a sample has one prompt and several answers, one of them right."""
    asked, right = sample.get("arguments", ()), sample.get("target")
    if type(right) is not int or len(asked) < 2 or any(len(pair) != 2 for pair in asked):
        return False
    return len({prompt for prompt, _ in asked}) == 1 and _bytes(asked[right][1]) > 0


def _bytes(answer: str) -> int:
    return len(answer.strip().encode())


def _leaves(name: str, members: Mapping[str, Sequence[str]]) -> Iterator[str]:
    for member in members.get(name, ()):
        if members.get(member):
            yield from _leaves(member, members)
        else:
            yield member


def _alias(result: Mapping[str, Any], name: str) -> str:
    return str(result["results"].get(name, {}).get("alias", name)).strip(" -")


def _metric_values(values: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics of a task by name, without standard errors and lm-eval's suffix ``,none``."""
    return {
        key.removesuffix(",none"): float(value)
        for key, value in values.items()
        if isinstance(value, int | float) and "_stderr" not in key and "," in key
    }


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
    order = sorted(range(len(rows)), key=lambda i: len(rows.rows[i].tokens))
    total, tokens, collate = 0.0, 0, without_prompt_logits(collator(tokenizer), model)
    for start in range(0, len(order), batch_size):
        batch = collate([rows[i] for i in order[start : start + batch_size]])
        inputs = send_to_device(dict(batch), model.device)
        labels = inputs.pop("labels")[:, 1:]
        with autocast(model, precision):
            logits = model(**inputs).logits[:, :-1]
        loss = F.cross_entropy(
            logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="sum"
        )
        total, tokens = total + loss.item(), tokens + int((labels != IGNORED).sum())
    mean = total / tokens
    return mean if math.isfinite(mean) else None


@torch.no_grad()
def generate_answers(
    model: PreTrainedModel,
    template: Template,
    instructions: Sequence[Instruction],
    new_tokens: int,
    precision: str,
) -> list[dict[str, str]]:
    """Generate greedy answers, row by row; return ``instruction``, ``input``, ``reference`` and ``answer`` of each."""
    model.eval()
    tokenizer, rows = template.tokenizer, []
    for row in instructions:
        prompt, special = template.prompt(row), template.special_tokens
        encoded = tokenizer(prompt, return_tensors="pt", add_special_tokens=special).to(
            model.device
        )
        encoded.pop("token_type_ids", None)
        with autocast(model, precision):
            output = cast(Any, model).generate(
                **encoded,
                max_new_tokens=new_tokens,
                do_sample=False,
                use_cache=True,
                eos_token_id=template.end_tokens,
                pad_token_id=tokenizer.pad_token_id,
            )
        text = tokenizer.decode(
            output[0, encoded["input_ids"].shape[1] :], skip_special_tokens=True
        )
        rows.append(
            {
                "instruction": row.instruction,
                "input": row.input,
                "reference": row.output,
                "answer": str(text),
            }
        )
    return rows
