"""Choose hyper-parameters after the fact, over records; training knows nothing of it."""

from __future__ import annotations

import pandas as pd

from benchmarks.harness.results.records import scores_of
from benchmarks.text.grid import CLEAN, PUBLISHED

CELL = ["model", "task", "method"]
CHOICE = ["variant", "learning_rate"]
PROTOCOLS = {
    # a split that is not reported chooses epoch, learning rate and variant
    CLEAN: "clean",
    # the authors': the dev split chooses them and is itself reported, which is optimistic
    PUBLISHED: "authors'",
}


def choosing_scores(records: pd.DataFrame, protocol: str) -> pd.DataFrame:
    """The score of every run by which its hyper-parameters are chosen.

    Tasks with a test split have clean runs only; there the authors' protocol is the score of the best dev epoch.
    """
    own = scores_of(records[records["protocol"] == protocol], "dev")
    return own if protocol == CLEAN else pd.concat([own, scores_of(records, "dev_best")])


def choices(records: pd.DataFrame, protocol: str) -> pd.DataFrame:
    """Mean choosing score over seeds of every choice, and whether its cell chose it.

    A cell is one model, task and method; a choice is a variant and a learning rate. The first of equal
    choices wins, in the order of the grid.

    Returns:
        Columns ``model, task, method, variant, learning_rate, mean, std, n, chosen``.
    """
    grouped = choosing_scores(records, protocol).groupby([*CELL, *CHOICE], sort=False)["value"]
    table = grouped.agg(mean="mean", std="std", n="count").reset_index()
    best = table.groupby(CELL, sort=False)["mean"].idxmax()
    return table.assign(chosen=table.index.isin(best))


def select(records: pd.DataFrame, protocol: str) -> pd.DataFrame:
    """The records of the chosen runs only."""
    table = choices(records, protocol)
    chosen = table.loc[table["chosen"], [*CELL, *CHOICE]]
    runs = choosing_scores(records, protocol)["run_id"]
    return records[records["run_id"].isin(runs)].merge(chosen, on=[*CELL, *CHOICE], how="inner")


def reported(records: pd.DataFrame, protocol: str) -> pd.DataFrame:
    """What a protocol reports in domain, of the chosen runs: a row a cell and seed.

    The reported split's score; of a task with a test split under the authors' protocol, the best dev epoch's.
    """
    chosen = select(records, protocol)
    test = scores_of(chosen[chosen["protocol"] == protocol], "test")
    return test if protocol == CLEAN else pd.concat([test, scores_of(chosen, "dev_best")])
