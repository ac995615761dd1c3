"""Methods against the baseline: one long frame from which every table and figure of a text benchmark is laid out."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pandas as pd

from benchmarks.harness.base.errors import DefinitionError
from benchmarks.harness.planning.catalogue import load_models
from benchmarks.harness.planning.kinds import Benchmark
from benchmarks.harness.planning.method_rows import resolve_methods
from benchmarks.harness.planning.runs import Run
from benchmarks.harness.planning.shared import MethodsDefinition
from benchmarks.harness.results.records import OOD_MEAN, collect, scores_of
from benchmarks.harness.results.statistics import Difference, Ranking, friedman_ranks, paired_difference, with_verdicts
from benchmarks.text.definition import TaskEntry
from benchmarks.text.selection import PROTOCOLS, reported, select

ID, OOD = "id", "ood"
_PAIR = ["model", "task", "eval_task"]
_ROW = ["protocol", "domain", *_PAIR, "method"]


class Comparison:
    """The finished runs of one text benchmark, by protocol.

    Args:
        benchmark: its definition.
        runs: the finished runs.

    Attributes:
        records: every number.
        seeds: a row a protocol, ``domain`` (``id``, ``ood``, ``ood_mean``), model, training task, evaluation task, method
            and seed, with its score.
        rows: the same over seeds: ``mean``, ``std`` (sample), ``population_std``, ``n``, the paired difference to the
            baseline (``delta``, ``low``, ``high``, ``p``), ``p_holm`` corrected over the tasks, its ``verdict``, and ``common``,
            the mean over the seeds that all methods have.
    """

    def __init__(self, benchmark: Benchmark[MethodsDefinition, TaskEntry], runs: list[Run]) -> None:
        self.benchmark = benchmark
        self.evaluates = benchmark.kind.evaluates(benchmark.definition) is not None
        self.records = collect(runs)
        self.methods = resolve_methods(benchmark.definition)
        self.baseline = benchmark.definition.baseline
        self._chosen = {protocol: self._choose(protocol) for protocol in PROTOCOLS}
        self.seeds = pd.concat([self._seeds(protocol) for protocol in PROTOCOLS], ignore_index=True)
        self.protocols = [protocol for protocol in PROTOCOLS if protocol in set(self.seeds["protocol"])]
        self.rows = self._rows()

    def chosen(self, protocol: str) -> pd.DataFrame:
        """The records of the chosen runs."""
        return self._chosen[protocol]

    def _choose(self, protocol: str) -> pd.DataFrame:
        # a benchmark that evaluates the chosen runs of another has no others
        if self.evaluates:
            return self.records[self.records["protocol"] == protocol]
        return select(self.records, protocol)

    def _seeds(self, protocol: str) -> pd.DataFrame:
        chosen = self.chosen(protocol)
        own = chosen[chosen["protocol"] == protocol]
        parts = [scores_of(own, part).assign(domain=part) for part in (OOD, OOD_MEAN)]
        if not self.evaluates:
            parts.insert(0, reported(self.records, protocol).assign(domain=ID))
        return pd.concat(parts)[["domain", *_PAIR, "method", "seed", "value"]].assign(protocol=protocol)

    def _rows(self) -> pd.DataFrame:
        found = []
        for key, group in self.seeds.groupby(["protocol", "domain", *_PAIR], sort=False):
            values = {method: part.set_index("seed")["value"] for method, part in group.groupby("method", sort=False)}
            common = sorted(set.intersection(*(set(series.index) for series in values.values())))
            base = values.get(self.baseline)
            for method, series in values.items():
                row = dict(zip(["protocol", "domain", *_PAIR], key, strict=True)) | {"method": method}
                row |= {
                    "mean": series.mean(),
                    "std": series.std(),
                    "population_std": series.std(ddof=0),
                    "n": len(series),
                }
                row |= {"common": series.loc[common].mean() if common else math.nan}
                if base is not None and method != self.baseline:
                    row |= paired_difference(series, base).columns()
                found.append(row)
        numbers = ["mean", "std", "population_std", "n", "common", *Difference.COLUMNS]
        rows = pd.DataFrame(found, columns=[*_ROW, *numbers])
        return with_verdicts(rows, ["protocol", "domain", "model", "method"])

    def of(self, domain: str, protocol: str) -> pd.DataFrame:
        """The rows of one domain under one protocol."""
        return self.rows[(self.rows["domain"] == domain) & (self.rows["protocol"] == protocol)]

    @property
    def run_protocols(self) -> list[str]:
        """The protocols that have runs of their own."""
        return [protocol for protocol in PROTOCOLS if protocol in set(self.records["protocol"])]

    def order(self, frame: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
        """Rows in the order of the grid's keys, then of the definition's methods; with titles."""
        places = {name: place for place, name in enumerate(self.methods)}
        first = {key: place for place, key in enumerate(dict.fromkeys(zip(*(frame[key] for key in keys), strict=True)))}
        by = [(first[tuple(row[key] for key in keys)], places[row["method"]]) for row in frame.to_dict("records")]
        return self.titled(frame.iloc[sorted(range(len(frame)), key=by.__getitem__)].reset_index(drop=True))

    def titled(self, frame: pd.DataFrame) -> pd.DataFrame:
        """With the titles that readers see."""
        titles = {
            "method": self.method_title,
            "model": self.model_title,
            "task": self.task_title,
            "eval_task": self.task_title,
        }
        found = frame.assign(**{f"{key}_title": frame[key].map(title) for key, title in titles.items() if key in frame})
        if "protocol" in frame:
            found["selection"] = frame["protocol"].map(PROTOCOLS)
        return found.assign(
            is_method=frame["method"].map(lambda name: name in self.methods and self.methods[name].role != "control")
        )

    def method_title(self, method: str) -> str:
        return self.methods[method].title if method in self.methods else method

    def task_title(self, task: str) -> str:
        """The task's title; all and the mean over sets have none of their own."""
        return self.benchmark.tasks[task].title if task in self.benchmark.tasks else task or "mean"

    def model_title(self, model: str) -> str:
        models = load_models()
        return models[model].title if model in models else model

    def pair_title(self, task: str, eval_task: str) -> str:
        """``SST-2 → IMDB``, or the task alone in domain."""
        return self.task_title(task) if task == eval_task else f"{self.task_title(task)} → {self.task_title(eval_task)}"


@dataclass(frozen=True)
class Ranked:
    """Ranks over the sets that all ranked methods have.

    Attributes:
        key: values of the keys that were ranked within.
        scores: what was ranked: methods in rows, pairs of training task and OOD set in columns.
        ranking: the ranks.
    """

    key: dict[str, str]
    scores: pd.DataFrame
    ranking: Ranking


def ranked(comparison: Comparison, methods: list[str], within: list[str]) -> list[Ranked]:
    """Rank methods over all pairs of training task and OOD set, within a protocol, a model, perhaps a task.

    Means are over the seeds that all ranked methods have.

    Raises:
        DefinitionError: the methods share no set, or no seed on it.
    """
    seeds = comparison.seeds[(comparison.seeds["domain"] == OOD) & comparison.seeds["method"].isin(methods)]
    found = []
    for key, group in seeds.groupby(within, sort=False):
        pairs = group.assign(pair=[comparison.pair_title(row.task, row.eval_task) for row in group.itertuples()])
        by_seed = pairs.pivot_table(index="method", columns=["pair", "seed"], values="value", sort=False).dropna(axis=1)
        table = by_seed.T.groupby(level="pair", sort=False).mean().T
        table = table.loc[[name for name in methods if name in table.index]]
        if table.empty:
            raise DefinitionError(
                f"{comparison.benchmark.file}: methods that are ranked share no OOD set and seed ({' '.join(key)})"
            )
        found.append(Ranked(dict(zip(within, key, strict=True)), table, friedman_ranks(table)))
    return found
