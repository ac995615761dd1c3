"""Collect, tabulate and draw the scores of models that learn several tasks at once."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from benchmarks.harness.config.benchmark import OOD_MEAN, AnyBenchmark
from benchmarks.harness.report import common
from benchmarks.harness.report.presentation import NOTE, Presentation
from benchmarks.harness.report.table import MISSING, RUNS, Column, Table
from benchmarks.harness.results.records import Record
from benchmarks.text.definition import CLEAN, ID, OOD
from benchmarks.text.outcomes import CELL, DOMAINS, KEYS, TextOutcomes
from benchmarks.text.tables import cost, ood, tests, verdicts

ID_MEAN, TRANSFER = "id_mean", "transfer"  # domains besides those of TextOutcomes
_MEANS = {ID_MEAN: ID, OOD_MEAN: OOD}


class MultitaskOutcomes(TextOutcomes):
    """Collect the finished runs; the training task is the mixture, or the task that is learned alone.

    Two domains are added: ``id_mean``, the mean over the tasks of a mixture, and ``transfer``, a task's score in the
    mixture minus its score if it is learned alone.
    """

    def select_mixtures(self, frame: pd.DataFrame) -> pd.DataFrame:
        """Select the rows of mixtures, without tasks that are learned alone."""
        return frame[frame["task"].isin(self.benchmark.definition.mixtures)]

    def _seeds(self, *protocol: str) -> pd.DataFrame:
        seeds = super()._seeds(*protocol)
        tasks = seeds[seeds["domain"] == ID]
        together, alone = self.select_mixtures(tasks), tasks[tasks["task"] == tasks["eval_task"]]
        means = (
            together.groupby(["protocol", *CELL, "seed"], sort=False)["value"].mean().reset_index()
        )
        on = ["protocol", "model", "eval_task", "method", "seed"]
        both = together.merge(alone, on=on, suffixes=("", "_alone"))
        gained = both.assign(domain=TRANSFER, value=both["value"] - both["value_alone"])[[*seeds]]
        return pd.concat([seeds, means.assign(domain=ID_MEAN, eval_task=""), gained])

    def claim_numbers(self) -> pd.DataFrame:
        """Return the scores of mixtures by seed and the parameter counts, for claims."""
        scores = self.select_mixtures(self.seeds).rename(columns={"protocol": "selection"})
        return common.join_claim_numbers(
            scores.assign(metric="score"), common.parameter_counts(self.records)
        )


def gains(outcomes: MultitaskOutcomes) -> Table:
    """Make a table of the mean over sets, the best set, and the paper's best gains."""
    row, interval = [*CELL, "domain"], ["delta", "low", "high"]
    rows = outcomes.select_mixtures(outcomes.rows)
    frame = rows.loc[rows["domain"].isin(_MEANS), [*row, "mean", "std", "n", *interval]].replace(
        {"domain": _MEANS}
    )
    sets = rows[rows["domain"].isin(DOMAINS)]
    counts = sets.groupby(row, sort=False).size().rename("sets").reset_index()
    compared = sets[sets["delta"].notna()]
    best = compared.loc[
        compared.groupby(row, sort=False)["delta"].idxmax(), [*row, *interval, "eval_task_title"]
    ]
    published = common.read_published(outcomes.benchmark)[["domain", "method", "value"]]
    frame = common.with_numbers(common.with_numbers(frame, row, counts), row, best, "best_")
    frame = common.with_numbers(frame, ["domain", "method"], published, "paper_")
    frame = frame.assign(
        where=frame["domain"].map(DOMAINS),
        paper=frame["paper_value"].astype(float) / 100,
        best_set=frame["best_eval_task_title"].fillna(MISSING),
    )
    return Table(
        "Means over tasks and over other sets, and the paper's best gains",
        "Means over the tasks of a mixture (in domain) and over the sets that no task is trained on (out of domain), "
        f"± sample standard deviation over n seeds. Δ is the difference to {outcomes.baseline_title} on the same "
        "tasks, paired by seed, with a 95 % confidence interval (Student's t), not corrected for multiple tests. "
        f"{outcomes.shared_note} Best set: the largest of several differences, so an optimistic number. The paper "
        "gives only its largest gains (T5-Base, N = 32 and k = 8 in domain; sources in paper.csv), neither tasks nor "
        "absolute scores, so they cannot be compared with ours. Epoch and learning rate are chosen by the mean dev "
        "score, which is not reported. Bold marks the best method, without controls.",
        {**KEYS, "where": "Where", "sets": "Sets", "n": "n"},
        [
            Column("score", "mean", "Mean", std="std", best=True),
            Column("score", "delta", "Δ, mean", interval=("low", "high"), signed=True),
            Column(
                "score",
                "best_delta",
                "Δ, best set",
                interval=("best_low", "best_high"),
                signed=True,
            ),
            Column("score", "paper", "Paper, best gain", signed=True, decimals=2),
        ],
        outcomes.order(frame, ["model", "task", "domain", "method"]),
        group=("model", "task", "where"),
        notes={"best_set": "Best set"},
        origins=outcomes.shared_origins,
    )


def transfer(outcomes: MultitaskOutcomes) -> Table:
    """Make a table of the difference between learning a task with others and learning it alone."""
    frame, cell = outcomes.of(TRANSFER, CLEAN).drop(columns="scope"), ["model", "method"]
    runs = outcomes.origins.groupby([*cell, "task"])["run_id"].unique()
    folders = runs.map(lambda ids: " ".join(f"{outcomes.name}/{run}" for run in ids))
    together, alone = (
        frame.join(folders, on=[*cell, key])["run_id"] for key in ("task", "eval_task")
    )
    return Table(
        "Learned together against learned alone",
        "Score of a task that is learned with the others minus its score if it is learned alone, with as many passes "
        "over as many rows: mean ± sample standard deviation over n seeds. Below 0, the other tasks do harm. The second "
        f"Δ compares a method with {outcomes.baseline_title}, with a 95 % confidence interval (Student's t), not "
        "corrected for multiple tests: the paper explains its gains with this difference.",
        {**KEYS, "eval_task_title": "Task", "n": "n"},
        [
            Column("score", "mean", "Δ to alone", std="std", signed=True),
            Column(
                "score",
                "delta",
                f"Δ less {outcomes.baseline_title}'s",
                interval=("low", "high"),
                signed=True,
            ),
        ],
        frame.assign(**{RUNS: together + " " + alone}),
    )


TABLES = {"gains": gains, "sets": ood, "tests": tests, "transfer": transfer, "cost": cost}


def present(benchmark: AnyBenchmark, records: Sequence[Record]) -> Presentation:
    """Present finished runs."""
    outcomes = MultitaskOutcomes(benchmark, records)
    sentences, optimizer = list(verdicts(outcomes)), "AdamW, linear decay, no clipping"
    return Presentation(
        benchmark, TABLES, {}, outcomes, verdicts=sentences, note=NOTE, optimizer=optimizer
    )
