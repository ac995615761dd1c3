"""What runs on texts compute: rows of their splits, and tokens of a row by the bytes of its text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.harness.config.workload import (
    NO_PASSES,
    ModelSize,
    Workload,
    model_size,
    padded,
    read_passes,
    text_tokens,
    trained_passes,
)
from benchmarks.text.definition import TaskEntry
from emoe.layer_numbers import resolve_layers

GRADIENT_ROWS = 32  # of every set on which gradients are compared
BY_LENGTH = 2  # rows that are padded together in groups of like length are about as long as two rows by chance
_COLUMNS = 12  # bytes of a token in the cache: its id, its sort, whether it is padding
_STATE = 4


@dataclass(frozen=True)
class Part:
    """A split as a run reads it.

    Attributes:
        name: of set and part.
        rows: that are used.
        tokens: of a row, on average.
        assumed: what is not known of it.
    """

    name: str
    rows: int
    tokens: float
    assumed: tuple[str, ...] = ()


def find_part(tasks: Mapping[str, TaskEntry], name: str, part: str, limit: int | None, max_length: int) -> Part | None:
    """A split of a set, or a drawn part of it; None where nobody has counted its rows.

    Args:
        tasks: of the benchmark.
        name: the set's.
        part: ``train``, ``dev`` or ``test``.
        limit: rows that are drawn of it; None for all.
        max_length: tokens that are kept of a row.
    """
    from benchmarks.text.data import known_rows, part_read  # with `datasets`, which takes seconds

    task = tasks[name]
    part = part_read(task.splits, part)
    there, _ = known_rows(task, part)
    rows = min(found) if (found := [count for count in (there, limit) if count is not None]) else None
    if rows is None:
        return None
    row_bytes = task.size.row_bytes
    assumed = () if row_bytes is not None else (f"rows of {name} as long as they may be",)
    return Part(f"{name} {part}", rows, text_tokens(row_bytes, max_length, len(task.fields) + 1), assumed)


def unknowns(parts: Iterable[Part], others: Mapping[str, Part | None]) -> tuple[str, ...]:
    """What is not known of the parts that a run reads, and which other sets are not counted."""
    notes = [note for part in dict.fromkeys(parts) for note in part.assumed]
    return (*notes, *(f"{name} not counted" for name, part in others.items() if part is None))


def trained_workload(spec: Mapping[str, Any], tasks: Mapping[str, TaskEntry]) -> Workload | None:
    """What training a classifier computes, with its evaluations after every epoch and at its end."""
    size, training, name = model_size(spec), spec["training"], spec["task"]["name"]
    length, limit = training["max_length"], training["eval_rows"]
    splits = spec["task"]["splits"]
    train = find_part(tasks, name, "train", training["train_rows"], length)
    test = find_part(tasks, name, "test", limit, length)
    own_dev = find_part(tasks, name, "dev", training.get("dev_rows") or limit, length) if splits["test"] else test
    beside = training.get("ood_rows") or limit
    others = {other["name"]: find_part(tasks, other["name"], "test", beside, length) for other in spec["ood"]}
    if size is None or train is None or test is None or own_dev is None:
        return None
    held_out, dev_rows = round(train.rows * training["validation_fraction"]), own_dev.rows
    if held_out:
        dev_rows = held_out
    rows = int((train.rows - held_out) * training.get("train_share", 1.0))
    epochs, batch = training["epochs"], training["batch_size"]
    together = BY_LENGTH if training["sampling"] == "group_by_length" else batch
    batches = math.ceil(rows / batch) * epochs
    agreement = GRADIENT_ROWS * (2 + len(others)) if others else 0
    tokens = rows * epochs * padded(train.tokens, together, length) + agreement * test.tokens
    at_once = training["eval_batch_size"]
    ends = [test, *(other for other in others.values() if other)]
    read = [read_passes(size, math.ceil(part.rows / at_once), part.rows * part.tokens) for part in ends]
    reading = [read_passes(size, epochs * math.ceil(dev_rows / at_once), epochs * dev_rows * test.tokens), *read]
    if "used_as" in spec:  # once more as another model
        config = spec["method"]["config"] or spec["used_as"]["config"]  # one of both has experts
        first = resolve_layers(config["layers"], size.shape.layers)[0]
        reading += [passes.again(size.shape, first) for passes in read]
    patience = training["patience"]
    return Workload(
        size=size,
        training=trained_passes(size, batches, tokens),
        updates=math.ceil(batches / training["gradient_accumulation_steps"]),
        reading=tuple(reading),
        batch_tokens=max(batch, at_once) * length,
        precision=training["precision"],
        least=1.0 if patience is None else min((patience + 1) / epochs, 1.0),
        keeps=training["keep_weights"],
        caches=tuple(_caches(spec, [train, *ends], length, size)),
        assumed=unknowns((train, *ends), others),
    )


def read_workload(
    size: ModelSize | None,
    parts: Mapping[str, Part | None],
    batch: int,
    max_length: int,
    *,
    precision: str = "fp32",
    again: Sequence[int] = (),
) -> Workload | None:
    """What a run computes that trains nothing.

    Args:
        size: of its model.
        parts: what it reads, by the names of the sets; those of which nobody has counted the rows are not counted.
        batch: rows at once.
        max_length: tokens of the longest.
        precision: of an accelerator's arithmetic.
        again: the first layer that differs, of every further time that it reads all of it.
    """
    found = [part for part in parts.values() if part]
    if size is None or not found:
        return None
    once = [read_passes(size, math.ceil(part.rows / batch), part.rows * part.tokens) for part in found]
    return Workload(
        size=size,
        training=NO_PASSES,
        updates=0,
        reading=(*once, *(passes.again(size.shape, first) for first in again for passes in once)),
        batch_tokens=batch * max_length,
        precision=precision,
        assumed=unknowns(found, parts),
    )


def _caches(spec: Mapping[str, Any], parts: list[Part], length: int, size: ModelSize) -> Iterator[tuple[str, float]]:
    """Tokens of every split, and what frozen layers make of them."""
    model = spec["model"]["name"]
    for part in parts:
        tokens = part.rows * part.tokens
        yield f"tokens {model} {part.name} {length}", tokens * _COLUMNS
        if layers := spec["training"].get("frozen_layers"):
            yield f"states {model} {part.name} {length} {layers}", tokens * size.shape.width * _STATE
