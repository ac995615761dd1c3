"""Measure active neurons and chosen experts of a pre-trained model on rows of several tasks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import DataCollatorWithPadding

import emoe
from benchmarks.harness.base import derive_seed
from benchmarks.harness.config.benchmark import load_benchmark
from benchmarks.harness.config.yaml import parse
from benchmarks.harness.models.build import permutations
from benchmarks.harness.models.conversion import apply_method_
from benchmarks.harness.models.loading import describe, load_backbone, load_tokenizer, weights_digest
from benchmarks.harness.training.progress import Progress
from benchmarks.harness.training.routing import loads_by_row
from benchmarks.modularity.activations import (
    active_mask,
    concentration,
    dense_magnitudes,
    neurons_used,
    selected,
)
from benchmarks.modularity.definition import EXPERTS, ModularitySpec, Reading
from benchmarks.text.data import load_part
from benchmarks.text.tokenization import TokenisedRows, batches
from benchmarks.text.usage import SetLoads, describe_usage
from emoe.records import RoutingRecord


def run(spec: Mapping[str, Any], folder: Path, progress: Progress) -> dict[str, Any]:
    """Measure the pre-trained model of one spec.

    Args:
        spec: The content of ``run.json``.
        folder: The folder of the run; nothing is written there.
        progress: The log.

    Returns:
        The content of ``metrics.json`` without the harness's part: ``measured`` numbers, ``usage`` by task and class,
        and ``matrix``, the active neurons of some tokens, in the order of the experts.
    """
    read = parse(spec, ModularitySpec, str(folder / "run.json"))
    load = partial(load_part, rows=read.reading.rows, entries=load_benchmark(read.benchmark).tasks, say=progress.say)
    splits = {task.name: load(task, "test") for task in (read.task, *read.ood)}
    tokenizer = load_tokenizer(spec["model"])
    model = load_backbone(spec["model"])
    model.to(cast(Any, "cuda" if torch.cuda.is_available() else "cpu"))
    source = {"from": describe(spec["model"], model), "weights": weights_digest(model)}
    (layer,) = spec["method"]["config"]["layers"]
    length, size, collate = read.reading.max_length, read.reading.batch_size, DataCollatorWithPadding(tokenizer)
    rows = {
        name: TokenisedRows(split, tokenizer, length, by_length=False, labelled=False) for name, split in splits.items()
    }
    progress.say(f"reading {sum(map(len, splits.values())):,} rows of {len(splits)} tasks with the dense model")
    dense = {name: dense_magnitudes(model, layer, batches(task, collate, size)) for name, task in rows.items()}
    report = apply_method_(model, spec["method"], read.seed)
    converted = [asdict(entry) for entry in report.layers] if report else []
    progress.say("reading them again with experts")
    loads, top, bottom = {}, [], []
    for name, task in rows.items():
        with emoe.record_routing(model) as record:
            top.append(neurons_used(model, layer, _label_by_row(batches(task, collate, size), record), "top"))
        loads[name] = SetLoads(loads_by_row(record.layers[layer], len(task)), splits[name].class_numbers)
        bottom.append(neurons_used(model, layer, batches(task, collate, size), "bottom"))
    order = permutations(model)[layer]
    whole = torch.cat([magnitudes[:, order] for magnitudes in dense.values()])
    active = active_mask(whole, read.reading.active_share)
    measured = concentration(whole, active, spec["method"]["config"]["num_experts"])
    for selection, used in (("top", top), ("bottom", bottom)):
        numbers = selected(torch.cat(used), whole, active)
        measured |= {f"{name}_{selection}": value for name, value in numbers.items()}
    measured["inertia"] = 1 - converted[0]["explained"]
    information, usage = describe_usage(loads)
    measured |= information | {f"{kind}_experts": float(len(usage[kind])) for kind in ("shared", "specialised")}
    return {
        "measured": {EXPERTS: measured},
        "usage": usage,
        "matrix": _matrix({name: len(magnitudes) for name, magnitudes in dense.items()}, whole, active, read.reading),
        "model": {"source": source, "conversion": converted},
        "cost": {},
        "data": {f"test:{name}": split.summary() for name, split in splits.items()},
    }


def _label_by_row(batches: Iterable[dict[str, Any]], record: RoutingRecord) -> Iterator[dict[str, Any]]:
    """Yield batches, and set the row numbers as labels of the record."""
    start = 0
    for batch in batches:
        end = start + len(batch["input_ids"])
        record.set_labels(torch.arange(start, end))
        yield batch
        start = end


def _matrix(tokens: Mapping[str, int], whole: Tensor, active: Tensor, reading: Reading) -> dict[str, Any]:
    """Sample tokens of every task, and list their active neurons.

    Args:
        tokens: The number of tokens of each task, in the order of ``whole``.
        whole: The magnitudes ``[tokens, d]``.
        active: The active neurons ``[tokens, d]``, bool.
        reading: The settings.
    """
    generator = torch.Generator().manual_seed(derive_seed("shown tokens"))
    shown, tasks, start = [], [], 0
    for name, count in tokens.items():
        chosen = torch.randperm(count, generator=generator)[: reading.shown_tokens // len(tokens)]
        shown.append(start + chosen.sort().values)
        tasks += [name] * len(chosen)
        start += count
    rows = torch.cat(shown)
    token, neuron = active[rows].nonzero(as_tuple=True)
    return {
        "tasks": tasks,
        "neurons": whole.shape[1],
        "tokens": token.tolist(),
        "places": neuron.tolist(),
        "values": [round(float(value), 3) for value in whole[rows][token, neuron]],
    }
