"""Present domain generalisation: tables, figures and verdicts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd

from benchmarks.domainbed.figures import SET_FIGURES
from benchmarks.domainbed.outcomes import CELL, DomainOutcomes
from benchmarks.harness.config.benchmark import AnyBenchmark
from benchmarks.harness.config.runs import Run
from benchmarks.harness.report import common
from benchmarks.harness.report.presentation import Presentation
from benchmarks.harness.report.table import Column, Table
from benchmarks.harness.results.records import Record
from benchmarks.harness.results.statistics import PERMUTATIONS

FOUR = ("pacs", "vlcs", "office_home", "terra_incognita")
_FOUR = "average of four"
_ORDER = ["model", "selection", "task", "method"]
_ROW = {
    "model_title": "Model",
    "selection_title": "Selection",
    "task_title": "Set",
    "method_title": "Method",
}
_KEYS = {key: heading for key, heading in _ROW.items() if key != "task_title"}
_SELECTIONS = (
    "Selections are DomainBed's. Training-domain validation: the step with the highest mean accuracy on held-out "
    "images of the training environments. Leave-one-domain-out: the step with the highest mean accuracy on each other "
    "environment, in runs that also hold it out; only if such runs exist. Test-domain validation (an oracle): the run "
    "whose last step is best on images of the test environment."
)
_VALIDATION = {
    True: "Images of training environments are augmented for validation too, as DomainBed and the paper's authors do.",
    False: "Images of training environments are not augmented for validation, unlike in DomainBed and the paper.",
}
_ERROR = "± is DomainBed's: the population standard deviation over trials, divided by the root of their number"


def results(outcomes: DomainOutcomes, name: str) -> Table:
    """Make a table of one set in DomainBed's layout: a column per held-out environment, and the mean."""
    cells = outcomes.shared[outcomes.shared["task"] == name]
    limits = {run.spec["training"]["eval_rows"] for run in _runs_on(outcomes, [name])}
    cut = "".join(f", of which {limit} are used" for limit in limits if limit)
    grouped = cells.groupby([*CELL, "eval_task"], sort=False)["value"]
    numbers = grouped.agg(mean="mean", error=_domainbed_error).reset_index()[
        ["eval_task", *CELL, "mean", "error"]
    ]
    frame = cells.groupby(CELL, sort=False).agg(n=("seed", "nunique")).reset_index()
    envs = [env for env in outcomes.environments(name) if env in set(cells["eval_task"])]
    headings = {env: outcomes.env_title(name, env) for env in envs}
    frame, columns = common.with_columns(frame, CELL, numbers, headings, "accuracy", std="error")
    frame, columns = common.with_average(frame, columns, "accuracy")
    frame = common.with_numbers(frame, CELL, outcomes.differences[[*CELL, "delta", "low", "high"]])
    delta = f"Δ to {outcomes.baseline_title}"
    columns.append(Column("accuracy", "delta", delta, interval=("low", "high"), signed=True))
    return Table(
        f"{outcomes.title('task', name)}: accuracy by held-out environment",
        f"Accuracy on the in split of the held-out environment (80 % of its images{cut}). Mean over n trials. "
        f"{_ERROR}. {outcomes.shared_note} "
        f"{_held_out_note(outcomes, [name])}{_selections_note(outcomes, [name])} {_experts_note(outcomes, [name])}Δ is "
        "paired by trial, with a 95 % confidence interval (Student's t), not corrected for multiple tests. Bold marks "
        "the best method, without controls.",
        {**_KEYS, "n": "n"},
        columns,
        outcomes.order(frame, ["model", "selection", "method"]),
        group=("model", "selection"),
        origins=outcomes.shared_origins,
    )


def choices(outcomes: DomainOutcomes, name: str) -> Table:
    """Make a table of the step and the draw of hyper-parameters that each selection chose on one set."""
    frame = outcomes.order(
        outcomes.cells[outcomes.cells["task"] == name], ["model", "selection", "method"]
    )
    frame["eval_task_title"] = [outcomes.env_title(name, env) for env in frame["eval_task"]]
    frame["draw"] = frame["hparams_seed"].map(lambda seed: str(seed) if seed else "defaults")
    varied = {"variant": "Variant"} if frame["variant"].any() else {}
    return Table(
        f"{outcomes.title('task', name)}: choices",
        "Step and draw of hyper-parameters (DomainBed's hparams_seed) that each selection chose, by held-out "
        "environment and trial; the selection's value, and the reported accuracy on the held-out environment. "
        f"{_selections_note(outcomes, [name])}",
        {
            **_KEYS,
            "eval_task_title": "Held out",
            "seed": "Trial",
            "step": "Step",
            "draw": "Draw",
            **varied,
        },
        [Column("accuracy", "chosen_by", "Chosen by"), Column("accuracy", "value", "Accuracy")],
        frame,
        # a row lists the runs of all trials and held-out environments
        origins=outcomes.records.drop(columns="seed"),
    )


def summary(outcomes: DomainOutcomes) -> Table:
    """Make DomainBed's summary table, with means over the environments of every set."""
    keys = ["selection", "model", "method"]
    trials = outcomes.trials().groupby(CELL, sort=False)
    spread = trials.agg(mean="mean", error=_domainbed_error, n="count").reset_index()
    frame = common.format_counts(spread, keys)
    headings = {name: outcomes.title("task", name) for name in outcomes.sets}
    numbers = spread[["task", *keys, "mean", "error"]]
    frame, columns = common.with_columns(frame, keys, numbers, headings, "accuracy", std="error")
    if len(columns) > 1:
        frame, columns = common.with_average(frame, columns, "accuracy")
    return Table(
        "Accuracy on held-out environments, by set",
        f"Mean over the held-out environments of a trial, then over n trials. {_ERROR}. {outcomes.shared_note} "
        f"{_held_out_note(outcomes, outcomes.sets)}The average needs a row with all sets. "
        f"{_selections_note(outcomes, outcomes.sets)} {_experts_note(outcomes, outcomes.sets)}".strip(),
        {**_KEYS, "n": "n"},
        columns,
        outcomes.order(frame, ["model", "selection", "method"]),
        group=("model", "selection"),
        origins=outcomes.shared_origins,
    )


def tests(outcomes: DomainOutcomes) -> Table:
    """Make a table of tests against the baseline, paired by trial."""
    return common.tests_table(
        outcomes.baseline_title,
        f"Differences to {outcomes.baseline_title} of the mean over held-out environments, paired by trial, over "
        "all n trials of both rows. Other tables use the trials that all their rows share.",
        {**_ROW, "n": "n"},
        "accuracy",
        outcomes.order(outcomes.tests, _ORDER),
    )


def cost(outcomes: DomainOutcomes) -> Table:
    """Make a table of costs, expert loads, and mutual information of experts with class and environment."""
    cell = ["model", "task", "method"]
    return common.cost_table(
        {"model_title": "Model", "task_title": "Set", "method_title": "Method"},
        outcomes.order(outcomes.records[cell].drop_duplicates(), cell),
        cell,
        outcomes.records,
        averaged="Means over all runs; step times exclude reading and augmenting images",
        measured_on="the out splits of all environments at the last step. Expert tells class (environment) is the "
        "mutual information of a token's expert and its image's class (environment). By chance: its mean and 95 % "
        f"quantile over {PERMUTATIONS} shuffles of classes over the images of an environment (environments over those "
        "of a class). Only values above the quantile are meaningful",
    )


def paper(outcomes: DomainOutcomes) -> Table:
    """Make a table of our averages and the published ones."""
    published = common.read_published(outcomes.benchmark).assign(
        value=lambda frame: frame["value"] / 100
    )
    trials = outcomes.trials(complete=True)
    ours = common.our_means(trials, CELL)
    of_four = trials[trials.index.get_level_values("task").isin(FOUR)]
    four = of_four.groupby(["selection", "model", "method", "seed"], sort=False)
    whole = four.mean()[four.count() == len(FOUR)]
    averages = common.our_means(whole, ["selection", "model", "method"]).assign(task=_FOUR)
    ours = pd.concat([ours[ours["task"].isin(published["task"])], averages])
    frame = published.merge(
        ours, on=["model", "task", "method", "selection"], how="outer", sort=False
    )
    frame["difference"] = frame["ours"] - frame["value"]
    frame = outcomes.order(frame, ["selection", "task", "model", "method"])
    return common.published_table(
        "Published averages beside ours",
        "Accuracy, mean over the environments of a set, each held out in turn; the average of four is over PACS, "
        "VLCS, OfficeHome and TerraIncognita. Status: published (from the authors' notebooks, or quoted), inferred "
        "(published, but the selection or the row is our interpretation). A dash: not run by this suite, or "
        "unavailable. Results with another model and other data neither confirm nor refute a published value. "
        f"{outcomes.shared_note} {_experts_note(outcomes, outcomes.sets)}".strip(),
        {
            key: _ROW[key]
            for key in ("selection_title", "task_title", "model_title", "method_title")
        },
        frame,
        origins=outcomes.shared_origins,
    )


def verdicts(outcomes: DomainOutcomes) -> Iterator[str]:
    """Yield a sentence per model, set and selection, with the differences of the methods; omit controls."""
    rows = outcomes.order(outcomes.tests, _ORDER)
    rows = rows[rows["method"].map(outcomes.role) == "method"]
    for key, group in rows.groupby(["model_title", "selection_title", "task_title"], sort=False):
        words = [
            f"{row.method_title} {common.difference_text(row)} (n = {row.n})"
            for row in group.itertuples()
        ]
        yield f"{key[0]}, {key[2]}, {key[1]}: {'; '.join(words)}."


TABLES = {"summary": summary, "tests": tests, "cost": cost, "paper": paper}
SET_TABLES = {"results": results, "choices": choices}


def _runs_on(outcomes: DomainOutcomes, names: list[str]) -> list[Run]:
    """Return the runs on some sets."""
    return [run for run in outcomes.runs if run.task in names]


def _selections_note(outcomes: DomainOutcomes, names: list[str]) -> str:
    """Return sentences on the selections, and on validation images if sets are augmented (MNIST's are not)."""
    augmented = set()
    for run in _runs_on(outcomes, names):
        is_mnist = "mnist" in run.spec["task"]["source"]
        if run.spec["hparams"]["data_augmentation"] and not is_mnist:
            augmented.add(run.spec["training"]["val_augment"])
    return " ".join(
        [_SELECTIONS, *(_VALIDATION[value] for value in sorted(augmented, reverse=True))]
    )


def _experts_note(outcomes: DomainOutcomes, names: list[str]) -> str:
    """Return a sentence on the experts per token and the converted blocks of each method."""
    experts: dict[str, dict[str, None]] = {}
    for run in _runs_on(outcomes, names):
        if run.config:
            layers = run.config["layers"]
            blocks = layers if isinstance(layers, str) else ", ".join(map(str, layers))
            text = f"{run.config['top_k']} of {run.config['num_experts']} in {blocks}"
            experts.setdefault(outcomes.title("method", run.method), {})[text] = None
    words = "; ".join(f"{title} {' or '.join(texts)}" for title, texts in experts.items())
    return f"Experts per token, and blocks with experts: {words}. " if words else ""


def _held_out_note(outcomes: DomainOutcomes, names: list[str]) -> str:
    """Return a sentence for every set with environments that were not held out."""
    return "".join(
        f"Of {outcomes.title('task', name)} {outcomes.held_out(name)} of {len(outcomes.environments(name))} "
        "environments were held out. "
        for name in names
        if outcomes.held_out(name) < len(outcomes.environments(name))
    )


def _domainbed_error(values: pd.Series[float]) -> float:
    """Return DomainBed's ±: the population standard deviation, divided by the root of the trials; nan for one trial."""
    return float(np.std(list(values)) / math.sqrt(len(values))) if len(values) > 1 else math.nan


_NOTE = (
    "Differences are in points: means over held-out environments, then over paired trials, with 95 % confidence "
    "intervals. Verdicts use paired t-tests at 5 %, corrected with Holm's procedure over all rows of the table of "
    "tests. With two trials a test has only two differences: read it as a hint."
)


def present(benchmark: AnyBenchmark, records: Sequence[Record]) -> Presentation:
    """Present finished runs."""
    outcomes = DomainOutcomes(benchmark, records)
    return Presentation(
        benchmark,
        TABLES,
        {},
        outcomes,
        verdicts=list(verdicts(outcomes)),
        note=_NOTE,
        optimizer="Adam, constant rate, no clipping",
        parts={
            name: Presentation(benchmark, SET_TABLES, SET_FIGURES, outcomes, name)
            for name in outcomes.sets
        },
    )
