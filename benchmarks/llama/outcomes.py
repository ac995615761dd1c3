"""Collect the losses and accuracies of finished runs, and compare methods."""

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
# references of comparisons: the baseline method of the same tuning, and the same method untuned
BASELINE = "baseline"
UNTUNED = "untuned"
ACCURACY = "accuracy"
Row = tuple[Any, ...]
_TITLES = {
    "mmlu": "MMLU",
    "mmlu_dev": "MMLU-dev",
    "mmlu_dev_continuation": "MMLU-dev, continuations",
}


class InstructionOutcomes(Outcomes):
    """The results of finished instruction-tuning runs.

    A cell is a row of a table: model, set, tuning, method and variant. It has the runs of its best
    learning rate, which has the lowest mean held-out loss.

    Attributes:
        chosen: The records of the runs with the best learning rates.
        runs: These runs.
        rates_chosen: True if a cell had several learning rates.
        records: All numbers of these runs, with the columns of :data:`CELL`.
        several_sets: True if runs train on several sets. The column ``task`` has the set.
        shared: The numbers of the seeds that all methods of a model, set and tuning share.
        eval_tasks: The evaluated tasks in order, each with the result of its first run.
        questions: The ``value`` of each question by ``eval_task`` and ``metric``: ``accuracy`` (1
            if correct), or the nats per byte of the right answer.
        tests: Paired tests by metric. Each method is compared with the baseline of the same tuning,
            and with itself before tuning. The tests pair questions, average seeds, and are
            Holm-corrected over the rows of a metric.
    """

    def __init__(self, benchmark: AnyBenchmark, finished: Sequence[Record]) -> None:
        self.chosen = _best_rate_runs(finished)
        self.rates_chosen = len(self.chosen) < len(finished)
        runs = [record.run for record in self.chosen]
        tunings = {name: tuning.title for name, tuning in benchmark.definition.finetuning.items()}
        sets = {name: task.title for name, task in benchmark.tasks.items()}
        super().__init__(benchmark, runs, [*GROUP, "method"], task=sets, tuning=tunings)
        self.records = _tabulate_by_cell(self.chosen)
        self.several_sets = self.records["task"].nunique() > 1
        self.shared = shared_pairs(self.records, GROUP, ["method", "variant"], "seed")
        self.eval_tasks = _first_results(self.chosen)
        self._layers = _converted_layers(self.chosen)
        self.questions = self.collect_rows(
            ["eval_task", "metric", "question", "value"], _question_values
        )
        # the values of a cell's columns that turn it into its reference
        self._references = {
            BASELINE: {"method": self.baseline, "variant": ""},
            UNTUNED: {"tuning": _untuned_name(runs)},
        }
        self.tests = {metric: self._tests(metric) for metric in (ACCURACY, NATS)}

    def collect_rows(
        self, columns: Sequence[str], read: Callable[[Metrics], Iterable[Row]]
    ) -> pd.DataFrame:
        """Collect rows from the metrics of all runs.

        Args:
            columns: The columns of the rows that ``read`` yields.
            read: A function that yields rows of a run's metrics.

        Returns:
            The rows, with the run id, the cell and the seed in the first columns.
        """
        rows = []
        for record in self.chosen:
            run = record.run
            for row in read(record.metrics):
                rows.append((run.id, *cell_of(run).values(), run.seed, *row))
        # pandas sums objects in order but floats pairwise, with another last digit
        return pd.DataFrame(rows, columns=["run_id", *CELL, "seed", *columns], dtype=object)

    def numbers(self, part: str, metric: str, name: str | None = None) -> pd.Series[float]:
        """Return a metric of the shared seeds, indexed by cell and seed.

        Args:
            part: The part of the scores, such as ``dev``.
            metric: The name of the metric.
            name: The evaluated task; None if the part has only one.
        """
        is_part = self.shared["part"] == part
        is_metric = self.shared["metric"] == metric
        numbers = self.shared[is_part & is_metric]
        if name is not None:
            numbers = numbers[numbers["eval_task"] == name]
        return numbers.set_index([*CELL, "seed"])["value"]

    def cells(self) -> pd.DataFrame:
        """Return a row per cell, with its number ``n`` of shared seeds."""
        cells = self.records[CELL].drop_duplicates()
        seeds = self.shared.groupby(CELL)["seed"].nunique().rename("n")
        return (
            cells.join(seeds, on=CELL)
            .fillna({"n": 0})  # a cell may share no seed with the others
            .astype({"n": int})
            .reset_index(drop=True)
        )

    def _tests(self, metric: str) -> pd.DataFrame:
        """Test a metric of questions against each reference, in the order of the tasks."""
        is_metric = self.questions["metric"] == metric
        values = self.questions[is_metric].drop(columns=["run_id", "metric"])
        differences = []
        for against in self._references:
            compared = self._differences(values, [*CELL, "eval_task"], against, "question")
            differences.append(compared.assign(against=against))
        tests = pd.concat(differences, ignore_index=True).rename(columns={"n": "questions"})
        # every seed has every question
        tests["seeds"] = tests["values"] // tests["questions"]
        task_numbers = {task: number for number, task in enumerate(self.eval_tasks)}
        in_order = tests.sort_values(
            "eval_task", key=lambda tasks: tasks.map(task_numbers), kind="stable"
        )
        columns = [*CELL, "against", "eval_task", "questions", "seeds", *Difference.COLUMNS]
        return with_verdicts(in_order[columns], lower_is_better=metric == NATS)

    def _differences(
        self, scores: pd.DataFrame, cell: list[str], against: str, pair: str
    ) -> pd.DataFrame:
        """Compare the ``value`` of each cell with its reference, paired by the column ``pair``."""
        # untuned models do not depend on the seed
        averaged = ["seed"] if against == UNTUNED else []
        return paired_differences(scores, cell, self._references[against], pair, averaged)

    def loss_differences(self, against: str) -> pd.DataFrame:
        """Compare the held-out loss of each cell with its reference, paired by shared seed."""
        losses = self.numbers("dev", "loss").reset_index()
        differences = self._differences(losses, CELL, against, "seed")
        return differences.drop(columns=["n", "values"])

    def claim_numbers(self) -> pd.DataFrame:
        """Return the numbers that claims may compare.

        These are losses by seed, accuracy and nats per byte by question, and parameter counts. The
        column ``setting`` is the variant, so that claims can select layers.
        """
        records = self.records.assign(setting=self.records["variant"])
        # the only loss of the part "dev" is on held-out instructions
        is_loss = (records["part"] == "dev") & (records["metric"] == "loss")
        losses = records[is_loss].assign(domain=HELD_OUT, eval_task="")
        # without seeds, so that each question is averaged over them
        questions = self.questions.assign(
            domain=QUESTIONS, setting=self.questions["variant"], seed=""
        )
        return join_claim_numbers(losses, questions, parameter_counts(records))

    def with_titles(self, frame: pd.DataFrame) -> pd.DataFrame:
        """Add titles. Method titles include the variant."""
        titled = super().with_titles(frame)
        method_titles = [self.method_title(row) for row in frame.to_dict("records")]
        return titled.assign(method_title=method_titles)

    def method_title(self, cell: Mapping[str, str]) -> str:
        """Return the title of a cell's method, with its variant and its converted layers."""
        title = self.title("method", cell["method"])
        layers = self._layers.get((cell["model"], cell["variant"]), [])
        setting = setting_text(cell["variant"], layers)
        return f"{title}, {setting}" if setting else title


def cell_of(run: Run) -> dict[str, str]:
    """Return the cell of a run: its names in the columns :data:`CELL`."""
    return {
        "model": run.model,
        "task": run.task,
        "tuning": run.spec["finetuning"],
        "method": run.method,
        "variant": run.method_variant,
    }


def format_task(task: str) -> str:
    """Return the title of an evaluated task, such as ``MMLU (5-shot)`` of ``mmlu (5-shot)``."""
    name, _, settings = task.partition(" ")
    title = _TITLES.get(name, name)
    return f"{title} {settings}".strip()


def _best_rate_runs(finished: Sequence[Record]) -> list[Record]:
    """Keep the runs of the best learning rate of each cell, with the lowest mean held-out loss."""
    rates = []  # the cell and the learning rate of each run
    losses = []
    for record in finished:
        run = record.run
        rates.append((*cell_of(run).values(), run.learning_rate))
        losses.append(_held_out_loss(record))
    frame = pd.DataFrame(rates, columns=[*CELL, "rate"])
    frame["loss"] = losses
    # averaged over the seeds of a rate
    mean_losses = frame.groupby([*CELL, "rate"], sort=False)["loss"].mean()
    best_rates = set(mean_losses.groupby(CELL, sort=False).idxmin())
    return [record for record, rate in zip(finished, rates, strict=True) if rate in best_rates]


def _held_out_loss(record: Record) -> float:
    """Return the held-out loss of a run; infinity if the model diverged, so it is not chosen."""
    scores = record.metrics.scores or {}
    loss = scores["dev"][record.run.task]["loss"]
    return math.inf if loss is None else loss


def _tabulate_by_cell(records: Sequence[Record]) -> pd.DataFrame:
    """Tabulate all numbers of runs, with their cell in the columns :data:`CELL`."""
    rows = [{"run_id": record.run.id, **cell_of(record.run)} for record in records]
    cells = pd.DataFrame(rows, columns=["run_id", *CELL])
    # the variant of a cell is the method's, without the fine-tuning
    numbers = tabulate_numbers(records).drop(columns=["task", "model", "method", "variant"])
    return numbers.merge(cells, on="run_id", sort=False)


def _first_results(records: Sequence[Record]) -> dict[str, QuestionResult]:
    """Map each evaluated task to its result in the first run that has it."""
    first: dict[str, QuestionResult] = {}
    for record in records:
        results = record.metrics.tasks or {}
        for task, result in results.items():
            first.setdefault(task, result)
    return first


def _converted_layers(records: Sequence[Record]) -> dict[tuple[str, str], list[str]]:
    """Map each model and variant with experts to the numbers of its converted layers."""
    layers = {}
    for record in records:
        routing = record.metrics.routing
        if routing and routing.shares:
            layers[record.run.model, record.run.method_variant] = sorted(routing.shares, key=int)
    return layers


def _untuned_name(runs: Iterable[Run]) -> str:
    """Return the name of the fine-tuning that trains nothing; empty if no run has it."""
    for run in runs:
        if not run.is_trained:
            return cell_of(run)["tuning"]
    return ""


def _question_values(metrics: Metrics) -> Iterator[Row]:
    """Yield evaluated task, metric, question and value of each question."""
    results = metrics.tasks or {}
    for task, result in results.items():
        # a digit is 1 if the answer is right, else 0
        for subject, digits in result.correct.items():
            for number, digit in enumerate(digits):
                question = f"{subject} {number}"
                yield task, ACCURACY, question, float(digit)
        for subject, values in result.nats_per_byte.items():
            for number, value in enumerate(values):
                question = f"{subject} {number}"
                if value is not None:  # None if the model diverged
                    yield task, NATS, question, float(value)
