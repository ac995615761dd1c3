"""The tables of a text benchmark, from records."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pandas as pd

from benchmarks.harness.definition import Benchmark, load_metrics, load_models
from benchmarks.harness.records import OOD_MEAN, collect, scores_of
from benchmarks.harness.rendering import MISSING, Column, Table
from benchmarks.harness.runs import Run
from benchmarks.harness.selection import CELL, choices, select
from benchmarks.harness.statistics import friedman_ranks, paired_difference

_ALL = "*"
_KEYS = {"model_title": "Model", "task_title": "Trained on", "method_title": "Method"}


class BenchmarkTables:
    """Builds every table of one benchmark.

    Args:
        benchmark: its definition.
        runs: the finished runs.
    """

    def __init__(self, benchmark: Benchmark, runs: list[Run]) -> None:
        self.benchmark = benchmark
        self.records = collect(runs)
        self.clean = select(self.records, "clean")
        self.published = select(self.records, "published")
        self._methods: dict[str, dict[str, str]] = benchmark.definition["methods"]
        self._baseline: str = benchmark.definition["baseline"]

    def all(self) -> list[Table]:
        """Every table, in the order of the report."""
        return [self.results(), self.ood(), self.cost(), self.choices(), self.paper()]

    def results(self) -> Table:
        """In-domain and out-of-domain scores, differences to the baseline, ranks and what it took."""
        test, ood = self._summary(self.clean, "test"), self._summary(self.clean, OOD_MEAN)
        best = self._summary(self.published, "dev_best")
        frame = self._cells(self.clean)
        frame = frame.merge(test.add_prefix("id_"), left_on=CELL, right_index=True, how="left")
        frame = frame.merge(ood.add_prefix("ood_"), left_on=CELL, right_index=True, how="left")
        frame = frame.merge(best.add_prefix("published_"), left_on=CELL, right_index=True, how="left")
        for part, prefix in (("test", "id_delta"), (OOD_MEAN, "ood_delta")):
            frame = frame.merge(
                self._differences(part).add_prefix(f"{prefix}_"), left_on=CELL, right_index=True, how="left"
            )
        for part, name in (("test", "id_common"), (OOD_MEAN, "ood_common")):
            common = self._common(scores_of(self.clean, part)).rename(name)
            frame = frame.merge(common, left_on=CELL, right_index=True, how="left")
        frame = frame.merge(self._ranks(), left_on=CELL, right_index=True, how="left")
        for part, metric in (("cost", "train_seconds"), ("model", "active_neurons"), ("model", "parameters")):
            frame = frame.merge(self._means(part, metric), left_on=CELL, right_index=True, how="left")
        return Table(
            f"{self.benchmark.name}_results",
            "Scores in domain (ID) and out of domain (OOD)",
            f"Mean ± sample standard deviation over n seeds; differences to {self._title(self._baseline)} are paired by seed, with a "
            "95 % confidence interval (Student's t): where it contains 0, the difference is within noise; intervals are not corrected for their number. "
            f"{self._protocol_note()} {self._rank_note()} Bold marks the best method, controls apart; marks and ranks compare the seeds "
            f"that all rows of a training domain have. {self._metric_note()}",
            {**_KEYS, "n": "n"},
            [
                Column("score", "id_mean", "ID", std="id_std", best="id_common"),
                Column("score", "ood_mean", "OOD", std="ood_std", best="ood_common"),
                Column("score", "id_delta_mean", "Δ ID", interval=("id_delta_low", "id_delta_high"), signed=True),
                Column("score", "ood_delta_mean", "Δ OOD", interval=("ood_delta_low", "ood_delta_high"), signed=True),
                Column("ood_rank", "ood_rank", "OOD rank", best="ood_rank"),
                Column("score", "published_mean", "Best dev epoch", std="published_std"),
                Column("train_seconds", "train_seconds"),
                Column("active_neurons", "active_neurons"),
                Column("parameters", "parameters"),
            ],
            frame,
            group=("model", "task"),
            compare="is_method",
        )

    def ood(self) -> Table:
        """The score on every set."""
        frame = self._cells(self.clean)
        columns = []
        parts = pd.concat([scores_of(self.clean, "test"), scores_of(self.clean, "ood")])
        for name in dict.fromkeys(parts["eval_task"]):
            summary = self._summarise(parts[parts["eval_task"] == name]).add_prefix(f"{name}_")
            frame = frame.merge(summary, left_on=CELL, right_index=True, how="left")
            common = self._common(parts[parts["eval_task"] == name]).rename(f"{name}_common")
            frame = frame.merge(common, left_on=CELL, right_index=True, how="left")
            columns.append(
                Column("score", f"{name}_mean", self._task_title(name), std=f"{name}_std", best=f"{name}_common")
            )
        return Table(
            f"{self.benchmark.name}_ood",
            "Scores by evaluation set",
            f"Mean ± sample standard deviation over n seeds; the column of the training domain is its ID score. {self._metric_note()}",
            {**_KEYS, "n": "n"},
            columns,
            frame,
            group=("model", "task"),
            compare="is_method",
        )

    def cost(self) -> Table:
        """Time, memory, parameters and how the experts were used."""
        frame = self._cells(self.clean)
        for part, metric in (
            ("cost", "train_seconds"),
            ("cost", "step_seconds"),
            ("cost", "evaluation_seconds"),
            ("cost", "startup_seconds"),
            ("cost", "job_seconds"),
            ("cost", "peak_memory_mb"),
            ("model", "active_neurons"),
            ("model", "parameters"),
            ("model", "trainable_parameters"),
            ("routing", "load_entropy"),
            ("routing", "load_max_over_mean"),
            ("routing", "drop_rate"),
        ):
            frame = frame.merge(self._means(part, metric), left_on=CELL, right_index=True, how="left")
        return Table(
            f"{self.benchmark.name}_cost",
            "What it took, and how the experts were used",
            "Means over seeds, on the machine of the runs (see the environment below). Runs share the machine, so times are rough: "
            "they do not compare methods. Start-up is what passes before the run's own work begins, mostly imports. Active neurons are the FFN neurons "
            "that a token uses, as a share of the dense model's. Load entropy is 1 for a perfectly balanced load; both load columns and the drops are measured on the ID test split without "
            "padding. Only the published settings limit the capacity of experts, so only there are choices dropped.",
            _KEYS,
            [
                Column("train_seconds", "train_seconds"),
                Column("step_seconds", "step_seconds"),
                Column("evaluation_seconds", "evaluation_seconds"),
                Column("startup_seconds", "startup_seconds"),
                Column("job_seconds", "job_seconds"),
                Column("peak_memory_mb", "peak_memory_mb"),
                Column("active_neurons", "active_neurons"),
                Column("parameters", "parameters"),
                Column("trainable_parameters", "trainable_parameters"),
                Column("load_entropy", "load_entropy"),
                Column("load_max_over_mean", "load_max_over_mean"),
                Column("drop_rate", "drop_rate"),
            ],
            frame,
        )

    def choices(self) -> Table:
        """Every choice of hyper-parameters with its dev score, and the chosen one."""
        table = choices(self.records, "clean")
        for part, prefix in (("test", "id_"), (OOD_MEAN, "ood_")):
            rows = scores_of(self.records, part)
            grouped = rows.groupby([*CELL, "variant", "learning_rate"], sort=False)["value"].agg(mean="mean", std="std")
            table = table.merge(grouped.add_prefix(prefix).reset_index(), how="left")
        table = pd.concat([table, _joint_choices(table)], ignore_index=True)
        table = self._with_titles(table)
        table["variant"] = table["variant"].replace("", MISSING)
        table["mark"] = table["chosen"].map({True: "✓", False: ""})
        table["rate"] = table["learning_rate"].map("{:.1e}".format)
        return Table(
            f"{self.benchmark.name}_choices",
            "Hyper-parameters and what was chosen",
            "Dev is the mean over n seeds of the kept epoch's score on the dev split of the training domain; the best one of every method is "
            "chosen (✓). ID and OOD stand beside it for the reader and chose nothing. Where several tasks were trained on, the rows of “all” are "
            "means over them, with the best one choice for all. A method with more choices has more chances: compare with that in mind. In a variant N is the number of experts, k the share "
            "of them that is used, L the converted layers.",
            {**_KEYS, "variant": "Variant", "rate": "Learning rate", "n": "n", "mark": "Chosen"},
            [
                Column("score", "mean", "Dev", std="std"),
                Column("score", "id_mean", "ID", std="id_std"),
                Column("score", "ood_mean", "OOD", std="ood_std"),
            ],
            table,
        )

    def paper(self) -> Table:
        """The paper's numbers beside ours, with their provenance."""
        file = self.benchmark.definition["paper"]
        columns = ["model", "scope", "method", "value", "status", "source"]
        published = pd.read_csv(self.benchmark.folder / file) if file else pd.DataFrame(columns=columns)
        published["value"] = published["value"] / 100
        base = published.loc[published["method"] == self._baseline].set_index(["model", "scope"])["value"]
        published["paper_delta"] = [
            math.nan if row.method == self._baseline else row.value - base.get((row.model, row.scope), math.nan)
            for row in published.itertuples()
        ]
        frame = published.merge(self._our_averages(), on=["model", "scope", "method"], how="outer", sort=False)
        order = {name: place for place, name in enumerate(self._methods)}
        frame = frame.sort_values(
            ["model", "scope", "method"],
            key=lambda column: column.map(order) if column.name == "method" else column,
            kind="stable",
        )
        frame = frame.assign(
            model_title=frame["model"].map(self._model_title),
            method_title=frame["method"].map(self._title),
            source=frame["source"].fillna(MISSING),
        )
        return Table(
            f"{self.benchmark.name}_paper",
            "The paper's numbers beside ours",
            "Averages over tasks, full fine-tuning. Δ is the difference to the dense model; ours is the mean over tasks of the "
            "difference paired by seed. A dash is a number that was not published where we looked, or that this suite did not run. "
            "Another model and other data can neither confirm nor refute the paper's value.",
            {
                "model_title": "Model",
                "scope": "Average over",
                "method_title": "Method",
                "source": "Source of the paper's number",
            },
            [
                Column("score", "value", "Paper", decimals=2),
                Column("score", "paper_delta", "Δ paper", signed=True, decimals=2),
                Column("score", "ours", "Ours", decimals=2),
                Column("score", "ours_delta", "Δ ours", signed=True, decimals=2),
            ],
            frame,
        )

    def verdicts(self) -> Iterator[str]:
        """One sentence a model, training task and method of the paper: does it differ from the baseline?"""
        frame = self.results().frame
        for row in frame[frame["is_method"] & (frame["method"] != self._baseline)].itertuples():
            parts = []
            for label, prefix in (("in domain", "id_delta"), ("out of domain", "ood_delta")):
                mean, low, high = (getattr(row, f"{prefix}_{end}") for end in ("mean", "low", "high"))
                if math.isnan(mean):
                    continue
                if math.isnan(low):
                    parts.append(f"{label} {mean * 100:+z.1f} (no interval)")
                else:
                    word = "within noise" if low <= 0 <= high else "better" if low > 0 else "worse"
                    parts.append(f"{label} {mean * 100:+z.1f} [{low * 100:+z.1f}, {high * 100:+z.1f}], {word}")
            if parts:
                yield f"{row.method_title}, {row.model_title} trained on {row.task_title}: {'; '.join(parts)} (n = {row.n})."

    def _our_averages(self) -> pd.DataFrame:
        """Mean ID score, and mean paired difference to the baseline, over the tasks that a method ran.

        Methods that ran fewer tasks than others form a scope of their own, with the baseline on the same tasks.
        """
        means, deltas = self._summary(self.clean, "test")["mean"], self._differences("test")["mean"]
        rows = []
        for model in dict.fromkeys(means.index.get_level_values("model")):
            tasks_of = {
                method: tuple(means.xs((model, method), level=["model", "method"]).index)
                for method in dict.fromkeys(means.loc[[model]].index.get_level_values("method"))
            }
            for tasks in dict.fromkeys(tasks_of.values()):
                members = [method for method, own in tasks_of.items() if own == tasks or method == self._baseline]
                for method in members:
                    cells = [(model, task, method) for task in tasks if (model, task, method) in means.index]
                    delta = deltas.reindex(cells).mean() if method != self._baseline else math.nan
                    rows.append(
                        {
                            "model": model,
                            "scope": self._scope(tasks),
                            "method": method,
                            "ours": means.loc[cells].mean(),
                            "ours_delta": delta,
                        }
                    )
        return pd.DataFrame(rows, columns=["model", "scope", "method", "ours", "ours_delta"])

    def _scope(self, tasks: tuple[str, ...]) -> str:
        """What an average is over: the whole of GLUE has the paper's name for it."""
        hub = {name for name, task in self.benchmark.tasks.items() if "hub" in task["source"]}
        return "GLUE average" if set(tasks) == hub else ", ".join(self._task_title(task) for task in tasks)

    def _common(self, rows: pd.DataFrame) -> pd.Series:
        """Mean over the seeds that all rows of a model and task have: what marks and ranks compare."""
        parts = [
            group[group["seed"].isin(_common_seeds(group))] for _, group in rows.groupby(["model", "task"], sort=False)
        ]
        return pd.concat(parts).groupby(CELL, sort=False)["value"].mean() if parts else pd.Series(dtype=float)

    def _cells(self, records: pd.DataFrame) -> pd.DataFrame:
        """One row a model, task and method, in the order of the grid's tasks and the definition's methods."""
        frame = records.groupby(CELL, sort=False).agg(n=("seed", "nunique")).reset_index()
        order = {name: place for place, name in enumerate(self._methods)}
        first = {
            cell: place for place, cell in enumerate(dict.fromkeys(zip(frame["model"], frame["task"], strict=True)))
        }
        keys = [(first[row.model, row.task], order[row.method]) for row in frame.itertuples()]
        frame = frame.iloc[sorted(range(len(frame)), key=keys.__getitem__)].reset_index(drop=True)
        return self._with_titles(frame)

    def _with_titles(self, frame: pd.DataFrame) -> pd.DataFrame:
        return frame.assign(
            model_title=frame["model"].map(self._model_title),
            task_title=frame["task"].map(lambda name: "all" if name == _ALL else self._task_title(name)),
            method_title=frame["method"].map(self._title),
            is_method=frame["method"].map(lambda name: self._methods[name]["role"] != "control"),
        )

    def _summarise(self, rows: pd.DataFrame) -> pd.DataFrame:
        return rows.groupby(CELL, sort=False)["value"].agg(mean="mean", std="std")

    def _summary(self, records: pd.DataFrame, part: str) -> pd.DataFrame:
        return self._summarise(scores_of(records, part))

    def _means(self, part: str, metric: str) -> pd.Series:
        rows = self.clean[(self.clean["part"] == part) & (self.clean["metric"] == metric)]
        return rows.groupby(CELL, sort=False)["value"].mean().rename(metric)

    def _differences(self, part: str) -> pd.DataFrame:
        rows = scores_of(self.clean, part)
        found = {}
        for (model, task), group in rows.groupby(["model", "task"], sort=False):
            values = {method: of_method.set_index("seed")["value"] for method, of_method in group.groupby("method")}
            if self._baseline in values:
                for method, series in values.items():
                    if method != self._baseline:
                        found[model, task, method] = vars(paired_difference(series, values[self._baseline]))
        index = (
            pd.MultiIndex.from_tuples(found, names=CELL)
            if found
            else pd.MultiIndex.from_arrays([[], [], []], names=CELL)
        )
        return pd.DataFrame(list(found.values()), index=index, columns=["mean", "low", "high", "p", "n"])

    def rankings(self) -> Iterator[tuple[str, str, pd.Series, float]]:
        """Per model and training task: Friedman ranks over its OOD sets, and the test's p."""
        rows = scores_of(self.clean, "ood")
        for (model, task), group in rows.groupby(["model", "task"], sort=False):
            group = group[group["seed"].isin(_common_seeds(group))]
            table = group.pivot_table(index="method", columns="eval_task", values="value", aggfunc="mean")
            ranking = friedman_ranks(table)
            yield model, task, ranking.ranks, ranking.p

    def _ranks(self) -> pd.DataFrame:
        rows = [
            {"model": model, "task": task, "method": method, "ood_rank": rank}
            for model, task, ranks, _ in self.rankings()
            for method, rank in ranks.items()
        ]
        return pd.DataFrame(rows, columns=[*CELL, "ood_rank"]).set_index(CELL)

    def _rank_note(self) -> str:
        notes = [
            f"{self._task_title(task)}: {len(ranks)} rows" + ("" if math.isnan(p) else f", Friedman p = {p:.2f}")
            for _, task, ranks, p in self.rankings()
        ]
        return (
            f"OOD rank is the average rank over the OOD sets among the rows of the same training domain ({'; '.join(notes)})."
            if notes
            else ""
        )

    def _protocol_note(self) -> str:
        """Which split chose, and which is reported."""
        tasks = [self.benchmark.tasks[name] for name in dict.fromkeys(self.records["task"])]
        choice = "The dev split of the training domain chose learning rate and variant"
        if all(task["splits"]["test"] is None for task in tasks):
            return f"{choice} and is itself reported, as in the paper: the task has no other labelled split."
        return (
            f"{choice}; ID is the test split, OOD the mean over the other domains without further training. "
            "“Best dev epoch” is the authors' protocol, which reports the dev score that it selects by."
        )

    def _metric_note(self) -> str:
        by_metric: dict[str, list[str]] = {}
        for task in dict.fromkeys(self.records["task"]):
            by_metric.setdefault(self.benchmark.tasks[task]["metric"], []).append(self._task_title(task))
        parts = [
            f"{load_metrics()[metric]['label'].lower()} ({', '.join(tasks)})" for metric, tasks in by_metric.items()
        ]
        return f"Scores are {'; '.join(parts)}, in %."

    def _title(self, method: str) -> str:
        return self._methods[method]["title"] if method in self._methods else method

    def _task_title(self, task: str) -> str:
        title: str = self.benchmark.tasks[task]["title"]
        return title

    def _model_title(self, model: str) -> str:
        title: str = load_models()[model]["title"]
        return title


def _common_seeds(rows: pd.DataFrame) -> set[int]:
    """Seeds that every method of these rows has."""
    return set.intersection(*(set(of_method["seed"]) for _, of_method in rows.groupby("method")))


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
