"""The tables of a text benchmark, laid out from a comparison."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pandas as pd

from benchmarks.harness.planning.catalogue import load_metrics
from benchmarks.harness.planning.schema import check_names
from benchmarks.harness.reporting.common_tables import cost_table, tests_table
from benchmarks.harness.reporting.rendering import MISSING, Column, Table
from benchmarks.harness.results.records import OOD_MEAN, scores_of
from benchmarks.text.comparison import ID, OOD, Comparison, Ranked, ranked
from benchmarks.text.grid import CLEAN, PUBLISHED, TABLES
from benchmarks.text.paper_tables import paper_table
from benchmarks.text.selection import CELL, PROTOCOLS, choices

_ALL = "*"
_KEYS = {"model_title": "Model", "task_title": "Trained on", "method_title": "Method"}
_BY_SELECTION = {"model_title": "Model", "selection": "Selection", "method_title": "Method"}
SELECTIONS = (
    "Selection says what chose epoch, learning rate and variant. Clean: a split that is not reported (of tasks without a test split a tenth of "
    "the training rows, held out). Authors': the dev split, which is also reported, so that the number is optimistic (of tasks with a test split "
    "the score of the best dev epoch)."
)


class TextTables:
    """Builds the tables that text benchmarks share.

    Args:
        comparison: the finished runs.
    """

    def __init__(self, comparison: Comparison) -> None:
        self.comparison = comparison
        self.name = comparison.benchmark.name

    def named(self, names: list[str]) -> list[Table]:
        """The tables that a definition names.

        Raises:
            DefinitionError: there is no such table.
        """
        check_names(f"{self.comparison.benchmark.file}: '", "tables", names, TABLES)
        return [getattr(self, name)() for name in names]

    def paper(self) -> Table:
        """The paper's scores in domain beside ours."""
        return paper_table(self.comparison, ID)

    def results(self) -> Table:
        """In-domain and out-of-domain scores under both selections, differences to the baseline, ranks and what it took."""
        frame = self._cells()
        for domain, protocol, prefix in ((ID, CLEAN, "id"), (OOD_MEAN, CLEAN, "ood"), (ID, PUBLISHED, "published")):
            rows = self.comparison.of(domain, protocol).set_index(CELL)
            numbers = rows[["mean", "std", "population_std", "common", "delta", "low", "high", "verdict"]]
            frame = frame.merge(numbers.add_prefix(f"{prefix}_"), left_on=CELL, right_index=True, how="left")
        frame = frame.merge(self._ranks(), left_on=CELL, right_index=True, how="left")
        for part, metric in (("cost", "train_seconds"), ("model", "active_neurons"), ("model", "trainable_parameters")):
            frame = frame.merge(self._means(part, metric), left_on=CELL, right_index=True, how="left")
        return Table(
            f"{self.name}_results",
            f"Scores under both selections, and differences to {self._baseline}",
            f"Mean ± standard deviation over n seeds (sample; of the authors' selection the population's, as theirs); differences to {self._baseline} are paired by "
            "seed, with a 95 % confidence interval (Student's t), not corrected for their number: the table of tests is. ID is the training task"
            f"{', OOD the mean over the other sets without further training' if self._of('task', OOD) else ''}. {SELECTIONS} {self._rank_note()} Bold marks the best method, controls apart; marks and ranks compare the "
            f"seeds that all rows of a training task have. n, training time, neurons and parameters are of the clean runs, of rows without such of the others. {self.metric_note()}",
            {**_KEYS, "n": "n"},
            [
                Column("score", "id_mean", "ID", std="id_std", best="id_common"),
                Column("score", "id_delta", "Δ ID", interval=("id_low", "id_high"), signed=True),
                Column("score", "ood_mean", "OOD", std="ood_std", best="ood_common"),
                Column("score", "ood_delta", "Δ OOD", interval=("ood_low", "ood_high"), signed=True),
                Column("ood_rank", "ood_rank", "OOD rank", best="ood_rank"),
                Column(
                    "score",
                    "published_mean",
                    "ID, authors' selection",
                    std="published_population_std",
                    best="published_common",
                ),
                Column(
                    "score",
                    "published_delta",
                    "Δ, authors' selection",
                    interval=("published_low", "published_high"),
                    signed=True,
                ),
                Column("train_seconds", "train_seconds"),
                Column("active_neurons", "active_neurons"),
                Column("trainable_parameters", "trainable_parameters"),
            ],
            frame,
            group=("model", "task"),
            compare="is_method",
        )

    def tasks(self, name: str = "tasks", domain: str = ID) -> Table:
        """The paper's layout: a row a model, selection and method, a column a task (or a pair of tasks), and the average."""
        rows = self.comparison.rows[self.comparison.rows["domain"] == domain]
        keys = ["model", "protocol", "method"]
        frame = rows.groupby(keys, sort=False).agg(n=("n", "max")).reset_index()
        columns = []
        pairs = list(dict.fromkeys(zip(rows["task"], rows["eval_task"], strict=True)))
        for task, eval_task in pairs:
            label = self.comparison.pair_title(task, eval_task)
            of_pair = rows[(rows["task"] == task) & (rows["eval_task"] == eval_task)]
            std = of_pair["std"].where(of_pair["protocol"] == CLEAN, of_pair["population_std"])
            numbers = of_pair[[*keys, "mean", "common"]].assign(std=std).set_index(keys).add_prefix(f"{label} ")
            frame = frame.merge(numbers, left_on=keys, right_index=True, how="left")
            columns.append(Column("score", f"{label} mean", label, std=f"{label} std", best=f"{label} common"))
        if len(pairs) > 1:
            # only over all of them: an average over fewer is another number
            averages = frame[[column.value for column in columns]].mean(axis=1, skipna=False)
            frame = frame.assign(average=averages)
            columns.append(Column("score", "average", "Average", best="average"))
        if domain == OOD:
            frame, beside = self._beside(frame)
            columns += beside
        return Table(
            f"{self.name}_{name}",
            "Scores by task" if domain == ID else "Scores by OOD set",
            "Mean ± standard deviation over n seeds (sample; of the authors' selection the population's, as theirs). The average is over all tasks, where a row has all. "
            f"{SELECTIONS} {self.metric_note() if domain == ID else self.ood_metric_note()}",
            {**_BY_SELECTION, "n": "n"},
            columns,
            self.comparison.order(frame, ["model", "protocol"]),
            group=("model", "protocol"),
            compare="is_method",
        )

    def _beside(self, frame: pd.DataFrame) -> tuple[pd.DataFrame, list[Column]]:
        """Columns of the metrics that stand beside the paper's."""
        columns = []
        for protocol in self.comparison.protocols:
            records = self.comparison.chosen(protocol)
            records = records[(records["part"] == OOD) & ~records["is_score"] & (records["metric"] != "loss")]
            for (task, eval_task, metric), rows in records.groupby(["task", "eval_task", "metric"], sort=False):
                label = f"{self.comparison.pair_title(task, eval_task)}, {load_metrics()[metric].label}"
                value = f"{label} mean"
                if value not in frame:
                    frame[value] = frame[f"{label} std"] = math.nan
                    columns.append(Column(metric, value, label, std=f"{label} std"))
                for (model, method), found in rows.groupby(["model", "method"]):
                    place = (frame["model"] == model) & (frame["method"] == method) & (frame["protocol"] == protocol)
                    frame.loc[place, value] = found["value"].mean()
                    frame.loc[place, f"{label} std"] = found["value"].std(ddof=1 if protocol == CLEAN else 0)
        return frame, columns

    def tests(self) -> Table:
        """Paired tests over seeds against the baseline, corrected over the tasks."""
        rows = self.comparison.rows
        rows = rows[rows["domain"].isin([ID, OOD]) & (rows["method"] != self.comparison.baseline)]
        frame = self.comparison.order(rows, ["model", "protocol", "domain", "task", "eval_task"])
        return tests_table(
            f"{self.name}_tests",
            self._baseline,
            f"Differences to {self._baseline}, paired by seed, over n seeds, with a 95 % confidence interval; p of the paired t-test, and p corrected by Holm's procedure over all "
            "tasks of a model, method and selection (in domain and out of domain apart). The verdict takes the corrected p at 5 %; a dash means that there is no test: one seed, or equal "
            f"differences. {SELECTIONS}",
            {
                "model_title": "Model",
                "selection": "Selection",
                "task_title": "Trained on",
                "eval_task_title": "Evaluated on",
                "method_title": "Method",
                "n": "n",
            },
            "score",
            frame,
        )

    def ood(self) -> Table:
        """The score on every set, of models trained on one."""
        rows = self.comparison.rows
        rows = rows[(rows["protocol"] == CLEAN) & rows["domain"].isin([ID, OOD])]
        frame = self._cells()
        columns = []
        for name in dict.fromkeys(rows["eval_task"]):
            found = rows[rows["eval_task"] == name].set_index(CELL)[["mean", "std", "common"]].add_prefix(f"{name}_")
            frame = frame.merge(found, left_on=CELL, right_index=True, how="left")
            title = self.comparison.task_title(name)
            columns.append(Column("score", f"{name}_mean", title, std=f"{name}_std", best=f"{name}_common"))
        return Table(
            f"{self.name}_ood",
            "Scores by evaluation set",
            f"Clean selection. Mean ± sample standard deviation over n seeds; the column of the training domain is its ID score. {self.metric_note()}",
            {**_KEYS, "n": "n"},
            columns,
            frame,
            group=("model", "task"),
            compare="is_method",
        )

    def cost(self) -> Table:
        """Time, memory, parameters and how the experts were used."""
        return cost_table(
            f"{self.name}_cost",
            _KEYS,
            self._cells(),
            CELL,
            self._means,
            averaged="Means over seeds of the chosen runs",
            measured_on="the ID test split without padding",
        )

    def choices(self) -> Table:
        """Every choice of hyper-parameters with its dev score, and the chosen one."""
        records = self.comparison.records
        parts = []
        for protocol in self.comparison.protocols:
            table = choices(records, protocol)
            for part, prefix in (("test", "id_"), (OOD_MEAN, "ood_")):
                rows = scores_of(records[records["protocol"] == protocol], part)
                grouped = rows.groupby([*CELL, "variant", "learning_rate"], sort=False)["value"]
                numbers = grouped.agg(mean="mean", std="std").add_prefix(prefix).reset_index()
                table = table.merge(numbers, how="left")
            parts += [part.assign(protocol=protocol) for part in (table, _joint_choices(table))]
        table = self.comparison.titled(pd.concat(parts, ignore_index=True))
        table["task_title"] = table["task_title"].replace(_ALL, "all")
        table["variant"] = table["variant"].replace("", MISSING)
        table["mark"] = table["chosen"].map({True: "✓", False: ""})
        table["rate"] = table["learning_rate"].map("{:.1e}".format)
        return Table(
            f"{self.name}_choices",
            "Hyper-parameters and what was chosen",
            "Choosing score is the mean over n seeds of the score that chooses; the best one of every method is "
            "chosen (✓). ID and OOD stand beside it for the reader and chose nothing. Where several tasks were trained on, the rows of “all” are "
            "means over them, with the best one choice for all. A method with more choices has more chances: compare with that in mind. In a variant N is the number of experts, k the share "
            f"of them that is used, L the converted layers. {SELECTIONS}",
            {
                "model_title": "Model",
                "selection": "Selection",
                **_KEYS,
                "variant": "Variant",
                "rate": "Learning rate",
                "n": "n",
                "mark": "Chosen",
            },
            [
                Column("score", "mean", "Choosing score", std="std"),
                Column("score", "id_mean", "ID", std="id_std"),
                Column("score", "ood_mean", "OOD", std="ood_std"),
            ],
            table,
        )

    def verdicts(self) -> Iterator[str]:
        """A sentence a model, method of the paper and selection: does it differ from the baseline?"""
        rows = self.comparison.rows
        names = [name for name, method in self.comparison.methods.items() if method.role == "method"]
        rows = rows[rows["method"].isin(names) & rows["delta"].notna()]
        for (model, protocol, method), found in self.comparison.order(rows, ["model", "protocol"]).groupby(
            ["model", "protocol", "method"], sort=False
        ):
            parts = [
                f"{label} {_phrase(part, self.comparison)}"
                for label, domain in (
                    ("in domain", ID),
                    ("out of domain", OOD_MEAN if ID in set(found["domain"]) else OOD),
                )
                if not (part := found[found["domain"] == domain]).empty
            ]
            title = f"{self.comparison.method_title(method)}, {self.comparison.model_title(model)}"
            yield f"{title}, {PROTOCOLS[protocol]} selection: {'; '.join(parts)}."

    def metric_note(self) -> str:
        """Which task is scored by what."""
        tasks = self.comparison.benchmark.tasks
        return _metric_note((tasks[name].metric, self.comparison.task_title(name)) for name in self._of("task", ID))

    def ood_metric_note(self) -> str:
        """Which OOD set is scored by what."""
        tasks = self.comparison.benchmark.tasks
        return _metric_note(
            ((tasks[name].ood_metrics or [tasks[name].metric])[0], self.comparison.task_title(name))
            for name in self._of("eval_task", OOD)
        )

    def _of(self, key: str, domain: str) -> list[str]:
        rows = self.comparison.rows
        return list(dict.fromkeys(rows.loc[rows["domain"] == domain, key]))

    @property
    def _baseline(self) -> str:
        return self.comparison.method_title(self.comparison.baseline)

    def _cells(self) -> pd.DataFrame:
        """One row a model, task and method, with its number of seeds: of the clean runs where there are any."""
        rows = self.comparison.rows[self.comparison.rows["domain"] == ID]
        rows = rows.sort_values("protocol", key=lambda column: column != CLEAN, kind="stable")
        frame = rows.drop_duplicates(CELL)[[*CELL, "n"]].reset_index(drop=True)
        return self.comparison.order(frame, ["model", "task"])

    def _means(self, part: str, metric: str) -> pd.Series:
        found: dict[Any, float] = {}
        for protocol in self.comparison.protocols:
            chosen = self.comparison.chosen(protocol)
            rows = chosen[(chosen["part"] == part) & (chosen["metric"] == metric)]
            found |= {
                cell: value
                for cell, value in rows.groupby(CELL, sort=False)["value"].mean().items()
                if cell not in found
            }
        index = (
            pd.MultiIndex.from_tuples(found, names=CELL)
            if found
            else pd.MultiIndex.from_arrays([[], [], []], names=CELL)
        )
        return pd.Series(list(found.values()), index=index, name=metric, dtype=float)

    def _ranks(self) -> pd.DataFrame:
        rows = [
            {**found.key, "method": method, "ood_rank": rank}
            for found in self._rankings()
            for method, rank in found.ranking.ranks.items()
        ]
        return pd.DataFrame(rows, columns=[*CELL, "ood_rank"]).set_index(CELL)

    def _rankings(self) -> list[Ranked]:
        found = ranked(self.comparison, list(self.comparison.methods), ["protocol", "model", "task"])
        return [one for one in found if one.key["protocol"] == CLEAN]

    def _rank_note(self) -> str:
        notes = [
            f"{self.comparison.task_title(one.key['task'])}: {len(one.ranking.ranks)} rows"
            + ("" if math.isnan(one.ranking.p) else f", Friedman p = {one.ranking.p:.2f}")
            for one in self._rankings()
        ]
        return (
            f"OOD rank is the average rank over the OOD sets among the rows of the same training domain ({'; '.join(notes)})."
            if notes
            else ""
        )


def _metric_note(pairs: Iterator[tuple[str, str]]) -> str:
    by_metric: dict[str, list[str]] = {}
    for metric, title in pairs:
        by_metric.setdefault(metric, []).append(title)
    parts = [f"{load_metrics()[metric].label.lower()} ({', '.join(titles)})" for metric, titles in by_metric.items()]
    return f"Scores are {'; '.join(parts)}, in %."


def _phrase(rows: pd.DataFrame, comparison: Comparison) -> str:
    """What came out over one or many tasks, in points."""
    if len(rows) == 1:
        row = rows.iloc[0]
        interval = "" if math.isnan(row["low"]) else f" [{row['low'] * 100:+z.1f}, {row['high'] * 100:+z.1f}]"
        verdict = f", {row['verdict']}" if row["verdict"] else ", no test"
        return f"{row['delta'] * 100:+z.1f}{interval}{verdict} ({comparison.pair_title(row['task'], row['eval_task'] or row['task'])}, n = {row['n']})"
    words = []
    for verdict in ("better", "worse"):
        pairs = rows.loc[rows["verdict"] == verdict, ["task", "eval_task"]].itertuples(index=False)
        titles = [comparison.pair_title(task, eval_task or task) for task, eval_task in pairs]
        words += [f"{verdict} on {', '.join(titles)}"] if titles else []
    for verdict, text in (("within noise", "within noise"), ("equal", "equal"), ("", "no test")):
        count = int((rows["verdict"] == verdict).sum())
        words += [f"{text} on {count} of {len(rows)}"] if count else []
    return f"{rows['delta'].mean() * 100:+z.1f} on average, {', '.join(words)}"


def _joint_choices(table: pd.DataFrame) -> pd.DataFrame:
    """Choices that all tasks of a model and method have, averaged over the tasks; empty for a single task."""
    keys = ["model", "method", "variant", "learning_rate"]
    tasks = table.groupby(["model", "method"])["task"].transform("nunique")
    grouped = table[tasks > 1].groupby(keys, sort=False)
    joint = grouped.agg(
        mean=("mean", "mean"),
        id_mean=("id_mean", "mean"),
        ood_mean=("ood_mean", "mean"),
        n=("n", "sum"),
        tasks=("task", "nunique"),
    ).reset_index()
    joint = joint[joint["tasks"] == joint.groupby(["model", "method"])["tasks"].transform("max")]
    best = joint.groupby(["model", "method"], sort=False)["mean"].idxmax()
    empty = {"std": math.nan, "id_std": math.nan, "ood_std": math.nan}
    return joint.assign(task=_ALL, chosen=joint.index.isin(best), **empty).drop(columns="tasks")
