"""The tables of a benchmark of domain generalisation."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pandas as pd

from benchmarks.domainbed.information import PERMUTATIONS
from benchmarks.domainbed.outcomes import CELL, Outcomes
from benchmarks.domainbed.selection import standard_error
from benchmarks.harness.planning.schema import check_names
from benchmarks.harness.reporting.common_tables import cost_table, interval_text, means_by, published_table, tests_table
from benchmarks.harness.reporting.published import read_published
from benchmarks.harness.reporting.rendering import Column, Table

FOUR = ("pacs", "vlcs", "office_home", "terra_incognita")
_FOUR = "average of four"
_PAPER_COLUMNS = ["model", "set", "method", "selection", "value", "status", "source"]
_KEYS = {"model_title": "Model", "selection_title": "Selection", "method_title": "Method"}
_SELECTIONS = (
    "Selections are DomainBed's. Training-domain validation: the step with the highest mean accuracy on held-out images of the training environments. Leave-one-domain-out: on each "
    "other environment, by runs that hold that out too; only where such runs exist. Test-domain validation: the run whose last step does best on images of the test environment itself, an oracle."
)
_VALIDATION = {
    True: "Validation sees the images of training environments augmented, as in DomainBed's code and the paper's authors'.",
    False: "Validation sees the images of training environments as they are: this suite's own choice; DomainBed and the paper's authors augment them.",
}
_ERROR = "± is DomainBed's: the population's standard deviation over trials by the root of their number"


def domain_tables(outcomes: Outcomes, names: list[str]) -> list[Table]:
    """The tables over all sets that a definition names."""
    makers = {"summary": summary, "tests": tests, "cost": cost, "paper": paper}
    check_names(f"{outcomes.benchmark.file}: '", "tables", names, makers)
    return [makers[name](outcomes) for name in names]


def set_tables(outcomes: Outcomes, name: str, tables: list[str]) -> list[Table]:
    """The tables of one set that a definition names."""
    makers = {"results": results, "choices": choices}
    check_names(f"{outcomes.benchmark.file}: '", "set_tables", tables, makers)
    return [makers[table](outcomes, name) for table in tables]


def results(outcomes: Outcomes, name: str) -> Table:
    """One set in DomainBed's layout: a column a held-out environment, and their mean."""
    cells = outcomes.cells[outcomes.cells["set"] == name]
    grouped = cells.groupby([*CELL, "env"], sort=False)["value"]
    spread = grouped.agg(mean="mean", error=_error).unstack("env")
    frame = cells.groupby(CELL, sort=False).agg(n=("trial", "nunique")).reset_index()
    columns = []
    for env in (env for env in outcomes.environments(name) if env in set(cells["env"])):
        found = pd.DataFrame({f"{env} mean": spread["mean", env], f"{env} error": spread["error", env]})
        frame = frame.merge(found, left_on=CELL, right_index=True, how="left")
        columns.append(Column("accuracy", f"{env} mean", env, std=f"{env} error", best=f"{env} mean"))
    # as DomainBed averages: the mean of the cells, where a row has all of them
    frame["average"] = frame[[column.value for column in columns]].mean(axis=1, skipna=False)
    tested = outcomes.tests.set_index(CELL)[["delta", "low", "high"]]
    frame = frame.merge(tested, left_on=CELL, right_index=True, how="left")
    columns += [
        Column("accuracy", "average", "Average", best="average"),
        Column("accuracy", "delta", f"Δ to {_baseline(outcomes)}", interval=("low", "high"), signed=True),
    ]
    return Table(
        f"{outcomes.benchmark.name}_{name}_results",
        f"{outcomes.set_title(name)}: accuracy by held-out environment",
        f"{_judged_on(outcomes, name)} Mean over n trials. {_ERROR}. {_partly(outcomes, [name])}{_selections(outcomes, [name])} {_experts(outcomes, [name])}Δ is paired by trial, with a 95 % confidence interval (Student's t), not "
        "corrected for the number of methods. Bold marks the best method, controls apart.",
        {**_KEYS, "n": "n"},
        columns,
        outcomes.order(frame, ["model", "selection"]),
        group=("model", "selection"),
        compare="is_method",
    )


def choices(outcomes: Outcomes, name: str) -> Table:
    """What each selection chose on one set: step and draw of hyper-parameters by held-out environment and trial."""
    frame = outcomes.order(outcomes.cells[outcomes.cells["set"] == name], ["model", "selection"])
    frame["draw"] = frame["hparams_seed"].map(lambda seed: str(seed) if seed else "defaults")
    varied = {"variant": "Variant"} if frame["variant"].any() else {}
    return Table(
        f"{outcomes.benchmark.name}_{name}_choices",
        f"{outcomes.set_title(name)}: what was chosen",
        "Step and draw of hyper-parameters (DomainBed's hparams_seed) that each selection chose, by held-out environment and trial; the value by which it chose, and the accuracy on the held-out environment "
        f"that is then reported. {_selections(outcomes, [name])}",
        {**_KEYS, "env": "Held out", "trial": "Trial", "step": "Step", "draw": "Draw", **varied},
        [Column("accuracy", "chosen_by", "Chosen by"), Column("accuracy", "value", "Accuracy")],
        frame,
    )


def summary(outcomes: Outcomes) -> Table:
    """Averages over the environments of every set, as DomainBed summarises them."""
    keys = ["selection", "model", "method"]
    trials = outcomes.trials()
    spread = trials.groupby(CELL, sort=False).agg(mean="mean", error=_error, n="count")
    frame = spread.reset_index().groupby(keys, sort=False).agg(n=("n", "max")).reset_index()
    columns = []
    for name in (name for name in outcomes.sets if outcomes.held_out(name)):
        found = spread.xs(name, level="set")[["mean", "error"]].add_prefix(f"{name} ")
        frame = frame.merge(found, left_on=keys, right_index=True, how="left")
        columns.append(
            Column("accuracy", f"{name} mean", outcomes.set_title(name), std=f"{name} error", best=f"{name} mean")
        )
    if len(columns) > 1:
        frame["average"] = frame[[column.value for column in columns]].mean(axis=1, skipna=False)
        columns.append(Column("accuracy", "average", "Average", best="average"))
    return Table(
        f"{outcomes.benchmark.name}_summary",
        "Accuracy on held-out environments, by set",
        f"Mean over the held-out environments of a trial, then over n trials. {_ERROR}. {_partly(outcomes, outcomes.sets)}The average is over all sets, where a row has all. {_selections(outcomes, outcomes.sets)} {_experts(outcomes, outcomes.sets)}".strip(),
        {**_KEYS, "n": "n"},
        columns,
        outcomes.order(frame, ["model", "selection"]),
        group=("model", "selection"),
        compare="is_method",
    )


def tests(outcomes: Outcomes) -> Table:
    """Paired tests over trials against the baseline, corrected over the sets."""
    frame = outcomes.order(outcomes.tests, ["model", "selection", "set"])
    return tests_table(
        f"{outcomes.benchmark.name}_tests",
        _baseline(outcomes),
        f"Differences to {_baseline(outcomes)} of the mean over held-out environments, paired by trial, over n trials, with a 95 % confidence interval; p of the paired t-test, and p corrected by Holm's "
        "procedure over the sets of a model, method and selection. The verdict takes the corrected p at 5 %; a dash means that there is no test: one trial, or equal differences.",
        {
            "model_title": "Model",
            "selection_title": "Selection",
            "set_title": "Set",
            "method_title": "Method",
            "n": "n",
        },
        "accuracy",
        frame,
    )


def cost(outcomes: Outcomes) -> Table:
    """Time, memory, parameters, loads, and what experts tell of classes and environments."""
    cell = ["model", "set", "method"]
    records = outcomes.records.rename(columns={"task": "set"})
    frame = outcomes.order(records[cell].drop_duplicates(), ["model", "set"])

    return cost_table(
        f"{outcomes.benchmark.name}_cost",
        {"model_title": "Model", "set_title": "Set", "method_title": "Method"},
        frame,
        cell,
        means_by(records, cell),
        averaged="Means over all runs; times of steps are without reading and augmenting images",
        measured_on="the out splits of all environments at the last step. Expert tells class (environment) is the mutual information of a token's expert and its image's class (environment), "
        f"and by chance the same after {PERMUTATIONS} shuffles of classes over the images of an environment (environments over those of a class): their mean, and what 95 % stay below. Only what is above that means anything",
    )


def paper(outcomes: Outcomes) -> Table:
    """Published averages beside ours."""
    published = read_published(outcomes.benchmark, _PAPER_COLUMNS).assign(value=lambda frame: frame["value"] / 100)
    key = ["model", "set", "method", "selection"]
    ours = outcomes.trials(complete=True).groupby(CELL, sort=False).mean().rename("ours").reset_index()
    four = ours[ours["set"].isin(FOUR)].groupby(["selection", "model", "method"], sort=False)["ours"]
    averages = four.mean().where(four.count() == len(FOUR)).dropna().reset_index().assign(set=_FOUR)
    ours = pd.concat([ours[ours["set"].isin(published["set"])], averages])
    frame = published.merge(ours, on=key, how="outer", sort=False)
    frame["difference"] = frame["ours"] - frame["value"]
    frame = outcomes.order(frame, ["selection", "set", "model"])
    return published_table(
        f"{outcomes.benchmark.name}_paper",
        "Published averages beside ours",
        "Accuracy, mean over the environments of a set, each held out in turn; the average of four is over PACS, VLCS, OfficeHome and TerraIncognita. Status: published (typed in the authors' notebooks, or "
        "quoted), inferred (published, but the selection or the row is our reading). A dash is a number that this suite did not run, or that was not found. Sets of which nothing is published are left out. Rows by other authors stand "
        "there for the reader. Another model and other data can neither confirm nor refute a published value. "
        f"{_experts(outcomes, outcomes.sets)}".strip(),
        {"selection_title": "Selection", "set_title": "Set", "model_title": "Model", "method_title": "Method"},
        frame,
    )


def verdicts(outcomes: Outcomes) -> Iterator[str]:
    """A sentence a set and selection: what the methods differ by."""
    rows = outcomes.order(outcomes.tests, ["model", "selection", "set"])
    rows = rows[rows["method"].map(lambda name: outcomes.methods[name].role == "method").astype(bool)]
    for key, found in rows.groupby(["model_title", "selection_title", "set_title"], sort=False):
        words = [
            f"{row.method_title} {row.delta * 100:+z.1f}{interval_text(row.low * 100, row.high * 100)}, {row.verdict or 'no test'} (n = {row.n})"
            for row in found.itertuples()
        ]
        yield f"{key[0]}, {key[2]}, {key[1]}: {'; '.join(words)}."


def _judged_on(outcomes: Outcomes, name: str) -> str:
    """Which images accuracies are of."""
    paired = outcomes.benchmark.tasks[name].source.emoji is not None
    share = "a fifth of the emoji, which no training environment shows" if paired else "80 % of its images"
    limits = {run.spec["training"]["eval_rows"] for run in outcomes.runs if run.spec["task"]["name"] == name}
    cut = "".join(f", of which {limit} are used" for limit in limits if limit)
    return f"On the in split of the environment that was held out ({share}{cut})."


def _selections(outcomes: Outcomes, names: list[str]) -> str:
    """What the selections go by, and on which images where a set's are augmented (MNIST's are not)."""
    asked = {
        run.spec["training"]["val_augment"]
        for run in outcomes.runs
        if run.spec["task"]["name"] in names
        and run.spec["hparams"]["data_augmentation"]
        and "mnist" not in run.spec["task"]["source"]
    }
    return " ".join([_SELECTIONS, *(_VALIDATION[augmented] for augmented in sorted(asked, reverse=True))])


def _experts(outcomes: Outcomes, names: list[str]) -> str:
    """A sentence that says how many experts each method's tokens use, of how many, in which blocks."""
    found: dict[str, dict[str, None]] = {}
    for run in outcomes.runs:
        method = run.spec["method"]
        if run.spec["task"]["name"] not in names or method["config"] is None:
            continue
        config = method["config"]
        layers = config["layers"]
        blocks = layers if isinstance(layers, str) else ", ".join(map(str, layers))
        text = f"{config['top_k']} of {config['num_experts']} in {blocks}"
        found.setdefault(outcomes.method_title(method["name"]), {})[text] = None
    words = "; ".join(f"{title} {' or '.join(texts)}" for title, texts in found.items())
    return f"Experts that a token uses, and the blocks that have them: {words}. " if words else ""


def _partly(outcomes: Outcomes, names: list[str]) -> str:
    """A sentence for every set of which not all environments were held out."""
    sizes = {name: (outcomes.held_out(name), len(outcomes.environments(name))) for name in names}
    return "".join(
        f"Of {outcomes.set_title(name)} {held_out} of {size} environments were held out. "
        for name, (held_out, size) in sizes.items()
        if held_out < size
    )


def _error(values: pd.Series) -> float:
    """DomainBed's ±; nothing for one trial, where it would be 0."""
    return standard_error(list(values)) if len(values) > 1 else math.nan


def _baseline(outcomes: Outcomes) -> str:
    return outcomes.method_title(outcomes.baseline)
