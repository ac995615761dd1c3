"""Rank methods over the OOD sets: Friedman ranks and their critical difference (Demšar 2006)."""

from __future__ import annotations

import math
from typing import cast

import pandas as pd

from benchmarks.glue_ood.definition import EvaluationDefinition
from benchmarks.harness.report.common import read_published
from benchmarks.harness.report.table import Column, Table
from benchmarks.harness.results.statistics import critical_difference, friedman_ranks
from benchmarks.text.definition import OOD
from benchmarks.text.outcomes import PROTOCOLS, TextOutcomes
from benchmarks.text.tables import BY_SELECTION, RANK

Scores = dict[tuple[str, str], pd.DataFrame]  # by protocol and model, [methods, data sets]


def ranked_scores(outcomes: TextOutcomes) -> Scores:
    """Return the mean scores ``[methods, data sets]`` of the ranked methods, by protocol and model.

    A data set is a pair of training task and OOD set. Means are over the seeds that all ranked
    methods have on it. A protocol and model without a common data set and seed is left out.
    """
    methods = cast(EvaluationDefinition, outcomes.benchmark.definition).ranked
    is_ood = outcomes.seeds["domain"] == OOD
    is_ranked = outcomes.seeds["method"].isin(methods)
    seeds = outcomes.seeds[is_ood & is_ranked]
    scores = {}
    for key, group in seeds.groupby(["protocol", "model"], sort=False):
        # [methods, data sets and seeds]
        by_seed = group.pivot_table(
            index="method", columns=["scope", "seed"], values="value", sort=False
        )
        # only the seeds of a data set that every method has
        complete = by_seed.dropna(axis=1)
        # the mean over seeds; transposed, because groups are made of rows
        by_set = complete.T.groupby(level="scope", sort=False).mean().T
        in_order = [name for name in methods if name in by_set.index]
        table = by_set.loc[in_order]
        if not table.empty:
            scores[key] = table
    return scores


def ranks(outcomes: TextOutcomes) -> Table:
    """Make a table of the mean rank of each method over OOD sets, and the paper's mean rank.

    It has a row per model, protocol and ranked method.
    """
    paper = _paper_ranks(outcomes)
    rows = []
    notes = []
    sets: list[str] = []
    for (protocol, model), table in ranked_scores(outcomes).items():
        mean_ranks, p = friedman_ranks(table)
        title = f"{outcomes.title('model', model)}, {PROTOCOLS[protocol]} selection"
        notes.append(f"{title}: {_test_text(table, p)}")
        sets += [name for name in table.columns if name not in sets]
        methods_count, sets_count = table.shape
        for method, rank in mean_ranks.items():
            rows.append(
                {
                    "protocol": protocol,
                    "model": model,
                    "method": method,
                    "rank": rank,
                    "sets": sets_count,
                    "ranked": methods_count,
                    "paper": paper.get((model, method), math.nan),
                }
            )
    # without rows, the columns must still exist
    frame = pd.DataFrame(
        rows, columns=["protocol", "model", "method", "rank", "sets", "ranked", "paper"]
    )
    methods = [outcomes.title("method", name) for name in frame["method"].unique()]
    if not notes:
        notes = ["No ranks: the rows have no common set and seed"]
    return Table(
        "Friedman ranks out of domain",
        f"Mean rank over the OOD sets, 1 is best, of {len(methods)} rows: {', '.join(methods)}. "
        "The paper does not name its ranked rows, so its ranks cannot be compared with ours. "
        f"Sets ({len(sets)}): {', '.join(sets)}. {'; '.join(notes)}. By Nemenyi's test at 5 %, "
        "ranks differ if they are further apart than the critical difference.",
        BY_SELECTION,
        [
            Column("ood_rank", "rank", "Rank", best=True),
            Column("sets", "sets", "Sets"),
            Column("sets", "ranked", "Rows ranked"),
            Column("ood_rank", "paper", "Rank in the paper"),
        ],
        outcomes.order(frame, ["protocol", "model", "method"]),
        group=("model", "protocol"),
    )


def _paper_ranks(outcomes: TextOutcomes) -> pd.Series[float]:
    """Read the paper's mean ranks. The index of the series is the model and the method."""
    published = read_published(outcomes.benchmark)
    of_ranks = published[published["scope"] == RANK]
    return of_ranks.set_index(["model", "method"])["value"]


def _test_text(scores: pd.DataFrame, p: float) -> str:
    """Describe Friedman's test of ranks, and the critical difference of two mean ranks.

    Args:
        scores: The scores, ``[methods, data sets]``.
        p: The p of the test; nan without a test.
    """
    test = "no Friedman test" if math.isnan(p) else f"Friedman p = {p:.3f}"
    methods, sets = scores.shape
    return f"{test}, critical difference {critical_difference(methods, sets):.2f}"
