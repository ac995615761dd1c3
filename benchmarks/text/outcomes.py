"""Choose hyper-parameters over finished runs, and collect the scores of a text benchmark in one long frame."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import pandas as pd

from benchmarks.harness.config.benchmark import OOD_MEAN, AnyBenchmark, resolve_methods
from benchmarks.harness.config.method_specs import remove_settings, setting_values
from benchmarks.harness.config.methods import ABLATION
from benchmarks.harness.report.common import (
    SETTING,
    Outcomes,
    join_claim_numbers,
    parameter_counts,
    summarize,
)
from benchmarks.harness.results.content import Metrics
from benchmarks.harness.results.records import AS, Record, scores_of, tabulate_numbers
from benchmarks.harness.results.statistics import paired_differences, shared_pairs, with_verdicts
from benchmarks.text.definition import CLEAN, ID, OOD, PUBLISHED

CELL = ["model", "task", "method"]
KEYS = {
    "model_title": "Model",
    "task_title": "Trained on",
    "method_title": "Method",
}  # their headings
CHOICE = ["variant", "learning_rate"]
PROTOCOLS = {CLEAN: "clean", PUBLISHED: "authors'"}  # their titles
DOMAINS = {ID: "in domain", OOD: "out of domain"}  # their titles
ARROW = " → "  # between the titles of training set and evaluation set
_PAIR = ["model", "task", "eval_task"]
_SET = ["protocol", "domain", *_PAIR, "scope"]
_ROW = [*_SET, "method"]


def selection_scores(records: pd.DataFrame, protocol: str) -> pd.DataFrame:
    """Return the dev score of every run, which chooses hyper-parameters.

    Tasks with a test split have clean runs only; for them the authors' protocol uses the score of the best dev epoch.
    """
    dev = scores_of(records[records["protocol"] == protocol], "dev")
    return dev if protocol == CLEAN else pd.concat([dev, scores_of(records, "dev_best")])


def choices(records: pd.DataFrame, protocol: str) -> pd.DataFrame:
    """Average the dev score of every choice (variant and learning rate) over seeds, and mark the best per cell.

    The columns are :data:`CELL`, :data:`CHOICE`, ``mean``, ``std``, ``n`` and ``chosen``. The first of
    equally good choices wins.
    """
    grouped = selection_scores(records, protocol).groupby([*CELL, *CHOICE], sort=False)["value"]
    table = grouped.agg(mean="mean", std="std", n="count").reset_index()
    best = table.groupby(CELL, sort=False)["mean"].idxmax()
    return table.assign(chosen=table.index.isin(best))


def select_runs(records: pd.DataFrame, protocol: str) -> pd.DataFrame:
    """Return the records of the runs with the chosen hyper-parameters.

    ``protocol`` becomes the protocol of the choice, and ``run_protocol`` that of the run.
    """
    table = choices(records, protocol)
    chosen = table.loc[table["chosen"], [*CELL, *CHOICE]]
    runs = selection_scores(records, protocol)["run_id"]
    selected = records[records["run_id"].isin(runs)].merge(chosen, on=[*CELL, *CHOICE], how="inner")
    return selected.assign(run_protocol=selected["protocol"], protocol=protocol)


def reported_scores(chosen: pd.DataFrame) -> pd.DataFrame:
    """Return the in-domain score that a protocol reports, a row per cell and seed.

    The score is on the reported split. For tasks with a test split, the authors' protocol reports the best dev epoch.
    """
    test = scores_of(chosen[chosen["run_protocol"] == chosen["protocol"]], "test")
    return pd.concat([test, scores_of(chosen[chosen["protocol"] == PUBLISHED], "dev_best")])


class TextOutcomes(Outcomes):
    """Collect the finished runs of one text benchmark.

    Args:
        records: The numbers of the runs; None to read them.
        include_ablations: True to add the rows of ablations. If a row has several variants, each setting becomes a
            separate row ``<row>|<setting>``, instead of the best one only.

    Attributes:
        records: Every number.
        chosen: The records of the chosen runs, by protocol; see :func:`select_runs`.
        seeds: The scores, a row for each protocol, ``domain`` (``id``, ``ood``, ``ood_mean``), model, training task,
            evaluation task, method and seed. ``scope`` is the title of both tasks.
        shared: The scores of the seeds that all methods of a set share.
        protocols: The protocols that have scores.
        run_protocols: The protocols under which runs were trained.
        rows: The statistics of :func:`~benchmarks.harness.report.common.summarize` over the shared seeds; ``n`` is 0
            without shared seeds.
        tests: The paired differences to the baseline in and out of domain, over all seeds of both methods, with
            verdicts, corrected over all rows.
    """

    benchmark: AnyBenchmark

    def __init__(
        self,
        benchmark: AnyBenchmark,
        finished: Sequence[Record],
        records: pd.DataFrame | None = None,
        *,
        include_ablations: bool = False,
    ) -> None:
        methods = resolve_methods(benchmark.definition)
        kept = [
            name for name, method in methods.items() if include_ablations or method.role != ABLATION
        ]
        shown = [record.run for record in finished if record.run.method in kept]
        super().__init__(benchmark, shown, ["method", *_PAIR, "protocol"], protocol=PROTOCOLS)
        self._include_ablations = include_ablations
        self._finished = finished
        self._all_records = tabulate_numbers(finished) if records is None else records
        records = add_transformed_rows(
            self._all_records[self._all_records["run_id"].isin({run.id for run in shown})]
        )
        self.records = records[records["method"].isin(kept)].reset_index(drop=True)
        if include_ablations:
            self._split_settings()
        self.chosen = pd.concat([self._chosen(protocol) for protocol in PROTOCOLS])
        seeds = self._seeds()
        pairs = zip(seeds["task"], seeds["eval_task"], strict=True)
        self.seeds = seeds.assign(scope=[self.pair_title(*pair) for pair in pairs]).reset_index(
            drop=True
        )
        self.protocols, self.run_protocols = (
            [protocol for protocol in PROTOCOLS if protocol in set(frame["protocol"])]
            for frame in (self.seeds, self.records)
        )
        self.shared = shared_pairs(self.seeds, _SET, ["method"], "seed")
        self.rows, self.tests = self._rows(), self._tests()

    @cached_property
    def ablated(self) -> TextOutcomes:
        """Return the outcomes of the same runs, including the rows of ablations."""
        return TextOutcomes(
            self.benchmark, self._finished, self._all_records, include_ablations=True
        )

    def _split_settings(self) -> None:
        """Turn every setting of an ablation, and of a row with several variants, into a separate row."""
        records = self.records
        is_ablation = records["method"].map(self.role).eq(ABLATION)
        variants = records.groupby(["protocol", "model", "task", "method"])["variant"].transform(
            "nunique"
        )
        main_rows = records[~is_ablation].groupby("model", sort=False)
        usual = {model: self._usual_settings(rows) for model, rows in main_rows}
        settings = records["variant"].where(variants > 1, "")
        settings[is_ablation] = [
            remove_settings(row.variant, usual.get(row.model, set()))
            for row in records[is_ablation].itertuples()
        ]
        names = records["method"].where(settings == "", records["method"] + SETTING + settings)
        # a row with a setting has the method of its row; the table adds the setting to its title
        self.methods |= {name: self.methods[name.partition(SETTING)[0]] for name in names.unique()}
        variant = records["variant"].mask(is_ablation | records["method"].ne(names), "")
        self.records = records.assign(method=names, variant=variant)

    def _usual_settings(self, records: pd.DataFrame) -> set[str]:
        """Return the settings that the variants of all rows with experts share, such as the model's layers."""
        has_experts = records["method"].map(lambda name: self.methods[name].kind != "dense")
        variants = map(setting_values, records.loc[has_experts, "variant"].unique())
        settings = [{f"{key}{value}" for key, value in values.items()} for values in variants]
        return set.intersection(*settings) if settings else set()

    @property
    def origins(self) -> pd.DataFrame:
        """Return the records of the chosen runs, which link table rows to runs."""
        return self.chosen

    @cached_property
    def shared_origins(self) -> pd.DataFrame:
        """Return the chosen runs of the shared seeds."""
        keys = ["protocol", *CELL, "seed"]
        return self.chosen.merge(self.shared[keys].drop_duplicates(), on=keys)

    def training(self) -> Iterator[tuple[Any, Metrics]]:
        """Yield the names of each chosen run of the first protocol, and what it recorded."""
        by_id = {record.run.id: record.metrics for record in self._finished}
        chosen = self.chosen[self.chosen["protocol"].isin(self.run_protocols[:1])].drop_duplicates(
            "run_id"
        )
        for record in self.order(chosen, [*CELL, "seed"]).itertuples():
            yield record, by_id[str(record.run_id)]

    def _chosen(self, protocol: str) -> pd.DataFrame:
        if self.benchmark.evaluates is None:
            return select_runs(self.records, protocol)
        chosen = self.records[
            self.records["protocol"] == protocol
        ]  # all its runs evaluate chosen runs
        return chosen.assign(run_protocol=protocol)

    def _seeds(self) -> pd.DataFrame:
        records = self.chosen[self.chosen["run_protocol"] == self.chosen["protocol"]]
        scores = [scores_of(records, part).assign(domain=part) for part in (OOD, OOD_MEAN)]
        if self._include_ablations or self.benchmark.evaluates is None:
            scores.insert(0, reported_scores(self.chosen).assign(domain=ID))
        seeds = pd.concat(scores)[["protocol", "domain", *_PAIR, "method", "seed", "value"]]
        return seeds.sort_values("protocol", kind="stable")

    def _rows(self) -> pd.DataFrame:
        rows = summarize(self.shared, _ROW, [(self.baseline, None)]).drop(columns="p")
        rows = self.seeds[_ROW].drop_duplicates().merge(rows, how="left", on=_ROW)
        return self._by_set(rows.fillna({"n": 0}).astype({"n": int}))

    def _tests(self) -> pd.DataFrame:
        scores = self.seeds[self.seeds["domain"].isin([ID, OOD])]
        tests = paired_differences(scores, _ROW, {"method": self.baseline}, "seed").drop(
            columns="values"
        )
        return self._by_set(with_verdicts(tests))

    def _by_set(self, rows: pd.DataFrame) -> pd.DataFrame:
        """Sort by set in the order of the runs, then by method in the order of the definition; add titles."""
        rows = rows.assign(set_number=rows.groupby(_SET, sort=False).ngroup())
        return self.order(rows, ["set_number", "method"]).drop(columns="set_number")

    def of(self, domain: str, protocol: str) -> pd.DataFrame:
        """Return the rows of one domain under one protocol."""
        return self.rows[(self.rows["domain"] == domain) & (self.rows["protocol"] == protocol)]

    def claim_numbers(self) -> pd.DataFrame:
        """Return scores of every seed and parameter counts, for claims, with the rows of ablations."""
        scores = self.seeds.rename(columns={"protocol": "selection"}).assign(metric="score")
        numbers = join_claim_numbers(scores, parameter_counts(self.records))
        names = numbers["method"].str.partition(SETTING)
        numbers = numbers.assign(method=names[0], setting=names[2])
        if self._include_ablations or not self.benchmark.definition.ablations:
            return numbers
        with_ablations, keys = self.ablated.claim_numbers(), ["method", "setting", "domain"]
        is_new = ~pd.MultiIndex.from_frame(with_ablations[keys]).isin(
            pd.MultiIndex.from_frame(numbers[keys])
        )
        return pd.concat([numbers, with_ablations[is_new]], ignore_index=True)

    def with_titles(self, frame: pd.DataFrame) -> pd.DataFrame:
        """Add titles; the protocol's title column is ``selection``."""
        return super().with_titles(frame).rename(columns={"protocol_title": "selection"})

    def pair_title(self, task: str, eval_task: str) -> str:
        """Return ``SST-2 → IMDB``; only the training task if both are equal or ``eval_task`` is empty."""
        titles = [self.title("task", name) for name in dict.fromkeys([task, eval_task or task])]
        return ARROW.join(titles)


def add_transformed_rows(records: pd.DataFrame) -> pd.DataFrame:
    """Assign the numbers of models that were converted after training to the method of the conversion.

    The method also gets a copy of the run's dev scores, which choose its runs.
    """
    parts = records["part"].str.partition(AS)
    trained = records[parts[2] == ""]
    transformed = records.assign(part=parts[0], method=parts[2])[parts[2] != ""]
    dev = trained[trained["part"] == "dev"].drop(columns="method")
    dev = dev.merge(transformed[["run_id", "method"]].drop_duplicates(), on="run_id")
    return pd.concat([trained, dev, transformed], ignore_index=True)
