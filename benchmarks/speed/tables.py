"""The tables of the measurements, and a sentence for each measure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pandas as pd

from benchmarks.harness.report.rendering import Column, Table
from benchmarks.speed.measurements import Measurements


def layer(measured: Measurements) -> Table:
    """Every candidate beside the dense FFN."""
    frame = measured.wide("layer")
    frame["size"] = [f"{row.neurons / float(row.num_experts):g}" for row in frame.itertuples()]
    return Table(
        "One FFN of experts beside the dense FFN",
        "Forward and backward, random weights and inputs. Time as a ratio to the dense FFN in the same round: median [lowest, highest]; the lowest possible is k/N. EMoE is "
        "emoe.set_backend_(model, 'sparse'); expected is the prediction of emoe.sparse.cost_model, which decides if the sparse products are used. The authors' block mask is our version of their Llama code's "
        "computation; their Tutel fork was not at hand. transformers' experts get the same weights without biases, the same choice of experts, and no router's cost beyond it. The last column is what the "
        "sparse path keeps for the backward pass.",
        {
            "model_title": "FFN",
            "num_experts": "N",
            "size": "Neurons an expert",
            "top_k_fraction": "k/N",
            "tokens": "Tokens",
            "threads": "Threads",
            "dtype": "Type",
        },
        [
            Column("milliseconds", "dense_seconds", "Dense"),
            *_ratio_columns(measured, frame, [name for name in measured.titles if name != "dense"]),
            Column("expected_ratio", "sparse_expected_ratio"),
            Column("memory_ratio", "sparse_memory_ratio"),
        ],
        frame,
    )


def step(measured: Measurements) -> Table:
    """A training step of a whole model."""
    frame = measured.wide("step")
    frame["batch"] = [f"{row.batch_size:g} × {row.length:g}" for row in frame.itertuples()]
    return Table(
        "A training step beside the dense model's",
        "Forward, backward and AdamW of a model with random weights, without a head. Ratios as above. A ViT reads images of its own number of patches.",
        {
            "model_title": "Model",
            "layers": "Layers",
            "num_experts": "N",
            "top_k_fraction": "k/N",
            "batch": "Batch",
            "threads": "Threads",
        },
        [Column("milliseconds", "dense_seconds", "Dense"), *_ratio_columns(measured, frame, ["sparse", "masked"])],
        frame,
    )


def decode(measured: Measurements) -> Table:
    """One token at a time, or the few of a prompt: the FFNs alone, and an answer."""
    frames = [
        measured.wide(measure).assign(what=entry.title)
        for measure, entry in measured.benchmark.definition.measures.items()
        if measure in ("decode", "prompt", "generate")
    ]
    for frame in frames:
        if (frame["task"] == "prompt").any():
            frame["what"] += ", " + frame["tokens"] + " tokens"
    frame = pd.concat([frame for frame in frames if len(frame)], ignore_index=True)
    return Table(
        "Decoding beside the dense model",
        "A language model with random weights and all FFNs converted, in evaluation mode: one token, or the tokens of a prompt at once, through all its FFNs one after another, and a greedy answer of 24 tokens to a prompt of 16 with "
        "a key-value cache. Ratios as above. EMoE is emoe.for_inference_(model), which stores a copy of the values by neuron, as large as the out-projections.",
        {
            "model_title": "Model",
            "what": "What",
            "num_experts": "N",
            "top_k_fraction": "k/N",
            "threads": "Threads",
            "dtype": "Type",
        },
        [
            Column("milliseconds", "dense_seconds", "Dense"),
            *_ratio_columns(measured, frame, ["inference", "masked"]),
        ],
        frame,
    )


def partition(measured: Measurements) -> Table:
    """Our clustering of keys beside the library's."""
    frame = measured.wide("partition")
    has_library = "kmeans_constrained_seconds" in frame
    if has_library:
        frame["speedup"] = 1 / frame["emoe_ratio"]
    library = [
        Column("seconds", "kmeans_constrained_seconds", "k-means-constrained"),
        Column("speedup", "speedup"),
    ]
    return Table(
        "Balanced clustering of one layer's keys",
        "Wall time, and the variance between normalised keys that the clusters leave unexplained (lower is better). k-means-constrained is called as the authors call it. "
        "MiniLM's keys are real; the others are Gaussian rows around 128 weak centres, of the sizes of the models named.",
        {"model_title": "Keys", "num_experts": "N", "starts": "Starts of the library", "threads": "Threads"},
        [
            Column("seconds", "emoe_seconds", "EMoE"),
            *(library if has_library else []),
            Column("inertia", "emoe_inertia", "Unexplained, EMoE"),
            *([Column("inertia", "kmeans_constrained_inertia", "Unexplained, library")] if has_library else []),
        ],
        frame,
    )


TABLES = {"layer": layer, "step": step, "decode": decode, "partition": partition}


def verdicts(measured: Measurements) -> Iterator[str]:
    """A sentence for each measure, type and share of experts: the middle over its settings, and both ends."""
    rows = measured.records[
        (measured.records["eval_task"].isin(["sparse", "inference"])) & (measured.records["metric"] == "ratio")
    ]
    for (measure, dtype, share), found in rows.groupby(["task", "dtype", "top_k_fraction"], dropna=False, sort=False):
        found = found.sort_values("value")
        first, last = found.iloc[0], found.iloc[-1]
        title = measured.benchmark.definition.measures[measure].title
        kind = "" if pd.isna(dtype) else f", {dtype}"
        range_ = f", from {_setting(first)} to {_setting(last)}" if len(found) > 1 else ""
        settings = "settings" if len(found) > 1 else "setting"
        yield (
            f"{title}{kind}, k/N {share:g}, {len(found)} {settings}: {found['value'].median():.2f} of the dense time{range_}."
        )


def _ratio_columns(measured: Measurements, frame: pd.DataFrame, names: list[str]) -> list[Column]:
    return [
        Column("ratio", f"{name}_ratio", measured.titles[name], interval=(f"{name}_ratio_low", f"{name}_ratio_high"))
        for name in names
        if f"{name}_ratio" in frame
    ]


def _setting(row: Any) -> str:
    where = (
        f"layers {row['layers']}"
        if row["task"] == "step"
        else f"{row['tokens']:g} tokens, {threads_text(row['threads'])}"
    )
    return f"{row['value']:.2f} ({row['model_title']}, N {row['num_experts']:g}, {where})"


def threads_text(count: float) -> str:
    """A number of threads in words."""
    return f"{count:g} thread{'s' if count > 1 else ''}"
