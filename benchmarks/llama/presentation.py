"""Present instruction tuning: tables, figures and verdicts."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

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
    format_task,
)

_LIKELIHOOD_NOTE = (
    "Nats per byte: the negative log-likelihood of the right answer; less is better. "
    "By length: the answer is the choice with the highest likelihood per letter. "
)
_LONGEST = 300  # letters of a text in a table


class _MetricTexts(NamedTuple):
    """The texts of :func:`tests_table` that depend on the metric.

    Attributes:
        description: The metric in words.
        title_end: The end of the table's title.
        caption_start: The first sentence of the caption, with a blank after it; may be empty.
    """

    description: str
    title_end: str
    caption_start: str


_TEXTS_OF_METRIC = {
    ACCURACY: _MetricTexts(description="accuracy", title_end="", caption_start=""),
    NATS: _MetricTexts(
        description="the right answers' nats per byte (negative log-likelihood divided by bytes)",
        title_end=", by nats per byte",
        caption_start="Less is better. ",
    ),
}


def results(outcomes: InstructionOutcomes) -> Table:
    """Make a table of held-out loss and accuracy, with a row for each tuning and method."""
    losses, loss_columns = _with_losses(outcomes.cells(), outcomes)
    losses_and_scores, score_columns = _with_scores(losses, outcomes)
    return Table(
        title="Held-out loss and accuracy",
        caption=_results_caption(outcomes),
        keys={**_key_headings(outcomes), "n": "n"},
        columns=[*loss_columns, *score_columns],
        frame=outcomes.order(losses_and_scores, CELL),
        group=("model", "task", "tuning"),
        origins=outcomes.shared,
    )


def _results_caption(outcomes: InstructionOutcomes) -> str:
    """Return the caption of :func:`results`."""
    diverged_note = ""
    if outcomes.shared["value"].isna().any():
        diverged_note = "A loss, or nats per byte, is a dash if the model of a seed diverged. "
    likelihood_note = "" if outcomes.tests[NATS].empty else _LIKELIHOOD_NOTE
    rate_note = ""
    if outcomes.rates_chosen:
        rate_note = "Rows show the learning rate with the lowest held-out loss. "
    template_note = ""
    if outcomes.draws_templates:
        template_note = (
            "The seed draws the prompt template, so Δ to not tuned needs an untuned run of the "
            "same seed. "
        )
    baseline = outcomes.baseline_title
    # each note is empty or ends with a blank
    return (
        f"Mean ± standard deviation over n seeds. {outcomes.shared_note} The loss is the mean over "
        f"the response tokens of held-out instructions. {diverged_note}{likelihood_note}"
        f"{_questions_note(outcomes)}Δ to {baseline} compares with the equally tuned {baseline}, "
        "paired by seed; for an untuned model it is the cost of conversion. Δ to not tuned "
        "compares with the same untuned method; it is the gain of tuning. Both have a 95 % "
        f"confidence interval over seeds (Student's t). {common.SEEDS_COVER} "
        f"{template_note}{rate_note}Bold marks the best method of a tuning, without controls."
    )


def _with_losses(
    cells: pd.DataFrame, outcomes: InstructionOutcomes
) -> tuple[pd.DataFrame, list[Column]]:
    """Add the held-out loss of each cell, and its differences to the baseline and to not tuned.

    Returns:
        The frame with the added numbers, and the columns of the table that show them.
    """
    losses = outcomes.numbers("dev", "loss")
    extended = cells.join(_mean_and_std(losses, "loss"), on=CELL)
    columns = [Column("loss", "loss", "Held-out loss", std="loss std", marks_best=True)]
    for against, title in _reference_titles(outcomes).items():
        differences = outcomes.loss_differences(against).drop(columns="p")
        # adds the columns ``<against> delta``, ``<against> low`` and ``<against> high``
        extended = common.with_numbers(extended, on=CELL, numbers=differences, prefix=f"{against} ")
        column = Column(
            "loss",
            f"{against} delta",
            f"Δ loss to {title}",
            interval=(f"{against} low", f"{against} high"),
            signed=True,
        )
        columns.append(column)
    return extended, columns


def _with_scores(
    cells: pd.DataFrame, outcomes: InstructionOutcomes
) -> tuple[pd.DataFrame, list[Column]]:
    """Add the scores of each cell on the evaluated tasks. A score that a task lacks is nan.

    Returns:
        The frame with the added scores, and the columns of the table that show them.
    """
    extended = cells
    columns = []
    titles = _short_titles(outcomes)
    for task, result in outcomes.eval_tasks.items():
        # the end of a column's heading, by metric
        endings = {
            ACCURACY: "",
            "accuracy_macro": ", by subject",
            "accuracy_norm": ", by length",
            NATS: "",  # its unit tells it from the accuracy
            "task_score": f", {result.metric}",
        }
        for metric, ending in endings.items():
            name = f"{task} {metric}"
            # empty if the task lacks the metric; a table omits columns without numbers
            scores = outcomes.numbers("test", metric, task)
            # adds the columns ``<name>`` and ``<name> std``
            extended = extended.join(_mean_and_std(scores, name), on=CELL)
            heading = f"{titles[task]}{ending}"
            columns.append(Column(metric, name, heading, std=f"{name} std", marks_best=True))
    return extended, columns


def _short_titles(outcomes: InstructionOutcomes) -> dict[str, str]:
    """Map each evaluated task to the heading of its columns.

    Settings that all tasks share, such as ``(0-shot)``, are left out if the caption has them.
    """
    full_titles = {}
    short_titles = {}
    settings = set()
    for task in outcomes.eval_tasks:
        # such as "mmlu" and "(5-shot)"
        name, _, setting = task.partition(" ")
        full_titles[task] = format_task(task)
        short_titles[task] = format_task(name)
        settings.add(setting)
    # the caption describes the questions of tasks that are scored by accuracy
    in_caption = all(result.metric == "acc" for result in outcomes.eval_tasks.values())
    if len(settings) > 1 or not in_caption:
        return full_titles
    return short_titles


def _mean_and_std(values: pd.Series[float], name: str) -> pd.DataFrame:
    """Return the mean of each cell's values over seeds, and their standard deviation.

    These are the columns ``<name>`` and ``<name> std``. The cells are the index. Both numbers are
    nan if a value is nan, because a table counts that seed in ``n``, too.
    """
    by_cell = values.groupby(CELL, sort=False)
    means = by_cell.mean(skipna=False)
    deviations = by_cell.std(skipna=False)
    return pd.DataFrame({name: means, f"{name} std": deviations})


def tests_table(outcomes: InstructionOutcomes, metric: str) -> Table:
    """Make a table of the paired t-tests of one metric, ``accuracy`` or ``nats_per_byte``.

    Each method is tested against the baseline of the same tuning, and against itself before tuning.
    The tests pair the values of the same question.
    """
    tests = outcomes.order(outcomes.tests[metric], CELL)
    # replace the names of references by titles, and add the titles of tasks
    reference_titles = tests["against"].map(_reference_titles(outcomes))
    task_titles = tests["eval_task"].map(format_task)
    titled_tests = tests.assign(against=reference_titles, eval_task_title=task_titles)
    keys = {
        **_key_headings(outcomes),
        "against": "Against",
        "eval_task_title": "Task",
        "questions": "Questions",
        "seeds": "Seeds",
    }
    title_end = _TEXTS_OF_METRIC[metric].title_end
    return common.tests_table(
        against=f"{outcomes.baseline_title}, and against the untuned model{title_end}",
        caption=_tests_caption(metric, outcomes.baseline_title),
        keys=keys,
        metric=metric,
        frame=titled_tests,
    )


def _tests_caption(metric: str, baseline: str) -> str:
    """Return the beginning of the caption of :func:`tests_table`.

    ``baseline`` is the title of the baseline.
    """
    texts = _TEXTS_OF_METRIC[metric]
    return (
        f"{texts.caption_start}Differences of {texts.description} to the equally tuned {baseline} "
        "and to the same untuned method, paired by question. Each question is averaged over the "
        "seeds that both have. A test over questions generalises to other questions of the same "
        "subjects, not to other seeds."
    )


def answers(outcomes: InstructionOutcomes) -> Table:
    """Make a table of greedy answers to held-out instructions."""
    all_seeds = outcomes.collect_rows(_ShortAnswer._fields, _short_answers)
    # rows are in the order of the runs, so the first row of a cell has its first seed
    first_seed = all_seeds.drop_duplicates([*CELL, "number"]).drop(columns=["run_id", "seed"])
    return Table(
        title="Answers to held-out instructions",
        caption=f"Greedy answers of the first seed of each row, cut at {_LONGEST} letters. "
        "`metrics.json` has the whole answers.",
        keys={"number": "No", "asked": "Instruction", **_key_headings(outcomes)},
        columns=[],
        frame=outcomes.order(first_seed, ["number", *CELL]),
        notes={"answer": "Answer"},
    )


class _ShortAnswer(NamedTuple):
    """A generated answer with its number and its instruction, as a table shows them."""

    number: int
    asked: str
    answer: str


def _short_answers(metrics: Metrics) -> Iterator[_ShortAnswer]:
    """Yield each generated answer with its number, from 1, and its instruction.

    The instruction includes its input. Both texts are shortened.
    """
    for number, answer in enumerate(metrics.answers or (), start=1):
        instruction = f"{answer.instruction}\n{answer.input}"
        yield _ShortAnswer(number, _shorten(instruction), _shorten(answer.answer))


def _shorten(text: str) -> str:
    """Write a text in one line, cut to the greatest length of a text in a table."""
    line = " ".join(text.split())
    if len(line) <= _LONGEST:
        return line
    return f"{line[: _LONGEST - 1]}…"


# headings of the counts of a set
_COUNT_HEADINGS = {
    "rows": "Rows",
    "tokens": "Tokens",
    "learned_tokens": "of responses",
    "longest": "Longest",
    "truncated_responses": "Responses cut",
    "truncated_tokens": "Tokens cut",
    "broken_rows": "Broken rows",
}


def data_table(outcomes: InstructionOutcomes) -> Table:
    """Make a table of the rows and tokens of each set: learned, held out, cut and broken."""
    # runs with the same model, set and drawn rows have the same counts
    distinct = pd.DataFrame(_data_rows(outcomes)).drop_duplicates().reset_index(drop=True)
    task_titles = [outcomes.title("task", name) for name in distinct["task"]]
    return Table(
        title="Instructions",
        caption="Only the tokens of responses are learned. Responses are cut at the maximum "
        "length. A row is broken if its prompt alone is longer, or if it lacks a field, is empty, "
        "or is not UTF-8. If seeds draw different rows, each draw has a row of its own.",
        keys={"task_title": "Set", "model": "Tokens of", "part": "Part", "template": "Template"},
        columns=[Column("count", name, heading) for name, heading in _COUNT_HEADINGS.items()],
        frame=distinct.assign(task_title=task_titles),
        notes={"source": "Source"},
    )


def _data_rows(outcomes: InstructionOutcomes) -> Iterator[dict[str, Any]]:
    """Yield the model, the set and the counts for each part (training, held out) of each run."""
    for record in outcomes.chosen:
        run = record.run
        summaries = record.metrics.data or {}
        for part, summary in summaries.items():
            if part == "train" and not run.trains_model:
                continue  # these rows were read, but not learned
            # the counts, and the source and the template of the rows
            values = summary.model_dump(exclude_unset=True)
            # in alphabetical order, in which the table's CSV file has the columns
            sorted_values = {name: values[name] for name in sorted(values)}
            part_title = part.replace("_", " ")
            yield {"model": run.model, "task": run.task, "part": part_title, **sorted_values}


def cost(outcomes: InstructionOutcomes) -> Table:
    """Make a table of time, memory, parameters and expert loads."""
    return common.cost_table(
        keys=_key_headings(outcomes),
        frame=outcomes.order(outcomes.cells(), CELL),
        cell_columns=CELL,
        numbers=outcomes.recorded_numbers,
        averaged="Means over seeds",
        measured_on="the held-out instructions",
    )


_PAPER_CAPTION = (
    "Status: published (quoted by others; the paper's full tables were not available). The paper's "
    "number of shots, and its learning rate and epochs of LoRA, are unknown. A dash: not run by "
    "this suite, or unavailable. Results with another model, other data and other questions "
    "neither confirm nor refute a published value. Only MMLU itself has a difference, and only if "
    "N and k are those of the published value, where these are known."
)


def paper_table(outcomes: InstructionOutcomes) -> Table:
    """Make a table of the paper's MMLU accuracies beside our accuracies on all evaluated tasks."""
    in_points = common.read_published(outcomes.benchmark)
    # published values are in points, ours are shares
    shares = in_points.assign(value=in_points["value"] / 100)
    # N and k are compared as text, because they may be empty
    published = shares.astype({"num_experts": str, "top_k": str})
    ours = _accuracy_means(outcomes).merge(outcomes.expert_counts(), on=CELL, how="left")
    # an outer join keeps the rows that only the paper has, or only we have
    merged = published.merge(
        ours,
        on=["model", "tuning", "method"],
        how="outer",
        sort=False,
        suffixes=("_published", "_ours"),  # both sides have N and k
    )
    # rows that only the paper has lack these; the paper's training set is unknown
    filled = merged.fillna({"eval_task_title": "MMLU (shots unknown)", "variant": "", "task": ""})
    # other tasks, such as "MMLU-dev (…)", have other questions, so they get no difference
    is_mmlu = filled["eval_task_title"].str.startswith("MMLU (")
    is_comparable = is_mmlu & _has_published_experts(filled)
    differences = filled["ours"] - filled["value"]
    compared = filled.assign(difference=differences.where(is_comparable))
    return common.published_table(
        title="The paper's MMLU accuracies beside ours",
        caption=f"{_PAPER_CAPTION} {outcomes.shared_note} {common.SEEDS_COVER}",
        keys={**_key_headings(outcomes), "eval_task_title": "Task"},
        frame=outcomes.order(compared, CELL),
        origins=outcomes.shared,
    )


def _has_published_experts(rows: pd.DataFrame) -> pd.Series[bool]:
    """Return True for the rows whose N and k are those of the published value.

    If the paper's N or k is unknown, every N or k is accepted.
    """
    has_published = pd.Series(True, rows.index)
    for name in ("num_experts", "top_k"):
        published = rows[f"{name}_published"]
        is_unknown = published == ""
        has_published &= is_unknown | (published == rows[f"{name}_ours"])
    return has_published


def _accuracy_means(outcomes: InstructionOutcomes) -> pd.DataFrame:
    """Average the accuracy of each cell on each evaluated task over the shared seeds.

    Returns:
        A row for each cell and task: the columns of :data:`CELL`, the mean ``ours``, its 95 %
        interval ``low`` and ``high``, the number of seeds ``n``, and ``eval_task_title``.
    """
    means = []
    for task in outcomes.eval_tasks:
        task_means = common.our_means(outcomes.numbers("test", ACCURACY, task), CELL)
        means.append(task_means.assign(eval_task_title=format_task(task)))
    if not means:
        return pd.DataFrame(columns=[*CELL, "ours", "low", "high", "n", "eval_task_title"])
    return pd.concat(means)


TABLES: dict[str, Callable[..., Table]] = {
    "results": results,
    "answers": answers,
    "data": data_table,
    "cost": cost,
    "paper": paper_table,
    "tests": partial(tests_table, metric=ACCURACY),
    "nats_tests": partial(tests_table, metric=NATS),
}


def verdicts(outcomes: InstructionOutcomes) -> Iterator[str]:
    """Yield a sentence for each cell that can be compared with the baseline of the same tuning.

    The sentence has the differences to the baseline, and what tuning changed. Controls have no
    sentence.
    """
    # a cell has no gain if a model diverged
    gains = outcomes.loss_differences(UNTUNED).set_index(CELL)["delta"].dropna()
    losses = outcomes.order(outcomes.loss_differences(BASELINE), CELL)
    has_method_role = losses["method"].map(outcomes.role) == "method"
    # the titles of model, set (if there are several) and tuning
    group_columns = [name for name in _key_headings(outcomes) if name != "method_title"]
    for row in losses[has_method_role].to_dict("records"):
        findings = [_loss_text(row)]
        gain_text = _gain_text(outcomes, row, gains)
        if gain_text:
            findings.append(gain_text)
        findings.extend(_test_texts(outcomes, row))
        findings_text = "; ".join(findings)
        group_text = ", ".join(row[column] for column in group_columns)
        yield (
            f"{group_text}, against {outcomes.baseline_title}: {row['method_title']}: "
            f"{findings_text}."
        )


def _loss_text(row: Mapping[Hashable, Any]) -> str:
    """Describe the difference of the held-out loss to the baseline, with its interval, if any."""
    if math.isnan(row["delta"]):
        return "held-out loss without a difference, because a model diverged"
    interval = common.interval_text(row["low"], row["high"], 3)
    return f"held-out loss {row['delta']:+z.3f}{interval}"


def _gain_text(
    outcomes: InstructionOutcomes, row: Mapping[Hashable, Any], gains: pd.Series[float]
) -> str:
    """Describe how much tuning changed the loss of a method, and that of the baseline.

    The text is empty if neither of them has both losses.

    Args:
        outcomes: The results.
        row: The cell of the method, with the title of the method.
        gains: The tuned loss minus the untuned loss, for each cell that has both.
    """
    method_cell = tuple(row[key] for key in CELL)
    group = [row[key] for key in GROUP]
    baseline_cell = (*group, outcomes.baseline, "")  # without a variant
    texts = []
    # with `z`, a number that is rounded to 0 has no minus
    if method_cell in gains.index:
        texts.append(f"{row['method_title']} {gains[method_cell]:+z.3f}")
    if baseline_cell in gains.index:
        texts.append(f"{outcomes.baseline_title} {gains[baseline_cell]:+z.3f}")
    if not texts:
        return ""
    return f"by tuning: {', '.join(texts)}"


def _test_texts(outcomes: InstructionOutcomes, row: Mapping[Hashable, Any]) -> list[str]:
    """Describe the tests of a cell against the baseline: one text for each task and metric.

    A test without a difference, because a model diverged, has no text.
    """
    texts = []
    for metric, all_tests in outcomes.tests.items():
        has_difference = all_tests["delta"].notna()
        against_baseline = all_tests["against"] == BASELINE
        for test in all_tests[has_difference & against_baseline].itertuples():
            is_of_cell = all(getattr(test, column) == row[column] for column in CELL)
            if is_of_cell:
                texts.append(f"{format_task(test.eval_task)} {_difference_text(test, metric)}")
    return texts


def _difference_text(test: Any, metric: str) -> str:
    """Describe the difference of a test, with its interval and its verdict, if any."""
    if metric == ACCURACY:
        return common.difference_text(test, " points")
    # nats per byte are not shares, so they are not in points
    interval = common.interval_text(test.low, test.high, 3)
    difference = f"{test.delta:+z.3f}{interval} nats per byte of the right answer"
    return f"{difference}, {test.verdict}" if test.verdict else difference


def _key_headings(outcomes: InstructionOutcomes) -> dict[str, str]:
    """Return the headings of the columns that identify a row of a table.

    The set has a heading only if runs train on several sets. The heading of the method is the last.
    """
    headings = {"model_title": "Model"}
    if outcomes.several_sets:
        headings["task_title"] = "Set"
    headings["tuning_title"] = "Tuned"
    headings["method_title"] = "Method"
    return headings


def _questions_note(outcomes: InstructionOutcomes) -> str:
    """Return caption sentences on the questions of each task that is scored by accuracy.

    The text ends with a blank. It is empty if there is no such task.
    """
    notes = []
    for task, result in outcomes.eval_tasks.items():
        if result.metric == "acc":
            notes.append(_accuracy_note(task, result.questions))
    if not notes:
        return ""
    draw_note = ""
    if any(task.endswith(" drawn)") for task in outcomes.eval_tasks):
        draw_note = (
            "Drawn questions are the same for all runs, and each subject has about its share. "
        )
    dev_note = ""
    if any(task.startswith("mmlu_dev") for task in outcomes.eval_tasks):
        dev_note = (
            "MMLU-dev has MMLU's few-shot development questions from lm-eval, not its test "
            "questions. "
        )
    return f"{'; '.join(notes)}. {draw_note}{dev_note}"


def _accuracy_note(task: str, questions: int) -> str:
    """Return a clause on the number of questions of a task, and the error of its accuracy."""
    # an accuracy p over n questions has the standard error sqrt(p * (1 - p) / n); for p = 0.3, this
    # is 0.458 / sqrt(n), or 45.8 / sqrt(n) in points (percent)
    standard_error = 45.8 / math.sqrt(questions)
    note = (
        f"{format_task(task)} has {questions:,} questions; the standard error of one accuracy near "
        f"30 % is {standard_error:.1f} points"
    )
    # every form of MMLU has four choices
    if task.startswith("mmlu"):
        return f"{note}; chance is 25 %"
    return note


def _reference_titles(outcomes: InstructionOutcomes) -> dict[str, str]:
    """Return the titles of the references: the title of the baseline, and ``not tuned``."""
    return {BASELINE: outcomes.baseline_title, UNTUNED: "not tuned"}


_NOTE = (
    "Losses are paired by seed, with a 95 % confidence interval if there are several seeds. "
    f"{common.SEEDS_COVER} Accuracies are paired by question. Their intervals cover the choice of "
    "the questions, not the training, because all seeds are averaged first. Verdicts are corrected "
    "with Holm's procedure over all rows of the table of tests."
)


def present(benchmark: AnyBenchmark, records: Sequence[Record]) -> Presentation:
    """Make the tables, figures and verdicts of finished runs."""
    outcomes = InstructionOutcomes(benchmark, records)
    sentences = list(verdicts(outcomes))
    return Presentation(
        benchmark=benchmark,
        table_functions=TABLES,
        figure_functions=FIGURES,
        outcomes=outcomes,
        verdicts=sentences,
        note=_NOTE,
        optimizer="AdamW",
    )
