"""What training does to the FFNs: how far they move, and whether the gradients of other sets agree with the task's own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd

from benchmarks.harness.report.rendering import Column, Table
from benchmarks.harness.results.statistics import paired_differences, with_verdicts
from benchmarks.text.definition import GRADIENT_ROWS
from benchmarks.text.grid import OWN
from benchmarks.text.outcomes import TextOutcomes

_ROW = ["model", "task", "method", "on"]
_CONVERTED = "converted"  # the layers that the suite's methods convert, of the dense model too


def _mean(values: Iterable[float | None]) -> float:
    """Over layers; nan where the run diverged."""
    return float(np.mean([np.nan if value is None else value for value in values]))


def _converted(outcomes: TextOutcomes) -> dict[str, list[str]]:
    """By model the layers that every method converts that converts any, as keys of ``updates``."""
    found: dict[str, set[str]] = {}
    for record, metrics in outcomes.training:
        if layers := {str(layer["index"]) for layer in metrics["model"]["conversion"]}:
            found[record.model] = found.get(record.model, layers) & layers
    return {model: sorted(layers, key=int) for model, layers in found.items()}


def _words(outcomes: TextOutcomes, converted: Mapping[str, Sequence[str]], model: str, on: str) -> str:
    """What a row's numbers are of."""
    if on == _CONVERTED:
        return f"weights of FFN {', '.join(converted[model])}, which methods convert"
    known = {"": "weights of all FFNs", OWN: "gradients of other rows of the task"}
    return known.get(on) or f"gradients of {outcomes.title('task', on)}"


def update_table(outcomes: TextOutcomes) -> Table:
    """A row a model, task and method, and one a set whose gradient is compared."""
    rows, converted = [], _converted(outcomes)
    for record, found in outcomes.training:
        key = {"model": record.model, "task": record.task, "method": record.method, "seed": record.seed}
        change, agreement = (found["updates"].get(part, {}) for part in ("change", "gradients"))
        if change:
            rows.append({**key, "on": "", "metric": "weight_change", "value": _mean(change.values())})
        if own := [change[layer] for layer in converted.get(record.model, ()) if layer in change]:
            rows.append({**key, "on": _CONVERTED, "metric": "weight_change", "value": _mean(own)})
        for name in next(iter(agreement.values()), {}):
            cosines = [layer[name] for layer in agreement.values()]
            rows.append({**key, "on": name, "metric": "gradient_agreement", "value": _mean(cosines)})
    seeds = pd.DataFrame(rows, columns=[*_ROW, "seed", "metric", "value"]).dropna(subset="value")
    by_row = seeds.groupby([*_ROW, "metric"], sort=False)["value"]
    frame = by_row.agg(mean="mean", std="std", n="size").reset_index()
    compared = paired_differences(seeds, _ROW, {"method": outcomes.baseline}, "seed").drop(columns=["values", "n"])
    frame = with_verdicts(frame.merge(compared, on=_ROW, how="left"), ["model", "task", "metric"])
    frame = frame.drop(columns="verdict")  # neither number is better for being higher
    order = {name: place for place, name in enumerate(["", _CONVERTED, OWN, *outcomes.benchmark.tasks])}
    frame = outcomes.order(frame.assign(place=frame["on"].map(order)), ["model", "task", "place", "method"])
    own = [_words(outcomes, converted, row.model, row.on) for row in frame.itertuples()]
    for metric in ("weight_change", "gradient_agreement"):
        here = frame["metric"] == metric
        for number in ("mean", "std", "delta", "low", "high"):
            frame[f"{metric}_{number}"] = frame[number].where(here)
    return Table(
        "What training does to the FFNs",
        f"Change: norm of the weights' change over their norm before training, mean over layers; of the FFNs that methods convert once more by themselves, of the dense model too. Gradients: cosine, after training, between the loss's gradient on {GRADIENT_ROWS} rows of the task and on {GRADIENT_ROWS} others (of the task "
        "itself, or of a set that the model is not trained on), by the weights of the FFNs in the last quarter of the layers; 1 where both ask for the same change, negative where what helps the one harms the "
        "other. What other rows of the task give is as much as is to be had. Means over n seeds ± standard deviation; Δ is the difference to the baseline, paired by seed, with a 95 % interval, and p is corrected by "
        "Holm's procedure over the rows of a task. The paper explains its gains by less negative transfer; it measures none.",
        {"model_title": "Model", "task_title": "Trained on", "what": "Of", "method_title": "Method", "n": "n"},
        [
            Column("weight_change", "weight_change_mean", "Change", std="weight_change_std"),
            Column("gradient_agreement", "gradient_agreement_mean", "Agree", std="gradient_agreement_std"),
            Column(
                "weight_change",
                "weight_change_delta",
                "Δ",
                interval=("weight_change_low", "weight_change_high"),
                signed=True,
            ),
            Column(
                "gradient_agreement",
                "gradient_agreement_delta",
                "Δ",
                interval=("gradient_agreement_low", "gradient_agreement_high"),
                signed=True,
            ),
            Column("p_value", "p_holm", "p (Holm)"),
        ],
        frame.assign(what=own, n=frame["n"].astype(str)),
    )
