"""What came out: scores by task, means over the tasks of a mixture, and what learning several tasks at once gains or costs each."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from benchmarks.harness.config.benchmark import Benchmark
from benchmarks.harness.config.runs import Run
from benchmarks.harness.report.common import compared, counts
from benchmarks.harness.results.statistics import paired_differences, with_verdicts
from benchmarks.multitask.definition import MultitaskDefinition
from benchmarks.multitask.grid import ID_MEAN
from benchmarks.text.definition import TaskEntry
from benchmarks.text.grid import CLEAN, ID
from benchmarks.text.outcomes import TextOutcomes

_KEY = ["model", "eval_task", "method", "seed"]
_TRANSFER = ["model", "task", "eval_task", "method"]
_INTERVAL = ["delta", "low", "high"]


class MultitaskOutcomes(TextOutcomes):
    """The finished runs of a benchmark whose models learn several tasks at once.

    In :attr:`~benchmarks.text.outcomes.TextOutcomes.seeds` and ``rows`` the training task is the mixture, or the task that is learned alone, and there is one domain
    more: ``id_mean``, the mean over the tasks of a mixture.

    Attributes:
        mixtures: the mixtures that ran.
        transfer: a row a model, mixture, task and method that also learned the task alone: scores ``alone`` and ``together`` and their difference, paired by seed
            (``delta``, ``low``, ``high``, ``p``, ``n``), corrected over the tasks (``p_holm``, ``verdict``), and ``less``, the same difference less the baseline's.
    """

    def __init__(self, benchmark: Benchmark[MultitaskDefinition, TaskEntry], runs: Sequence[Run]) -> None:
        super().__init__(benchmark, runs)
        ran = set(self.seeds["task"])
        self.mixtures = [name for name in benchmark.definition.mixtures if name in ran]
        self.transfer = self._transfer()

    def of_mixtures(self, frame: pd.DataFrame) -> pd.DataFrame:
        """Rows of a frame that are of mixtures, and not of tasks that are learned alone."""
        return frame[frame["task"].isin(self.mixtures)]

    def compared(self) -> pd.DataFrame:
        """Scores of mixtures by seed, and numbers of parameters, for claims."""
        seeds = self.of_mixtures(self.seeds)
        scores = seeds.rename(columns={"protocol": "selection", "seed": "pair"}).assign(metric="score")
        return compared(scores[scores["domain"] != ID_MEAN], counts(self.records))

    def _seeds(self, protocol: str) -> pd.DataFrame:
        seeds = super()._seeds(protocol)
        own = seeds[(seeds["domain"] == ID) & seeds["task"].isin(self.benchmark.definition.mixtures)]  # type: ignore[attr-defined]
        means = own.groupby(["model", "task", "method", "seed"], sort=False)["value"].mean().reset_index()
        return pd.concat([seeds, means.assign(domain=ID_MEAN, eval_task="", protocol=protocol)], ignore_index=True)

    def _transfer(self) -> pd.DataFrame:
        seeds = self.seeds[(self.seeds["protocol"] == CLEAN) & (self.seeds["domain"] == ID)]
        alone = seeds[seeds["task"] == seeds["eval_task"]].set_index(_KEY)["value"].rename("alone")
        both = self.of_mixtures(seeds).merge(alone, left_on=_KEY, right_index=True)
        means = both.groupby(_TRANSFER, sort=False, as_index=False)[["alone", "value"]].mean()
        kinds = [both.assign(value=both[name], how=how) for name, how in (("alone", "alone"), ("value", "together"))]
        stacked = pd.concat([kind[[*_TRANSFER, "seed", "how", "value"]] for kind in kinds], ignore_index=True)
        found = paired_differences(stacked, [*_TRANSFER, "how"], {"how": "alone"}, "seed").drop(
            columns=["how", "values"]
        )
        gains = both.assign(value=both["value"] - both["alone"])[[*_TRANSFER, "seed", "value"]]
        less = paired_differences(gains, _TRANSFER, {"method": self.baseline}, "seed")
        less = less[[*_TRANSFER, *_INTERVAL]].rename(columns={name: f"less_{name}" for name in _INTERVAL})
        rows = with_verdicts(found, ["model", "task", "method"])
        rows = rows.merge(means.rename(columns={"value": "together"}), on=_TRANSFER).merge(
            less, on=_TRANSFER, how="left"
        )
        return self.order(rows, _TRANSFER)
