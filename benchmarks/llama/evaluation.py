"""What a tuned model is worth: tasks of lm-eval, the loss on held-out instructions, and answers to read."""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.harness.base.errors import DataError, DefinitionError, first_line
from benchmarks.harness.base.paths import QUESTIONS
from benchmarks.harness.models.loading import DTYPES
from benchmarks.harness.models.prefix import Prefix
from benchmarks.harness.sources.hub import commit_of, hub_name
from benchmarks.llama.definition import AskedTask
from benchmarks.llama.encoding import IGNORED, EncodedRows, collator, without_prompt_logits
from benchmarks.llama.instructions import Instruction
from benchmarks.llama.likelihood import NATS, nats_per_byte
from benchmarks.llama.questions import MMLU_DEV, is_mmlu_dev, mmlu_dev_file
from benchmarks.llama.templates import Template
from emoe.errors import did_you_mean

_ACCURACY, _BY_LENGTH, _FILTER = "acc", "acc_norm", "none"
_SEED, _OTHER_SEED = 0, 1234  # those of lm-eval's own command: Python's; NumPy's, torch's and that of the shots


@dataclass(frozen=True)
class LoadedTask:
    """A task or group of lm-eval, ready to be asked once.

    Attributes:
        entry: of ``evaluation.tasks``.
        found: what lm-eval loaded, tasks and groups.
        sources: where the questions came from.
    """

    entry: AskedTask
    found: dict[str, Any]
    sources: list[str]


def task_title(entry: AskedTask) -> str:
    """An entry of ``evaluation.tasks`` as records name it: ``mmlu (5-shot)``, ``mmlu_dev (0-shot, first 3)``."""
    limit = f", first {entry.limit}" if entry.limit else ""
    return f"{entry.task} ({entry.num_fewshot}-shot{limit})"


def load_tasks(tasks: Sequence[AskedTask]) -> list[LoadedTask]:
    """Load what lm-eval is asked for, and see that it can be run as asked, before any other work is done.

    Raises:
        DefinitionError: a task that does not exist, that needs what is not given here, or that has no such shots.
        DataError: MMLU-dev has not been written, or a task's data cannot be loaded.
    """
    return [_load(entry) for entry in tasks]


def _load(entry: AskedTask) -> LoadedTask:
    name = entry.task
    folder = _folder(name)
    if folder and not mmlu_dev_file(name).exists():
        raise DataError(
            f"{mmlu_dev_file(name)} does not exist; the workflow writes it, or `python -m benchmarks questions`"
        )
    known = _manager(folder).all_tasks
    if name not in known:
        raise DefinitionError(
            f"'evaluation.tasks' names '{name}', which lm-eval does not have{did_you_mean(name, known)}"
        )
    try:
        with _uncounted(folder):
            loaded = _manager(folder).load([name])
    except Exception as error:  # whatever hub, parser and the task's own code raise
        raise DataError(f"lm-eval cannot load '{name}': {first_line(error)}") from error
    tasks = loaded["tasks"]
    for task, found in tasks.items():
        _check_task(entry, task, found)
    if _shared_metric({task: list(found.aggregation()) for task, found in tasks.items()}) is None:
        raise DefinitionError(
            f"'evaluation.tasks' names '{name}', whose tasks are scored by different metrics; name them one by one"
        )
    return LoadedTask(entry, loaded, sorted({_source(name, found) for found in tasks.values()}))


def _source(name: str, task: Any) -> str:
    """Where the questions of a loaded task came from; lm-eval pins hardly any."""
    if _folder(name):
        return f"package lm-eval {version('lm-eval')}"
    asked = (task.get_config("dataset_kwargs") or {}).get("revision")
    return hub_name(task.DATASET_PATH, asked, commit_of(task.dataset))


def _check_task(entry: AskedTask, name: str, task: Any) -> None:
    """One of the tasks that an entry of ``evaluation.tasks`` stands for."""
    shots = entry.num_fewshot
    where = f"'evaluation.tasks' names '{entry.task}' with {shots} shots"
    if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
        raise DefinitionError(
            f"{where}, but '{name}' runs code that a model wrote, or shows images; neither is done here"
        )
    if shots and task.get_config("num_fewshot") == 0:
        raise DefinitionError(f"{where}, but '{name}' has none in lm-eval; ask for 0")
    if shots and _folder(entry.task):
        others = len(list(task.fewshot_docs())) - 1  # all but the one that is asked
        if shots > others:
            raise DefinitionError(f"{where}, but '{name}' has {others} other questions")


def _shared_metric(metrics: Mapping[str, Sequence[str]]) -> str | None:
    """The metric by which all of these tasks are judged: accuracy, else the first one that they share."""
    shared = [metric for metric in next(iter(metrics.values())) if all(metric in found for found in metrics.values())]
    return _ACCURACY if _ACCURACY in shared else next(iter(shared), None)


def _folder(task: str) -> Path | None:
    """Where a task is defined, if that is not inside lm-eval."""
    return (QUESTIONS / MMLU_DEV).resolve() if is_mmlu_dev(task) else None


@functools.cache
def _manager(folder: Path | None) -> Any:
    from lm_eval.tasks import TaskManager

    # lm-eval's own list is long to read
    return TaskManager() if folder is None else TaskManager(include_path=str(folder), include_defaults=False)


@contextmanager
def _uncounted(folder: Path | None) -> Iterator[None]:
    """Have `datasets` not tell the hub that it reads questions which are a file here: it would call for each of 57 subjects."""
    from datasets import config

    before = config.HF_UPDATE_DOWNLOAD_COUNTS
    config.HF_UPDATE_DOWNLOAD_COUNTS = before and folder is None
    try:
        yield
    finally:
        config.HF_UPDATE_DOWNLOAD_COUNTS = before


def run_task(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: LoadedTask,
    batch_size: int,
    precision: str,
    prefix: Prefix | None = None,
) -> dict[str, Any]:
    """Run one task or group by lm-eval, on the model as it is in this process.

    The same as ``lm_eval.simple_evaluate``, which would load the task again, and ask pip and git what there is on this machine.

    Args:
        model: the model.
        tokenizer: its own.
        task: the task.
        batch_size: rows at once.
        precision: in which an accelerator computes.
        prefix: the model's frozen layers, where it has some.

    Returns:
        ``scores``: ``accuracy`` over all questions (micro) and, of several subjects, ``accuracy_macro``, their mean, ``accuracy_norm`` where
        lm-eval has it, ``nats_per_byte`` where answers are said (see :mod:`~benchmarks.llama.likelihood`); or, of tasks that are not
        scored by accuracy, ``task_score``: ``metric``, lm-eval's first one; ``questions``: how many; ``subjects``: every metric of each task;
        ``categories``: groups within the group; ``correct``: 1 or 0 for every question of a subject, in its order, where that is what
        accuracy counts; ``nats_per_byte``: that of every question of a subject, where there is one; ``source``: where they came from.
    """
    from lm_eval import evaluate

    from benchmarks.llama.shared_prompt import SharedPromptLM

    mixed = DTYPES["bf16"] if precision == "bf16" else None
    wrapped = SharedPromptLM(
        prefix=prefix, pretrained=model, tokenizer=tokenizer, batch_size=batch_size, mixed_precision_dtype=mixed
    )
    random.seed(_SEED)
    np.random.seed(_OTHER_SEED)
    torch.manual_seed(_OTHER_SEED)
    for one in task.found["tasks"].values():
        if one.get_config("num_fewshot") != 0:  # 0 in a task's own file is meant
            one.set_config(key="num_fewshot", value=task.entry.num_fewshot)
        one.set_fewshot_seed(seed=_OTHER_SEED)
    with _uncounted(_folder(task.entry.task)):
        found = evaluate(
            lm=wrapped,
            task_dict=task.found,
            limit=task.entry.limit,
            log_samples=True,
            bootstrap_iters=0,
            fewshot_as_multiturn=True,
        )
    return {**summarise(found), "source": task.sources}


def summarise(found: Mapping[str, Any]) -> dict[str, Any]:
    """What lm-eval found, by subject and category; see :func:`run_task`."""
    # groups have results of their own, but no samples
    counts = {name: int(samples["effective"]) for name, samples in found["n-samples"].items()}
    subjects = {name: _numbers(found["results"][name]) for name in counts}
    metric = _shared_metric({name: list(values) for name, values in subjects.items()})
    assert metric is not None  # noqa: S101  load_tasks saw to it

    def mean(names: Sequence[str], of: str = metric) -> float:
        return sum(subjects[name][of] * counts[name] for name in names) / sum(counts[name] for name in names)

    members = found.get("group_subtasks", {})
    inside = {group: [leaf for leaf in _leaves(group, members) if leaf in counts] for group in members}
    categories = {
        _alias(found, group): {metric: mean(leaves), "questions": sum(counts[leaf] for leaf in leaves)}
        for group, leaves in inside.items()
        if 0 < len(leaves) < len(counts)
    }
    if metric == _ACCURACY:
        scores: dict[str, float | None] = {"accuracy": mean(list(counts))}
        if len(counts) > 1:
            scores["accuracy_macro"] = sum(values[metric] for values in subjects.values()) / len(subjects)
        if all(_BY_LENGTH in values for values in subjects.values()):
            scores["accuracy_norm"] = mean(list(counts), _BY_LENGTH)
    else:
        scores = {"task_score": mean(list(counts))}
    samples = found.get("samples", {}) if metric == _ACCURACY else {}
    correct = {_alias(found, name): _correct(samples[name]) for name in samples}
    nats = {_alias(found, name): nats_per_byte(samples[name]) for name in samples}
    by_question = {name: values for name, values in nats.items() if values is not None}
    likely: dict[str, Any] = {}
    if by_question and len(by_question) == len(counts):
        every = [value for values in by_question.values() for value in values]
        scores[NATS] = sum(cast(list[float], every)) / len(every) if None not in every else None
        likely = {NATS: by_question}
    return {
        "scores": scores,
        "questions": sum(counts.values()),
        "metric": metric,
        "categories": categories,
        "subjects": {_alias(found, name): values | {"questions": counts[name]} for name, values in subjects.items()},
        "correct": correct if all(value is not None for value in correct.values()) else {},
        **likely,
    }


def _correct(samples: Sequence[Mapping[str, Any]]) -> str | None:
    """A digit a question; None where accuracy is no yes or no (truthfulqa_mc2's is a probability)."""
    in_order = sorted(samples, key=lambda sample: int(sample["doc_id"]))
    values = [float(sample[_ACCURACY]) for sample in in_order]
    return "".join(str(int(value)) for value in values) if set(values) <= {0.0, 1.0} else None


def _leaves(name: str, members: Mapping[str, Sequence[str]]) -> Iterator[str]:
    for member in members.get(name, ()):
        if members.get(member):
            yield from _leaves(member, members)
        else:
            yield member


def _alias(found: Mapping[str, Any], name: str) -> str:
    return str(found["results"].get(name, {}).get("alias", name)).strip(" -")


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of a task, without lm-eval's name of a filter where that is none."""
    return {
        key.removesuffix(f",{_FILTER}"): float(value)
        for key, value in values.items()
        if isinstance(value, int | float) and "_stderr" not in key and "," in key
    }


@torch.no_grad()
def held_out_loss(
    model: PreTrainedModel, rows: EncodedRows, tokenizer: PreTrainedTokenizerBase, batch_size: int, precision: str
) -> float | None:
    """Mean loss over the learned tokens of rows; None of a model that diverged."""
    model.eval()
    order = sorted(range(len(rows)), key=lambda i: len(rows.rows[i].tokens))
    total, tokens, collate = 0.0, 0, without_prompt_logits(collator(tokenizer), model)
    for start in range(0, len(order), batch_size):
        batch = collate([rows[i] for i in order[start : start + batch_size]])
        inputs = send_to_device(dict(batch), model.device)
        labels = inputs.pop("labels")[:, 1:]
        with autocast(model, precision):
            logits = model(**inputs).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="sum")
        total, tokens = total + loss.item(), tokens + int((labels != IGNORED).sum())
    mean = total / tokens
    return mean if math.isfinite(mean) else None


def autocast(model: PreTrainedModel, precision: str) -> AbstractContextManager[Any]:
    """Mixed precision where it was asked for and there is an accelerator."""
    return torch.autocast(model.device.type, DTYPES["bf16"]) if precision == "bf16" else nullcontext()


@torch.no_grad()
def answers(
    model: PreTrainedModel, template: Template, instructions: Sequence[Instruction], new_tokens: int, precision: str
) -> list[dict[str, str]]:
    """Greedy answers, one row at a time, so that no padding is read."""
    model.eval()
    tokenizer, found = template.tokenizer, []
    for row in instructions:
        encoded = tokenizer(template.prompt(row), return_tensors="pt", add_special_tokens=template.special_tokens).to(
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
        text = tokenizer.decode(output[0, encoded["input_ids"].shape[1] :], skip_special_tokens=True)
        found.append({"instruction": row.instruction, "input": row.input, "reference": row.output, "answer": str(text)})
    return found
