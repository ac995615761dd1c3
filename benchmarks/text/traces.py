"""Show how routing changes while models are trained: the loads of experts, window by window."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.special import entr

from benchmarks.harness.base import DefinitionError
from benchmarks.harness.config.methods import CONTROL
from benchmarks.harness.report.table import MISSING, Column, Table
from benchmarks.text.definition import PublishedTraces, TextDefinition
from benchmarks.text.outcomes import TextOutcomes

Shares = NDArray[np.float64]
_PERIODS = 4  # quarters of the training
NUMBERS = ("load_entropy", "load_max_over_mean", "load_change", "load_drift", "load_drift_chance")


@dataclass(frozen=True)
class Trace:
    """Hold the shares of experts in the windows of one layer's training.

    Attributes:
        shares: ``[windows, N]``; each row sums to 1.
        ends: the last step of each window; empty where that is not known.
    """

    shares: Shares
    ends: list[int]

    def numbers(self) -> dict[str, float]:
        """Return the numbers of a trace, by :data:`NUMBERS`.

        Entropy (by ln N) and load of the busiest expert over the mean load are means over windows, and so is the L1
        distance of a window's shares to the next one's. That
        distance is larger the fewer tokens a window has, so that it compares rows of one run with each other, and not
        runs of other lengths. Drift is the L1 distance between
        the first and the last quarter of the training; its chance is the distance between two halves of as many
        windows, taken in turn, which differ by the tokens in them alone.
        """
        found = self.shares
        count = found.shape[1]
        entropy = entr(found).sum(1) / np.log(count) if count > 1 else np.ones(len(found))
        quarter = max(len(found) // _PERIODS, 1)
        halves = [part for part in (found[: 2 * quarter], found[-2 * quarter :]) if len(part) > 1]
        return {
            "load_entropy": float(entropy.mean()),
            "load_max_over_mean": float(found.max(1).mean() * count),
            "load_change": float(np.abs(np.diff(found, axis=0)).sum(1).mean()) if len(found) > 1 else np.nan,
            "load_drift": _distance(found[:quarter], found[-quarter:]) if len(found) > 1 else np.nan,
            "load_drift_chance": float(np.mean([_distance(part[::2], part[1::2]) for part in halves]))
            if halves
            else np.nan,
        }


def _distance(one: Shares, other: Shares) -> float:
    return float(np.abs(one.mean(0) - other.mean(0)).sum())


def traces(outcomes: TextOutcomes) -> Iterator[tuple[Any, int, Trace]]:
    """Yield record, layer and trace of every chosen run of the first selection that routes."""
    for record, found in outcomes.training:
        windows = found["routing"].get("windows")
        if windows:
            for layer, loads in windows["loads"].items():
                counts = np.asarray(loads, dtype=np.float64)
                yield record, int(layer), Trace(counts / np.maximum(counts.sum(1, keepdims=True), 1), windows["ends"])


def published_traces(outcomes: TextOutcomes) -> dict[str, Trace]:
    """Read the paper's traces, by row (``published_traces`` of the definition).

    Raises:
        DefinitionError: a file that is no table of numbers.
    """
    given, found = _given(outcomes), {}
    for name, file in (given.rows if given else {}).items():
        path: Path = outcomes.benchmark.folder / file
        try:
            shares = np.loadtxt(path, delimiter=",", ndmin=2)
        except (OSError, ValueError) as error:
            raise DefinitionError(f"{path} is no table of shares, a row a window: {error}") from error
        found[name] = Trace(shares / shares.sum(1, keepdims=True), [])
    return found


def trace_table(outcomes: TextOutcomes) -> Table:
    """Lay out a row for each model, task and routed method, and the paper's."""
    keys = ["model", "task", "method"]
    rows = [
        {
            **{key: getattr(record, key) for key in keys},
            "seed": record.seed,
            "windows": len(trace.shares),
            **trace.numbers(),
        }
        for record, _, trace in traces(outcomes)
    ]
    frame = pd.DataFrame(rows, columns=[*keys, "seed", "windows", *NUMBERS])
    frame = frame.groupby([*keys, "seed"], sort=False).mean().reset_index()  # over layers
    by_row = frame.groupby(keys, sort=False)
    means = by_row[["windows", *NUMBERS]].mean().join(by_row[list(NUMBERS)].std().add_suffix("_std"))
    means = outcomes.order(means.join(by_row.size().rename("n")).reset_index(), keys)
    published = published_traces(outcomes)
    paper = [
        {
            "model_title": MISSING,
            "task_title": f"{outcomes.title('task', _paper_task(outcomes))} (the paper)",
            "method_title": outcomes.title("method", name),
            "method": name,
            "n": 1,
            "windows": len(trace.shares),
            **trace.numbers(),
        }
        for name, trace in published.items()
    ]
    shown = pd.concat([means, pd.DataFrame(paper)], ignore_index=True) if paper else means
    shown = shown.assign(n=shown["n"].astype(int).astype(str), windows=shown["windows"].map("{:.0f}".format))
    return Table(
        "Shares of experts over training",
        "Loads of training batches, in windows of 100 steps as in the authors' code (of fewer where a run would have "
        "less than 20 windows), padding left out; means over layers and n seeds ± standard "
        "deviation. Entropy is 1, and the busiest expert over the mean 1, where loads are balanced in every window. "
        "Change is the L1 distance between the shares of a window and of the next, which is the larger the "
        "fewer tokens a window has. Drift is that between the first and the last quarter of the training; within "
        "quarters is what as many windows differ by when nothing but their tokens differs: drift above it is "
        "a change of routing.",
        {"model_title": "Model", "task_title": "Trained on", "method_title": "Method", "n": "n", "windows": "Windows"},
        [Column(name, name, std=f"{name}_std") for name in NUMBERS],
        shown.reindex(
            columns=[
                *("model_title", "task_title", "method_title", "method", "n", "windows"),
                *NUMBERS,
                *(f"{name}_std" for name in NUMBERS),
            ]
        ),
    )


def _given(outcomes: TextOutcomes) -> PublishedTraces | None:
    definition = outcomes.benchmark.definition
    return definition.published_traces if isinstance(definition, TextDefinition) else None


def _paper_task(outcomes: TextOutcomes) -> str:
    given = _given(outcomes)
    return given.task if given else ""


def shown_traces(outcomes: TextOutcomes) -> dict[tuple[str, str], dict[str, tuple[str, Trace]]]:
    """Select the traces of a figure: of the first layer and seed, by model and task (the paper's first) and method."""
    found: dict[tuple[str, str], dict[str, tuple[str, Trace]]] = {}
    for record, layer, trace in traces(outcomes):
        if outcomes.role(record.method) != CONTROL:
            title = f"{outcomes.title('method', record.method)}, layer {layer}"
            found.setdefault((record.model, record.task), {}).setdefault(record.method, (title, trace))
    first = _paper_task(outcomes)
    return dict(sorted(found.items(), key=lambda one: one[0][1] != first))
