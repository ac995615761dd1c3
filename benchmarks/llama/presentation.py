"""Present instruction tuning: tables, figures and verdicts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import pandas as pd

from benchmarks.harness.config.benchmark import AnyBenchmark
from benchmarks.harness.report import common
from benchmarks.harness.report.presentation import Presentation
from benchmarks.harness.report.table import Column, Table
from benchmarks.harness.results.content import Metrics
from benchmarks.harness.results.records import Record
from benchmarks.llama.definition import NATS
from benchmarks.llama.figures import FIGURES
from benchmarks.llama.outcomes import (
    ACCURACY,
    BASELINE,
    CELL,
    GROUP,
    UNTUNED,
    InstructionOutcomes,
    Row,
    format_task,
)

_LIKELIHOOD = (
    "Right answer: its negative log-likelihood per byte; less is better. "
    "By length: the answer is the choice with the highest likelihood per letter. "
)
_NEGATIVE_LOGS = "the right answers' nats per byte (negative log-likelihood divided by bytes)"
# texts of a metric's table of tests: words, end of the title, first sentence
_TESTED = {
    ACCURACY: ("accuracy", "", ""),
    NATS: (_NEGATIVE_LOGS, ", by nats per byte", "Less is better. "),
}
_LONGEST = 300  # letters of a text in a table
_MMLU = "mmlu"


def results(outcomes: InstructionOutcomes) -> Table:
    """Make a table of held-out loss and accuracy by tuning and method."""
    frame = outcomes.cells().join(_means(outcomes.numbers("dev", "loss"), "loss"), on=CELL)
    columns = [Column("loss", "loss", "Held-out loss", std="loss std", best=True)]
    for against, words in _reference_titles(outcomes).items():
        frame = common.with_numbers(
            frame, CELL, outcomes.loss_differences(against).drop(columns="p"), f"{against} "
        )
        interval = (f"{against} low", f"{against} high")
        columns.append(
            Column("loss", f"{against} delta", f"Δ loss to {words}", interval=interval, signed=True)
        )
    for task, tested in outcomes.eval_tasks.items():
        parts = {
            ACCURACY: "",
            "accuracy_macro": ", mean of subjects",
            "accuracy_norm": ", by length",
        }
        parts |= {NATS: ", right answer", "task_score": f", {tested.metric}"}
        for metric, word in parts.items():
            name = f"{task} {metric}"
            frame = frame.join(_means(outcomes.numbers("test", metric, task), name), on=CELL)
            columns.append(
                Column(metric, name, f"{format_task(task)}{word}", std=f"{name} std", best=True)
            )
    chosen = (
        "Rows show the learning rate with the lowest held-out loss. "
        if outcomes.rates_chosen
        else ""
    )
    return Table(
        "Held-out loss and accuracy",
        f"Mean ± standard deviation over n seeds. {outcomes.shared_note} The loss is the mean over the response tokens "
        f"of held-out instructions. {'' if outcomes.tests[NATS].empty else _LIKELIHOOD}{_questions_note(outcomes)}"
        f"Δ to {outcomes.baseline_title} compares with the equally tuned {outcomes.baseline_title}, paired by seed; "
        "for an untuned model it is the cost of conversion. Δ to not tuned compares with the same untuned method; it "
        "is the gain of tuning. Both have a 95 % confidence interval over seeds (Student's t). "
        f"{chosen}Bold marks the best method of a tuning, without controls.",
        {**_key_headings(outcomes), "n": "n"},
        columns,
        outcomes.order(frame, CELL),
        group=("model", "task", "tuning"),
        origins=outcomes.shared,
    )


def _means(values: pd.Series[float], name: str) -> pd.DataFrame:
    """Return the columns ``<name>`` and ``<name> std``: mean and standard deviation over the seeds of each cell."""
    return values.groupby(CELL, sort=False).agg(**{name: "mean", f"{name} std": "std"})


def tests(outcomes: InstructionOutcomes, metric: str) -> Table:
    """Make a table of tests paired by question, against the equally tuned baseline and the same untuned method."""
    frame = outcomes.order(outcomes.tests[metric], CELL)
    frame["against"] = frame["against"].map(_reference_titles(outcomes))
    frame["eval_task_title"] = frame["eval_task"].map(format_task)
    words, title, note = _TESTED[metric]
    keys = {**_key_headings(outcomes), "against": "Against", "eval_task_title": "Task"}
    return common.tests_table(
        f"{outcomes.baseline_title}, and against the untuned model{title}",
        f"{note}Differences of {words} to the equally tuned {outcomes.baseline_title} and to the same untuned method, "
        "paired by question. Each question is averaged over the seeds that both have. A test over questions "
        "generalises to other questions, not to other seeds.",
        {**keys, "questions": "Questions", "seeds": "Seeds"},
        metric,
        frame,
    )


def answers(outcomes: InstructionOutcomes) -> Table:
    """Make a table of greedy answers to held-out instructions."""

    def shorten(text: str) -> str:
        words = " ".join(text.split())
        return words if len(words) <= _LONGEST else f"{words[: _LONGEST - 1]}…"

    def shortened(metrics: Metrics) -> Iterator[Row]:
        for number, answer in enumerate(metrics.answers or (), start=1):
            instruction = "\n".join(filter(None, (answer.instruction, answer.input)))
            yield number, shorten(instruction), shorten(answer.answer)

    rows = outcomes.collect_rows(["number", "asked", "answer"], shortened)
    first = rows.drop_duplicates([*CELL, "number"]).drop(columns=["run_id", "seed"])
    return Table(
        "Answers to held-out instructions",
        f"Greedy answers of the first seed of each row, cut at {_LONGEST} letters. `metrics.json` has the whole "
        "answers.",
        {"number": "No", "asked": "Instruction", **_key_headings(outcomes)},
        [],
        outcomes.order(first, ["number", *CELL]),
        notes={"answer": "Answer"},
    )


_DATA = {
    "rows": "Rows",
    "tokens": "Tokens",
    "learned_tokens": "of responses",
    "longest": "Longest",
    "truncated_responses": "Responses cut",
    "truncated_tokens": "Tokens cut",
    "broken_rows": "Broken rows",
}


def data(outcomes: InstructionOutcomes) -> Table:
    """Make a table of row and token counts: learned, held out, cut and broken."""
    rows = []
    for record in outcomes.chosen:
        names = {"model": record.run.model, "task": record.run.task}
        for split, counts in (record.metrics.data or {}).items():
            if split != "train" or record.run.is_trained:
                given = sorted(counts.model_dump(exclude_unset=True).items())
                rows.append({**names, "part": split.replace("_", " "), **dict(given)})
    frame = pd.DataFrame(rows).drop_duplicates().reset_index(drop=True)
    frame["task_title"] = [outcomes.title("task", name) for name in frame["task"]]
    return Table(
        "Instructions",
        "Only the tokens of responses are learned. Responses are cut at the maximum length. A row is broken if its "
        "prompt alone is longer, or if it lacks a field, is empty, or is not UTF-8.",
        {"task_title": "Set", "model": "Tokens of", "part": "Part", "template": "Template"},
        [Column("count", name, heading) for name, heading in _DATA.items()],
        frame,
        notes={"source": "Source"},
    )


def cost(outcomes: InstructionOutcomes) -> Table:
    """Make a table of time, memory, parameters and expert loads."""
    return common.cost_table(
        _key_headings(outcomes),
        outcomes.order(outcomes.cells(), CELL),
        CELL,
        outcomes.records,
        averaged="Means over seeds",
        measured_on="the held-out instructions",
    )


def paper(outcomes: InstructionOutcomes) -> Table:
    """Make a table of our MMLU accuracies and the paper's."""
    published = common.read_published(outcomes.benchmark).assign(
        value=lambda frame: frame["value"] / 100, eval_task_paper="MMLU (shots unknown)"
    )
    ours = [
        common.our_means(outcomes.numbers("test", ACCURACY, task), CELL).assign(
            eval_task_title=format_task(task)
        )
        for task in outcomes.eval_tasks
    ]
    measured = (
        pd.concat(ours)
        if ours
        else pd.DataFrame(columns=[*CELL, "ours", "low", "high", "n", "eval_task_title"])
    )
    frame = published.merge(measured, on=["model", "tuning", "method"], how="outer", sort=False)
    frame = frame.fillna({"eval_task_title": frame["eval_task_paper"], "variant": ""})
    is_mmlu = frame["eval_task_title"].str.startswith(f"{_MMLU.upper()} (")
    frame["difference"] = (frame["ours"] - frame["value"]).where(is_mmlu)
    frame = outcomes.order(frame.assign(task=""), CELL)
    return common.published_table(
        "The paper's MMLU accuracies beside ours",
        "Status: published (quoted by others; the paper's full tables were not available). The paper's number of "
        "shots, and its learning rate and epochs of LoRA, are unknown. A dash: not run by this suite, or unavailable. "
        "Results with another model, other data and other questions neither confirm nor refute a published value. Only "
        f"MMLU itself has a difference. {outcomes.shared_note}",
        {**_key_headings(outcomes), "eval_task_title": "Task"},
        frame,
        origins=outcomes.shared,
    )


TABLES: dict[str, Callable[..., Table]] = {
    **{table.__name__: table for table in (results, answers, data, cost, paper)},
    "tests": partial(tests, metric=ACCURACY),
    "nats_tests": partial(tests, metric=NATS),
}


def verdicts(outcomes: InstructionOutcomes) -> Iterator[str]:
    """Yield a sentence per tuning and method, with differences to the baseline and gains of tuning."""
    gains = outcomes.loss_differences(UNTUNED).set_index(CELL)["delta"]
    losses = outcomes.order(outcomes.loss_differences(BASELINE), CELL)
    for row in losses[losses["method"].map(outcomes.role) == "method"].to_dict("records"):
        cell = tuple(row[key] for key in CELL)
        words = [
            f"held-out loss {row['delta']:+z.3f}{common.interval_text(row['low'], row['high'], 3)}"
        ]
        tuned = {
            row["method_title"]: cell,
            outcomes.baseline_title: (*cell[: len(GROUP)], outcomes.baseline, ""),
        }
        if by_tuning := [
            f"{title} {gains[of]:+z.3f}" for title, of in tuned.items() if of in gains.index
        ]:
            words.append(f"by tuning: {', '.join(by_tuning)}")
        for metric, tests in outcomes.tests.items():
            of_cell = (tests[[*CELL, "against"]] == [*cell, BASELINE]).all(axis=1)
            for test in tests[of_cell].itertuples():
                words.append(f"{format_task(test.eval_task)} {_difference_text(test, metric)}")
        titles = [row[key] for key in _key_headings(outcomes)]
        yield f"{', '.join(titles[:-1])}, against {outcomes.baseline_title}: {titles[-1]}: {'; '.join(words)}."


def _difference_text(test: Any, metric: str) -> str:
    if metric == ACCURACY:
        return common.difference_text(test, " points")
    interval = common.interval_text(test.low, test.high, 3)
    return ", ".join(
        filter(
            None, (f"{test.delta:+z.3f}{interval} nats per byte of the right answer", test.verdict)
        )
    )


def _key_headings(outcomes: InstructionOutcomes) -> dict[str, str]:
    """Return the headings of the key columns; include the set if there are several."""
    sets = {"task_title": "Set"} if outcomes.several_sets else {}
    return {"model_title": "Model", **sets, "tuning_title": "Tuned", "method_title": "Method"}


def _questions_note(outcomes: InstructionOutcomes) -> str:
    """Return sentences on the number of questions of each task and the standard error of its accuracy."""
    words = [
        f"{format_task(task)} has {tested.questions:,} questions; the standard error of one accuracy near 30 % is "
        f"{45.8 / math.sqrt(tested.questions):.1f} points"
        f"{'; chance is 25 %' if task.startswith(_MMLU) else ''}"
        for task, tested in outcomes.eval_tasks.items()
        if tested.metric == "acc"
    ]
    is_dev = any(task.startswith("mmlu_dev") for task in outcomes.eval_tasks)
    dev = (
        "MMLU-dev has MMLU's few-shot development questions from lm-eval, not its test questions. "
    )
    return f"{'; '.join(words)}. {dev if is_dev else ''}" if words else ""


def _reference_titles(outcomes: InstructionOutcomes) -> dict[str, str]:
    """Return the titles of the references of comparisons, by key."""
    return {BASELINE: outcomes.baseline_title, UNTUNED: "not tuned"}


_NOTE = (
    "Losses are paired by seed, with a 95 % confidence interval if there are several seeds. Accuracies are paired by "
    "question, with an interval over questions; verdicts are corrected with Holm's procedure over all rows of the "
    "table of tests."
)


def present(benchmark: AnyBenchmark, records: Sequence[Record]) -> Presentation:
    """Present finished runs."""
    outcomes = InstructionOutcomes(benchmark, records)
    sentences = list(verdicts(outcomes))
    return Presentation(
        benchmark, TABLES, FIGURES, outcomes, verdicts=sentences, note=_NOTE, optimizer="AdamW"
    )
