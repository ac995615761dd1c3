"""What runs on several tasks compute: rows of their splits through the encoder, and answers of a few tokens through the decoder."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from benchmarks.harness.config.workload import Workload, model_size, padded, read_passes, trained_passes
from benchmarks.text.definition import TaskEntry
from benchmarks.text.workload import BY_LENGTH, find_part, unknowns

_READ = 0.5  # of the blocks: those of the encoder, which read a row; the decoder's read its answers, a few tokens


def mixed_workload(spec: Mapping[str, Any], tasks: Mapping[str, TaskEntry]) -> Workload | None:
    """What training on several tasks computes, with its evaluations after every epoch and at its end; None where the rows of one are not known."""
    whole, training = model_size(spec), spec["training"]
    length, limit = training["max_length"], training["eval_rows"]
    names = [task["name"] for task in spec["task"]["tasks"]]
    train = [find_part(tasks, name, "train", training["rows_per_epoch"], length) for name in names]
    test = [find_part(tasks, name, "test", limit, length) for name in names]
    others = {other["name"]: find_part(tasks, other["name"], "test", limit, length) for other in spec["ood"]}
    if whole is None or None in train or None in test:
        return None
    size = replace(whole, above=round(whole.above * _READ), learned=round(whole.learned * _READ))
    epochs, batch, at_once = (training[key] for key in ("epochs", "batch_size", "eval_batch_size"))
    together = BY_LENGTH if training["sampling"] == "group_by_length" else batch
    learned = [part for part in train if part]
    rows = sum(part.rows for part in learned)
    tokens = epochs * sum(part.rows * padded(part.tokens, together, length) for part in learned)
    batches = math.ceil(rows / batch) * epochs
    ends = [part for part in (*test, *others.values()) if part]
    dev = [(training["dev_rows"] or part.rows) * epochs for part in test if part]
    reading = [(count, count * part.tokens) for count, part in zip(dev, (part for part in test if part), strict=True)]
    reading += [(part.rows, part.rows * part.tokens) for part in ends]
    return Workload(
        size=size,
        training=trained_passes(size, batches, tokens),
        updates=math.ceil(batches / training["gradient_accumulation_steps"]),
        reading=tuple(read_passes(size, math.ceil(count / at_once), total) for count, total in reading),
        batch_tokens=max(batch, at_once) * length,
        precision=training["precision"],
        assumed=unknowns((*learned, *ends), others),
    )
