"""Rank methods over the OOD sets: Friedman ranks and their critical difference (Demšar 2006)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import cast

import pandas as pd

from benchmarks.glue_ood.definition import OOD_RANK, EvaluationDefinition
from benchmarks.harness.base import distinct
from benchmarks.harness.report.common import read_published
from benchmarks.harness.report.table import Column, Table
from benchmarks.harness.results.statistics import critical_difference, friedman_ranks
from benchmarks.text.definition import OOD
from benchmarks.text.outcomes import PROTOCOL_TITLES, TextOutcomes
from benchmarks.text.tables import BY_SELECTION, RANK

# for each protocol and model, a frame with a row for each ranked method
Scores = dict[tuple[str, str], pd.DataFrame]
# the columns of the table, before titles are added
_RANK_COLUMNS = ["protocol", "model", "method", "rank", "sets", "ranked", "paper"]


def complete_scores(outcomes: TextOutcomes) -> Scores:
    """Collect the OOD scores for which all ranked methods can be compared.

    Returns:
        A frame for each protocol and model. It has a row for each ranked method that has any score.
        It has a column for each ``scope`` (pair of training task and OOD set) and ``seed`` for
        which all these methods have a score. A protocol and model without such columns is left out.
    """
    methods = cast(EvaluationDefinition, outcomes.benchmark.definition).ranked
    is_ood = outcomes.seeds["domain"] == OOD
    is_ranked = outcomes.seeds["method"].isin(methods)
    seeds = outcomes.seeds[is_ood & is_ranked]
    scores = {}
    for key, group in seeds.groupby(["protocol", "model"], sort=False):
        # a row for each method, a column for each data set and seed; missing scores are nan
        all_scores = group.pivot_table(
            index="method", columns=["scope", "seed"], values="value", sort=False
        )
        complete = all_scores.dropna(axis=1)
        # put the methods in the order of the definition
        in_order = [name for name in methods if name in complete.index]
        table = complete.loc[in_order]
        if not table.empty:
            scores[key] = table
    return scores


def ranked_scores(outcomes: TextOutcomes) -> Scores:
    """Return the mean scores ``[methods, data sets]`` of the ranked methods, by protocol and model.

    They are means of :func:`complete_scores` over the seeds.
    """
    means = {}
    for key, by_seed in complete_scores(outcomes).items():
        # transposed twice, because pandas groups rows, not columns
        means[key] = by_seed.T.groupby(level="scope", sort=False).mean().T
    return means


def ranks_by_seed(outcomes: TextOutcomes) -> pd.DataFrame:
    """Return the mean rank of each ranked method over the OOD sets, for each seed.

    The methods are ranked on every data set by their scores with the same seed. A seed without
    scores of all methods on all data sets is left out, because ranks over other sets do not
    compare.

    Returns:
        A row per protocol, model, seed and method, with the columns ``protocol``, ``model``,
        ``seed``, ``method`` and ``value``, the mean rank.
    """
    rows = []
    for (protocol, model), by_seed in complete_scores(outcomes).items():
        num_sets = by_seed.columns.get_level_values("scope").nunique()
        for seed in by_seed.columns.get_level_values("seed").unique():
            scores = by_seed.xs(seed, axis=1, level="seed")  # [methods, data sets]
            # the seed lacks a data set
            if scores.shape[1] < num_sets:
                continue
            mean_ranks, _ = friedman_ranks(scores)
            for method, rank in mean_ranks.items():
                rows.append((protocol, model, int(seed), method, rank))
    columns = ["protocol", "model", "seed", "method", "value"]
    return pd.DataFrame(rows, columns=columns).astype({"seed": int, "value": float})


def ranks(outcomes: TextOutcomes) -> Table:
    """Make a table of the mean rank of each method over OOD sets, and the paper's mean rank.

    It has a row per model, protocol and ranked method.
    """
    scores = ranked_scores(outcomes)
    frame = _rank_rows(outcomes, scores)
    return Table(
        title="Friedman ranks out of domain",
        caption=_caption(outcomes, scores, frame["method"].unique()),
        keys=BY_SELECTION,
        columns=[
            Column(OOD_RANK, "rank", "Rank", marks_best=True),
            Column("sets", "sets", "Sets"),
            Column("sets", "ranked", "Rows ranked"),
            Column(OOD_RANK, "paper", "Rank in the paper"),
        ],
        frame=outcomes.order(frame, ["protocol", "model", "method"]),
        group=("model", "protocol"),
    )


def _rank_rows(outcomes: TextOutcomes, scores: Scores) -> pd.DataFrame:
    """Return the rows of the table of ranks, not yet in order.

    ``sets`` is the number of data sets, and ``ranked`` the number of ranked methods.
    """
    paper = _paper_ranks(outcomes)
    rows = []
    for (protocol, model), table in scores.items():
        mean_ranks, _ = friedman_ranks(table)
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
    return pd.DataFrame(rows, columns=_RANK_COLUMNS)


def _caption(outcomes: TextOutcomes, scores: Scores, methods: Iterable[str]) -> str:
    """Write the caption of the table of ranks: methods, data sets, and the tests of the ranks."""
    titles = [outcomes.title("method", name) for name in methods]
    columns: list[str] = []  # of all protocols and models
    for table in scores.values():
        columns.extend(table.columns)
    sets = distinct(columns)
    return (
        f"Mean rank over the OOD sets, 1 is best, of {len(titles)} rows: {', '.join(titles)}. "
        "The paper does not name its ranked rows, so its ranks cannot be compared with ours. "
        f"Sets ({len(sets)}): {', '.join(sets)}. {_notes(outcomes, scores)}. By Nemenyi's "
        "test at 5 %, ranks differ if they are further apart than the critical difference."
    )


def _notes(outcomes: TextOutcomes, scores: Scores) -> str:
    """Describe Friedman's test for each protocol and model, or say that there are no ranks."""
    if not scores:
        return "No ranks: the rows have no common set and seed"
    notes = []
    for (protocol, model), table in scores.items():
        title = f"{outcomes.title('model', model)}, {PROTOCOL_TITLES[protocol]} selection"
        notes.append(f"{title}: {_test_text(table)}")
    return "; ".join(notes)


def _paper_ranks(outcomes: TextOutcomes) -> pd.Series[float]:
    """Read the paper's mean ranks. The index of the series is the model and the method."""
    published = read_published(outcomes.benchmark)
    of_ranks = published[published["scope"] == RANK]
    return of_ranks.set_index(["model", "method"])["value"]


def _test_text(table: pd.DataFrame) -> str:
    """Describe Friedman's test of scores ``[methods, data sets]``, and the critical difference."""
    methods_count, sets_count = table.shape
    # a single method has no other to differ from
    if methods_count == 1:
        return "no test of a single row"
    _, p = friedman_ranks(table)
    # p is nan if there are too few methods or data sets, or all methods are equal
    test = "no Friedman test" if math.isnan(p) else f"Friedman p = {p:.3f}"
    return f"{test}, critical difference {critical_difference(methods_count, sets_count):.2f}"
