"""Present finished measurements: tables and verdicts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pandas as pd

from benchmarks.harness.config.benchmark import AnyBenchmark
from benchmarks.harness.config.runs import Run
from benchmarks.harness.report.common import join_claim_numbers
from benchmarks.harness.report.presentation import Figure, Presentation, make
from benchmarks.harness.report.table import Column, Table
from benchmarks.harness.results.records import collect
from benchmarks.speed.definition import Settings

_NOTE = (
    "Each ratio is the median over rounds, in which all candidates ran in turn in one process. Sentences give the "
    "median over settings."
)
_KEYS = {"num_experts": "N", "top_k_fraction": "k/N"}


class Measurements:
    """Hold the numbers of finished runs.

    Attributes:
        runs: The finished runs.
        titles: The titles of the candidates.
        records: Every number with the settings of its run; ``eval_task`` is the candidate.
        origins: The same frame, for the runs of tables.
    """

    def __init__(self, benchmark: AnyBenchmark, runs: list[Run]) -> None:
        definition = benchmark.definition
        self.runs = runs
        self.measures = definition.measures
        self.titles = {name: candidate.title for name, candidate in definition.candidates.items()}
        settings = [
            {"run_id": run.id, "neurons": run.spec["model"].get("neurons"), "hidden": run.spec["model"].get("hidden")}
            | run.spec["settings"]
            for run in runs
        ]
        # a suite may lack a measure, and so its settings
        frame = pd.DataFrame(settings, columns=["run_id", "neurons", "hidden", *Settings.model_fields])
        self.records = self.origins = collect(runs).merge(frame, on="run_id")
        self.records["model_title"] = self.records["model"].map(lambda name: definition.models[name].title)

    def wide(self, measure: str) -> pd.DataFrame:
        """Return a row per run, in the order of the grid, with columns ``<candidate>_<metric>``."""
        rows = self.records[self.records["task"] == measure]
        values = rows.assign(name=rows["eval_task"] + "_" + rows["metric"]).pivot_table(
            index="run_id", columns="name", values="value"
        )
        frame = rows.drop_duplicates("run_id").set_index("run_id").join(values).reset_index()
        for column in ("top_k_fraction", "num_experts", "tokens", "threads", "starts"):
            frame[column] = frame[column].map("{:g}".format)
        return frame

    def claim_numbers(self) -> pd.DataFrame:
        """Return the ratios of every setting, for claims."""
        ratios = self.records[self.records["metric"].str.startswith("ratio")]
        names = {"task": "domain", "eval_task": "method", "run_id": "pair"}
        return join_claim_numbers(ratios.drop(columns="method").rename(columns=names))


def layer(measured: Measurements) -> Table:
    """Make a table of every candidate beside the dense FFN."""
    frame = measured.wide("layer")
    frame["size"] = [f"{row.neurons / float(row.num_experts):g}" for row in frame.itertuples()]
    return Table(
        "One FFN of experts beside the dense FFN",
        "Forward and backward, random weights and inputs. Time as a ratio to the dense FFN in the same round: median "
        "[lowest, highest]; the lowest possible is k/N. EMoE is emoe.set_backend_(model, 'sparse'); expected is the "
        "prediction of emoe.sparse.cost_model. The authors' block mask is our version of their Llama code; their Tutel "
        "fork was not at hand. transformers' experts have the same weights and choice, but no biases. The last column "
        "is what the sparse path keeps for the backward pass.",
        {"model_title": "FFN", "num_experts": "N", "size": "Neurons an expert", "top_k_fraction": "k/N"}
        | {"tokens": "Tokens", "threads": "Threads", "dtype": "Type"},
        [
            *_ratio_columns(measured, frame),
            Column("expected_ratio", "sparse_expected_ratio"),
            Column("memory_ratio", "sparse_memory_ratio"),
        ],
        frame,
    )


def step(measured: Measurements) -> Table:
    """Make a table of training steps of whole models."""
    frame = measured.wide("step")
    frame["batch"] = [f"{row.batch_size:g} × {row.length:g}" for row in frame.itertuples()]
    keys = {"model_title": "Model", "layers": "Layers", **_KEYS, "batch": "Batch", "threads": "Threads"}
    return Table(
        "A training step beside the dense model's",
        "Forward, backward and AdamW of a model with random weights, without a head. Ratios as above. A ViT reads "
        "images of its own number of patches.",
        keys,
        _ratio_columns(measured, frame),
        frame,
    )


def decode(measured: Measurements) -> Table:
    """Make a table of decoding times: one token or a prompt through all FFNs, and a generated answer."""
    frame = pd.concat([measured.wide(name) for name in measured.measures if name in ("decode", "prompt", "generate")])
    frame["what"] = [
        f"{measured.measures[row.task].title}{f', {row.tokens} tokens' if row.task == 'prompt' else ''}"
        for row in frame.itertuples()
    ]
    keys = {"model_title": "Model", "what": "What", **_KEYS, "threads": "Threads", "dtype": "Type"}
    return Table(
        "Decoding beside the dense model",
        "A language model with random weights and all FFNs converted, in evaluation mode: one token, or a prompt at "
        "once, through all its FFNs, and a greedy answer of 24 tokens to a prompt of 16 with a key-value cache. Ratios "
        "as above. EMoE is emoe.for_inference_(model), which stores a copy of the out-projections.",
        keys,
        _ratio_columns(measured, frame),
        frame.reset_index(drop=True),
    )


def partition(measured: Measurements) -> Table:
    """Make a table of our clustering of keys beside k-means-constrained."""
    frame = measured.wide("partition")
    columns = [Column("seconds", "emoe_seconds", "EMoE"), Column("inertia", "emoe_inertia", "Unexplained, EMoE")]
    if "kmeans_constrained_seconds" in frame:
        frame["speedup"] = 1 / frame["emoe_ratio"]
        library = Column("seconds", "kmeans_constrained_seconds", "k-means-constrained")
        columns[1:1] = [library, Column("speedup", "speedup")]
        columns.append(Column("inertia", "kmeans_constrained_inertia", "Unexplained, library"))
    return Table(
        "Balanced clustering of one layer's keys",
        "Wall time, and the variance between normalised keys that the clusters leave unexplained (lower is better). "
        "k-means-constrained is called as the authors call it. MiniLM's keys are real; the others are Gaussian rows "
        "around 128 weak centres, as many and as wide as those of the model.",
        {"model_title": "Keys", "num_experts": "N", "starts": "Starts of the library", "threads": "Threads"},
        columns,
        frame,
    )


def _ratio_columns(measured: Measurements, frame: pd.DataFrame) -> list[Column]:
    ratios = [
        Column("ratio", f"{name}_ratio", title, interval=(f"{name}_ratio_low", f"{name}_ratio_high"))
        for name, title in measured.titles.items()
        if name != "dense" and f"{name}_ratio" in frame
    ]
    return [Column("milliseconds", "dense_seconds", "Dense"), *ratios]


def verdicts(measured: Measurements) -> Iterator[str]:
    """Yield a sentence per measure, dtype and k/N, with the median ratio over settings, and its range."""
    rows = measured.records[
        (measured.records["eval_task"].isin(["sparse", "inference"])) & (measured.records["metric"] == "ratio")
    ]
    for (measure, dtype, share), group in rows.groupby(["task", "dtype", "top_k_fraction"], dropna=False, sort=False):
        ordered = group.sort_values("value")
        kind = "" if pd.isna(dtype) else f", {dtype}"
        ends = f", from {_setting_text(ordered.iloc[0])} to {_setting_text(ordered.iloc[-1])}" if len(group) > 1 else ""
        settings = f"{len(group)} setting{'s' if len(group) > 1 else ''}"
        title = measured.measures[measure].title
        yield f"{title}{kind}, k/N {share:g}, {settings}: {group['value'].median():.2f} of the dense time{ends}."


def _setting_text(row: Any) -> str:
    tokens = f"{row['tokens']:g} tokens, {row['threads']:g} thread{'s' if row['threads'] > 1 else ''}"
    where = f"layers {row['layers']}" if row["task"] == "step" else tokens
    return f"{row['value']:.2f} ({row['model_title']}, N {row['num_experts']:g}, {where})"


TABLES = {"layer": layer, "step": step, "decode": decode, "partition": partition}


FIGURES: dict[str, Figure] = {}


def present(benchmark: AnyBenchmark, runs: list[Run]) -> Presentation:
    """Present finished runs."""
    measured = Measurements(benchmark, runs)
    sentences: dict[str, Any] = {
        "verdicts": list(verdicts(measured)),
        "note": _NOTE,
        "claim_numbers": measured.claim_numbers,
    }
    return make(benchmark, TABLES, FIGURES, measured, **sentences)
