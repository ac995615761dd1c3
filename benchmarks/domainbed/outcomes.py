"""Select among the records of finished runs, and compare methods."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import pandas as pd

from benchmarks.domainbed.protocol import SELECTIONS, RunRecords
from benchmarks.harness.config.benchmark import AnyBenchmark
from benchmarks.harness.config.runs import Run
from benchmarks.harness.report.common import Outcomes, join_claim_numbers, parameter_counts
from benchmarks.harness.results.records import Record, tabulate_numbers
from benchmarks.harness.results.statistics import paired_differences, shared_pairs, with_verdicts

CELL = ["selection", "model", "task", "method"]  # the task is the image set


class DomainOutcomes(Outcomes):
    """The finished runs of a domain generalisation benchmark.

    Attributes:
        cells: The chosen records by :data:`CELL`, held-out environment (``eval_task``) and trial (``seed``), with
            ``value`` (the reported accuracy), ``chosen_by`` (the selection's value), ``step``, ``hparams_seed`` and
            ``variant``.
        finished: The runs with what they recorded, by run id.
        records: Every number of every run.
        shared: The cells of the trials that have all methods and environments of a selection, model and set.
        differences: The paired differences to the baseline over these trials, of means over environments.
        tests: The same over all trials and environments that both methods share, with verdicts, corrected over all
            rows.
    """

    pair = "trial"  # DomainBed's word for a seed
    benchmark: AnyBenchmark

    def __init__(self, benchmark: AnyBenchmark, finished: Sequence[Record]) -> None:
        selections = {name: title for name, (title, _) in SELECTIONS.items()}
        sets = {name: task.title for name, task in benchmark.tasks.items()}
        super().__init__(
            benchmark, [record.run for record in finished], CELL, selection=selections, task=sets
        )
        self.finished = {record.run.id: record for record in finished}
        self.records = tabulate_numbers(finished)
        columns = [
            *CELL,
            "eval_task",
            "seed",
            "value",
            "chosen_by",
            "step",
            "hparams_seed",
            "variant",
        ]
        self.cells = pd.DataFrame(self._cells(), columns=columns)
        self.shared = shared_pairs(
            self.cells, ["selection", "model", "task"], ["method", "eval_task"], "seed"
        )
        self.differences = self._differences(self.shared)
        self.tests = with_verdicts(self._differences(self.cells))

    def _differences(self, cells: pd.DataFrame) -> pd.DataFrame:
        # sorted by environment, because the order of summation changes the last digit
        scores = cells[[*CELL, "eval_task", "seed", "value"]].sort_values(
            ["eval_task", "seed"], kind="stable"
        )
        return paired_differences(scores, CELL, {"method": self.baseline}, "seed").drop(
            columns="values"
        )

    @cached_property
    def shared_origins(self) -> pd.DataFrame:
        """Return the runs of the shared trials."""
        keys = ["model", "task", "method", "seed"]
        return self.records.merge(self.shared[keys].drop_duplicates(), on=keys)

    @property
    def sets(self) -> list[str]:
        """Return the names of the sets with runs."""
        return list(dict.fromkeys(run.task for run in self.runs))

    def environments(self, name: str) -> list[str]:
        """Return the names of a set's environments, in DomainBed's order."""
        return list(self.benchmark.tasks[name].environments)

    def env_title(self, name: str, env: str) -> str:
        """Return the title of an environment: its name, with the unit if it is a number."""
        return f"{env}{self.benchmark.tasks[name].unit}"

    def _cells(self) -> Iterator[dict[str, Any]]:
        """Yield the chosen record of every selection and held-out environment, if the selection has one."""
        groups: dict[tuple[str, str, str, int], list[Run]] = {}
        for run in self.runs:
            key = (run.model, run.task, run.method, run.seed)
            groups.setdefault(key, []).append(run)
        for (model, name, method, seed), runs in groups.items():
            # by DomainBed's hparams_seed, then in the order of the grid
            choices = sorted(dict.fromkeys(map(_choice, runs)), key=lambda choice: choice[0])
            records = []
            for run in runs:
                steps = [step.model_dump() for step in self.finished[run.id].metrics.records or ()]
                records.append(
                    RunRecords(tuple(run.spec["test_envs"]), choices.index(_choice(run)), steps)
                )
            for selection, (_, choose) in SELECTIONS.items():
                for env, env_name in enumerate(self.environments(name)):
                    chosen = choose(records, env)
                    if chosen is None:
                        continue
                    hparams_seed, variant = choices[chosen.choice]
                    yield {
                        "selection": selection,
                        "model": model,
                        "task": name,
                        "method": method,
                        "eval_task": env_name,
                        "seed": seed,
                        "value": chosen.test_accuracy(env),
                        "chosen_by": chosen.value,
                        "step": chosen.record["step"],
                        "hparams_seed": hparams_seed,
                        "variant": variant,
                    }

    def trials(self, *, complete: bool = False) -> pd.Series[float]:
        """Average shared cells over environments, by cell and trial; ``complete`` omits trials that lack some."""
        grouped = self.shared.groupby([*CELL, "seed"], sort=False)["value"]
        means, counts = grouped.mean(), grouped.count()
        if not complete:
            return means
        sizes = [len(self.environments(name)) for name in means.index.get_level_values("task")]
        return means[counts.to_numpy() == sizes]

    def claim_numbers(self) -> pd.DataFrame:
        """Return the held-out accuracies of every trial, and the parameter counts, for claims."""
        accuracies = self.cells.assign(domain="held_out", metric="accuracy")
        return join_claim_numbers(accuracies, parameter_counts(self.records))

    def held_out(self, name: str) -> int:
        """Count the environments of a set that were held out."""
        return int(self.cells.loc[self.cells["task"] == name, "eval_task"].nunique())


def _choice(run: Run) -> tuple[int, str]:
    """Return the hyper-parameters' draw and the variant of a run."""
    return run.spec["hparams_seed"], run.method_variant
