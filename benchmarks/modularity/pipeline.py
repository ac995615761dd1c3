"""Measure active neurons and chosen experts of a pre-trained model on rows of several tasks."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import DataCollatorWithPadding

import emoe
from benchmarks.harness.base import derive_seed
from benchmarks.harness.config.benchmark import load_benchmark
from benchmarks.harness.models.build import permutations
from benchmarks.harness.models.conversion import apply_method_
from benchmarks.harness.models.loading import load_backbone, load_tokenizer, source_of
from benchmarks.harness.training.progress import Progress
from benchmarks.harness.training.routing import loads_by_row
from benchmarks.modularity.definition import EXPERTS, ModularitySpec
from benchmarks.text.data import load_part
from benchmarks.text.tokenization import TokenisedRows, batches
from benchmarks.text.usage import SetLoads, describe_usage
from emoe.architectures import find_ffns
from emoe.calibration import record_activations
from emoe.config import EMoEConfig, Selection
from emoe.layer import routed_layers
from emoe.records import RoutingRecord

Batches = Iterable[Mapping[str, Any]]


def run(spec: ModularitySpec, _folder: Path, progress: Progress) -> dict[str, Any]:
    """Measure the pre-trained model of one spec.

    Args:
        spec: The settings of the run.
        _folder: The folder of the run; nothing is written there.
        progress: The log.

    Returns:
        The content of ``metrics.json`` without the harness's part: ``measured`` numbers, ``usage`` by task and class,
        and ``matrix``, the active neurons of some tokens, sorted by expert.
    """
    load = partial(
        load_part,
        rows=spec.reading.rows,
        entries=load_benchmark(spec.benchmark).tasks,
        say=progress.say,
    )
    splits = {task.name: load(task, "test") for task in (spec.task, *spec.ood)}
    tokenizer, model = load_tokenizer(spec.model), load_backbone(spec.model)
    model.to(cast(Any, "cuda" if torch.cuda.is_available() else "cpu"))
    source = source_of(spec.model, model)
    config = cast(dict[str, Any], spec.method.config)  # a plan of this benchmark always has one
    (layer,) = config["layers"]
    tokenise = partial(
        TokenisedRows,
        tokenizer=tokenizer,
        max_length=spec.reading.max_length,
        by_length=False,
        labelled=False,
    )
    rows = {name: tokenise(split) for name, split in splits.items()}
    read_batches = partial(
        batches, collate=DataCollatorWithPadding(tokenizer), size=spec.reading.batch_size
    )
    progress.say(
        f"reading {sum(map(len, splits.values())):,} rows of {len(splits)} tasks with the dense model"
    )
    dense = {
        name: dense_magnitudes(model, layer, read_batches(task)) for name, task in rows.items()
    }
    report = apply_method_(model, spec.method, spec.seed)
    converted = [dataclasses.asdict(entry) for entry in report.layers] if report else []
    progress.say("reading them again with experts")
    loads, top, bottom = {}, [], []
    for name, task in rows.items():
        with emoe.record_routing(model) as record:
            top.append(neurons_used(model, layer, _label_by_row(read_batches(task), record), "top"))
        loads[name] = SetLoads(
            loads_by_row(record.layers[layer], len(task)), splits[name].class_numbers
        )
        bottom.append(neurons_used(model, layer, read_batches(task), "bottom"))
    order = permutations(model)[layer]
    magnitudes = torch.cat([of_task[:, order] for of_task in dense.values()])
    active = active_mask(magnitudes, spec.reading.active_share)
    measured = concentration(magnitudes, active, config["num_experts"])
    for selection, used in (("top", top), ("bottom", bottom)):
        numbers = measure_use(torch.cat(used), magnitudes, active)
        measured |= {f"{name}_{selection}": value for name, value in numbers.items()}
    measured["inertia"] = 1 - converted[0]["explained"]
    information, usage = describe_usage(loads)
    measured |= information | {
        f"{kind}_experts": float(len(usage[kind])) for kind in ("shared", "specialised")
    }
    tokens = {name: len(of_task) for name, of_task in dense.items()}
    return {
        "measured": {EXPERTS: measured},
        "usage": usage,
        "matrix": sample_matrix(tokens, magnitudes, active, spec.reading.shown_tokens),
        "model": {"source": source, "conversion": converted},
        "cost": {},
        "data": {f"test:{name}": split.summary() for name, split in splits.items()},
    }


def _label_by_row(
    batches: Iterable[dict[str, Any]], record: RoutingRecord
) -> Iterator[dict[str, Any]]:
    """Yield batches, and set the row numbers as labels of the record."""
    start = 0
    for batch in batches:
        end = start + len(batch["input_ids"])
        record.set_labels(torch.arange(start, end))
        yield batch
        start = end


def dense_magnitudes(model: nn.Module, layer: int, batches: Batches) -> Tensor:
    """Record ``|activation|`` ``[tokens, d]`` of a layer for tokens sampled with a fixed seed, without padding."""
    ffn = find_ffns(model)[layer]
    return record_activations(model, [ffn], batches, seed=derive_seed("tokens"))[layer].t()


def neurons_used(model: nn.Module, layer: int, batches: Batches, selection: Selection) -> Tensor:
    """Return the neurons that a selection of experts uses, ``[tokens, d]`` bool, for the same sampled tokens.

    With an activation that always returns 1, the input of the out-projection is the mask. The model is restored.
    """
    (routed,) = routed_layers(model)
    config, activation = routed.config, routed.activation
    assert isinstance(config, EMoEConfig)  # noqa: S101 -- the grid sees to it
    routed.config = routed.router.config = dataclasses.replace(config, selection=selection)
    routed.activation = _Ones()
    try:
        return dense_magnitudes(model, layer, batches) != 0
    finally:
        routed.activation = activation
        routed.config = routed.router.config = config


class _Ones(nn.Module):
    def forward(self, z: Tensor) -> Tensor:
        return torch.ones_like(z)


def active_mask(magnitudes: Tensor, share: float) -> Tensor:
    """Return a boolean mask of the largest entries, up to a share of all; ties at the threshold are excluded."""
    flat = magnitudes.flatten()
    kept = max(1, round(share * flat.numel()))
    threshold = flat.kthvalue(flat.numel() - kept).values if kept < flat.numel() else flat.min() - 1
    return magnitudes > threshold


def concentration(magnitudes: Tensor, active: Tensor, num_blocks: int) -> dict[str, float]:
    """Measure the concentration of activations in contiguous blocks of neurons.

    Args:
        magnitudes: The magnitudes ``[tokens, d]``.
        active: The active neurons ``[tokens, d]``, bool.
        num_blocks: The number of blocks of equal size, N.

    Returns:
        ``best_quarter``: the share of a token's active neurons in the quarter of blocks with most of them (mean over
        tokens with active neurons); ``best_quarter_mass``: the same for magnitudes; ``usage_gini``: the Gini
        coefficient of the blocks' counts of active neurons over all tokens; ``dead``: the share of neurons that no
        token activates.
    """
    counts = active.unflatten(1, (num_blocks, -1)).sum(-1).double()
    mass = magnitudes.unflatten(1, (num_blocks, -1)).double().sum(-1)
    return {
        "best_quarter": _best_quarter(counts),
        "best_quarter_mass": _best_quarter(mass),
        "usage_gini": gini(counts.sum(0)),
        "dead": float((~active.any(0)).double().mean()),
    }


def _best_quarter(by_block: Tensor) -> float:
    blocks = max(by_block.shape[1] // 4, 1)
    total = by_block.sum(1)
    return float((by_block.topk(blocks, dim=1).values.sum(1)[total > 0] / total[total > 0]).mean())


def gini(values: Tensor) -> float:
    """Compute the Gini coefficient of non-negative values: 0 if all are equal, near 1 if one is the total.

    >>> round(gini(torch.tensor([1.0, 1.0])), 3), round(gini(torch.tensor([0.0, 0.0, 0.0, 8.0])), 3)
    (0.0, 0.75)
    """
    ordered = values.double().sort().values
    count, total = len(ordered), float(ordered.sum())
    ranks = torch.arange(1, count + 1, dtype=torch.float64)
    return float((2 * (ranks * ordered).sum()) / (count * total) - (count + 1) / count)


def measure_use(used: Tensor, magnitudes: Tensor, active: Tensor) -> dict[str, float]:
    """Measure the neurons that a selection of experts uses.

    Args:
        used: The neurons in use ``[tokens, d]``, bool.
        magnitudes: The magnitudes ``[tokens, d]`` of the dense model.
        active: The active neurons ``[tokens, d]``, bool.

    Returns:
        ``kept``: the share of all magnitudes in used neurons; ``active``: the share of used neurons that are active for
        the token; ``dead``: the share that no token activates. The last two are means over tokens.
    """
    number = used.sum(1).double()
    return {
        "kept": float((magnitudes.double() * used).sum() / magnitudes.double().sum()),
        "active": float(((active & used).sum(1) / number).mean()),
        "dead": float(((~active.any(0) & used).sum(1) / number).mean()),
    }


def sample_matrix(
    tokens: Mapping[str, int], magnitudes: Tensor, active: Tensor, count: int
) -> dict[str, Any]:
    """Sample ``count`` tokens evenly over tasks, and list their active neurons.

    ``tokens`` counts the tokens of each task, in the order of ``magnitudes`` and ``active``, both ``[tokens, d]``.
    """
    generator = torch.Generator().manual_seed(derive_seed("shown tokens"))
    shown, tasks, start = [], [], 0
    for name, number in tokens.items():
        chosen = torch.randperm(number, generator=generator)[: count // len(tokens)]
        shown.append(start + chosen.sort().values)
        tasks += [name] * len(chosen)
        start += number
    rows = torch.cat(shown)
    token, neuron = active[rows].nonzero(as_tuple=True)
    return {
        "tasks": tasks,
        "neurons": magnitudes.shape[1],
        "tokens": token.tolist(),
        "places": neuron.tolist(),
        "values": [round(float(value), 3) for value in magnitudes[rows][token, neuron]],
    }
