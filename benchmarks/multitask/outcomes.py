"""Collect the scores of models that learn several tasks at once, and compare them with learning each task alone."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from benchmarks.harness.config.benchmark import AnyBenchmark
from benchmarks.harness.config.runs import Run
from benchmarks.harness.report.common import join_claim_numbers, parameter_counts
from benchmarks.harness.results.statistics import paired_differences, shared_pairs, with_verdicts
from benchmarks.multitask.definition import ID_MEAN
from benchmarks.text.definition import CLEAN, ID
from benchmarks.text.outcomes import TextOutcomes

_KEY = ["model", "eval_task", "method", "seed"]
_TRANSFER = ["model", "task", "eval_task", "method"]
INTERVAL = ["delta", "low", "high"]


class MultitaskOutcomes(TextOutcomes):
    """Collect the finished runs.

    In :attr:`~benchmarks.text.outcomes.TextOutcomes.seeds` and ``rows`` the training task is the mixture, or the task
    that is learned alone. There is one more domain: ``id_mean``, the mean over the tasks of a mixture.

    Attributes:
        mixtures: The mixtures that ran.
        transfer: The scores ``alone`` and ``together`` by model, mixture, task and method, their difference, paired by
            seed (``delta``, ``low``, ``high``, ``p``, ``n``) and corrected over all rows (``p_holm``, ``verdict``), and
            the same difference less the baseline's (``less_delta`` …); over the seeds that all methods have.
    """

    def __init__(self, benchmark: AnyBenchmark, runs: Sequence[Run]) -> None:
        super().__init__(benchmark, runs)
        ran = set(self.seeds["task"])
        self.mixtures = [name for name in benchmark.definition.mixtures if name in ran]
        self.transfer = self._transfer()

    def select_mixtures(self, frame: pd.DataFrame) -> pd.DataFrame:
        """Select the rows of mixtures, without tasks that are learned alone."""
        return frame[frame["task"].isin(self.mixtures)]

    def claim_numbers(self) -> pd.DataFrame:
        """Collect the scores of mixtures by seed, and the numbers of parameters, for claims."""
        seeds = self.select_mixtures(self.seeds)
        scores = seeds.rename(columns={"protocol": "selection", "seed": "pair"}).assign(metric="score")
        return join_claim_numbers(scores[scores["domain"] != ID_MEAN], parameter_counts(self.records))

    def _seeds(self) -> pd.DataFrame:
        seeds = super()._seeds()
        mixtures = self.benchmark.definition.mixtures
        tasks = seeds[(seeds["domain"] == ID) & seeds["task"].isin(mixtures)]
        means = tasks.groupby(["protocol", "model", "task", "method", "seed"], sort=False)["value"].mean()
        return pd.concat([seeds, means.reset_index().assign(domain=ID_MEAN, eval_task="")])

    def _transfer(self) -> pd.DataFrame:
        seeds = self.seeds[(self.seeds["protocol"] == CLEAN) & (self.seeds["domain"] == ID)]
        alone = seeds[seeds["task"] == seeds["eval_task"]].set_index(_KEY)["value"].rename("alone")
        both = self.select_mixtures(seeds).merge(alone, left_on=_KEY, right_index=True)
        both = shared_pairs(both, ["model", "task", "eval_task"], ["method"], "seed")
        means = both.groupby(_TRANSFER, sort=False, as_index=False)[["alone", "value"]].mean()
        pairs = [both.assign(how="alone", value=both["alone"]), both.assign(how="together")]
        stacked = pd.concat([rows[[*_TRANSFER, "seed", "how", "value"]] for rows in pairs], ignore_index=True)
        gains = paired_differences(stacked, [*_TRANSFER, "how"], {"how": "alone"}, "seed")
        by_seed = both.assign(value=both["value"] - both["alone"])[[*_TRANSFER, "seed", "value"]]
        less = paired_differences(by_seed, _TRANSFER, {"method": self.baseline}, "seed")
        less = less[[*_TRANSFER, *INTERVAL]].rename(columns={name: f"less_{name}" for name in INTERVAL})
        rows = with_verdicts(gains.drop(columns=["how", "values"]))
        rows = rows.merge(means.rename(columns={"value": "together"}), on=_TRANSFER)
        return self.order(rows.merge(less, on=_TRANSFER, how="left"), _TRANSFER)
