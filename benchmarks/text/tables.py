"""Make the tables of a text benchmark, and write its verdicts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import pandas as pd

from benchmarks.harness.config.benchmark import OOD_MEAN
from benchmarks.harness.config.catalogue import load_metrics
from benchmarks.harness.report import common
from benchmarks.harness.report.table import MISSING, Column, Table
from benchmarks.text.definition import CLEAN, ID, OOD, PAPER_COLUMNS, PUBLISHED
from benchmarks.text.outcomes import (
    CELL,
    DOMAIN_TITLES,
    HEADINGS,
    PROTOCOL_TITLES,
    TextOutcomes,
    choices,
    selection_scores,
    shown_deviation,
)

RANK = "OOD Friedman rank"  # scope of the paper's ranks
# the columns that identify a row of a table over all training tasks
_KEYS_OF_ROW = ["model", "protocol", "method"]
# the headings of these columns
BY_SELECTION = {"model_title": "Model", "selection": "Selection", "method_title": "Method"}
_SELECTIONS = (
    "Selection chooses epoch, learning rate and variant. Clean: with a split that is not reported "
    "(for tasks without a test split, a tenth of the training rows). Authors': with the dev split, "
    "which is also reported and so optimistic (for tasks with a test split, the score of the best "
    "dev epoch)."
)
_DEVIATION = (
    "Mean ± standard deviation over n seeds (sample; authors' selection: population, like the "
    "authors)."
)


class _ResultBlock(NamedTuple):
    """Two columns of the table of results: scores, and their differences to the baseline."""

    prefix: str  # the names of the frame's columns begin with it
    domain: str
    protocol: str
    score_heading: str
    delta_heading: str
    std: str  # the standard deviation to show: std or population_std

    @property
    def columns(self) -> list[Column]:
        """Return the two printed columns: the score, and the difference."""
        return [
            Column(
                "score",
                f"{self.prefix}_mean",
                self.score_heading,
                std=f"{self.prefix}_{self.std}",
                marks_best=True,
            ),
            Column(
                "score",
                f"{self.prefix}_delta",
                self.delta_heading,
                interval=(f"{self.prefix}_low", f"{self.prefix}_high"),
                signed=True,
            ),
        ]


_RESULT_BLOCKS = (
    _ResultBlock(
        prefix="id",
        domain=ID,
        protocol=CLEAN,
        score_heading="ID",
        delta_heading="Δ ID",
        std="std",
    ),
    _ResultBlock(
        prefix="ood",
        domain=OOD_MEAN,
        protocol=CLEAN,
        score_heading="OOD",
        delta_heading="Δ OOD",
        std="std",
    ),
    _ResultBlock(
        prefix="published",
        domain=ID,
        protocol=PUBLISHED,
        score_heading="ID, authors' selection",
        delta_heading="Δ, authors' selection",
        std="population_std",
    ),
)


def results_table(outcomes: TextOutcomes) -> Table:
    """Make a table of scores under both protocols, and their differences to the baseline.

    It has a row per model, training task and method.
    """
    columns = []
    for block in _RESULT_BLOCKS:
        columns += block.columns
    return Table(
        title=f"Scores under both selections, and differences to {outcomes.baseline_title}",
        caption=_results_caption(outcomes),
        keys={**HEADINGS, "n": "n", "pairs": "n of Δ"},
        columns=columns,
        frame=_result_rows(outcomes),
        group=("model", "task"),
        origins=outcomes.shared_origins,
    )


def _result_rows(outcomes: TextOutcomes) -> pd.DataFrame:
    """Return the rows of :func:`results_table`, one for each model, task and method.

    Each block has columns of its own, such as ``id_mean``, ``id_delta`` and ``ood_mean``. The
    columns ``n`` and ``pairs`` have numbers of seeds as text.
    """
    score_counts = common.format_counts(outcomes.rows, CELL)
    pair_counts = common.format_counts(outcomes.rows, CELL, count="pairs")
    counts = score_counts.merge(pair_counts, on=CELL)
    # begin with the sorted rows and their counts, then join the numbers of each block
    frame = outcomes.order(counts, CELL)
    for block in _RESULT_BLOCKS:
        rows_of_block = outcomes.of(block.domain, block.protocol)
        numbers = rows_of_block[[*CELL, "mean", "std", "population_std", "delta", "low", "high"]]
        frame = common.with_numbers(frame, on=CELL, numbers=numbers, prefix=f"{block.prefix}_")
    return frame


def _results_caption(outcomes: TextOutcomes) -> str:
    """Write the caption of :func:`results_table`."""
    return (
        f"{_DEVIATION} {pairs_note(outcomes)} They have a 95 % confidence interval (Student's t), "
        f"not corrected for multiple tests. {outcomes.seeds_cover} ID is the training task, OOD "
        f"the mean over the other sets, without further training. {_SELECTIONS} Bold marks the "
        f"best method, without controls. {_metric_note(outcomes, ID, OOD)}"
    )


def pairs_note(outcomes: TextOutcomes) -> str:
    """Return sentences for captions: which seeds the scores use, and which the differences."""
    return (
        "Scores use the n seeds that all compared rows have. Differences (Δ) use all seeds that a "
        f"row shares with {outcomes.baseline_title}, paired by seed, so Δ may differ from the "
        "difference between the shown scores."
    )


def tasks_table(outcomes: TextOutcomes, domain: str = ID) -> Table:
    """Make a table of scores in the paper's layout: a column per task, and their average.

    Out of domain, a column is a pair of training and evaluation task. The table has a row per
    model, protocol and method.
    """
    of_domain = outcomes.rows[outcomes.rows["domain"] == domain]
    rows = of_domain.assign(std=shown_deviation(of_domain))
    # a scope is the title of a task (or pair of tasks), and so the heading of its column as it is
    headings = {scope: scope for scope in rows["scope"].unique()}
    seed_counts = common.format_counts(rows, _KEYS_OF_ROW)  # a row for each row of the table
    frame, columns = common.spread_over_columns(
        seed_counts,
        on=_KEYS_OF_ROW,
        numbers=rows[["scope", *_KEYS_OF_ROW, "mean", "std"]],
        name_column="scope",
        headings=headings,
        metric="score",
    )
    # the average of a single column would repeat it
    if len(columns) > 1:
        frame, columns = common.with_average(frame, columns, "score")
    title = "Scores by task" if domain == ID else "Scores by OOD set"
    return Table(
        title=title,
        caption=f"{_DEVIATION} {outcomes.shared_note} {_SELECTIONS} "
        f"{_metric_note(outcomes, domain)}",
        keys={**BY_SELECTION, "n": "n"},
        columns=columns,
        frame=outcomes.order(frame, ["protocol", "model", "method"]),
        group=("model", "protocol"),
        origins=outcomes.shared_origins,
    )


def tests_table(outcomes: TextOutcomes) -> Table:
    """Make a table of tests against the baseline, paired by seed, for every task and OOD set."""
    keys = {
        "model_title": "Model",
        "selection": "Selection",
        "task_title": "Trained on",
        "eval_task_title": "Evaluated on",
        "method_title": "Method",
        "n": "n",
    }
    caption = (
        f"Differences to {outcomes.baseline_title}, paired by seed, over all n seeds of both rows. "
        f"{outcomes.seeds_cover} {_SELECTIONS}"
    )
    return common.tests_table(
        against=outcomes.baseline_title,
        caption=caption,
        keys=keys,
        metric="score",
        frame=outcomes.tests.drop(columns="scope"),
    )


def ood_table(outcomes: TextOutcomes) -> Table:
    """Make a table of clean scores on the training task and each OOD set, one column per set.

    It has a row per model, training task and method.
    """
    is_clean = outcomes.rows["protocol"] == CLEAN
    # a mean over OOD sets has no column
    is_single_set = outcomes.rows["domain"].isin([ID, OOD])
    rows = outcomes.rows[is_clean & is_single_set]
    headings = {name: outcomes.title("task", name) for name in rows["eval_task"].unique()}
    seed_counts = common.format_counts(rows, CELL)  # a row for each row of the table
    frame, columns = common.spread_over_columns(
        outcomes.order(seed_counts, CELL),
        on=CELL,
        numbers=rows[["eval_task", *CELL, "mean", "std"]],
        name_column="eval_task",
        headings=headings,
        metric="score",
        joint="_",  # the frame has columns such as `imdb_mean`
    )
    return Table(
        title="Scores by evaluation set",
        caption="Clean selection. Mean ± sample standard deviation over n seeds. The column of "
        f"the training task is the ID score. {outcomes.shared_note} "
        f"{_metric_note(outcomes, ID, OOD)}",
        keys={**HEADINGS, "n": "n"},
        columns=columns,
        frame=frame,
        group=("model", "task"),
        origins=outcomes.shared_origins,
    )


def cost_table(outcomes: TextOutcomes) -> Table:
    """Make a table of time, memory, parameters and expert loads.

    It has a row per model, training task and method.
    """
    # Each model, task and method shows the runs of one protocol: clean if it has clean runs, else
    # published. Clean records come first, so this is the protocol of its first record. `transform`
    # repeats this protocol for each of its records.
    records = outcomes.origins
    shown_protocol = records.groupby(CELL)["protocol"].transform("first")
    shown_records = records[records["protocol"] == shown_protocol]
    # mutual information is in the table of expert use
    is_information = shown_records["metric"].str.contains("_information")
    # `outcomes.rows` has a row for each protocol and evaluation set, this table has one for all
    table_rows = outcomes.rows[CELL].drop_duplicates()
    sorted_rows = outcomes.order(table_rows, CELL)
    return common.cost_table(
        keys=HEADINGS,
        frame=sorted_rows,
        cell_columns=CELL,
        numbers=shown_records[~is_information],
        averaged="Means over seeds of the chosen runs",
        measured_on="the ID test split without padding",
    )


def choices_table(outcomes: TextOutcomes) -> Table:
    """Make a table of the tried hyper-parameters, variant and learning rate, with their dev scores.

    A mark shows which hyper-parameters are chosen.
    """
    # without scores there is no protocol, but the table must have its columns
    protocols = outcomes.protocols or list(PROTOCOL_TITLES)
    dev_scores = []  # of all runs that could be chosen
    for protocol in protocols:
        of_protocol = selection_scores(outcomes.recorded_numbers, protocol)
        dev_scores.append(of_protocol.assign(protocol=protocol))
    return Table(
        title="Hyper-parameters, and the choice",
        caption="The choice (✓) has the best mean dev score over n seeds. A method with more "
        "choices has more chances. In a variant, N is the number of experts, k the share of "
        f"experts in use, L the converted layers. {_SELECTIONS}",
        keys={
            "model_title": "Model",
            "selection": "Selection",  # after the model, before the other keys
            **HEADINGS,
            "variant_shown": "Variant",
            "rate": "Learning rate",
            "n": "n",
            "mark": "Chosen",
        },
        columns=[Column("score", "mean", "Dev score", std="std")],
        frame=_choice_rows(outcomes, protocols),
        origins=pd.concat(dev_scores),
    )


def _choice_rows(outcomes: TextOutcomes, protocols: Iterable[str]) -> pd.DataFrame:
    """Return the rows of :func:`choices_table`: the tried hyper-parameters under each protocol."""
    tables = []
    for protocol in protocols:
        tables.append(choices(outcomes.recorded_numbers, protocol).assign(protocol=protocol))
    table = outcomes.with_titles(pd.concat(tables, ignore_index=True))
    return table.assign(
        variant_shown=table["variant"].replace("", MISSING),
        mark=table["chosen"].map({True: "✓", False: ""}),
        rate=table["learning_rate"].map("{:.1e}".format),
    )


def verdicts(outcomes: TextOutcomes) -> Iterator[str]:
    """Yield a sentence for each protocol, model and method, on its differences to the baseline.

    Controls and ablations have no sentence.
    """
    roles = outcomes.tests["method"].map(outcomes.role)
    tests_of_methods = outcomes.tests[roles == "method"]
    keys = ["protocol", "model", "method"]
    tested = outcomes.order(tests_of_methods, keys)
    for (protocol, model, method), group in tested.groupby(keys, sort=False):
        method_title = outcomes.title("method", method)
        model_title = outcomes.title("model", model)
        texts = []
        for domain, domain_title in DOMAIN_TITLES.items():
            differences_in_domain = group[group["domain"] == domain]
            if len(differences_in_domain):
                texts.append(f"{domain_title} {_differences_text(differences_in_domain)}")
        differences = "; ".join(texts)
        selection = f"{PROTOCOL_TITLES[protocol]} selection"
        yield f"{method_title}, {model_title}, {selection}: {differences}."


def _differences_text(differences: pd.DataFrame) -> str:
    """Describe the differences of a method to the baseline on one or several tasks, in points.

    Several differences are averaged, and their verdicts are listed or counted.
    """
    if len(differences) == 1:
        only = differences.iloc[0]
        return f"{common.difference_text(only)} ({only['scope']}, n = {only['n']})"

    mean = differences["delta"].mean() * 100
    parts = [f"{mean:+z.1f} on average"]  # z: no minus sign for a number that rounds to 0
    for verdict in ("better", "worse", "within noise", "equal"):
        scopes = differences.loc[differences["verdict"] == verdict, "scope"]
        if scopes.empty:
            continue
        # for a clear verdict, the sets are named; for other verdicts, they are counted
        if verdict in ("better", "worse"):
            parts.append(f"{verdict} on {', '.join(scopes)}")
        else:
            parts.append(f"{verdict} on {len(scopes)} of {len(differences)}")
    return ", ".join(parts)


def _metric_note(outcomes: TextOutcomes, *domains: str) -> str:
    """Return a sentence for captions that names the metrics of the scores.

    Args:
        outcomes: The outcomes.
        domains: The domains of the scores: ``id``, ``ood`` or both. A domain without scores is
            left out of the sentence.
    """
    texts_by_domain = {}
    for domain in domains:
        text = _metrics_text(outcomes, domain)
        if text:
            texts_by_domain[domain] = text
    if not texts_by_domain:
        return "Scores are in %."
    if len(texts_by_domain) > 1:
        scores = f"{texts_by_domain[ID]} in domain, and {texts_by_domain[OOD]} out of domain"
    else:
        (scores,) = texts_by_domain.values()  # the only text
    return f"Scores are {scores}, in %."


def _metrics_text(outcomes: TextOutcomes, domain: str) -> str:
    """List each metric of a domain, with the tasks (or OOD sets) that are scored with it."""
    rows = outcomes.rows[outcomes.rows["domain"] == domain]
    titles_by_metric: dict[str, list[str]] = {}
    for name in rows["eval_task"].unique():
        task = outcomes.benchmark.tasks[name]
        # the first of several metrics out of domain is the main one
        metric = task.metric if domain == ID else task.ood_metrics[0]
        titles = titles_by_metric.setdefault(metric, [])
        titles.append(outcomes.title("task", name))
    parts = []
    for metric, titles in titles_by_metric.items():
        label = load_metrics()[metric].label.lower()
        parts.append(f"{label} ({', '.join(titles)})")
    return "; ".join(parts)


_PUBLISHED_KEY = list(PAPER_COLUMNS)  # model, scope (task or pair of tasks), method


def paper_table(outcomes: TextOutcomes, domain: str = ID) -> Table:
    """Make a table of our scores and the paper's in one domain, under both protocols.

    It has a row per model, method and task (or pair of tasks).
    """
    return Table(
        title="The paper's numbers beside ours",
        caption=_paper_caption(outcomes),
        keys={"model_title": "Model", "scope": "Task", "method_title": "Method"},
        columns=[
            Column("score", "value", "Paper", decimals=2),
            Column("score", "paper_delta", "Δ paper", signed=True, decimals=2),
            *_our_columns(PUBLISHED),
            *_our_columns(CLEAN),
        ],
        frame=_paper_rows(outcomes, domain),
        notes={"status": "Status", "source": "Source of the paper's number"},
        origins=outcomes.shared_origins,
    )


def _paper_caption(outcomes: TextOutcomes) -> str:
    """Write the caption of :func:`paper_table`."""
    return (
        f"{pairs_note(outcomes)} Ours have a 95 % confidence interval for single tasks. "
        f"{outcomes.seeds_cover} {common.OTHER_MODELS} Status: published (from the authors' "
        "notebooks or quoted from the paper), inferred (published, but the row is our "
        "interpretation), unknown (in the paper, but unavailable). A dash: unavailable, or not "
        "run by this suite."
    )


def _paper_rows(outcomes: TextOutcomes, domain: str) -> pd.DataFrame:
    """Return the rows of :func:`paper_table`: the paper's scores, and ours under each protocol."""
    published = _published_scores(outcomes)
    ours_published = _our_scores(outcomes, domain, PUBLISHED)
    ours_clean = _our_scores(outcomes, domain, CLEAN)
    # an outer join keeps the rows that only the paper has, and those that only we have
    joined = published.merge(ours_published, on=_PUBLISHED_KEY, how="outer", sort=False)
    frame = joined.merge(ours_clean, on=_PUBLISHED_KEY, how="outer", sort=False)
    return _sort_known_rows(outcomes, frame)


def _published_scores(outcomes: TextOutcomes) -> pd.DataFrame:
    """Read the paper's scores as shares, and add ``paper_delta``, the difference to the baseline.

    The paper's ranks are left out, because they have a table of their own.
    """
    published = common.read_published(outcomes.benchmark)
    scores = published[published["scope"] != RANK]
    shares = scores.assign(value=scores["value"] / 100)
    return shares.assign(paper_delta=common.published_delta(shares, outcomes.baseline))


def _our_columns(protocol: str) -> list[Column]:
    """Return the columns of our scores, differences and seed counts under a protocol."""
    title = PROTOCOL_TITLES[protocol]
    return [
        Column("score", protocol, f"Ours, {title} selection", decimals=2),
        Column(
            "score",
            f"{protocol}_delta",
            f"Δ ours, {title}",
            interval=(f"{protocol}_low", f"{protocol}_high"),
            signed=True,
            decimals=2,
        ),
        Column("runs", f"{protocol}_n", f"n, {title}"),
        Column("runs", f"{protocol}_pairs", f"n of Δ, {title}"),
    ]


def _sort_known_rows(outcomes: TextOutcomes, frame: pd.DataFrame) -> pd.DataFrame:
    """Keep the rows with a score of the paper or of ours, sort them, and add titles."""
    # the paper's scores are in the column `value`, ours in a column for each protocol
    has_number = frame[["value", PUBLISHED, CLEAN]].notna().any(axis=1)
    known = frame[has_number].reset_index(drop=True)
    # models and scopes are sorted by name, methods by their place in the definition
    places = {name: place for place, name in enumerate(outcomes.methods)}
    with_places = known.assign(place=known["method"].map(places))
    in_order = with_places.sort_values(["model", "scope", "place"], kind="stable")
    titled = outcomes.with_titles(in_order.drop(columns="place"))
    # a dash if the paper has no such number, or the number has no status or source
    notes = titled[["status", "source"]].fillna("").replace("", MISSING)
    return titled.assign(status=notes["status"], source=notes["source"])


def _our_scores(outcomes: TextOutcomes, domain: str, protocol: str) -> pd.DataFrame:
    """Return our scores, differences and seed counts in one domain under one protocol.

    The columns are named after the protocol, such as ``clean`` for the score, and ``clean_delta``.
    In domain, methods with a score on all tasks of the paper also have a row with their average.
    """
    rows = outcomes.of(domain, protocol)
    numbers = ["mean", "delta", "low", "high", "n", "pairs"]
    ours = rows[[*_PUBLISHED_KEY, *numbers]]
    if domain == ID:
        ours = pd.concat([ours, _task_averages(outcomes, rows)])
    return ours.rename(
        columns={
            "mean": protocol,
            "delta": f"{protocol}_delta",
            "low": f"{protocol}_low",
            "high": f"{protocol}_high",
            "n": f"{protocol}_n",
            "pairs": f"{protocol}_pairs",
        }
    )


def _task_averages(outcomes: TextOutcomes, rows: pd.DataFrame) -> pd.DataFrame:
    """Average scores and differences over the paper's tasks, for each model and method.

    A model and method without a score on one of these tasks is left out. The scope is ``average``.
    """
    # the paper trains on sets of the hub; the others are our additions
    tasks_of_paper = []
    for name, task in outcomes.benchmark.tasks.items():
        if task.splits.train and task.source.hub:
            tasks_of_paper.append(name)
    is_of_paper = rows["task"].isin(tasks_of_paper)
    has_score = rows["n"] > 0  # a row without shared seeds has none
    by_method = rows[is_of_paper & has_score].groupby(["model", "method"], sort=False)
    # a task without the baseline has no difference (nan); skipna=False then gives no average either
    averages = by_method[["mean", "delta"]].mean(skipna=False)
    ran_all_tasks = by_method.size() == len(tasks_of_paper)
    return averages[ran_all_tasks].reset_index().assign(scope="average")


TABLES = {
    "results": results_table,
    "tasks": tasks_table,
    "tests": tests_table,
    "ood": ood_table,
    "cost": cost_table,
    "choices": choices_table,
    "paper": paper_table,
}
