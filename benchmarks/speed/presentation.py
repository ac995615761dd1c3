"""Tables, figures and verdicts of the measurements."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas as pd
import torch
from matplotlib import pyplot as plt

from benchmarks.harness.planning.kinds import Benchmark
from benchmarks.harness.planning.runs import Run
from benchmarks.harness.reporting.plots import STYLE, save
from benchmarks.harness.reporting.presentation import Presentation
from benchmarks.harness.reporting.rendering import Column, Table
from benchmarks.harness.results.records import collect
from benchmarks.speed.definition import Measure, MeasurementDefinition
from emoe.sparse.cost_model import predicted_time_ratio

_COLOURS = {
    "auto": "#0072b2",
    "sparse": "#56b4e9",
    "masked": "#999999",
    "block_mask": "#d55e00",
    "transformers_eager": "#009e73",
    "transformers_grouped": "#cc79a7",
}
_MARKERS = {
    "auto": "D",
    "sparse": "o",
    "masked": "s",
    "block_mask": "^",
    "transformers_eager": "v",
    "transformers_grouped": ">",
}


def present(benchmark: Benchmark[MeasurementDefinition, Measure], runs: list[Run]) -> Presentation:
    """Present finished runs."""
    shown = _Shown(benchmark, runs)
    return Presentation(
        [shown.layer(), shown.step(), shown.decode(), shown.partition()],
        list(shown.verdicts()),
        "Each ratio is the median over rounds in which all candidates ran in turn in one process. The middle here is the median over settings.",
        shown.draw,
    )


class _Shown:
    def __init__(self, benchmark: Benchmark[MeasurementDefinition, Measure], runs: list[Run]) -> None:
        self.benchmark = benchmark
        self._titles = {name: candidate.title for name, candidate in benchmark.definition.candidates.items()}
        settings = pd.DataFrame(
            [
                {
                    "run_id": run.id,
                    "neurons": run.spec["model"].get("neurons"),
                    "hidden": run.spec["model"].get("hidden"),
                    **run.spec["settings"],
                }
                for run in runs
            ]
        )
        self.records = collect(runs).merge(settings, on="run_id")
        models = benchmark.definition.models
        self.records["model_title"] = self.records["model"].map({name: model.title for name, model in models.items()})

    def _wide(self, measure: str) -> pd.DataFrame:
        """A row a run, in the order of the grid, with columns ``<candidate>_<metric>``."""
        rows = self.records[self.records["task"] == measure]
        values = rows.assign(name=rows["eval_task"] + "_" + rows["metric"]).pivot_table(
            index="run_id", columns="name", values="value"
        )
        first = rows.drop_duplicates("run_id").set_index("run_id")
        frame = first.join(values).reset_index()
        for column in ("top_k_fraction", "num_experts", "tokens", "threads", "starts"):
            if column in frame:
                frame[column] = frame[column].map("{:g}".format)
        return frame

    def _ratio_columns(self, frame: pd.DataFrame, names: list[str]) -> list[Column]:
        return [
            Column("ratio", f"{name}_ratio", self._titles[name], interval=(f"{name}_ratio_low", f"{name}_ratio_high"))
            for name in names
            if f"{name}_ratio" in frame
        ]

    def layer(self) -> Table:
        frame = self._wide("layer")
        frame["size"] = [f"{row.neurons / float(row.num_experts):g}" for row in frame.itertuples()]
        return Table(
            f"{self.benchmark.name}_layer",
            "One FFN of experts beside the dense FFN",
            "Forward and backward, random weights and inputs. Time as a ratio to the dense FFN in the same round: median [lowest, highest]; the lowest possible is k/N. EMoE is "
            'backend="auto", which chooses between sparse and masked; expected is what emoe.sparse.cost_model, by which it chooses, says of sparse. The authors\' block mask is our writing of what their Llama code '
            "computes; their Tutel fork was not at hand. transformers' experts get the same weights without biases, the same choice of experts, and no router's cost beyond it. The last column is what the "
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
                *self._ratio_columns(frame, [name for name in self._titles if name != "dense"]),
                Column("expected_ratio", "sparse_expected_ratio"),
                Column("memory_ratio", "sparse_memory_ratio"),
            ],
            frame,
        )

    def step(self) -> Table:
        frame = self._wide("step")
        frame["batch"] = [f"{row.batch_size:g} × {row.length:g}" for row in frame.itertuples()]
        return Table(
            f"{self.benchmark.name}_step",
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
            [Column("milliseconds", "dense_seconds", "Dense"), *self._ratio_columns(frame, ["auto", "masked"])],
            frame,
        )

    def decode(self) -> Table:
        measures = self.benchmark.definition.measures
        frames = [self._wide(measure).assign(what=measures[measure].title) for measure in ("decode", "generate")]
        frame = pd.concat([frame for frame in frames if len(frame)], ignore_index=True)
        return Table(
            f"{self.benchmark.name}_decode",
            "Decoding beside the dense model",
            "A language model with random weights and all FFNs converted, at rest, one token at a time: all its FFNs one after the other, and a greedy answer of 24 tokens to a prompt of 16 with "
            "a key-value cache. Ratios as above. EMoE keeps a copy of the values by neuron, as large as the out-projections; without it they are gathered from where they lie.",
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
                *self._ratio_columns(frame, ["auto", "scattered", "masked"]),
            ],
            frame,
        )

    def partition(self) -> Table:
        frame = self._wide("partition")
        has_library = "kmeans_constrained_seconds" in frame
        if has_library:
            frame["speedup"] = 1 / frame["emoe_ratio"]
        library = [
            Column("seconds", "kmeans_constrained_seconds", "k-means-constrained"),
            Column("speedup", "speedup"),
        ]
        return Table(
            f"{self.benchmark.name}_partition",
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

    def verdicts(self) -> Iterator[str]:
        """A sentence for each measure, type and share of experts: the middle over its settings, and both ends."""
        rows = self.records[(self.records["eval_task"] == "auto") & (self.records["metric"] == "ratio")]
        for (measure, dtype, share), found in rows.groupby(
            ["task", "dtype", "top_k_fraction"], dropna=False, sort=False
        ):
            found = found.sort_values("value")
            first, last = found.iloc[0], found.iloc[-1]
            title = self.benchmark.definition.measures[measure].title
            kind = "" if pd.isna(dtype) else f", {dtype}"
            range_ = f", from {_setting(first)} to {_setting(last)}" if len(found) > 1 else ""
            settings = "settings" if len(found) > 1 else "setting"
            yield (
                f"{title}{kind}, k/N {share:g}, {len(found)} {settings}: {found['value'].median():.2f} of the dense time{range_}."
            )

    def draw(self, folder: Path) -> None:
        """Write both figures."""
        self._draw_layer(folder)
        self._draw_scaling(folder)

    def _ratios(self, **where: Any) -> pd.DataFrame:
        """A row a run and candidate: its settings, ``ratio``, ``ratio_low``, ``ratio_high``."""
        rows = self.records[self.records["task"] == "layer"]
        for column, value in where.items():
            rows = rows[rows[column] == value]
        keys = ["run_id", "eval_task"]
        values = rows.pivot_table(index=keys, columns="metric", values="value", sort=False)
        return rows.drop_duplicates(keys).set_index(keys).join(values).reset_index()

    def _draw_layer(self, folder: Path) -> None:
        """One panel a number of threads: the FFNs that met all candidates."""
        rows = self._ratios(dtype="float32")
        rows = rows[rows["candidates"].map(len) == rows["candidates"].map(len).max()]
        panels = sorted(rows["threads"].unique())
        names = [name for name in _COLOURS if name in set(rows["eval_task"])]
        cells = list(dict.fromkeys(zip(rows["model_title"], rows["top_k_fraction"], strict=True)))
        with mpl.rc_context(STYLE):
            figure, axes = plt.subplots(
                1,
                len(panels),
                figsize=(3.4 * len(panels) + 1.2, 0.42 * len(cells) + 1.3),
                sharey=True,
                squeeze=False,
                layout="constrained",
            )
            for axis, threads in zip(axes[0], panels, strict=True):
                for place, (title, share) in enumerate(cells):
                    cell = rows[
                        (rows["model_title"] == title)
                        & (rows["top_k_fraction"] == share)
                        & (rows["threads"] == threads)
                    ]
                    for offset, name in enumerate(names):
                        for row in cell[cell["eval_task"] == name].itertuples():
                            height = place + (offset - (len(names) - 1) / 2) * 0.11
                            axis.plot([row.ratio_low, row.ratio_high], [height] * 2, color=_COLOURS[name], lw=1)
                            axis.plot(
                                row.ratio,
                                height,
                                _MARKERS[name],
                                ms=3.6,
                                color=_COLOURS[name],
                                label=self._titles[name],
                            )
                    axis.plot([share] * 2, [place - 0.4, place + 0.4], ":", color="black", lw=1)
                axis.axvline(1, color="#444444", ls="--", lw=0.8, zorder=0)
                axis.set_xscale("log")
                _plain_ticks(axis.xaxis, [0.25, 0.5, 1, 2, 4])
                axis.set_title(_threads(threads))
                axis.set_xlabel("Time ÷ dense")
            axes[0][0].set_yticks(range(len(cells)), [f"{title}, k/N {share:g}" for title, share in cells])
            axes[0][0].set_ylim(len(cells) - 0.5, -0.5)
            _legend(figure, axes[0][0])
            save(figure, folder / f"{self.benchmark.name}_layer")

    def _draw_scaling(self, folder: Path) -> None:
        """Each axis varied alone, the rest at the measure's usual setting with 1024 tokens."""
        usual = self.benchmark.definition.measures["layer"].settings
        rows = self._ratios(dtype="float32", threads=1)
        rows = rows.assign(size=rows["neurons"] / rows["num_experts"])
        base = rows["model"] == "bert-base"
        usual_n, usual_k, at = (
            rows["num_experts"] == usual["num_experts"],
            rows["top_k_fraction"] == usual["top_k_fraction"],
            rows["tokens"] == 1024,
        )
        panels = {
            "tokens": ("Tokens", rows[base & usual_n & usual_k]),
            "size": ("Neurons an expert", rows[base & usual_k & at]),
            "top_k_fraction": ("Share of experts in use, k/N", rows[base & usual_n & at]),
            "hidden": ("Width", rows[usual_n & usual_k & at]),
        }
        names = [name for name in ("auto", "masked", "block_mask") if name in set(rows["eval_task"])]
        with mpl.rc_context(STYLE):
            figure, axes = plt.subplots(
                1, len(panels), figsize=(2.5 * len(panels), 2.9), sharey=True, layout="constrained"
            )
            for axis, (column, (label, panel)) in zip(axes, panels.items(), strict=True):
                for name in names:
                    line = panel[panel["eval_task"] == name].sort_values(column)
                    axis.errorbar(
                        line[column],
                        line["ratio"],
                        yerr=[line["ratio"] - line["ratio_low"], line["ratio_high"] - line["ratio"]],
                        color=_COLOURS[name],
                        marker=_MARKERS[name],
                        ms=3.4,
                        lw=1,
                        label=self._titles[name],
                    )
                own = panel[panel["eval_task"] == "auto"].sort_values(column)
                expected = [
                    predicted_time_ratio(
                        row.tokens, int(row.hidden), int(row.size), row.top_k_fraction, torch.float32, 1
                    )
                    for row in own.itertuples()
                ]
                axis.plot(own[column], expected, color="#bbbbbb", lw=2.5, zorder=0, label="sparse, expected")
                axis.plot(own[column], own["top_k_fraction"], ":", color="black", lw=1, label="limit k/N")
                axis.axhline(1, color="#444444", ls="--", lw=0.8, zorder=0)
                if column != "top_k_fraction":
                    axis.set_xscale("log", base=2)
                    _plain_ticks(axis.xaxis, _apart(sorted(own[column].unique())))
                axis.set_xlabel(label)
                axis.grid(axis="y", color="#e3e3e3")
                axis.set_ylim(0, 2)
            axes[0].set_ylabel("Time ÷ dense")
            _legend(figure, axes[0])
            save(figure, folder / f"{self.benchmark.name}_scaling")


def _threads(count: float) -> str:
    return f"{count:g} thread{'s' if count > 1 else ''}"


def _setting(row: Any) -> str:
    where = (
        f"layers {row['layers']}" if row["task"] == "step" else f"{row['tokens']:g} tokens, {_threads(row['threads'])}"
    )
    return f"{row['value']:.2f} ({row['model_title']}, N {row['num_experts']:g}, {where})"


def _apart(places: list[float]) -> list[float]:
    """Those of sorted places that are at least a seventh of a logarithmic axis apart, so that their labels do not touch."""
    least = (places[-1] / places[0]) ** (1 / 7)
    kept = places[:1]
    for place in places[1:]:
        if place >= least * kept[-1]:
            kept.append(place)
    return kept


def _plain_ticks(axis: Any, places: list[float]) -> None:
    axis.set_major_locator(mpl.ticker.FixedLocator(places))
    axis.set_major_formatter(mpl.ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(mpl.ticker.NullLocator())


def _legend(figure: Any, axis: Any) -> None:
    handles, labels = axis.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    figure.legend(
        unique.values(), unique.keys(), loc="outside lower center", ncols=len(unique), fontsize=7, frameon=False
    )
