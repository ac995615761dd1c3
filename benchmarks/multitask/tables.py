"""Tables of models that learn several tasks at once: scores, differences, and the effect of learning together."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pandas as pd

from benchmarks.harness.config.benchmark import OOD_MEAN, Benchmark
from benchmarks.harness.config.runs import Run
from benchmarks.harness.report.common import (
    compared,
    counts,
    difference_text,
    means_by,
    read_published,
    tests_table,
    with_numbers,
    with_runs,
)
from benchmarks.harness.report.table import MISSING, RUNS, Column, Table
from benchmarks.harness.results.statistics import paired_differences, with_verdicts
from benchmarks.multitask.grid import ID_MEAN, MultitaskDefinition
from benchmarks.text.definition import TaskEntry
from benchmarks.text.grid import CLEAN, ID, OOD
from benchmarks.text.outcomes import CELL, TextOutcomes
from benchmarks.text.tables import cost, ood, tests

_KEYS = {"model_title": "Model", "task_title": "Trained on", "method_title": "Method"}
_MEANS = {ID: (ID_MEAN, "in domain"), OOD: (OOD_MEAN, "out of domain")}
_CHOSEN = "Epoch and learning rate are chosen by the mean score over the tasks on rows that are not reported."
_KEY = ["model", "eval_task", "method", "seed"]
_TRANSFER = ["model", "task", "eval_task", "method"]
_INTERVAL = ["delta", "low", "high"]


class MultitaskOutcomes(TextOutcomes):
    """The finished runs.

    In :attr:`~benchmarks.text.outcomes.TextOutcomes.seeds` and ``rows`` the training task is the mixture, or the task
    that is learned alone. There is one more domain: ``id_mean``, the mean over the tasks of a mixture.

    Attributes:
        mixtures: The mixtures that ran.
        transfer: A row a model, mixture, task and method that also learned the task alone: the scores ``alone`` and
            ``together``, their difference, paired by seed (``delta``, ``low``, ``high``, ``p``, ``n``) and corrected
            over the tasks (``p_holm``, ``verdict``), and the same difference less the baseline's (``less_delta`` …).
    """

    def __init__(self, benchmark: Benchmark[MultitaskDefinition, TaskEntry], runs: Sequence[Run]) -> None:
        super().__init__(benchmark, runs)
        ran = set(self.seeds["task"])
        self.mixtures = [name for name in benchmark.definition.mixtures if name in ran]
        self.transfer = self._transfer()

    def of_mixtures(self, frame: pd.DataFrame) -> pd.DataFrame:
        """Select the rows of mixtures, without tasks that are learned alone."""
        return frame[frame["task"].isin(self.mixtures)]

    def compared(self) -> pd.DataFrame:
        """Collect the scores of mixtures by seed, and the numbers of parameters, for claims."""
        seeds = self.of_mixtures(self.seeds)
        scores = seeds.rename(columns={"protocol": "selection", "seed": "pair"}).assign(metric="score")
        return compared(scores[scores["domain"] != ID_MEAN], counts(self.records))

    def _seeds(self, protocol: str) -> pd.DataFrame:
        seeds = super()._seeds(protocol)
        own = seeds[(seeds["domain"] == ID) & seeds["task"].isin(self.benchmark.definition.mixtures)]  # type: ignore[attr-defined]
        means = own.groupby(["model", "task", "method", "seed"], sort=False)["value"].mean().reset_index()
        return pd.concat([seeds, means.assign(domain=ID_MEAN, eval_task="", protocol=protocol)], ignore_index=True)

    def _transfer(self) -> pd.DataFrame:
        seeds = self.seeds[(self.seeds["protocol"] == CLEAN) & (self.seeds["domain"] == ID)]
        alone = seeds[seeds["task"] == seeds["eval_task"]].set_index(_KEY)["value"].rename("alone")
        both = self.of_mixtures(seeds).merge(alone, left_on=_KEY, right_index=True)
        means = both.groupby(_TRANSFER, sort=False, as_index=False)[["alone", "value"]].mean()
        kinds = [both.assign(value=both[name], how=how) for name, how in (("alone", "alone"), ("value", "together"))]
        stacked = pd.concat([kind[[*_TRANSFER, "seed", "how", "value"]] for kind in kinds], ignore_index=True)
        found = paired_differences(stacked, [*_TRANSFER, "how"], {"how": "alone"}, "seed").drop(
            columns=["how", "values"]
        )
        gains = both.assign(value=both["value"] - both["alone"])[[*_TRANSFER, "seed", "value"]]
        less = paired_differences(gains, _TRANSFER, {"method": self.baseline}, "seed")
        less = less[[*_TRANSFER, *_INTERVAL]].rename(columns={name: f"less_{name}" for name in _INTERVAL})
        rows = with_verdicts(found, ["model", "task", "method"])
        rows = rows.merge(means.rename(columns={"value": "together"}), on=_TRANSFER).merge(
            less, on=_TRANSFER, how="left"
        )
        return self.order(rows, _TRANSFER)


def gains(outcomes: MultitaskOutcomes) -> Table:
    """Show the paper's best gains beside ours: the mean over the sets, and the best of them."""
    known = read_published(outcomes.benchmark).set_index(["domain", "method"])["value"] / 100
    rows = outcomes.of_mixtures(outcomes.rows)
    rows = rows[rows["method"] != outcomes.baseline]
    parts = []
    for domain, (mean, words) in _MEANS.items():
        sets = rows[(rows["domain"] == domain) & rows["delta"].notna()]
        best = sets.loc[sets.groupby(CELL, sort=False)["delta"].idxmax(), [*CELL, *_INTERVAL, "eval_task"]]
        sizes = sets.groupby(CELL, sort=False).size().rename("sets").reset_index()
        part = rows.loc[rows["domain"] == mean, [*CELL, *_INTERVAL, "pairs"]].assign(where=words)
        part = with_numbers(with_numbers(part, CELL, sizes), CELL, best, "best_")
        parts.append(part.assign(paper=[known.get((domain, name), math.nan) for name in part["method"]]))
    frame = pd.concat(parts).rename(columns={"pairs": "n", "best_delta": "best"}).fillna({"n": 0, "sets": 0})
    frame = frame.astype({"n": int, "sets": int})
    frame["best_set"] = [
        outcomes.title("task", name) if pd.notna(name) else MISSING for name in frame["best_eval_task"]
    ]
    best_columns = ["best", "best_low", "best_high", "best_set"]
    frame = frame[[*CELL, "where", "sets", *_INTERVAL, "n", *best_columns, "paper"]]
    return Table(
        "The paper's best gains beside ours",
        f"Differences to {outcomes.baseline_title} that learned the same tasks at once, in points, paired by seed over n seeds, with a 95 % confidence interval (Student's t), not corrected for their number: the "
        f"table of tests is. Mean: over the sets. Best set: the set with the largest difference, which is the largest of several and so an optimistic number. Of the paper nothing but its largest gains is known "
        f"(T5-Base, N = 32, k = 8 in domain; status and source in paper.csv): neither its tasks nor its absolute scores, nor whether its gain is of a task or a mean, so that it stands here for the reader and not for comparison. {_CHOSEN}",
        {**_KEYS, "where": "Where", "sets": "Sets", "n": "n"},
        [
            Column("score", "delta", "Δ, mean", interval=("low", "high"), signed=True),
            Column("score", "best", "Δ, best set", interval=("best_low", "best_high"), signed=True),
            Column("score", "paper", "Paper, best gain", signed=True, decimals=2),
        ],
        outcomes.order(frame, CELL),
        notes={"best_set": "Best set"},
    )


def results(outcomes: MultitaskOutcomes) -> Table:
    """Show means over the tasks and over the other sets, differences to the baseline, and the cost."""
    rows = outcomes.rows
    alone = ~rows["task"].isin(outcomes.mixtures)
    in_domain = rows[(rows["domain"] == ID_MEAN) | (alone & (rows["domain"] == ID))]
    frame = outcomes.order(in_domain[[*CELL, "n"]], CELL)
    columns = []
    for name, numbers in (("ID", in_domain), ("OOD", rows[rows["domain"] == OOD_MEAN])):
        kept = numbers[[*CELL, "mean", "std", "common", "delta", "low", "high"]]
        frame = with_numbers(frame, CELL, kept, f"{name}_")
        interval = (f"{name}_low", f"{name}_high")
        columns += [
            Column("score", f"{name}_mean", name, std=f"{name}_std", best=f"{name}_common"),
            Column("score", f"{name}_delta", f"Δ {name}", interval=interval, signed=True),
        ]
    chosen = outcomes.chosen[CLEAN]
    rates = chosen.groupby(CELL, sort=False)["learning_rate"].first().map("{:.1e}".format).rename("rate")
    took = ["train_seconds", "active_neurons", "trainable_parameters"]
    frame = frame.merge(rates, left_on=CELL, right_index=True, how="left")
    frame = with_numbers(frame, CELL, means_by(chosen, CELL, took))
    return Table(
        "Several tasks at once: means over tasks and over other sets",
        f"Mean ± sample standard deviation over n seeds of the mean over the tasks (ID) and over the sets that no task is trained on (OOD), each scored by its own metric; differences to {outcomes.baseline_title} "
        f"trained on the same, paired by seed, with a 95 % confidence interval (Student's t), not corrected for their number. Rows of one task are models that learned it alone. {_CHOSEN} Bold marks the best method, "
        "controls apart.",
        {**_KEYS, "rate": "Learning rate", "n": "n"},
        [*columns, *(Column(metric, metric) for metric in took)],
        frame,
        group=("model", "task"),
        compare="is_method",
    )


def sets(outcomes: MultitaskOutcomes) -> Table:
    """Show the score on every set."""
    return replace(
        ood(outcomes),
        caption=f"Mean ± sample standard deviation over n seeds. Sets that a row is trained on are in domain, the others are read as the task that names them. {_CHOSEN}",
    )


def transfer(outcomes: MultitaskOutcomes) -> Table:
    """Show the gain or loss of learning a task with others, against the same method that learned it alone."""
    table = tests_table(
        "the same method that learned the task alone",
        "Score of a task where it is learned alone, and where it is learned with the others: as many passes over as many of its rows. Δ is the difference, paired by seed over n seeds, with a 95 % confidence interval; below 0 the other tasks "
        f"do harm (negative transfer). p of the paired t-test, and corrected by Holm's procedure over the tasks of a row. Δ less {outcomes.baseline_title}'s is how much more a method gains by the other tasks than {outcomes.baseline_title} does, by which the paper explains its results; "
        "not corrected.",
        {**_KEYS, "eval_task_title": "Task", "n": "n"},
        "score",
        outcomes.transfer,
    )
    less = Column(
        "score", "less_delta", f"Δ less {outcomes.baseline_title}'s", interval=("less_low", "less_high"), signed=True
    )
    columns = [Column("score", "alone", "Alone"), Column("score", "together", "Together"), *table.columns, less]
    return _of_both(outcomes, replace(table, title="Learned together against learned alone", columns=columns))


def _of_both(outcomes: MultitaskOutcomes, table: Table) -> Table:
    """Name the runs of both sides, on several tasks and on the task alone."""
    together, alone = (
        with_runs(replace(table, frame=table.frame.assign(task=table.frame[key])), outcomes.origins, outcomes.name)
        for key in ("task", "eval_task")
    )
    both = [" ".join(runs) for runs in zip(together.frame[RUNS], alone.frame[RUNS], strict=True)]
    return replace(table, frame=table.frame.assign(**{RUNS: both}))


TABLES = {"gains": gains, "results": results, "sets": sets, "tests": tests, "transfer": transfer, "cost": cost}


def verdicts(outcomes: MultitaskOutcomes) -> Iterator[str]:
    """Yield a sentence a model, mixture and method of the paper: its differences to the baseline."""
    rows = outcomes.of_mixtures(outcomes.rows)
    rows = rows[(rows["method"].map(outcomes.role) == "method") & rows["delta"].notna()]
    for (model, task, method), group in outcomes.order(rows, CELL).groupby(CELL, sort=False):
        parts = [
            f"{words} {difference_text(row)}"
            for mean, words in _MEANS.values()
            for row in group[group["domain"] == mean].itertuples()
        ]
        titles = ", ".join(outcomes.title(key, name) for key, name in zip(CELL, (model, task, method), strict=True))
        yield f"{titles} (n = {int(group['pairs'].max())}): {'; '.join(parts)}, means over sets."
