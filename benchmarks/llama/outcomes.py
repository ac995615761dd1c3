"""Collect losses and accuracies of finished runs, and compare methods with equally tuned dense models."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import pandas as pd

from benchmarks.harness.config.benchmark import AnyBenchmark
from benchmarks.harness.config.method_specs import setting_text
from benchmarks.harness.config.runs import Run
from benchmarks.harness.report.common import Outcomes, join_claim_numbers, parameter_counts
from benchmarks.harness.results.content import Metrics, QuestionResult
from benchmarks.harness.results.records import Record, tabulate_numbers
from benchmarks.harness.results.statistics import (
    Difference,
    paired_differences,
    shared_pairs,
    with_verdicts,
)
from benchmarks.llama.definition import HELD_OUT, NATS, QUESTIONS

GROUP = ["model", "task", "tuning"]
CELL = [*GROUP, "method", "variant"]
BASELINE, UNTUNED = "baseline", "untuned"
ACCURACY = "accuracy"
Row = tuple[Any, ...]
_TITLES = {
    "mmlu": "MMLU",
    "mmlu_dev": "MMLU-dev",
    "mmlu_dev_continuation": "MMLU-dev, continuations",
}


class InstructionOutcomes(Outcomes):
    """Collect the finished runs of an instruction-tuning benchmark.

    Each cell has the runs of its best learning rate, with the lowest mean held-out loss.

    Attributes:
        chosen: The finished runs of the best learning rates.
        runs: The same without what they recorded.
        rates_chosen: True if a cell had several learning rates.
        records: All numbers of these runs, with the columns of :data:`CELL`.
        several_sets: True if runs train on several sets; ``task`` is the set.
        shared: The numbers of the seeds that all methods of a model, set and tuning share.
        eval_tasks: The evaluated tasks in order, each with the result of its first run.
        questions: The ``value`` of each question by ``eval_task`` and ``metric``: ``accuracy`` (1 if correct), or the
            right answer's nats per byte.
        tests: The paired tests over questions by metric, averaged over seeds, against the equally tuned baseline and
            the same untuned method, with verdicts, corrected over all rows.
    """

    def __init__(self, benchmark: AnyBenchmark, finished: Sequence[Record]) -> None:
        self.chosen = _best_rate_runs(finished)
        runs = [record.run for record in self.chosen]
        tunings = {name: tuning.title for name, tuning in benchmark.definition.finetuning.items()}
        sets = {name: task.title for name, task in benchmark.tasks.items()}
        super().__init__(benchmark, runs, [*GROUP, "method"], task=sets, tuning=tunings)
        self.rates_chosen = len(self.chosen) < len(finished)
        records = tabulate_numbers(self.chosen)
        cells = pd.DataFrame(
            [{"run_id": run.id, **cell_of(run)} for run in runs], columns=["run_id", *CELL]
        )
        self.records = records.drop(columns=["task", "model", "method", "variant"]).merge(
            cells, on="run_id", sort=False
        )
        self.several_sets = self.records["task"].nunique() > 1
        self.shared = shared_pairs(self.records, GROUP, ["method", "variant"], "seed")
        self.eval_tasks: dict[str, QuestionResult] = {}
        self._layers: dict[tuple[str, str], list[str]] = {}
        for record in self.chosen:
            for name, result in (record.metrics.tasks or {}).items():
                self.eval_tasks.setdefault(name, result)
            if record.metrics.routing and record.metrics.routing.shares:
                converted = sorted(record.metrics.routing.shares, key=int)
                self._layers[record.run.model, record.run.method_variant] = converted
        self.questions = self.collect_rows(
            ["eval_task", "metric", "question", "value"], _question_values
        )
        untuned = next((run.spec["finetuning"] for run in runs if not run.is_trained), "")
        self._references = {
            BASELINE: {"method": self.baseline, "variant": ""},
            UNTUNED: {"tuning": untuned},
        }
        self.tests = {metric: self._tests(metric) for metric in (ACCURACY, NATS)}

    def collect_rows(
        self, columns: Sequence[str], read: Callable[[Metrics], Iterable[Row]]
    ) -> pd.DataFrame:
        """Collect the rows that ``read`` yields from each run's metrics, and prepend run id, cell and seed."""
        rows = []
        for record in self.chosen:
            run = record.run
            for row in read(record.metrics):
                rows.append((run.id, *cell_of(run).values(), run.seed, *row))
        # pandas sums objects in order but floats pairwise, with another last digit
        return pd.DataFrame(rows, columns=["run_id", *CELL, "seed", *columns], dtype=object)

    def numbers(self, part: str, metric: str, name: str | None = None) -> pd.Series[float]:
        """Return a metric of the shared seeds, indexed by cell and seed; ``name`` selects a task of the part."""
        chosen = self.shared[(self.shared["part"] == part) & (self.shared["metric"] == metric)]
        if name is not None:
            chosen = chosen[chosen["eval_task"] == name]
        return chosen.set_index([*CELL, "seed"])["value"]

    def cells(self) -> pd.DataFrame:
        """Return a row per cell, with its number ``n`` of shared seeds."""
        cells = self.records[CELL].drop_duplicates()
        seeds = self.shared.groupby(CELL)["seed"].nunique().rename("n")
        return cells.join(seeds, on=CELL).fillna({"n": 0}).astype({"n": int}).reset_index(drop=True)

    def _tests(self, metric: str) -> pd.DataFrame:
        values = self.questions[self.questions["metric"] == metric].drop(
            columns=["run_id", "metric"]
        )
        differences = [
            self._differences(values, [*CELL, "eval_task"], against, "question").assign(
                against=against
            )
            for against in self._references
        ]
        tests = pd.concat(differences, ignore_index=True).rename(columns={"n": "questions"})
        tests["seeds"] = tests["values"] // tests["questions"]  # every seed has every question
        tests = tests.sort_values(
            "eval_task", key=lambda names: names.map(list(self.eval_tasks).index), kind="stable"
        )
        row = [*CELL, "against", "eval_task", "questions", "seeds", *Difference.COLUMNS]
        return with_verdicts(tests[row], lower_is_better=metric == NATS)

    def _differences(
        self, scores: pd.DataFrame, cell: list[str], against: str, pair: str
    ) -> pd.DataFrame:
        # untuned models do not depend on the seed
        averaged = ["seed"] if against == UNTUNED else []
        return paired_differences(scores, cell, self._references[against], pair, averaged)

    def loss_differences(self, against: str) -> pd.DataFrame:
        """Return the differences of held-out loss to a reference, a row per cell, paired by shared seed."""
        losses = self.numbers("dev", "loss").reset_index()
        return self._differences(losses, CELL, against, "seed").drop(columns=["n", "values"])

    def claim_numbers(self) -> pd.DataFrame:
        """Return losses by seed, accuracy and nats per byte by question, and parameter counts, for claims.

        The column ``setting`` is the variant, so that claims can select layers.
        """
        records = self.records.assign(setting=self.records["variant"])
        is_loss = (records["part"] == "dev") & (records["metric"] == "loss")
        losses = records[is_loss].assign(domain=HELD_OUT, eval_task="")
        # without seeds, so that each question is averaged over them
        questions = self.questions.assign(
            domain=QUESTIONS, setting=self.questions["variant"], seed=""
        )
        return join_claim_numbers(losses, questions, parameter_counts(records))

    def with_titles(self, frame: pd.DataFrame) -> pd.DataFrame:
        """Add titles; method titles include the variant."""
        return (
            super()
            .with_titles(frame)
            .assign(method_title=[self.method_title(row) for row in frame.to_dict("records")])
        )

    def method_title(self, cell: Mapping[str, str]) -> str:
        """Return a method's title with its variant and the numbers of its converted layers."""
        setting = setting_text(
            cell["variant"], self._layers.get((cell["model"], cell["variant"]), ())
        )
        return ", ".join(filter(None, (self.title("method", cell["method"]), setting)))


def cell_of(run: Run) -> dict[str, str]:
    """Return the cell of a run."""
    return {
        "model": run.model,
        "task": run.task,
        "tuning": run.spec["finetuning"],
        "method": run.method,
        "variant": run.method_variant,
    }


def format_task(task: str) -> str:
    """Return the title of a task."""
    name, _, shots = task.partition(" ")
    return " ".join((_TITLES.get(name, name), shots)).strip()


def _best_rate_runs(finished: Sequence[Record]) -> list[Record]:
    """Return the runs of each cell's learning rate with the lowest mean held-out loss."""
    rates = []
    losses = []
    for record in finished:
        run = record.run
        rates.append((*cell_of(run).values(), run.learning_rate))
        loss = (record.metrics.scores or {})["dev"][run.task]["loss"]
        losses.append(math.inf if loss is None else loss)  # the model diverged
    frame = pd.DataFrame(rates, columns=[*CELL, "rate"])
    frame["loss"] = losses
    means = frame.groupby([*CELL, "rate"], sort=False)["loss"].mean()
    best = set(means.groupby(CELL, sort=False).idxmin())
    return [record for record, rate in zip(finished, rates, strict=True) if rate in best]


def _question_values(metrics: Metrics) -> Iterator[Row]:
    """Yield evaluated task, metric, question and value of each question."""
    for task, result in (metrics.tasks or {}).items():
        for subject, digits in result.correct.items():
            for number, digit in enumerate(digits):
                yield task, ACCURACY, f"{subject} {number}", float(digit)
        for subject, values in result.nats_per_byte.items():
            for number, value in enumerate(values):
                if value is not None:  # the model diverged
                    yield task, NATS, f"{subject} {number}", float(value)
