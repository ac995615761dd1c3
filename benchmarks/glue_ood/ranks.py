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

Scores = dict[tuple[str, str], pd.DataFrame]


def ranked_scores(outcomes: TextOutcomes) -> Scores:
    """Return the mean scores ``[methods, sets]`` of the ranked methods, by protocol and model.

    Means are over the seeds that all ranked methods share. Methods without a common set and seed are omitted.
    """
    methods = cast(EvaluationDefinition, outcomes.benchmark.definition).ranked
    seeds = outcomes.seeds[
        (outcomes.seeds["domain"] == OOD) & outcomes.seeds["method"].isin(methods)
    ]
    scores = {}
    for key, group in seeds.groupby(["protocol", "model"], sort=False):
        by_seed = group.pivot_table(
            index="method", columns=["scope", "seed"], values="value", sort=False
        )
        table = by_seed.dropna(axis=1).T.groupby(level="scope", sort=False).mean().T
        table = table.loc[[name for name in methods if name in table.index]]
        if not table.empty:
            scores[key] = table
    return scores


def ranks(outcomes: TextOutcomes) -> Table:
    """Make a table of our mean ranks over OOD sets and the paper's."""
    published = read_published(outcomes.benchmark)
    published = published[published["scope"] == RANK].set_index(["model", "method"])["value"]
    scores = ranked_scores(outcomes)
    rows, notes = [], []
    for (protocol, model), table in scores.items():
        mean_ranks, p = friedman_ranks(table)
        test = "no Friedman test" if math.isnan(p) else f"Friedman p = {p:.3f}"
        difference = f"critical difference {critical_difference(*table.shape):.2f}"
        notes.append(
            f"{outcomes.title('model', model)}, {PROTOCOLS[protocol]} selection: {test}, {difference}"
        )
        for method, rank in mean_ranks.items():
            paper = published.get((model, method), math.nan)
            rows.append((protocol, model, method, rank, table.shape[1], len(table), paper))
    frame = pd.DataFrame(
        rows, columns=["protocol", "model", "method", "rank", "sets", "ranked", "paper"]
    )
    sets = list(dict.fromkeys(name for table in scores.values() for name in table.columns))
    methods = [outcomes.title("method", name) for name in frame["method"].unique()]
    return Table(
        "Friedman ranks out of domain",
        f"Mean rank over the OOD sets, 1 is best, of {len(methods)} rows: {', '.join(methods)}. The paper does not "
        f"name its ranked rows, so its ranks cannot be compared with ours. Sets ({len(sets)}): {', '.join(sets)}. "
        f"{'; '.join(notes) or 'No ranks: the rows have no common set and seed'}. By Nemenyi's test at 5 %, ranks "
        "differ if they are further apart than the critical difference.",
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
