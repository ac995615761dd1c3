"""What runs of instruction tuning compute: rows of instructions, questions of lm-eval, answers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from benchmarks.harness.config.workload import (
    BYTES_PER_TOKEN,
    NO_PASSES,
    Passes,
    Workload,
    model_size,
    padded,
    read_passes,
    text_tokens,
    trained_passes,
)
from benchmarks.llama.definition import InstructionSet, InstructionSpec, RunInstructionTraining
from benchmarks.llama.questions import MMLU_DEV, is_mmlu_dev
from benchmarks.llama.templates import template_bytes

_QUESTION_BYTES = 417  # of an MMLU question with its choices, on average of the 281 development ones


# Questions of a group of lm-eval, and the tasks that it is made of. A question is asked once where its choices are letters; those of several words
# are read together with it.
_KNOWN = {"mmlu": (14042, 57), MMLU_DEV: (281, 57), f"{MMLU_DEV}_continuation": (281, 57)}


def instruction_workload(given: Mapping[str, Any], tasks: Mapping[str, InstructionSet]) -> Workload | None:
    """What a run computes; None where the rows of its set are not counted."""
    spec, size = InstructionSpec.model_validate(given), model_size(given)
    data, training, evaluation, known = spec.data, spec.training, spec.evaluation, tasks[spec.task.name]
    if size is None or (known.rows is None and data.train_rows is None):
        return None
    longest, held_out = data.max_length, data.held_out_rows
    row_bytes = known.size.row_bytes
    whole = None if row_bytes is None else row_bytes + template_bytes(data.template)
    tokens = text_tokens(whole, longest, 2)
    assumed = [] if row_bytes is not None else [f"rows of {spec.task.name} as long as they may be"]
    there = None if known.rows is None else max(known.rows - held_out, 0)
    rows = min(count for count in (data.train_rows, there) if count is not None)
    trained, updates, looks, batch_tokens = NO_PASSES, 0, 0, evaluation.batch_size * longest
    if isinstance(training, RunInstructionTraining):
        batch = training.batch_size
        updates = training.steps or int(rows // batch * training.epochs)
        at_once = training.per_device_train_batch_size
        row = tokens if training.packing else padded(tokens, at_once, longest)
        trained = trained_passes(size, updates * batch / at_once, updates * batch * row)
        looks = math.ceil(updates / every) if (every := training.eval_every) else 0
        batch_tokens = at_once * longest
    evaluations = (1 + looks) * held_out
    reading = [read_passes(size, math.ceil(evaluations / evaluation.batch_size), evaluations * tokens)]
    for entry in evaluation.tasks:
        if entry.task not in _KNOWN:
            assumed.append(f"lm-eval's {entry.task} not counted")
            continue
        count, subjects = _KNOWN[entry.task]
        count = min(count, subjects * entry.limit) if entry.limit else count
        asked = count * (entry.num_fewshot + 1) * _QUESTION_BYTES / BYTES_PER_TOKEN
        at_once = 1 if is_mmlu_dev(entry.task) else evaluation.batch_size
        reading.append(read_passes(size, math.ceil(count / at_once), asked, whole=True))
    answered = evaluation.generations * evaluation.new_tokens
    reading.append(Passes(answered, answered, size.forward, size.shape.layers))
    return Workload(
        size=size,
        training=trained,
        updates=updates,
        reading=tuple(reading),
        batch_tokens=batch_tokens,
        precision=training.precision,
        logits=True,
        keeps=training.keep_weights,
        assumed=tuple(assumed),
    )
