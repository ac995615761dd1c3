"""Present models that learn several tasks at once: tables, figure and verdicts."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pandas as pd

from benchmarks.harness.config.benchmark import OOD_MEAN, AnyBenchmark
from benchmarks.harness.config.runs import Run
from benchmarks.harness.report.common import (
    cell_means,
    format_counts,
    read_published,
    tests_table,
    with_numbers,
    with_runs,
)
from benchmarks.harness.report.presentation import NOTE, Figure, Presentation, make
from benchmarks.harness.report.table import MISSING, RUNS, Column, Table
from benchmarks.multitask.definition import ID_MEAN
from benchmarks.multitask.figures import draw_differences
from benchmarks.multitask.outcomes import INTERVAL, MultitaskOutcomes
from benchmarks.text.definition import CLEAN, ID, OOD
from benchmarks.text.outcomes import CELL, KEYS
from benchmarks.text.tables import DOMAINS, cost, differences_text, ood, tests

_MEANS = {ID: ID_MEAN, OOD: OOD_MEAN}
_CHOSEN = "Selection of epoch and learning rate uses the mean dev score over the tasks, which is not reported."


def gains(outcomes: MultitaskOutcomes) -> Table:
    """Make a table of the paper's best gains beside ours: the mean over the sets, and the best set."""
    published = read_published(outcomes.benchmark).set_index(["domain", "method"])["value"] / 100
    rows = outcomes.select_mixtures(outcomes.rows)
    rows = rows[rows["method"] != outcomes.baseline]
    parts = []
    for domain, mean in _MEANS.items():
        sets = rows[(rows["domain"] == domain) & rows["delta"].notna()]
        best = sets.loc[sets.groupby(CELL, sort=False)["delta"].idxmax(), [*CELL, *INTERVAL, "eval_task"]]
        sizes = sets.groupby(CELL, sort=False).size().rename("sets").reset_index()
        part = rows.loc[rows["domain"] == mean, [*CELL, *INTERVAL, "pairs"]].assign(where=DOMAINS[domain])
        part = with_numbers(with_numbers(part, CELL, sizes), CELL, best, "best_")
        parts.append(part.assign(paper=[published.get((domain, name), math.nan) for name in part["method"]]))
    frame = pd.concat(parts).rename(columns={"pairs": "n", "best_delta": "best"}).fillna({"n": 0, "sets": 0})
    frame = frame.astype({"n": int, "sets": int})
    frame["best_set"] = frame["best_eval_task"].map(outcomes.titles["task"]).fillna(MISSING)
    best_columns = ["best", "best_low", "best_high", "best_set"]
    frame = frame[[*CELL, "where", "sets", *INTERVAL, "n", *best_columns, "paper"]]
    return Table(
        "The paper's best gains beside ours",
        f"Differences to {outcomes.baseline_title} that learned the same tasks at once, in points, paired by seed over "
        "n seeds, with a 95 % confidence interval (Student's t), not corrected for their number: the table of tests "
        f"is. {outcomes.shared_note} Mean: over the sets. Best set: the largest difference of several, so an "
        "optimistic number. The paper gives only its largest gains (T5-Base, N = 32, k = 8 in domain; status and "
        f"source in paper.csv), neither tasks nor absolute scores, so they cannot be compared with ours. {_CHOSEN}",
        {**KEYS, "where": "Where", "sets": "Sets", "n": "n"},
        [
            Column("score", "delta", "Δ, mean", interval=("low", "high"), signed=True),
            Column("score", "best", "Δ, best set", interval=("best_low", "best_high"), signed=True),
            Column("score", "paper", "Paper, best gain", signed=True, decimals=2),
        ],
        outcomes.order(frame, CELL),
        notes={"best_set": "Best set"},
        origins=outcomes.shared_origins,
    )


def results(outcomes: MultitaskOutcomes) -> Table:
    """Make a table of means over the tasks and the OOD sets, differences to the baseline, and the cost."""
    rows = outcomes.rows
    alone = ~rows["task"].isin(outcomes.mixtures)
    in_domain = rows[(rows["domain"] == ID_MEAN) | (alone & (rows["domain"] == ID))]
    frame = outcomes.order(format_counts(in_domain, CELL), CELL)
    columns = []
    for name, numbers in (("ID", in_domain), ("OOD", rows[rows["domain"] == OOD_MEAN])):
        kept = numbers[[*CELL, "mean", "std", "delta", "low", "high"]]
        frame = with_numbers(frame, CELL, kept, f"{name}_")
        interval = (f"{name}_low", f"{name}_high")
        columns += [
            Column("score", f"{name}_mean", name, std=f"{name}_std", best=True),
            Column("score", f"{name}_delta", f"Δ {name}", interval=interval, signed=True),
        ]
    chosen = outcomes.chosen[outcomes.chosen["protocol"] == CLEAN]
    rates = chosen.groupby(CELL, sort=False)["learning_rate"].first().map("{:.1e}".format).rename("rate")
    took = ["train_seconds", "active_neurons", "trainable_parameters"]
    frame = frame.merge(rates, left_on=CELL, right_index=True, how="left")
    frame = with_numbers(frame, CELL, cell_means(outcomes.shared_origins, CELL, took))
    return Table(
        "Several tasks at once: means over tasks and over other sets",
        "Mean ± sample standard deviation over n seeds of the mean over the tasks (ID) and over the sets that no task "
        f"is trained on (OOD), each scored by its own metric; differences to {outcomes.baseline_title} trained on the "
        "same, paired by seed, with a 95 % confidence interval (Student's t), not corrected for their number. Rows of "
        f"one task are models that learned it alone. {outcomes.shared_note} {_CHOSEN} Bold marks the best method, "
        "controls apart.",
        {**KEYS, "rate": "Learning rate", "n": "n"},
        [*columns, *(Column(metric, metric) for metric in took)],
        frame,
        group=("model", "task"),
        origins=outcomes.shared_origins,
    )


def sets(outcomes: MultitaskOutcomes) -> Table:
    """Make a table of the score on every set."""
    caption = (
        "Mean ± sample standard deviation over n seeds. Sets that a row is trained on are in domain, the others are "
        f"read as the task that names them. {outcomes.shared_note} {_CHOSEN}"
    )
    return replace(ood(outcomes), caption=caption)


def transfer(outcomes: MultitaskOutcomes) -> Table:
    """Make a table of the gain or loss of learning a task together with others, against learning it alone."""
    table = tests_table(
        "the same method that learned the task alone",
        "Score of a task that is learned alone, and with the others: as many passes over as many of its rows. Δ is the "
        "difference, paired by seed over the n seeds that all rows of a task have; below 0 the other tasks do harm. Δ "
        f"less {outcomes.baseline_title}'s: how much more a method gains by the other tasks, by which the paper "
        "explains its results; not corrected.",
        {**KEYS, "eval_task_title": "Task", "n": "n"},
        "score",
        outcomes.transfer,
    )
    less = Column(
        "score", "less_delta", f"Δ less {outcomes.baseline_title}'s", interval=("less_low", "less_high"), signed=True
    )
    columns = [Column("score", "alone", "Alone"), Column("score", "together", "Together"), *table.columns, less]
    return _add_runs_of_both(outcomes, replace(table, title="Learned together against learned alone", columns=columns))


def _add_runs_of_both(outcomes: MultitaskOutcomes, table: Table) -> Table:
    """Add the runs of both sides: on several tasks, and on the task alone."""
    together, alone = (
        with_runs(replace(table, frame=table.frame.assign(task=table.frame[key])), outcomes.origins, outcomes.name)
        for key in ("task", "eval_task")
    )
    both = [" ".join(runs) for runs in zip(together.frame[RUNS], alone.frame[RUNS], strict=True)]
    return replace(table, frame=table.frame.assign(**{RUNS: both}))


TABLES = {"gains": gains, "results": results, "sets": sets, "tests": tests, "transfer": transfer, "cost": cost}
FIGURES = {
    "differences": Figure(
        draw_differences,
        "What a method changes against the dense model that learned the same tasks at once, set by set: "
        "means over seeds, with 95 % intervals from three seeds on. Sets marked OOD are none that the model "
        "was trained on. The paper's numbers are its largest gains alone (7.56 points in domain, 1.58 out "
        "of domain, T5-Base); they are in the table of gains.",
    )
}


def verdicts(outcomes: MultitaskOutcomes) -> Iterator[str]:
    """Yield a sentence per model, mixture and method, with the differences to the baseline; omit controls."""
    rows = outcomes.select_mixtures(outcomes.tests)
    rows = rows[rows["method"].map(outcomes.role) == "method"]
    for names, group in outcomes.order(rows, CELL).groupby(CELL, sort=False):
        titles = ", ".join(outcomes.title(key, name) for key, name in zip(CELL, names, strict=True))
        yield f"{titles} (n = {group['n'].max()}): {differences_text(group)}."


def present(benchmark: AnyBenchmark, runs: list[Run]) -> Presentation:
    """Present finished runs."""
    outcomes = MultitaskOutcomes(benchmark, runs)
    optimizer = "AdamW, linear decay, no clipping"
    sentences: dict[str, Any] = {"verdicts": list(verdicts(outcomes)), "note": NOTE, "optimizer": optimizer}
    return make(
        benchmark, TABLES, FIGURES, outcomes, claim_numbers=outcomes.claim_numbers, shows_labels=True, **sentences
    )
