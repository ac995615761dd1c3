"""Choose hyper-parameters after the fact, over records; training knows nothing of it."""

from __future__ import annotations

import pandas as pd

from benchmarks.harness.records import scores_of

CELL = ["model", "task", "method"]
CHOICE = ["variant", "learning_rate"]

PROTOCOLS = {
    # the kept epoch's dev score chooses; a split that chose nothing is reported
    "clean": "dev",
    # the authors': the best epoch's dev score chooses and is itself reported, which is optimistic
    "published": "dev_best",
}


def choices(records: pd.DataFrame, protocol: str) -> pd.DataFrame:
    """Mean dev score over seeds of every choice, and whether its cell chose it.

    A cell is one model, task and method; a choice is a variant and a learning rate. The first of equal
    choices wins, in the order of the grid.

    Returns:
        Columns ``model, task, method, variant, learning_rate, mean, std, n, chosen``.
    """
    dev = scores_of(records, PROTOCOLS[protocol])
    grouped = dev.groupby([*CELL, *CHOICE], sort=False)["value"]
    table = grouped.agg(mean="mean", std="std", n="count").reset_index()
    best = table.groupby(CELL, sort=False)["mean"].idxmax()
    return table.assign(chosen=table.index.isin(best))


def select(records: pd.DataFrame, protocol: str) -> pd.DataFrame:
    """The records of the chosen runs only."""
    table = choices(records, protocol)
    chosen = table.loc[table["chosen"], [*CELL, *CHOICE]]
    return records.merge(chosen, on=[*CELL, *CHOICE], how="inner")
