"""Make the tables of a text benchmark, and write its verdicts."""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd

from benchmarks.harness.config.benchmark import OOD_MEAN
from benchmarks.harness.config.catalogue import load_metrics
from benchmarks.harness.report import common
from benchmarks.harness.report.table import MISSING, Column, Table
from benchmarks.text.definition import CLEAN, ID, OOD, PAPER_COLUMNS, PUBLISHED
from benchmarks.text.outcomes import (
    CELL,
    DOMAINS,
    KEYS,
    PROTOCOLS,
    TextOutcomes,
    choices,
    selection_scores,
)

RANK = "OOD Friedman rank"  # scope of the paper's ranks
_ROW = ["model", "protocol", "method"]
BY_SELECTION = {"model_title": "Model", "selection": "Selection", "method_title": "Method"}
_SELECTIONS = (
    "Selection chooses epoch, learning rate and variant. Clean: with a split that is not reported (for tasks without a "
    "test split, a tenth of the training rows). Authors': with the dev split, which is also reported and so optimistic "
    "(for tasks with a test split, the score of the best dev epoch)."
)


def results(outcomes: TextOutcomes) -> Table:
    """Make a table of scores under both selections, and differences to the baseline."""
    frame = outcomes.order(common.format_counts(outcomes.rows, CELL), CELL)
    columns = []
    for prefix, domain, protocol, score, delta, std in (
        ("id", ID, CLEAN, "ID", "Δ ID", "std"),
        ("ood", OOD_MEAN, CLEAN, "OOD", "Δ OOD", "std"),
        (
            "published",
            ID,
            PUBLISHED,
            "ID, authors' selection",
            "Δ, authors' selection",
            "population_std",
        ),
    ):
        numbers = ["mean", "std", "population_std", "delta", "low", "high"]
        frame = common.with_numbers(
            frame, CELL, outcomes.of(domain, protocol)[[*CELL, *numbers]], f"{prefix}_"
        )
        columns += [
            Column("score", f"{prefix}_mean", score, std=f"{prefix}_{std}", best=True),
            Column(
                "score",
                f"{prefix}_delta",
                delta,
                interval=(f"{prefix}_low", f"{prefix}_high"),
                signed=True,
            ),
        ]
    return Table(
        f"Scores under both selections, and differences to {outcomes.baseline_title}",
        "Mean ± standard deviation over n seeds (sample; authors' selection: population, like the authors). "
        "Differences are paired by seed, with a 95 % confidence interval (Student's t), not corrected for multiple "
        f"tests. {outcomes.shared_note} ID is the training task, OOD the mean over the other sets, without further "
        f"training. {_SELECTIONS} Bold marks the best method, without controls. {_metric_note(outcomes)}",
        {**KEYS, "n": "n"},
        columns,
        frame,
        group=("model", "task"),
        origins=outcomes.shared_origins,
    )


def tasks(outcomes: TextOutcomes, domain: str = ID) -> Table:
    """Make a table like the paper's: a column of scores per task (or pair of tasks), and the average."""
    rows = outcomes.rows[outcomes.rows["domain"] == domain]
    rows = rows.assign(std=rows["std"].where(rows["protocol"] == CLEAN, rows["population_std"]))
    frame = common.format_counts(rows, _ROW)
    headings = {scope: scope for scope in rows["scope"].unique()}
    frame, columns = common.with_columns(
        frame, _ROW, rows[["scope", *_ROW, "mean", "std"]], headings, "score"
    )
    if len(columns) > 1:
        frame, columns = common.with_average(frame, columns, "score")
    return Table(
        "Scores by task" if domain == ID else "Scores by OOD set",
        "Mean ± standard deviation over n seeds (sample; authors' selection: population, like the authors). "
        f"{outcomes.shared_note} {_SELECTIONS} {_metric_note(outcomes, domain)}",
        {**BY_SELECTION, "n": "n"},
        columns,
        outcomes.order(frame, ["protocol", "model", "method"]),
        group=("model", "protocol"),
        origins=outcomes.shared_origins,
    )


def tests(outcomes: TextOutcomes) -> Table:
    """Make a table of paired tests over seeds against the baseline."""
    return common.tests_table(
        outcomes.baseline_title,
        f"Differences to {outcomes.baseline_title}, paired by seed, over all n seeds of both rows. Other tables use "
        f"the seeds that all their rows share. {_SELECTIONS}",
        {"model_title": "Model", "selection": "Selection", "task_title": "Trained on"}
        | {"eval_task_title": "Evaluated on", "method_title": "Method", "n": "n"},
        "score",
        outcomes.tests.drop(columns="scope"),
    )


def ood(outcomes: TextOutcomes) -> Table:
    """Make a table of scores on every set, by training task."""
    rows = outcomes.rows[
        (outcomes.rows["protocol"] == CLEAN) & outcomes.rows["domain"].isin([ID, OOD])
    ]
    headings = {name: outcomes.title("task", name) for name in rows["eval_task"].unique()}
    numbers = rows[["eval_task", *CELL, "mean", "std"]]
    frame = outcomes.order(common.format_counts(rows, CELL), CELL)
    frame, columns = common.with_columns(frame, CELL, numbers, headings, "score", joint="_")
    return Table(
        "Scores by evaluation set",
        "Clean selection. Mean ± sample standard deviation over n seeds. The column of the training task is the ID "
        f"score. {outcomes.shared_note} {_metric_note(outcomes)}",
        {**KEYS, "n": "n"},
        columns,
        frame,
        group=("model", "task"),
        origins=outcomes.shared_origins,
    )


def cost(outcomes: TextOutcomes) -> Table:
    """Make a table of time, memory, parameters and the use of experts."""
    # clean runs; all runs for cells without clean ones
    records = outcomes.origins
    records = records[records["protocol"] == records.groupby(CELL)["protocol"].transform("first")]
    return common.cost_table(
        KEYS,
        outcomes.order(outcomes.rows[CELL].drop_duplicates(), CELL),
        CELL,
        records[~records["metric"].str.contains("_information")],  # shown in another table
        averaged="Means over seeds of the chosen runs",
        measured_on="the ID test split without padding",
    )


def choices_table(outcomes: TextOutcomes) -> Table:
    """Make a table of all hyper-parameter choices with their dev scores; mark the chosen ones."""
    tables = [
        choices(outcomes.records, protocol).assign(protocol=protocol)
        for protocol in outcomes.protocols
    ]
    table = outcomes.with_titles(pd.concat(tables, ignore_index=True))
    table["variant_shown"] = table["variant"].replace("", MISSING)
    table["mark"] = table["chosen"].map({True: "✓", False: ""})
    table["rate"] = table["learning_rate"].map("{:.1e}".format)
    tried = [
        selection_scores(outcomes.records, name).assign(protocol=name)
        for name in outcomes.protocols
    ]
    return Table(
        "Hyper-parameters, and the choice",
        "The choice (✓) has the best mean dev score over n seeds. A method with more choices has more chances. In a "
        "variant, N is the number of experts, k the share of experts in use, L the converted layers. "
        f"{_SELECTIONS}",
        {"model_title": "Model", "selection": "Selection", **KEYS}
        | {"variant_shown": "Variant", "rate": "Learning rate", "n": "n", "mark": "Chosen"},
        [Column("score", "mean", "Dev score", std="std")],
        table,
        origins=pd.concat(tried),
    )


def verdicts(outcomes: TextOutcomes) -> Iterator[str]:
    """Yield a sentence per model, method and selection, with the differences to the baseline; omit controls."""
    rows = outcomes.tests[outcomes.tests["method"].map(outcomes.role) == "method"]
    keys = ["protocol", "model", "method"]
    for (protocol, model, method), group in outcomes.order(rows, keys).groupby(keys, sort=False):
        title = f"{outcomes.title('method', method)}, {outcomes.title('model', model)}"
        in_domains = [
            (words, group[group["domain"] == domain]) for domain, words in DOMAINS.items()
        ]
        text = "; ".join(
            f"{words} {_differences_text(tests)}" for words, tests in in_domains if len(tests)
        )
        yield f"{title}, {PROTOCOLS[protocol]} selection: {text}."


def _differences_text(tests: pd.DataFrame) -> str:
    """Format the differences over one or many tasks, in points."""
    if len(tests) == 1:
        row = tests.iloc[0]
        return f"{common.difference_text(row)} ({row['scope']}, n = {row['n']})"
    words = [f"{tests['delta'].mean() * 100:+z.1f} on average"]
    for verdict in ("better", "worse", "within noise", "equal"):
        scopes = tests.loc[tests["verdict"] == verdict, "scope"]
        where = (
            ", ".join(scopes)
            if verdict in ("better", "worse")
            else f"{len(scopes)} of {len(tests)}"
        )
        words += [f"{verdict} on {where}"] if len(scopes) else []
    return ", ".join(words)


def _metric_note(outcomes: TextOutcomes, domain: str = ID) -> str:
    """Return a sentence that lists the tasks, or out-of-domain sets, of each metric."""
    rows = outcomes.rows[outcomes.rows["domain"] == domain]
    by_metric: dict[str, list[str]] = {}
    for name in rows["eval_task"].unique():
        task = outcomes.benchmark.tasks[name]
        metric = task.metric if domain == ID else (task.ood_metrics or [task.metric])[0]
        by_metric.setdefault(metric, []).append(outcomes.title("task", name))
    parts = [
        f"{load_metrics()[metric].label.lower()} ({', '.join(titles)})"
        for metric, titles in by_metric.items()
    ]
    return f"Scores are {'; '.join(parts)}, in %."


_PUBLISHED_KEY = list(PAPER_COLUMNS)


def paper(outcomes: TextOutcomes, domain: str = ID) -> Table:
    """Make a table of our numbers and the paper's in one domain, under both selections."""
    frame = common.read_published(outcomes.benchmark)
    frame = frame[frame["scope"] != RANK].assign(value=lambda published: published["value"] / 100)
    frame["paper_delta"] = common.published_delta(frame, outcomes.baseline)
    columns = [
        Column("score", "value", "Paper", decimals=2),
        Column("score", "paper_delta", "Δ paper", signed=True, decimals=2),
    ]
    for protocol in (PUBLISHED, CLEAN):
        frame = frame.merge(
            _our_scores(outcomes, domain, protocol), on=_PUBLISHED_KEY, how="outer", sort=False
        )
        title, delta, ends = (
            PROTOCOLS[protocol],
            f"{protocol}_delta",
            (f"{protocol}_low", f"{protocol}_high"),
        )
        columns += [
            Column("score", protocol, f"Ours, {title} selection", decimals=2),
            Column("score", delta, f"Δ ours, {title}", interval=ends, signed=True, decimals=2),
            Column("runs", f"{protocol}_n", f"n, {title}"),
        ]
    # a row of an unknown published number needs one of ours
    frame = frame[frame[["value", PUBLISHED, CLEAN]].notna().any(axis=1)].reset_index(drop=True)
    ranks = {name: rank for rank, name in enumerate(outcomes.methods)}
    frame = frame.sort_values(
        _PUBLISHED_KEY,
        key=lambda column: column.map(ranks) if column.name == "method" else column,
        kind="stable",
    )
    frame = outcomes.with_titles(frame)
    frame[["status", "source"]] = frame[["status", "source"]].fillna(MISSING).replace("", MISSING)
    return Table(
        "The paper's numbers beside ours",
        f"Δ is the difference to {outcomes.baseline_title}. Ours is paired by seed, with a 95 % confidence interval "
        f"for single tasks. {outcomes.shared_note} Status: published (from the authors' notebooks or quoted from the "
        "paper), inferred (published, but the row is our interpretation), unknown (in the paper, but unavailable). A "
        "dash: unavailable, or not run by this suite.",
        {"model_title": "Model", "scope": "Task", "method_title": "Method"},
        columns,
        frame,
        notes={"status": "Status", "source": "Source of the paper's number"},
        origins=outcomes.shared_origins,
    )


def _our_scores(outcomes: TextOutcomes, domain: str, protocol: str) -> pd.DataFrame:
    """Return our scores by pair of tasks, and in domain the average of a method that ran all tasks of the paper."""
    rows, numbers = outcomes.of(domain, protocol), ["mean", "delta", "low", "high", "n"]
    ours = rows[[*_PUBLISHED_KEY, *numbers]]
    if domain == ID:
        tasks_of_paper = [
            name
            for name, task in outcomes.benchmark.tasks.items()
            if task.splits.train and task.source.hub
        ]
        of_paper = rows[rows["task"].isin(tasks_of_paper)].groupby(["model", "method"], sort=False)
        averages = of_paper[["mean", "delta"]].mean()[of_paper.size() == len(tasks_of_paper)]
        ours = pd.concat([ours, averages.reset_index().assign(scope="average")])
    return ours.rename(
        columns={**{name: f"{protocol}_{name}" for name in numbers}, "mean": protocol}
    )


TABLES = {
    "results": results,
    "tasks": tasks,
    "tests": tests,
    "ood": ood,
    "cost": cost,
    "choices": choices_table,
    "paper": paper,
}
