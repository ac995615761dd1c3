"""Measure active neurons and chosen experts of a pre-trained model on rows of several tasks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
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
from benchmarks.harness.training.routing import label_rows, loads_by_row
from benchmarks.modularity.definition import EXPERTS, ModularitySpec
from benchmarks.text.data import TextSplit, load_part
from benchmarks.text.tokenization import TokenisedRows, batches
from benchmarks.text.usage import SetLoads, describe_usage
from emoe.architectures import find_ffns
from emoe.calibration import record_activations
from emoe.config import EMoEConfig, Selection
from emoe.layer import routed_layers

Batches = Iterable[Mapping[str, Any]]
# a function that yields batches of the same rows at every call
ReadBatches = Callable[[], Iterator[dict[str, Any]]]


def run(spec: ModularitySpec, _folder: Path, progress: Progress) -> dict[str, Any]:
    """Measure the pre-trained model of one spec, first dense and then with experts.

    Args:
        spec: The settings of the run.
        _folder: The folder of the run; nothing is written there.
        progress: The reporter of progress.

    Returns:
        The content of ``metrics.json``, except for what the harness adds to every run. It has the
        ``measured`` numbers, the ``usage`` of experts by task and class, and in ``matrix`` the
        active neurons of some tokens, with the neurons sorted by expert.
    """
    splits = _load_splits(spec, progress)
    model = load_backbone(spec.model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(cast(Any, device))
    source = source_of(spec.model, model)
    config = cast(dict[str, Any], spec.method.config)  # a plan of this benchmark always has one
    (layer,) = config["layers"]  # the plan gives each run a single layer
    read_batches = _batch_readers(spec, splits)

    # before the conversion, because the magnitudes are of the dense model
    num_rows = sum(len(split) for split in splits.values())
    progress.say(f"reading {num_rows:,} rows of {len(splits)} tasks with the dense model")
    magnitudes_by_task = {}
    for name, read in read_batches.items():
        magnitudes_by_task[name] = dense_magnitudes(model, layer, read())
    token_counts = {name: len(tokens) for name, tokens in magnitudes_by_task.items()}

    report = apply_method_(model, spec.method, spec.seed)
    assert report is not None  # noqa: S101 -- all methods are EMoEs
    (converted,) = report.layers
    conversion = dataclasses.asdict(converted)
    progress.say("reading them again with experts")
    routing = _read_with_experts(model, layer, splits, read_batches)

    # sort the neurons so that those of an expert are neighbours
    order = permutations(model)[layer]
    sorted_magnitudes = [tokens[:, order] for tokens in magnitudes_by_task.values()]
    magnitudes = torch.cat(sorted_magnitudes)  # [tokens of all tasks, d]
    active = active_mask(magnitudes, spec.reading.active_share)
    information, usage = describe_usage(routing.loads)
    measured = {
        **concentration(magnitudes, active, num_blocks=config["num_experts"]),
        **_measure_selections(routing, magnitudes, active),
        # the share of the keys' variance that the clusters do not explain
        "inertia": 1 - conversion["explained"],
        **information,
        "shared_experts": float(len(usage["shared"])),
        "specialised_experts": float(len(usage["specialised"])),
    }
    return {
        "measured": {EXPERTS: measured},
        "usage": usage,
        "matrix": sample_matrix(token_counts, magnitudes, active, spec.reading.shown_tokens),
        "model": {"source": source, "conversion": [conversion]},
        "cost": {},
        "data": {f"test:{name}": split.summary() for name, split in splits.items()},
    }


def _load_splits(spec: ModularitySpec, progress: Progress) -> dict[str, TextSplit]:
    """Load the sampled rows of every task, by name of the task."""
    entries = load_benchmark(spec.benchmark).tasks
    splits = {}
    for task in (spec.task, *spec.ood):
        splits[task.name] = load_part(
            task, "test", spec.reading.rows, entries=entries, warn=progress.warn
        )
    return splits


def _batch_readers(spec: ModularitySpec, splits: Mapping[str, TextSplit]) -> dict[str, ReadBatches]:
    """Tokenise the rows of every task, and return for each task a function that yields batches."""
    tokenizer = load_tokenizer(spec.model)
    collate = DataCollatorWithPadding(tokenizer)
    readers: dict[str, ReadBatches] = {}
    for name, split in splits.items():
        rows = TokenisedRows(
            split, tokenizer, spec.reading.max_length, by_length=False, labelled=False
        )
        readers[name] = partial(batches, rows, collate, spec.reading.batch_size)
    return readers


@dataclass(frozen=True)
class _Routing:
    """The expert choices of a model for the rows of all tasks, and the neurons that it uses.

    Attributes:
        loads: For each task, the counts of each row's expert choices, and the classes of the rows.
        used_top: True for the neurons of a token's top k experts, ``[tokens of all tasks, d]``.
        used_bottom: True for the neurons of its bottom k experts, ``[tokens of all tasks, d]``.
    """

    loads: dict[str, SetLoads]
    used_top: Tensor
    used_bottom: Tensor


def _read_with_experts(
    model: nn.Module,
    layer: int,
    splits: Mapping[str, TextSplit],
    read_batches: Mapping[str, ReadBatches],
) -> _Routing:
    """Record the expert choices of every row, and the neurons of the top and bottom experts."""
    loads = {}
    used_top = []
    used_bottom = []
    for name, split in splits.items():
        read = read_batches[name]
        # Two passes: one uses the top k experts of each token, the other the bottom k. Only the
        # first one also records the routing, because the model usually chooses the top k.
        with (
            emoe.record_routing(model) as record,
            label_rows(model, record, labels=torch.arange(len(split))),
        ):
            used_top.append(neurons_used(model, layer, read(), "top"))
        row_loads = loads_by_row(record.layers[layer], len(split))
        loads[name] = SetLoads(row_loads, split.class_numbers)
        used_bottom.append(neurons_used(model, layer, read(), "bottom"))
    return _Routing(loads, torch.cat(used_top), torch.cat(used_bottom))


def _measure_selections(routing: _Routing, magnitudes: Tensor, active: Tensor) -> dict[str, float]:
    """Measure the neurons that the top and the bottom experts use.

    Returns the numbers that :func:`measure_use` computes from ``magnitudes`` and ``active``. Each
    name ends with the selection: ``kept_top``, ``kept_bottom``.
    """
    measured = {}
    for selection, used in [("top", routing.used_top), ("bottom", routing.used_bottom)]:
        for name, value in measure_use(used, magnitudes, active).items():
            measured[f"{name}_{selection}"] = value
    return measured


def dense_magnitudes(model: nn.Module, layer: int, batches: Batches) -> Tensor:
    """Return the magnitudes of the inputs of a layer's out-projection, ``[tokens, d]``.

    In a dense model, an input is the activation of a neuron. The tokens are a sample without
    padding. The sample is the same at every call.
    """
    ffn = find_ffns(model)[layer]
    activations = record_activations(model, [ffn], batches, seed=derive_seed("tokens"))
    # the activations of a layer are [d, tokens]
    return activations[layer].t()


def neurons_used(model: nn.Module, layer: int, batches: Batches, selection: Selection) -> Tensor:
    """Return which neurons belong to the selected experts of each token, ``[tokens, d]`` bool.

    Args:
        model: The model, with experts in this layer only.
        layer: The index of the layer.
        batches: The inputs of the model. The tokens are those of :func:`dense_magnitudes`.
        selection: The experts that are selected by their scores: ``top``, ``bottom``, ….
    """
    (routed,) = routed_layers(model)
    config = routed.config
    activation = routed.activation
    assert isinstance(config, EMoEConfig)  # noqa: S101 -- the grid refuses other methods
    changed = dataclasses.replace(config, selection=selection)
    # The layer now uses the selected experts, and all activations are 1. So the out-projection gets
    # 1 from the neurons of these experts, and 0 from all others.
    routed.config = changed
    routed.router.config = changed
    routed.activation = _Ones()
    try:
        return dense_magnitudes(model, layer, batches) != 0
    finally:
        routed.activation = activation
        routed.config = config
        routed.router.config = config


class _Ones(nn.Module):
    """An activation that always returns 1."""

    def forward(self, z: Tensor) -> Tensor:
        return torch.ones_like(z)


def active_mask(magnitudes: Tensor, share: float) -> Tensor:
    """Mark the largest entries: ``round(share * size)`` of them, or one if this is 0.

    Entries that equal the largest unmarked entry are not marked either. So ties give fewer marks,
    or none.
    """
    flat = magnitudes.flatten()
    total = flat.numel()
    kept = max(1, round(share * total))
    if kept >= total:
        return torch.ones_like(magnitudes, dtype=torch.bool)
    # kthvalue counts from the smallest entry, so this is the largest one that is not kept
    threshold = flat.kthvalue(total - kept).values
    return magnitudes > threshold


def concentration(magnitudes: Tensor, active: Tensor, num_blocks: int) -> dict[str, float]:
    """Measure the concentration of activations in contiguous blocks of neurons.

    Args:
        magnitudes: The magnitudes ``[tokens, d]``.
        active: The active neurons ``[tokens, d]``, bool.
        num_blocks: The number of blocks of equal size, N.

    Returns:
        - ``best_quarter``: the share of a token's active neurons in the quarter of the blocks that
          hold most of them. Mean over the tokens with active neurons.
        - ``best_quarter_mass``: the share of a token's magnitudes in the quarter of the blocks that
          hold most of them. Mean over tokens.
        - ``usage_gini``: the Gini coefficient of the number of active neurons by block, over all
          tokens.
        - ``dead``: the share of neurons that no token activates.
    """
    # the sums over the neurons of a block, [tokens, blocks]
    counts = active.unflatten(1, (num_blocks, -1)).sum(-1).double()
    mass = magnitudes.unflatten(1, (num_blocks, -1)).double().sum(-1)
    is_dead = ~active.any(0)
    return {
        "best_quarter": _best_quarter(counts),
        "best_quarter_mass": _best_quarter(mass),
        "usage_gini": gini(counts.sum(0)),
        "dead": float(is_dead.double().mean()),
    }


def _best_quarter(by_block: Tensor) -> float:
    """Return how much of a token's total is in the best quarter of the blocks, as a share.

    The best quarter contains the blocks with the token's largest values. The result is the mean of
    the shares over tokens. Tokens with a total of zero are ignored.

    Args:
        by_block: The values ``[tokens, blocks]``, not negative.
    """
    num_best = max(by_block.shape[1] // 4, 1)
    # each token has a sum over its best blocks, and a sum over all blocks
    best = by_block.topk(num_best, dim=1).values.sum(1)
    total = by_block.sum(1)
    is_counted = total > 0
    shares = best[is_counted] / total[is_counted]
    return float(shares.mean())


def gini(values: Tensor) -> float:
    """Compute the Gini coefficient of non-negative values.

    It is 0 if all values are equal, and near 1 if one value is the total.

    >>> round(gini(torch.tensor([1.0, 1.0])), 3), round(gini(torch.tensor([0.0, 0.0, 0.0, 8.0])), 3)
    (0.0, 0.75)
    """
    ordered = values.double().sort().values
    count = len(ordered)
    total = float(ordered.sum())
    # for sorted x_1 to x_n: 2 * sum(i * x_i) / (n * sum(x_i)) - (n + 1) / n
    ranks = torch.arange(1, count + 1, dtype=torch.float64)
    weighted_sum = (ranks * ordered).sum()
    # a tensor is divided: if all values are zero, this gives nan instead of an error
    ratio = 2 * weighted_sum / (count * total)
    return float(ratio - (count + 1) / count)


def measure_use(used: Tensor, magnitudes: Tensor, active: Tensor) -> dict[str, float]:
    """Measure the neurons that a selection of experts uses.

    Args:
        used: The neurons of the selected experts ``[tokens, d]``, bool.
        magnitudes: The magnitudes of activations ``[tokens, d]`` of the dense model.
        active: The active neurons ``[tokens, d]``, bool.

    Returns:
        - ``kept``: the share of all magnitudes in used neurons.
        - ``active``: the share of a token's used neurons that are active for it. Mean over tokens.
        - ``dead``: the share of a token's used neurons that no token activates. Mean over tokens.
    """
    exact = magnitudes.double()
    kept = (exact * used).sum() / exact.sum()
    # each token has a number of used neurons, and numbers of active and dead ones among them
    num_used = used.sum(1).double()
    num_active = (active & used).sum(1)
    is_dead = ~active.any(0)
    num_dead = (is_dead & used).sum(1)
    return {
        "kept": float(kept),
        "active": float((num_active / num_used).mean()),
        "dead": float((num_dead / num_used).mean()),
    }


def sample_matrix(
    token_counts: Mapping[str, int], magnitudes: Tensor, active: Tensor, num_shown: int
) -> dict[str, Any]:
    """Sample tokens evenly over tasks, and list their active neurons.

    Args:
        token_counts: The number of tokens of each task, in the order of the other arguments.
        magnitudes: The magnitudes ``[tokens of all tasks, d]``.
        active: The active neurons ``[tokens of all tasks, d]``, bool.
        num_shown: The most tokens to sample. Each task has an equal share, and a task with fewer
            tokens is sampled whole.

    Returns:
        - ``tasks``: the task of each sampled token.
        - ``neurons``: the number of neurons, d.
        - ``tokens``, ``places`` and ``values``: for each active neuron of a sampled token, the
          index of the token among the sampled ones, the index of the neuron, and the magnitude.
    """
    generator = torch.Generator().manual_seed(derive_seed("shown tokens"))
    tokens_per_task = num_shown // len(token_counts)
    sampled_tokens = []
    tasks = []
    start = 0  # the index of the task's first token among the tokens of all tasks
    for name, num_tokens in token_counts.items():
        chosen = torch.randperm(num_tokens, generator=generator)[:tokens_per_task]
        sampled_tokens.append(start + chosen.sort().values)
        tasks += [name] * len(chosen)
        start += num_tokens
    sampled = torch.cat(sampled_tokens)
    # the index of the token (among the sampled tokens) and of the neuron for each active neuron
    token_indices, neuron_indices = active[sampled].nonzero(as_tuple=True)
    values = magnitudes[sampled][token_indices, neuron_indices]
    return {
        "tasks": tasks,
        "neurons": magnitudes.shape[1],
        "tokens": token_indices.tolist(),
        "places": neuron_indices.tolist(),
        "values": [round(float(value), 3) for value in values],
    }
