"""Present instruction tuning: tables, figures and verdicts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pandas as pd

from benchmarks.harness.config.benchmark import AnyBenchmark
from benchmarks.harness.config.runs import Run
from benchmarks.harness.report import common
from benchmarks.harness.report.presentation import Figure, Presentation, make
from benchmarks.harness.report.table import Column, Table
from benchmarks.llama.definition import is_trained
from benchmarks.llama.figures import draw_categories, draw_curves, draw_routing
from benchmarks.llama.likelihood import NATS
from benchmarks.llama.outcomes import (
    BASELINE,
    CELL,
    GROUP,
    UNTUNED,
    InstructionOutcomes,
    cell_of,
    format_part,
    format_task,
)

_CHOSEN = "Rows show the learning rate with the lowest held-out loss. "
_LIKELIHOOD = (
    "Right answer: its negative log-likelihood per byte; less is better. "
    "By length: the answer is the choice with the highest likelihood per letter. "
)
_LONGEST = 300  # letters of a text in a table
_MMLU = "mmlu"


def results(outcomes: InstructionOutcomes) -> Table:
    """Make a table of held-out loss and accuracy by tuning and method."""
    frame = _add_mean(outcomes.cells(), outcomes.losses, "loss")
    columns = [Column("loss", "loss", "Held-out loss", std="loss std", best=True)]
    for against, words in _reference_titles(outcomes).items():
        frame = common.with_numbers(frame, CELL, outcomes.loss_differences(against).drop(columns="p"), f"{against} ")
        interval = (f"{against} low", f"{against} high")
        columns.append(Column("loss", f"{against} delta", f"Δ loss to {words}", interval=interval, signed=True))
    for task, tested in outcomes.tasks.items():
        parts = {"accuracy": "", "accuracy_macro": ", mean of subjects", "accuracy_norm": ", by length"}
        parts |= {NATS: ", right answer", "task_score": f", {tested['metric']}"}
        for metric, word in parts.items():
            name = f"{task} {metric}"
            frame = _add_mean(frame, outcomes.numbers("test", metric, task), name)
            columns.append(Column(metric, name, f"{format_task(task)}{word}", std=f"{name} std", best=True))
    return Table(
        "Held-out loss and accuracy",
        f"Mean ± standard deviation over n seeds. {outcomes.shared_note} The loss is the mean over the response tokens "
        f"of held-out instructions. {'' if outcomes.nats_tests.empty else _LIKELIHOOD}{_questions_note(outcomes)}"
        f"Δ to {outcomes.baseline_title} compares with the equally tuned {outcomes.baseline_title}, paired by seed; "
        "for an untuned model it is the cost of conversion. Δ to not tuned compares with the same untuned method; it "
        "is the gain of tuning. Both have a 95 % confidence interval over seeds (Student's t). "
        f"{_CHOSEN if outcomes.rates_chosen else ''}Bold marks the best method of a tuning, without controls.",
        {**_key_headings(outcomes), "n": "n"},
        columns,
        outcomes.order(frame, CELL),
        group=("model", "set", "tuning"),
        origins=outcomes.shared_origins,
    )


def tests(outcomes: InstructionOutcomes) -> Table:
    """Make a table of paired accuracy tests against the equally tuned baseline and the same untuned method."""
    return _tests(outcomes, outcomes.tests, "accuracy", "accuracy", "")


def nats_tests(outcomes: InstructionOutcomes) -> Table:
    """Make a table of the same tests for the right answers' nats per byte."""
    what = "the right answers' nats per byte (negative log-likelihood divided by bytes)"
    return _tests(outcomes, outcomes.nats_tests, NATS, what, "Less is better. ")


def _tests(outcomes: InstructionOutcomes, tests: pd.DataFrame, metric: str, what: str, note: str) -> Table:
    frame = outcomes.order(tests, CELL)
    frame["against"] = frame["against"].map(_reference_titles(outcomes))
    frame["task_title"] = frame["task"].map(format_task)
    nats = ", by nats per byte" if metric == NATS else ""
    return common.tests_table(
        f"{outcomes.baseline_title}, and against the untuned model{nats}",
        f"{note}Differences of {what} to the equally tuned {outcomes.baseline_title} and to the same untuned method, "
        "paired by question. Each question is averaged over the seeds that both have. A test over questions "
        "generalises to other questions, not to other seeds.",
        {
            **_key_headings(outcomes),
            "against": "Against",
            "task_title": "Task",
            "questions": "Questions",
            "seeds": "Seeds",
        },
        metric,
        frame,
    )


def accuracy_by(outcomes: InstructionOutcomes, heading: str, key: str) -> Table:
    """Make a table of accuracy by category or subject: a row per part of a task, a column per cell."""
    rows: dict[tuple[str, str], dict[str, list[float]]] = {}
    names: dict[str, None] = {}
    shared = set(outcomes.shared["run_id"])
    for run in (run for run in outcomes.runs if run.id in shared):
        name = outcomes.row_title(cell_of(run))
        for task, tested in outcomes.metrics[run.id]["tasks"].items():
            for part, values in tested[key].items() if tested["metric"] == "acc" else ():
                title = f"{format_part(part)} ({values['questions']})"
                rows.setdefault((format_task(task), title), {}).setdefault(name, []).append(values["acc"])
                names[name] = None
    frame = pd.DataFrame(
        [
            {"task_title": task, "part": part, **{name: sum(values) / len(values) for name, values in by_name.items()}}
            for (task, part), by_name in rows.items()
        ],
        columns=["task_title", "part", *names],
    )
    return Table(
        f"Accuracy by {heading.lower()}",
        f"Mean over n seeds; the number of questions is in brackets. {outcomes.shared_note}",
        {"task_title": "Task", "part": heading},
        [Column("accuracy", name, name) for name in names],
        frame,
    )


def answers(outcomes: InstructionOutcomes) -> Table:
    """Make a table of greedy answers to held-out instructions."""
    first: dict[tuple[str, ...], Run] = {}
    for run in outcomes.runs:
        first.setdefault(tuple(cell_of(run).values()), run)
    rows = []
    for cell, run in first.items():
        for number, answer in enumerate(outcomes.metrics[run.id]["answers"], start=1):
            instruction = "\n".join(filter(None, (answer["instruction"], answer["input"])))
            rows.append((*cell, number, _shorten(instruction), _shorten(answer["answer"])))
    frame = outcomes.order(pd.DataFrame(rows, columns=[*CELL, "number", "asked", "answer"]), ["number", *CELL])
    return Table(
        "Answers to held-out instructions",
        f"Greedy answers of the first seed of each row, cut at {_LONGEST} letters. `metrics.json` has the whole "
        "answers.",
        {"number": "No", "asked": "Instruction", **_key_headings(outcomes)},
        [],
        frame,
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
    for run in outcomes.runs:
        names = {"model": run.spec["model"]["name"], "set": run.spec["task"]["name"]}
        for part, counts in outcomes.metrics[run.id]["data"].items():
            if part != "train" or is_trained(run.spec):
                rows.append({**names, "part": part.replace("_", " "), **counts})
    frame = pd.DataFrame(rows).drop_duplicates().reset_index(drop=True)
    frame["set_title"] = [outcomes.title("set", name) for name in frame["set"]]
    return Table(
        "Instructions",
        "Only the tokens of responses are learned. Responses are cut at the maximum length. A row is broken if its "
        "prompt alone is longer, or if it lacks a field, is empty, or is not UTF-8.",
        {"set_title": "Set", "model": "Tokens of", "part": "Part", "template": "Template"},
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
    """Make a table of the paper's MMLU accuracies beside ours."""
    published = common.read_published(outcomes.benchmark).assign(
        value=lambda frame: frame["value"] / 100, task_paper="MMLU (shots unknown)"
    )
    ours = [
        common.our_means(outcomes.numbers("test", "accuracy", task), CELL).assign(task=format_task(task))
        for task in outcomes.tasks
    ]
    measured = pd.concat(ours) if ours else pd.DataFrame(columns=[*CELL, "ours", "low", "high", "n", "task"])
    frame = published.merge(measured, on=["model", "tuning", "method"], how="outer", sort=False)
    frame = frame.fillna({"task": frame["task_paper"], "variant": ""})
    is_mmlu = frame["task"].str.startswith(f"{_MMLU.upper()} (")
    frame["difference"] = (frame["ours"] - frame["value"]).where(is_mmlu)
    frame = outcomes.order(frame.assign(set=""), CELL)
    return common.published_table(
        "The paper's MMLU accuracies beside ours",
        "Status: published (quoted by others; the paper's full tables were not available). The paper's number of "
        "shots, and its learning rate and epochs of LoRA, are unknown. A dash: not run by this suite, or unavailable. "
        "Results with another model, other data and other questions neither confirm nor refute a published value. Only "
        f"MMLU itself has a difference. {outcomes.shared_note}",
        {**_key_headings(outcomes), "task": "Task"},
        frame,
        origins=outcomes.shared_origins,
    )


TABLES: dict[str, Callable[..., Table]] = {
    **{table.__name__: table for table in (results, tests, nats_tests, answers, data, cost, paper)},
    "categories": partial(accuracy_by, heading="Category", key="categories"),
    "subjects": partial(accuracy_by, heading="Subject", key="subjects"),
}


def verdicts(outcomes: InstructionOutcomes) -> Iterator[str]:
    """Yield a sentence per tuning and method, with its differences to the baseline and the gains of tuning."""
    gains = outcomes.loss_differences(UNTUNED).set_index(CELL)["delta"].to_dict()
    losses = outcomes.order(outcomes.loss_differences(BASELINE), CELL)
    losses = losses[losses["method"].map(outcomes.role) == "method"]
    for key, rows in losses.groupby(list(_key_headings(outcomes))[:-1], sort=False):
        for row in rows.itertuples():
            cell = tuple(getattr(row, key) for key in CELL)
            parts = [f"held-out loss {row.delta:+z.3f}{common.interval_text(row.low, row.high, 3)}"]
            tuned = {row.method_title: cell, outcomes.baseline_title: (*cell[: len(GROUP)], outcomes.baseline, "")}
            if texts := [f"{title} {gains[of]:+z.3f}" for title, of in tuned.items() if of in gains]:
                parts.append(f"by tuning: {', '.join(texts)}")
            for test in _baseline_tests(outcomes.tests, cell).itertuples():
                parts.append(f"{format_task(test.task)} {common.difference_text(test, ' points')}")
            for test in _baseline_tests(outcomes.nats_tests, cell).itertuples():
                interval = common.interval_text(test.low, test.high, 3)
                nats = f"{test.delta:+z.3f}{interval} nats per byte of the right answer"
                parts.append(", ".join(filter(None, (f"{format_task(test.task)} {nats}", test.verdict))))
            yield f"{', '.join(key)}, against {outcomes.baseline_title}: {row.method_title}: {'; '.join(parts)}."


def _baseline_tests(tests: pd.DataFrame, cell: tuple[str, ...]) -> pd.DataFrame:
    """Return a cell's tests against the baseline."""
    return tests[(tests[[*CELL, "against"]] == [*cell, BASELINE]).all(axis=1)]


def _key_headings(outcomes: InstructionOutcomes) -> dict[str, str]:
    """Return the headings of the key columns; include the set if there are several."""
    sets = {"set_title": "Set"} if outcomes.several_sets else {}
    return {"model_title": "Model", **sets, "tuning_title": "Tuned", "method_title": "Method"}


def _add_mean(frame: pd.DataFrame, values: pd.Series[float], name: str) -> pd.DataFrame:
    """Add the columns ``<name>`` and ``<name> std``: mean and standard deviation over a cell's seeds."""
    grouped = values.groupby(CELL, sort=False).agg(["mean", "std"])
    grouped.columns = [name, f"{name} std"]
    return frame.merge(grouped, left_on=CELL, right_index=True, how="left", sort=False)


def _questions_note(outcomes: InstructionOutcomes) -> str:
    """Return sentences on the number of questions of each task and the standard error of its accuracy."""
    words = [
        f"{format_task(task)} has {tested['questions']:,} questions; the standard error of one accuracy near 30 % is "
        f"{45.8 / math.sqrt(tested['questions']):.1f} points"
        f"{'; chance is 25 %' if task.startswith(_MMLU) else ''}"
        for task, tested in outcomes.tasks.items()
        if tested["metric"] == "acc"
    ]
    is_dev = any(task.startswith("mmlu_dev") for task in outcomes.tasks)
    dev = "MMLU-dev has MMLU's few-shot development questions from lm-eval, not its test questions. "
    return f"{'; '.join(words)}. {dev if is_dev else ''}" if words else ""


def _shorten(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


def _reference_titles(outcomes: InstructionOutcomes) -> dict[str, str]:
    """Return the titles of the references of comparisons, by key."""
    return {BASELINE: outcomes.baseline_title, UNTUNED: "not tuned"}


_NOTE = (
    "Losses are paired by seed, with a 95 % confidence interval if there are several seeds. Accuracies are paired by "
    "question, with an interval over questions; verdicts are corrected with Holm's procedure over all rows of the "
    "table of tests."
)
FIGURES = {
    "curves": Figure(
        draw_curves,
        "Loss of the training steps by tuning and method: the mean over the response tokens of a step, averaged over "
        "seeds. Every step has different rows. The held-out loss, shown below if runs computed it while training "
        "(`training.eval_every`), is always over the same rows. The axes do not start at zero.",
    ),
    "categories": Figure(
        draw_categories,
        "Accuracy by category of questions. Dots are seeds, larger marks their mean; the line is chance. Bars are 95 % "
        "Wilson intervals over the questions, for the first seed.",
    ),
    "routing": Figure(
        draw_routing,
        "Load of each expert on the held-out tokens, divided by the mean load, by converted layer.",
    ),
}


def present(benchmark: AnyBenchmark, runs: list[Run]) -> Presentation:
    """Present finished runs."""
    outcomes = InstructionOutcomes(benchmark, runs)
    sentences: dict[str, Any] = {"verdicts": list(verdicts(outcomes)), "note": _NOTE, "optimizer": "AdamW"}
    return make(benchmark, TABLES, FIGURES, outcomes, claim_numbers=outcomes.claim_numbers, **sentences)
