"""Read rows of several tasks with a pre-trained model, and see which neurons fire and which experts are chosen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

import emoe
from benchmarks.harness.base.seeds import derive_seed
from benchmarks.harness.config.definition import load_benchmark
from benchmarks.harness.config.schema import parse
from benchmarks.harness.models.build import permutations
from benchmarks.harness.models.conversion import apply_method_
from benchmarks.harness.models.loading import describe, load_backbone, load_tokenizer, weights_digest
from benchmarks.harness.models.prefix import StatesBelow
from benchmarks.harness.training.progress import Progress
from benchmarks.modularity.concentration import Concentration, is_active
from benchmarks.modularity.definition import EXPERTS, ModularitySpec, Reading
from benchmarks.modularity.selected import Selected, dense_magnitudes, is_dead, neurons_used
from benchmarks.text.datasets import TextSplit, load_part
from benchmarks.text.tokenization import TokenisedRows
from benchmarks.text.usage import SetLoads, describe_usage
from emoe.records import RoutingRecord


def run(spec: Mapping[str, Any], folder: Path, progress: Progress) -> dict[str, Any]:
    """Run one spec.

    Args:
        spec: the content of ``run.json``.
        folder: the run's folder; nothing is written there.
        progress: where to say what is going on.

    Returns:
        The content of ``metrics.json``, less what the harness adds: ``measured`` numbers, ``usage`` by task and class, and ``matrix``, the active
        neurons of some tokens, by their place in the order of the experts.
    """
    read = parse(spec, ModularitySpec, str(folder / "run.json"))
    load = partial(load_part, rows=read.reading.rows, known=load_benchmark(read.benchmark).tasks, say=progress.say)
    splits = {task.name: load(task, "test") for task in (read.task, *read.ood)}
    tokenizer = load_tokenizer(spec["model"])
    model = load_backbone(spec["model"])
    model.to(cast(Any, "cuda" if torch.cuda.is_available() else "cpu"))
    source = {"from": describe(spec["model"], model), "weights": weights_digest(model)}
    (layer,) = spec["method"]["config"]["layers"]
    parts = {name: _encoded(split, tokenizer, read.reading) for name, split in splits.items()}
    progress.say(f"reading {sum(map(len, splits.values())):,} rows of {len(splits)} tasks with the dense model")
    below = StatesBelow(model, layer)
    with below.recording():
        dense = {name: dense_magnitudes(model, layer, part.batches()) for name, part in parts.items()}
    report = apply_method_(model, spec["method"], read.seed)
    converted = [asdict(found) for found in report.layers] if report else []
    progress.say("reading them again with experts")
    loads, top = {}, []
    with below.replaying():
        for name, part in parts.items():
            with emoe.record_routing(model) as record:
                top.append(neurons_used(model, layer, part.batches(record), "top"))
            by_row = record.layers[layer].by_label
            by_expert = np.stack([by_row[row].numpy() for row in range(len(part.rows))])
            loads[name] = SetLoads(by_expert, splits[name].class_numbers)
    with below.replaying():
        bottom = [neurons_used(model, layer, part.batches(), "bottom") for part in parts.values()]
    order = permutations(model)[layer]
    ordered = {name: magnitudes[:, order] for name, magnitudes in dense.items()}
    number = spec["method"]["config"]["num_experts"]
    whole = torch.cat(list(ordered.values()))
    active = is_active(whole, read.reading.active_share)
    measured = asdict(Concentration.of(whole, active, number))
    measured |= _selected(whole, active, {"top": torch.cat(top), "bottom": torch.cat(bottom)})
    measured["inertia"] = 1 - converted[0]["explained"]
    told, usage = describe_usage(loads)
    told |= {f"{kind}_experts": float(len(usage[kind])) for kind in ("shared", "specialised")}
    return {
        "measured": {EXPERTS: measured | told},
        "usage": usage,
        "matrix": _matrix({name: len(found) for name, found in ordered.items()}, whole, active, read.reading),
        "model": {"source": source, "conversion": converted},
        "cost": {},
        "data": {f"test:{name}": split.summary() for name, split in splits.items()},
    }


@dataclass(frozen=True)
class _Encoded:
    """Rows of a task as a model is called with them."""

    rows: TokenisedRows
    tokenizer: PreTrainedTokenizerBase
    batch_size: int

    def batches(self, record: RoutingRecord | None = None) -> Iterator[dict[str, Any]]:
        """Batches in the order of the rows; the record counts by row."""
        collate = DataCollatorWithPadding(self.tokenizer)
        for start in range(0, len(self.rows), self.batch_size):
            places = range(start, min(start + self.batch_size, len(self.rows)))
            if record is not None:
                record.set_labels(torch.tensor(places))
            yield dict(collate([self.rows[place] for place in places]))


def _encoded(split: TextSplit, tokenizer: PreTrainedTokenizerBase, reading: Reading) -> _Encoded:
    rows = TokenisedRows(split, tokenizer, reading.max_length, by_length=False, labelled=False)
    return _Encoded(rows, tokenizer, reading.batch_size)


def _matrix(tokens: Mapping[str, int], whole: Tensor, active: Tensor, reading: Reading) -> dict[str, Any]:
    """The active neurons of some tokens of every task; ``tokens`` says how many of each stand in ``whole`` one after the other."""
    generator = torch.Generator().manual_seed(derive_seed("shown tokens"))
    shown, tasks, start = [], [], 0
    for name, count in tokens.items():
        chosen = torch.randperm(count, generator=generator)[: reading.shown_tokens // len(tokens)]
        shown.append(start + chosen.sort().values)
        tasks += [name] * len(chosen)
        start += count
    places = torch.cat(shown)
    token, neuron = active[places].nonzero(as_tuple=True)
    values = whole[places][token, neuron]
    return {
        "tasks": tasks,
        "neurons": whole.shape[1],
        "tokens": token.tolist(),
        "places": neuron.tolist(),
        "values": [round(float(value), 3) for value in values],
    }


def _selected(whole: Tensor, active: Tensor, used: Mapping[str, Tensor]) -> dict[str, float]:
    """What the neurons are like that each selection uses."""
    found = {"dead": float(is_dead(active).double().mean())}
    for selection, neurons in used.items():
        for name, value in asdict(Selected.of(neurons, whole, active)).items():
            found[f"{name}_{selection}"] = value
    return found
