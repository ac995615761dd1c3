"""What the choice of an expert tells of sets and classes, of models that were trained."""

from __future__ import annotations

import pandas as pd

from benchmarks.harness.report.table import Column, Table
from benchmarks.harness.results.records import information_numbers
from benchmarks.harness.results.statistics import PERMUTATIONS
from benchmarks.text.outcomes import TextOutcomes

_CELL = ["model", "task", "method"]
_NUMBERS = information_numbers("task", "class")


def usage_table(outcomes: TextOutcomes) -> Table:
    """A row a model, training task and routed method."""
    rows = [
        {
            **{key: getattr(record, key) for key in (*_CELL, "seed")},
            **{name: found["routing"].get(name) for name in _NUMBERS},
            "specialised_experts": float(len(found["usage"]["specialised"])),
            "shared_experts": float(len(found["usage"]["shared"])),
        }
        for record, found in outcomes.training
        if found["usage"]
    ]
    counted = ["specialised_experts", "shared_experts"]
    frame = pd.DataFrame(rows, columns=[*_CELL, "seed", *_NUMBERS, *counted])
    frame = frame.astype(dict.fromkeys([*_NUMBERS, *counted], float))
    by_row = frame.groupby(_CELL, sort=False)
    shown = by_row[[*_NUMBERS, *counted]].mean().join(by_row[_NUMBERS].std().add_suffix("_std"))
    shown = outcomes.order(shown.join(by_row.size().rename("n")).reset_index(), _CELL)
    return Table(
        "What the choice of an expert tells after training",
        "Mutual information, in bits, of a token's expert (of the last converted layer) with the set that its row is of, over the training task and the sets that were evaluated on, and with the row's class "
        f"(within a set, mean over the sets); of 200 rows a set. Chance: mean and 95 % quantile of {PERMUTATIONS} shuffles of rows over the sets, or within their set; more than the quantile is more than chance. Specialised experts are "
        "those that some set uses more than shuffles explain (5 %, all experts and sets together); shared ones are used above 1/N by every set, and by none more or less than by the others. Means over n seeds ± "
        "standard deviation. Before training: the benchmark modularity.",
        {"model_title": "Model", "task_title": "Trained on", "method_title": "Method", "n": "n"},
        [
            *(Column(name, name, std=f"{name}_std" if name.endswith("_information") else None) for name in _NUMBERS),
            *(Column(name, name) for name in counted),
        ],
        shown.assign(n=shown["n"].astype(str)),
    )
