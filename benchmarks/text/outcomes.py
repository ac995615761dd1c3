"""Choose hyper-parameters over finished runs, and collect the scores of a text benchmark in one long frame."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pandas as pd

from benchmarks.harness.config.benchmark import OOD_MEAN, AnyBenchmark, resolve_methods
from benchmarks.harness.config.methods import ABLATION, remove_settings, setting_text, setting_values
from benchmarks.harness.config.runs import Run
from benchmarks.harness.report.common import SETTING, Outcomes, join_claim_numbers, parameter_counts, summarize
from benchmarks.harness.results.records import AS, collect, read_metrics, scores_of
from benchmarks.harness.results.statistics import friedman_ranks, paired_differences, shared_pairs, with_verdicts
from benchmarks.text.definition import CLEAN, ID, OOD, PUBLISHED

CELL = ["model", "task", "method"]
KEYS = {"model_title": "Model", "task_title": "Trained on", "method_title": "Method"}  # their headings
CHOICE = ["variant", "learning_rate"]
PROTOCOLS = {CLEAN: "clean", PUBLISHED: "authors'"}  # their titles
ARROW = " → "  # from the set that was trained on to the one that is evaluated on
_PAIR = ["model", "task", "eval_task"]
_SET = ["protocol", "domain", *_PAIR]
_ROW = [*_SET, "method"]


def choosing_scores(records: pd.DataFrame, protocol: str) -> pd.DataFrame:
    """Return the dev score of every run, which chooses hyper-parameters.

    Tasks with a test split have clean runs only; for them the authors' protocol uses the score of the best dev epoch.
    """
    dev = scores_of(records[records["protocol"] == protocol], "dev")
    return dev if protocol == CLEAN else pd.concat([dev, scores_of(records, "dev_best")])


def choices(records: pd.DataFrame, protocol: str) -> pd.DataFrame:
    """Average the dev score of every choice (variant and learning rate) over seeds, and mark the best per cell.

    The columns are those of :data:`CELL` and :data:`CHOICE`, ``mean``, ``std``, ``n`` and ``chosen``. Among equal choices
    the first one of the grid wins.
    """
    grouped = choosing_scores(records, protocol).groupby([*CELL, *CHOICE], sort=False)["value"]
    table = grouped.agg(mean="mean", std="std", n="count").reset_index()
    best = table.groupby(CELL, sort=False)["mean"].idxmax()
    return table.assign(chosen=table.index.isin(best))


def select_runs(records: pd.DataFrame, protocol: str) -> pd.DataFrame:
    """Return the records of the runs with the chosen hyper-parameters."""
    table = choices(records, protocol)
    chosen = table.loc[table["chosen"], [*CELL, *CHOICE]]
    runs = choosing_scores(records, protocol)["run_id"]
    return records[records["run_id"].isin(runs)].merge(chosen, on=[*CELL, *CHOICE], how="inner")


def reported_scores(chosen: pd.DataFrame, protocol: str) -> pd.DataFrame:
    """Return the in-domain score that a protocol reports, a row per cell and seed.

    The score is on the reported split. For tasks with a test split, the authors' protocol reports the best dev epoch.
    """
    test = scores_of(chosen[chosen["protocol"] == protocol], "test")
    return test if protocol == CLEAN else pd.concat([test, scores_of(chosen, "dev_best")])


class TextOutcomes(Outcomes):
    """Collect the finished runs of one text benchmark, by protocol.

    Args:
        records: The numbers of the runs; None to read them.
        include_ablations: True adds the rows of ablations. If a row has several variants, each setting becomes a
            separate row ``<row>|<setting>``, so that none is chosen.

    Attributes:
        records: Every number.
        chosen: The records of the chosen runs, by protocol.
        seeds: The scores, a row for each protocol, ``domain`` (``id``, ``ood``, ``ood_mean``), model, training task,
            evaluation task, method and seed.
        shared: The scores of the seeds that all methods of a set share.
        protocols: The protocols that have scores.
        rows: The statistics of :func:`~benchmarks.harness.report.common.summarize` over the shared seeds; ``n`` is 0
            without shared seeds.
        tests: The paired differences to the baseline in and out of domain, over all seeds of both methods, with
            verdicts, corrected over all rows.
    """

    benchmark: AnyBenchmark

    def __init__(
        self,
        benchmark: AnyBenchmark,
        runs: Sequence[Run],
        records: pd.DataFrame | None = None,
        *,
        include_ablations: bool = False,
    ) -> None:
        methods = resolve_methods(benchmark.definition)
        kept = [name for name, method in methods.items() if include_ablations or method.role != ABLATION]
        shown = [run for run in runs if run.spec["method"]["name"] in kept]
        super().__init__(benchmark, shown, ["method", *_PAIR, "protocol"], protocol=PROTOCOLS)
        self._evaluates, self._include_ablations = benchmark.evaluates is not None, include_ablations
        records = collect(shown) if records is None else records
        records = with_transformed(records[records["run_id"].isin({run.id for run in shown})])
        self.records = records[records["method"].isin(kept)].reset_index(drop=True)
        if include_ablations:
            self._split_settings()
        self.chosen = {protocol: self._chosen(protocol) for protocol in PROTOCOLS}
        self.seeds = pd.concat([self._seeds(protocol) for protocol in PROTOCOLS], ignore_index=True)
        self.protocols = [protocol for protocol in PROTOCOLS if protocol in set(self.seeds["protocol"])]
        self.shared = shared_pairs(self.seeds, _SET, ["method"], "seed")
        self.shared_note = self.explain_n(self.seeds, self.shared, ["model", "task", "protocol"])
        self.rows, self.tests = self._rows(), self._tests()

    def _split_settings(self) -> None:
        """Turn every setting of an ablation, and of a row with several variants, into a separate row."""
        records = self.records
        is_ablation = records["method"].map(self.role).eq(ABLATION)
        variants = records.groupby(["protocol", "model", "task", "method"])["variant"].transform("nunique")
        usual = {
            model: self._usual_settings(rows) for model, rows in records[~is_ablation].groupby("model", sort=False)
        }
        settings = [
            remove_settings(row.variant, usual.get(row.model, set()))
            if ablation
            else row.variant
            if several > 1
            else ""
            for row, ablation, several in zip(records.itertuples(), is_ablation, variants, strict=True)
        ]
        rows = zip(records["method"], settings, strict=True)
        names = [f"{row}{SETTING}{setting}" if setting else row for row, setting in rows]
        variant = records["variant"].mask(is_ablation | records["method"].ne(names), "")
        for name in dict.fromkeys(name for name in names if SETTING in name):
            row, _, setting = name.partition(SETTING)
            title = f"{self.methods[row].title}, {setting_text(setting)}"
            self.methods[name] = self.methods[row].model_copy(update={"title": title})
        self.titles["method"] = {name: method.title for name, method in self.methods.items()}
        self.records = records.assign(method=names, variant=variant)

    @property
    def origins(self) -> pd.DataFrame:
        """Return the chosen runs by selection; the authors' selection includes runs of the clean protocol."""
        return pd.concat([chosen.assign(protocol=protocol) for protocol, chosen in self.chosen.items()])

    @cached_property
    def shared_origins(self) -> pd.DataFrame:
        """Return the chosen runs of the shared seeds, by selection."""
        keys = ["protocol", *CELL, "seed"]
        return self.origins.merge(self.shared[keys].drop_duplicates(), on=keys)

    def _usual_settings(self, records: pd.DataFrame) -> set[str]:
        """Return the settings that the variants of all rows with experts share, such as the model's layers."""
        methods = records[["method", "variant"]].drop_duplicates().itertuples(index=False, name=None)
        settings = [
            {f"{key}{value}" for key, value in setting_values(variant).items()}
            for name, variant in methods
            if self.methods[name].kind != "dense"
        ]
        return set.intersection(*settings) if settings else set()

    @cached_property
    def specs(self) -> Mapping[tuple[str, str], Mapping[str, Any]]:
        """Return the spec of one run of each row, by model and method."""
        by_id = {run.id: run.spec for run in self.runs}
        rows = self.records.drop_duplicates(["model", "method"])
        return {(row.model, row.method): by_id[row.run_id] for row in rows[["model", "method", "run_id"]].itertuples()}

    @cached_property
    def training(self) -> list[tuple[Any, dict[str, Any]]]:
        """Return the chosen runs of the first selection: record, and ``routing`` and ``usage`` of its metrics."""
        if not self.run_protocols:
            return []
        chosen = self.chosen[self.run_protocols[0]].drop_duplicates("run_id")
        records = list(self.order(chosen, [*CELL, "seed"]).itertuples())
        by_id = {run.id: run for run in self.runs}
        metrics = [read_metrics(by_id[str(record.run_id)]) for record in records]
        parts = [{part: each.get(part, {}) for part in ("routing", "usage")} for each in metrics]
        return list(zip(records, parts, strict=True))

    def _chosen(self, protocol: str) -> pd.DataFrame:
        # a benchmark that evaluates another has only chosen runs
        if self._evaluates:
            return self.records[self.records["protocol"] == protocol]
        return select_runs(self.records, protocol)

    def _seeds(self, protocol: str) -> pd.DataFrame:
        chosen = self.chosen[protocol]
        records = chosen[chosen["protocol"] == protocol]
        scores = [scores_of(records, part).assign(domain=part) for part in (OOD, OOD_MEAN)]
        if self._include_ablations or not self._evaluates:
            scores.insert(0, reported_scores(chosen, protocol).assign(domain=ID))
        return pd.concat(scores)[["domain", *_PAIR, "method", "seed", "value"]].assign(protocol=protocol)

    def _rows(self) -> pd.DataFrame:
        rows = summarize(self.shared, _ROW, [(self.baseline, None)]).drop(columns=["low_mean", "high_mean", "p"])
        rows = self.seeds[_ROW].drop_duplicates().merge(rows, how="left", on=_ROW)
        return self._by_set(rows.fillna({"n": 0}).astype({"n": int}))

    def _tests(self) -> pd.DataFrame:
        scores = self.seeds[self.seeds["domain"].isin([ID, OOD])]
        tests = paired_differences(scores, _ROW, {"method": self.baseline}, "seed").drop(columns="values")
        return self._by_set(with_verdicts(tests))

    def _by_set(self, rows: pd.DataFrame) -> pd.DataFrame:
        """Sort by set in the order of the runs, then by method in the order of the definition; add titles."""
        rows = rows.assign(set_number=rows.groupby(_SET, sort=False).ngroup())
        return self.order(rows, ["set_number", "method"]).drop(columns="set_number")

    def of(self, domain: str, protocol: str) -> pd.DataFrame:
        """Return the rows of one domain under one protocol."""
        return self.rows[(self.rows["domain"] == domain) & (self.rows["protocol"] == protocol)]

    def claim_numbers(self) -> pd.DataFrame:
        """Return scores of every seed and parameter counts, for claims."""
        scores = self.seeds.rename(columns={"protocol": "selection", "seed": "pair"}).assign(metric="score")
        numbers = join_claim_numbers(scores, parameter_counts(self.records))
        names = numbers["method"].str.partition(SETTING)
        return numbers.assign(method=names[0], setting=names[2])

    @property
    def run_protocols(self) -> list[str]:
        """Return the protocols under which runs were trained."""
        return [protocol for protocol in PROTOCOLS if protocol in set(self.records["protocol"])]

    def titled(self, frame: pd.DataFrame) -> pd.DataFrame:
        """Add titles; the protocol's title column is ``selection``."""
        return super().titled(frame).rename(columns={"protocol_title": "selection"})

    def pair_title(self, task: str, eval_task: str) -> str:
        """Return ``SST-2 → IMDB``; only the training task if both are equal or ``eval_task`` is empty."""
        titles = [self.title("task", name) for name in dict.fromkeys([task, eval_task or task])]
        return ARROW.join(titles)

    def with_scopes(self, frame: pd.DataFrame) -> pd.DataFrame:
        """Add the title of each row's pair of tasks as ``scope``."""
        pairs = zip(frame["task"], frame["eval_task"], strict=True)
        return frame.assign(scope=[self.pair_title(task, eval_task) for task, eval_task in pairs])


def with_transformed(records: pd.DataFrame) -> pd.DataFrame:
    """Assign the numbers of converted models to the methods that they were converted to.

    Each such method gets a copy of the run's dev scores, which choose the run.
    """
    parts = records["part"].str.partition(AS)
    trained = records[parts[2] == ""]
    transformed = records.assign(part=parts[0], method=parts[2])[parts[2] != ""]
    dev = trained[trained["part"] == "dev"].drop(columns="method")
    dev = dev.merge(transformed[["run_id", "method"]].drop_duplicates(), on="run_id")
    return pd.concat([trained, dev, transformed], ignore_index=True)


@dataclass(frozen=True)
class Ranking:
    """Hold the results of :func:`.friedman_ranks` over the sets that all ranked methods share."""

    ranks: pd.Series[float]
    p: float
    key: dict[str, str]  # protocol, model, and the task if ranks are per task
    scores: pd.DataFrame  # [methods, pairs of training task and OOD set]


def rank_methods(outcomes: TextOutcomes, methods: list[str], within: list[str]) -> list[Ranking]:
    """Rank methods over all pairs of training task and OOD set, separately per value of the columns ``within``.

    Means are over the seeds that all ranked methods share. Methods without a common set and seed get no ranks.
    """
    seeds = outcomes.seeds[(outcomes.seeds["domain"] == OOD) & outcomes.seeds["method"].isin(methods)]
    rankings = []
    for key, group in outcomes.with_scopes(seeds).groupby(within, sort=False):
        by_seed = group.pivot_table(index="method", columns=["scope", "seed"], values="value", sort=False)
        table = by_seed.dropna(axis=1).T.groupby(level="scope", sort=False).mean().T
        table = table.loc[[name for name in methods if name in table.index]]
        rankings.append(Ranking(*friedman_ranks(table), dict(zip(within, key, strict=True)), table))
    return rankings


def rank_rows(rankings: list[Ranking], column: str) -> pd.DataFrame:
    """List the ranks, a row per ranking and method, with the numbers of ``sets`` and of ``ranked`` methods."""
    return pd.DataFrame(
        [
            {**each.key, "method": method, column: rank, "sets": each.scores.shape[1], "ranked": len(each.scores)}
            for each in rankings
            for method, rank in each.ranks.items()
        ],
        columns=["protocol", "model", "task", "method", column, "sets", "ranked"],
    )
