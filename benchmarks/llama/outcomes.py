"""Collect the losses and accuracies of finished runs, and compare methods.

The column ``tuning`` has the name of the fine-tuning method, which definitions and specs call
``finetuning``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

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
from benchmarks.llama.definition import HELD_OUT, NATS, QUESTIONS, RANDOM

# the columns that identify a group of comparable cells
GROUP = ["model", "task", "tuning"]
# the columns that identify a cell, which is a row of a table
CELL = [*GROUP, "method", "variant"]
# a cell is compared with the baseline method of the same tuning, and with its own method untuned
BASELINE = "baseline"
UNTUNED = "untuned"
ACCURACY = "accuracy"
Row = tuple[Any, ...]


class QuestionValue(NamedTuple):
    """The value of a metric for one question, in one run."""

    eval_task: str
    metric: str
    question: str
    value: float


# the titles of lm-eval's tasks
_TITLES = {
    "mmlu": "MMLU",
    "mmlu_continuation": "MMLU, continuations",
    "mmlu_dev": "MMLU-dev",
    "mmlu_dev_continuation": "MMLU-dev, continuations",
}


class InstructionOutcomes(Outcomes):
    """The results of finished instruction-tuning runs.

    A cell is a row of a table: a combination of model, set, tuning (fine-tuning method), method and
    variant (varied settings of the method). Only the runs with the best learning rate of a cell are
    used. The best rate has the lowest mean held-out loss.

    Attributes:
        chosen: The records of the runs with the best learning rates.
        runs: These runs.
        rates_chosen: True if a cell had several learning rates.
        recorded_numbers: All numbers of these runs, with the columns of :data:`CELL`. A score that
            a run lacks because its model diverged is nan.
        several_sets: True if runs train on several sets. The column ``task`` has the set.
        draws_templates: True if the seed of a run draws its prompt template.
        shared: The rows of ``recorded_numbers`` for the seeds that all methods of a model, set
            and tuning share.
        eval_tasks: The evaluated tasks in order, each with the result of its first run.
        questions: One row per run, ``question`` and ``metric``, with the ``value`` and the
            ``eval_task``. The metric is ``accuracy`` (1 if correct, else 0) or
            ``nats_per_byte`` (of the right answer; nan if the model diverged).
        tests: A frame of paired tests for each metric of questions. Each method is compared with
            the baseline of the same tuning, and with itself before tuning. The tests pair questions
            (averaged over seeds). p is Holm-corrected over the frame.
    """

    def __init__(self, benchmark: AnyBenchmark, finished: Sequence[Record]) -> None:
        self.chosen = _best_rate_runs(finished)
        self.rates_chosen = len(self.chosen) < len(finished)
        runs = [record.run for record in self.chosen]
        finetuning = benchmark.definition.finetuning
        tuning_titles = {name: tuning.title for name, tuning in finetuning.items()}
        set_titles = {name: task.title for name, task in benchmark.tasks.items()}
        super().__init__(benchmark, runs, [*GROUP, "method"], task=set_titles, tuning=tuning_titles)
        self.recorded_numbers = _tabulate_by_cell(self.chosen)
        self.several_sets = self.recorded_numbers["task"].nunique() > 1
        self.draws_templates = any(run.spec["data"]["template"] == RANDOM for run in runs)
        self.shared = shared_pairs(
            self.recorded_numbers, within=GROUP, compared=["method", "variant"], pair="seed"
        )
        self.eval_tasks = _first_results(self.chosen)
        self._layers = _converted_layers(self.chosen)
        self.questions = self.collect_rows(QuestionValue._fields, _question_values)
        # each cell is compared with two references: the cells that have these values, and are equal
        # to it in the other columns of CELL
        self._references = {
            BASELINE: {"method": self.baseline, "variant": ""},
            UNTUNED: {"tuning": _untuned_name(runs)},
        }
        self.tests = {metric: self._test_metric(metric) for metric in (ACCURACY, NATS)}

    def collect_rows(
        self, columns: Sequence[str], read: Callable[[Metrics], Iterable[Row]]
    ) -> pd.DataFrame:
        """Collect rows from the metrics of all runs.

        Args:
            columns: The names of the values in a row: the fields of a named tuple.
            read: A function that yields such named tuples from the metrics of a run.

        Returns:
            The rows of all runs. The first columns are ``run_id``, those of :data:`CELL`, and
            ``seed``; then come ``columns``.
        """
        rows = []
        for record in self.chosen:
            run = record.run
            # the values of the first columns: ``run_id``, those of CELL, and ``seed``
            run_values = (run.id, *cell_of(run).values(), run.seed)
            for read_values in read(record.metrics):
                rows.append((*run_values, *read_values))
        # dtype object, because pandas sums floats in another order, which rounds differently
        return pd.DataFrame(rows, columns=["run_id", *CELL, "seed", *columns], dtype=object)

    def numbers(self, part: str, metric: str, eval_task: str | None = None) -> pd.Series[float]:
        """Return the values of a metric for the shared seeds, indexed by cell and seed.

        Args:
            part: The part of the scores: ``dev`` (held-out loss) or ``test`` (tasks of lm-eval).
            metric: The name of the metric.
            eval_task: The evaluated task; None if the part has only one.
        """
        is_part = self.shared["part"] == part
        is_metric = self.shared["metric"] == metric
        numbers = self.shared[is_part & is_metric]
        if eval_task is not None:
            numbers = numbers[numbers["eval_task"] == eval_task]
        return numbers.set_index([*CELL, "seed"])["value"]

    def cells(self) -> pd.DataFrame:
        """Return a row per cell, with the columns of :data:`CELL` and the count ``n`` of seeds.

        ``n`` counts the seeds that all methods of a model, set and tuning share.
        """
        cells = self.recorded_numbers[CELL].drop_duplicates()
        seed_counts = self.shared.groupby(CELL)["seed"].nunique().rename("n")
        counted = cells.join(seed_counts, on=CELL)
        # a cell may share no seed with the others
        filled = counted.fillna({"n": 0}).astype({"n": int})
        return filled.reset_index(drop=True)

    def _test_metric(self, metric: str) -> pd.DataFrame:
        """Compute the frame of :attr:`tests` for one metric, in the order of the tasks."""
        is_metric = self.questions["metric"] == metric
        values = self.questions[is_metric].drop(columns=["run_id", "metric"])
        cell_columns = [*CELL, "eval_task"]
        to_baseline = paired_differences(
            values, cell_columns, reference=self._references[BASELINE], pair="question"
        )
        # The answers of an untuned model depend on the seed only if its experts are a random
        # partition, because tasks of lm-eval do not use the template that the seed may draw. So
        # every seed is compared with the mean of the untuned answers.
        to_untuned = paired_differences(
            values,
            cell_columns,
            reference=self._references[UNTUNED],
            pair="question",
            averaged=["seed"],
        )
        differences = pd.concat(
            [to_baseline.assign(against=BASELINE), to_untuned.assign(against=UNTUNED)],
            ignore_index=True,
        )
        # Here ``n`` counts questions, and ``values`` counts the answers of all seeds. Every seed
        # answers every question.
        num_questions = differences["n"]
        num_seeds = differences["values"] // num_questions
        # in the order of the tasks, not of their names
        position_of_task = {task: position for position, task in enumerate(self.eval_tasks)}
        positions = differences["eval_task"].map(position_of_task)
        counted = differences.assign(questions=num_questions, seeds=num_seeds, position=positions)
        tests = counted.sort_values("position", kind="stable")
        columns = [*CELL, "against", "eval_task", "questions", "seeds", *Difference.COLUMNS]
        lower_is_better = metric == NATS
        return with_verdicts(tests[columns], lower_is_better=lower_is_better)

    def loss_differences(self, against: str) -> pd.DataFrame:
        """Compare the held-out loss of each cell with its reference, paired by shared seed.

        The loss of an untuned model depends on the seed only if the seed draws the template or a
        random partition. Unless it draws the template, every seed is compared with the mean of the
        untuned losses.

        Args:
            against: The reference: ``baseline`` (of the same tuning) or ``untuned`` (the same
                method before tuning).

        Returns:
            The columns of :data:`CELL` and of :class:`.Difference`.
        """
        losses = self.numbers("dev", "loss").reset_index()
        averaged = []
        if against == UNTUNED and not self.draws_templates:
            averaged = ["seed"]
        differences = paired_differences(
            losses, CELL, reference=self._references[against], pair="seed", averaged=averaged
        )
        return differences.drop(columns=["n", "values"])

    def expert_counts(self) -> pd.DataFrame:
        """Return the number of experts of each converted cell, and the number that a token uses.

        A row has the columns of :data:`CELL`, ``num_experts`` and ``top_k`` (both as text).
        """
        rows = []
        for run in self.runs:
            if not run.config:
                continue  # a dense model has no experts
            num_experts = str(run.config["num_experts"])
            top_k = str(run.config["top_k"])
            rows.append({**cell_of(run), "num_experts": num_experts, "top_k": top_k})
        # the runs of a cell differ only in their seeds, so their rows are equal; one is kept
        return pd.DataFrame(rows, columns=[*CELL, "num_experts", "top_k"]).drop_duplicates()

    def claim_numbers(self) -> pd.DataFrame:
        """Return the numbers that claims may compare, with the columns of ``common.COMPARED``.

        These are losses by seed, accuracy and nats per byte by question, and parameter counts. The
        column ``setting`` is the variant, so that claims can select layers.
        """
        records = self.recorded_numbers.assign(setting=self.recorded_numbers["variant"])
        # the only loss of the part "dev" is on held-out instructions
        is_loss = (records["part"] == "dev") & (records["metric"] == "loss")
        losses = records[is_loss].assign(domain=HELD_OUT, eval_task="")
        # without seeds, so that each question is averaged over them
        questions = self.questions.assign(
            domain=QUESTIONS, setting=self.questions["variant"], seed=""
        )
        return join_claim_numbers(losses, questions, parameter_counts(records))

    def with_titles(self, frame: pd.DataFrame) -> pd.DataFrame:
        """Add title columns as the parent class does. Method titles include the variant."""
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
    """Return the cell of a run: a value for each column of :data:`CELL`, in that order."""
    return {
        "model": run.model,
        "task": run.task,
        "tuning": str(run.spec["finetuning"]),
        "method": run.method,
        "variant": run.method_variant,
    }


def format_task(task: str) -> str:
    """Return the title of an evaluated task: ``mmlu (5-shot)`` becomes ``MMLU (5-shot)``."""
    name, _, settings = task.partition(" ")
    title = _TITLES.get(name, name)
    return f"{title} {settings}".strip()


def _best_rate_runs(finished: Sequence[Record]) -> list[Record]:
    """Keep the runs with the best learning rate of each cell, in the given order.

    The best rate of a cell has the lowest held-out loss, averaged over seeds.
    """
    # a row per run
    rows = []
    for record in finished:
        rate = record.run.learning_rate
        rows.append({**cell_of(record.run), "rate": rate, "loss": _held_out_loss(record)})
    losses = pd.DataFrame(rows, columns=[*CELL, "rate", "loss"]).astype({"loss": float})
    # a row per cell and learning rate, with the mean over seeds
    mean_losses = losses.groupby([*CELL, "rate"], sort=False)["loss"].mean().reset_index()
    # the row with the lowest loss of each cell; idxmin returns the first of equal losses
    index_of_best = mean_losses.groupby(CELL, sort=False)["loss"].idxmin()
    best_rows = mean_losses.loc[index_of_best]
    # a cell is a tuple of the values of CELL
    best_rate_of_cell = best_rows.set_index(CELL)["rate"].to_dict()

    chosen = []
    for record in finished:
        cell = tuple(cell_of(record.run).values())
        if record.run.learning_rate == best_rate_of_cell[cell]:
            chosen.append(record)
    return chosen


def _held_out_loss(record: Record) -> float:
    """Return the held-out loss of a run; infinity if the model diverged, so it is not chosen."""
    scores = record.metrics.scores or {}
    loss = scores["dev"][record.run.task]["loss"]
    return math.inf if loss is None else loss


def _tabulate_by_cell(records: Sequence[Record]) -> pd.DataFrame:
    """Tabulate the numbers of runs, one row for each number, with the columns of :data:`CELL`."""
    cell_rows = [{"run_id": record.run.id, **cell_of(record.run)} for record in records]
    cells = pd.DataFrame(cell_rows, columns=["run_id", *CELL])

    # replace the names of runs by those of cells: the variant of a run begins with the fine-tuning,
    # and a cell has these in two columns
    numbers = tabulate_numbers(records)
    without_names = numbers.drop(columns=["task", "model", "method", "variant"])
    return without_names.merge(cells, on="run_id", sort=False)


def _first_results(records: Sequence[Record]) -> dict[str, QuestionResult]:
    """Map each evaluated task to its result in the first run that has it."""
    first: dict[str, QuestionResult] = {}
    for record in records:
        results = record.metrics.tasks or {}
        for task, result in results.items():
            first.setdefault(task, result)
    return first


def _converted_layers(records: Sequence[Record]) -> dict[tuple[str, str], list[str]]:
    """Map each model and variant to the numbers of the converted layers, as text.

    Dense runs have no entry.
    """
    layers = {}
    for record in records:
        routing = record.metrics.routing
        if routing and routing.shares:
            layers[record.run.model, record.run.method_variant] = sorted(routing.shares, key=int)
    return layers


def _untuned_name(runs: Iterable[Run]) -> str:
    """Return the name in the column ``tuning`` of runs that only evaluate, such as ``base``.

    If every run trains, the result is empty. The empty name matches no tuning.
    """
    for run in runs:
        if not run.trains_model:
            return cell_of(run)["tuning"]
    return ""


def _question_values(metrics: Metrics) -> Iterator[QuestionValue]:
    """Yield the accuracy and the nats per byte of every question, if they are recorded."""
    results = metrics.tasks or {}
    for task, result in results.items():
        # a digit is 1 if the answer is right, else 0
        for question, digit in _numbered_questions(result.correct):
            yield QuestionValue(task, ACCURACY, question, float(digit))
        for question, value in _numbered_questions(result.nats_per_byte):
            # None if the model diverged; then every mean with this question is missing
            nats = math.nan if value is None else float(value)
            yield QuestionValue(task, NATS, question, nats)


def _numbered_questions(by_subject: Mapping[str, Sequence[Any]]) -> Iterator[tuple[str, Any]]:
    """Yield the name of each question, such as ``anatomy 0``, and its value.

    ``by_subject`` has the values of a subject in the order of its questions.
    """
    for subject, values in by_subject.items():
        for number, value in enumerate(values):
            yield f"{subject} {number}", value
