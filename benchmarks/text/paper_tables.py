"""The paper's numbers beside ours, each with its provenance."""

from __future__ import annotations

import math

import pandas as pd

from benchmarks.harness.report.outcomes import published_delta, read_published
from benchmarks.harness.report.rendering import MISSING, Column, Table
from benchmarks.harness.results.statistics import critical_difference
from benchmarks.text.grid import CLEAN, ID, PUBLISHED
from benchmarks.text.outcomes import Ranked, TextOutcomes
from benchmarks.text.selection import PROTOCOLS

AVERAGE, RANK = "average", "OOD Friedman rank"
_KEY = ["model", "scope", "method"]
_NUMBERS = ["", "_delta", "_low", "_high", "_n"]  # what there is of ours, after the selection's name
_PAPERS_RANKS = (
    "; which ones the paper ranks is unknown, so that its ranks stand here for the reader and not for comparison"
)


def paper(outcomes: TextOutcomes, domain: str = ID) -> Table:
    """What the paper says and what came out, under both selections.

    Args:
        outcomes: the finished runs.
        domain: ``id`` or ``ood``.
    """
    published = read_published(outcomes.benchmark)
    published = published[published["scope"] != RANK].assign(value=lambda frame: frame["value"] / 100)
    published["paper_delta"] = published_delta(published, outcomes.baseline)
    frame = published
    for protocol in (PUBLISHED, CLEAN):
        ours = _ours(outcomes, domain, protocol).rename(columns={f"ours{end}": f"{protocol}{end}" for end in _NUMBERS})
        frame = frame.merge(ours, on=_KEY, how="outer", sort=False)
    # of what was not found a row is shown where we have a number ourselves
    frame = frame[frame[["value", PUBLISHED, CLEAN]].notna().any(axis=1)].reset_index(drop=True)
    places = {name: place for place, name in enumerate(outcomes.methods)}
    frame = frame.sort_values(
        _KEY, key=lambda column: column.map(places) if column.name == "method" else column, kind="stable"
    )
    frame = outcomes.titled(frame)
    frame[["status", "source"]] = frame[["status", "source"]].fillna(MISSING).replace("", MISSING)
    return Table(
        "The paper's numbers beside ours",
        f"Δ is the difference to {outcomes.baseline_title}; ours is paired by seed, with a 95 % confidence interval where it is of one task. A mean is over n seeds, a difference over those that both methods have. Status: published (typed in the authors' notebooks or quoted from the paper), inferred "
        "(published, but the row is our reading), unknown (in the paper, but not found by us). A dash is a number that was not found, or that this suite did not run. Another model "
        "and other data can neither confirm nor refute the paper's value.",
        {"model_title": "Model", "scope": "Task", "method_title": "Method"},
        [
            Column("score", "value", "Paper", decimals=2),
            Column("score", "paper_delta", "Δ paper", signed=True, decimals=2),
            *(
                column
                for protocol in (PUBLISHED, CLEAN)
                for column in (
                    Column("score", protocol, f"Ours, {PROTOCOLS[protocol]} selection", decimals=2),
                    Column(
                        "score",
                        f"{protocol}_delta",
                        f"Δ ours, {PROTOCOLS[protocol]}",
                        interval=(f"{protocol}_low", f"{protocol}_high"),
                        signed=True,
                        decimals=2,
                    ),
                    Column("runs", f"{protocol}_n", f"n, {PROTOCOLS[protocol]}"),
                )
            ),
        ],
        frame,
        notes={"status": "Status", "source": "Source of the paper's number"},
    )


def ranks(outcomes: TextOutcomes, rankings: list[Ranked]) -> Table:
    """Mean ranks over the OOD sets, the paper's beside ours."""
    published = read_published(outcomes.benchmark)
    published = published[published["scope"] == RANK].set_index(["model", "method"])["value"]
    rows = [
        {**one.key, "method": method, "rank": rank, "sets": one.scores.shape[1], "ranked": len(one.scores)}
        for one in rankings
        for method, rank in one.ranking.ranks.items()
    ]
    frame = pd.DataFrame(rows, columns=["protocol", "model", "method", "rank", "sets", "ranked"])
    frame["paper"] = [published.get((row.model, row.method), math.nan) for row in frame.itertuples()]
    notes = [
        f"{outcomes.title('model', one.key['model'])}, {PROTOCOLS[one.key['protocol']]} selection: "
        + ("no test" if math.isnan(one.ranking.p) else f"Friedman p = {one.ranking.p:.3f}")
        + f", critical difference {critical_difference(*one.scores.shape):.2f}"
        for one in rankings
    ]
    notes = notes or ["No ranks: the rows have no common set and seed"]
    pairs = list(dict.fromkeys(pair for one in rankings for pair in one.scores.columns))
    methods = list(dict.fromkeys(outcomes.title("method", name) for one in rankings for name in one.scores.index))
    return Table(
        "Friedman ranks out of domain",
        f"Mean rank over the OOD sets, 1 is best, of {len(methods)} rows: {', '.join(methods)}. A rank means something only among the rows that are ranked "
        f"together{_PAPERS_RANKS if frame['paper'].notna().any() else ''}. "
        f"Sets ({len(pairs)}): {', '.join(pairs)}. {'; '.join(notes)}. Ranks that are further apart than the critical difference differ by Nemenyi's test at 5 %.",
        {"model_title": "Model", "selection": "Selection", "method_title": "Method"},
        [
            Column("ood_rank", "rank", "Rank", best="rank"),
            Column("sets", "sets", "Sets"),
            Column("sets", "ranked", "Rows ranked"),
            Column("ood_rank", "paper", "Rank in the paper"),
        ],
        outcomes.order(frame, ["protocol", "model", "method"]),
        group=("model", "protocol"),
    )


def _ours(outcomes: TextOutcomes, domain: str, protocol: str) -> pd.DataFrame:
    """Our scores by pair of tasks, and in domain the averages over the tasks that a method ran.

    Methods that ran fewer tasks than others form a scope of their own, with the baseline on the same tasks.
    """
    rows = outcomes.of(domain, protocol)
    found = [
        {
            "model": row.model,
            "scope": outcomes.pair_title(row.task, row.eval_task),
            "method": row.method,
            "ours": row.mean,
            "ours_delta": row.delta,
            "ours_low": row.low,
            "ours_high": row.high,
            "ours_n": row.n,
        }
        for row in rows.itertuples()
    ]
    for model, of_model in rows.groupby("model", sort=False) if domain == ID else ():
        tasks_of = {method: tuple(part["task"]) for method, part in of_model.groupby("method", sort=False)}
        for tasks in dict.fromkeys(tasks for tasks in tasks_of.values() if len(tasks) > 1):
            for method, own in tasks_of.items():
                if own != tasks and method != outcomes.baseline:
                    continue
                part = of_model[(of_model["method"] == method) & of_model["task"].isin(tasks)]
                numbers = {"ours": part["mean"].mean(), "ours_delta": part["delta"].mean()}
                found.append({"model": model, "scope": _scope(outcomes, tasks), "method": method, **numbers})
    return pd.DataFrame(found, columns=[*_KEY, *(f"ours{end}" for end in _NUMBERS)])


def _scope(outcomes: TextOutcomes, tasks: tuple[str, ...]) -> str:
    """What an average is over: all tasks that the paper trains on have its name for it."""
    glue = {
        name
        for name, task in outcomes.benchmark.tasks.items()
        if task.splits.train is not None and task.source.vader_sentiment is None
    }
    return AVERAGE if set(tasks) == glue else ", ".join(outcomes.title("task", task) for task in tasks)
