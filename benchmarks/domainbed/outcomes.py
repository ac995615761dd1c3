"""Select among the records of finished runs, and compare methods."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple, cast

import pandas as pd
from pandas.api.typing import SeriesGroupBy

from benchmarks.domainbed.definition import ImageSpec
from benchmarks.domainbed.protocol import SELECTIONS, RunRecords
from benchmarks.harness.base import distinct
from benchmarks.harness.config.benchmark import AnyBenchmark
from benchmarks.harness.config.runs import Run
from benchmarks.harness.report.common import Outcomes, join_claim_numbers, parameter_counts
from benchmarks.harness.results.records import Record, tabulate_numbers
from benchmarks.harness.results.statistics import paired_differences, shared_pairs, with_verdicts

# the columns that identify a cell, which is a row of a table; the column ``task`` has the image set
CELL = ["selection", "model", "task", "method"]


class _Settings(NamedTuple):
    """The settings of a run among which a selection chooses."""

    hparams_seed: int
    """DomainBed's number of the hyper-parameters; 0 for the defaults."""
    variant: str
    """The settings of the method that the grid varies, as text."""


class DomainOutcomes(Outcomes):
    """The finished runs of a domain generalisation benchmark.

    Args:
        benchmark: The benchmark.
        finished: The finished runs with their metrics.

    Attributes:
        cells: What the selections choose, one row for each selection, model, image set and method
            (:data:`CELL`), held-out environment (``eval_task``) and trial (``seed``). The other
            columns are ``value`` (the reported accuracy), ``chosen_by`` (the accuracy that the
            selection maximises), ``step``, ``hparams_seed`` and ``variant``.
        finished: The finished runs with their metrics, by run id.
        specs: The specs of the runs, by run id.
        recorded_numbers: Every number of every run.
        shared: The rows of ``cells`` that make methods comparable. Each selection, model and image
            set keeps only the trials that have every method and environment.
        differences: The differences to the baseline in ``shared``, one row for each :data:`CELL`.
            They are paired by trial, and averaged over environments.
        tests: The differences to the baseline in ``cells``, with verdicts, one row for each
            :data:`CELL`. They are over all trials and environments that a method shares with the
            baseline. p is Holm-corrected over all rows.
    """

    pair = "trial"  # texts use DomainBed's word for a seed
    benchmark: AnyBenchmark

    def __init__(self, benchmark: AnyBenchmark, finished: Sequence[Record]) -> None:
        runs = [record.run for record in finished]
        selection_titles = {name: selection.title for name, selection in SELECTIONS.items()}
        set_titles = {name: task.title for name, task in benchmark.tasks.items()}
        super().__init__(benchmark, runs, keys=CELL, selection=selection_titles, task=set_titles)
        self.finished = {record.run.id: record for record in finished}
        self.specs = {run.id: cast(ImageSpec, benchmark.read_spec(run)) for run in runs}
        self.recorded_numbers = tabulate_numbers(finished)

        # named, so that they exist even without rows
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
        self.cells = pd.DataFrame(self._chosen_rows(), columns=columns)
        # methods of the same selection, model and set are compared on the same trials
        self.shared = shared_pairs(
            self.cells,
            within=["selection", "model", "task"],
            compared=["method", "eval_task"],
            pair="seed",
        )
        self.differences = self._differences(self.shared)
        # a test compares only two methods, so it uses every trial that these two have
        differences_of_all_trials = self._differences(self.cells)
        self.tests = with_verdicts(differences_of_all_trials)

    def _differences(self, cells: pd.DataFrame) -> pd.DataFrame:
        """Compute the mean difference between each method and the baseline.

        Accuracies are averaged over the held-out environments of a trial, and trials are paired.
        The argument has the columns of :attr:`cells`, but maybe fewer rows. Returns one row for
        each selection, model, image set and method.
        """
        scores = cells[[*CELL, "eval_task", "seed", "value"]]
        # sums of floats depend on the order, so it is fixed
        ordered = scores.sort_values(["eval_task", "seed"], kind="stable")
        differences = paired_differences(
            ordered,
            cell_columns=CELL,
            reference={"method": self.baseline},
            pair="seed",  # the column of the trial
        )
        # no table shows the column ``values``, which counts accuracies
        return differences.drop(columns="values")

    @cached_property
    def shared_origins(self) -> pd.DataFrame:
        """Return the rows of :attr:`recorded_numbers` whose trials are in :attr:`shared`.

        Tables list only the runs of these rows.
        """
        keys = ["model", "task", "method", "seed"]
        shared_trials = self.shared[keys].drop_duplicates()
        return self.recorded_numbers.merge(shared_trials, on=keys)

    @property
    def sets(self) -> list[str]:
        """Return the names of the image sets with runs, in the order of the runs."""
        return distinct(run.task for run in self.runs)

    def environments(self, data_set: str) -> list[str]:
        """Return the names of the environments of an image set, in DomainBed's order."""
        return list(self.benchmark.tasks[data_set].environments)

    def env_title(self, data_set: str, env_name: str) -> str:
        """Return the title of an environment: its name on disk, with blanks for underscores.

        An environment of digits is not on disk. Its title is its short name and the unit.
        """
        image_set = self.benchmark.tasks[data_set]
        name_on_disk = image_set.environments[env_name]
        if isinstance(name_on_disk, str):
            return name_on_disk.replace("_", " ")
        return f"{env_name}{image_set.unit}"

    def _chosen_rows(self) -> Iterator[dict[str, Any]]:
        """Yield what each selection chooses.

        There is one row per selection, model, set, method, trial and held-out environment.
        """
        # a selection chooses among the runs of one model, set, method and trial
        groups: dict[tuple[str, str, str, int], list[Run]] = {}
        for run in self.runs:
            key = (run.model, run.task, run.method, run.seed)
            groups.setdefault(key, []).append(run)
        for runs in groups.values():
            yield from self._choose_among(runs)

    def _choose_among(self, runs: Sequence[Run]) -> Iterator[dict[str, Any]]:
        """Yield the rows of :attr:`cells` for the runs of one model, image set, method and trial.

        There is a row for each selection and held-out environment. If the runs that a selection
        needs are missing, its row is left out.
        """
        # a selection identifies settings by their number, which is their index in this list
        all_settings = self._distinct_settings(runs)
        records_of_runs = [self._records_of_run(run, all_settings) for run in runs]
        first_run = runs[0]  # all runs have the same model, set, method and trial
        for name, selection in SELECTIONS.items():
            for env, env_name in enumerate(self.environments(first_run.task)):
                chosen = selection.choose(records_of_runs, env)
                if chosen is None:
                    # runs that this selection needs are missing
                    continue
                settings = all_settings[chosen.settings_number]
                yield {
                    "selection": name,
                    "model": first_run.model,
                    "task": first_run.task,
                    "method": first_run.method,
                    "eval_task": env_name,
                    "seed": first_run.seed,
                    "value": chosen.test_accuracy(env),
                    "chosen_by": chosen.value,
                    "step": chosen.record["step"],
                    "hparams_seed": settings.hparams_seed,
                    "variant": settings.variant,
                }

    def _records_of_run(self, run: Run, all_settings: Sequence[_Settings]) -> RunRecords:
        """Return the accuracies of a run, with the index of its settings in ``all_settings``."""
        evaluated_steps = self.finished[run.id].metrics.records or ()
        return RunRecords(
            test_envs=tuple(self.specs[run.id].test_envs),
            settings_number=all_settings.index(self._settings_of(run)),
            records=[step.model_dump() for step in evaluated_steps],
        )

    def _distinct_settings(self, runs: Sequence[Run]) -> list[_Settings]:
        """Return the distinct settings of some runs, sorted by ``hparams_seed``.

        Settings with the same ``hparams_seed`` are in the order of the runs.
        """
        found: list[_Settings] = []
        for run in runs:
            settings = self._settings_of(run)
            if settings not in found:
                found.append(settings)
        return sorted(found, key=lambda settings: settings.hparams_seed)

    def _settings_of(self, run: Run) -> _Settings:
        """Return the settings of a run among which a selection chooses."""
        return _Settings(self.specs[run.id].hparams_seed, run.method_variant)

    def trial_means(self) -> pd.Series[float]:
        """Average the accuracies of :attr:`shared` over environments.

        Returns one mean for each :data:`CELL` and ``seed``, which are the index. The mean is nan if
        the trial lacks an environment that another trial of the image set has, because means over
        different environments are not comparable.
        """
        grouped_by_trial = self._accuracies_by_trial()
        means = grouped_by_trial.mean()
        num_environments = grouped_by_trial.count()
        # for each image set, the number of environments that any trial has
        num_compared = self.shared.groupby("task")["eval_task"].nunique()
        # for each mean, that number of its image set
        image_sets = means.index.get_level_values("task")
        num_needed = [num_compared[name] for name in image_sets]
        has_all_environments = num_environments == num_needed
        # where() replaces the other means by nan
        return means.where(has_all_environments)

    def complete_trial_means(self) -> pd.Series[float]:
        """Average the accuracies of :attr:`shared` over environments, for complete trials.

        Returns one mean for each :data:`CELL` and ``seed``, as in :meth:`trial_means`. Trials that
        lack an environment of the image set are omitted.
        """
        grouped_by_trial = self._accuracies_by_trial()
        means = grouped_by_trial.mean()
        num_environments = grouped_by_trial.count()
        # for each mean, the number of environments of its image set
        image_sets = means.index.get_level_values("task")
        num_needed = [len(self.environments(name)) for name in image_sets]
        return means[num_environments == num_needed]

    def _accuracies_by_trial(self) -> SeriesGroupBy[Any, Any]:
        """Group the accuracies of :attr:`shared` by :data:`CELL` and ``seed``.

        A group has one accuracy for each environment of the trial.
        """
        return self.shared.groupby([*CELL, "seed"], sort=False)["value"]

    def claim_numbers(self) -> pd.DataFrame:
        """Return the held-out accuracies of all trials and the parameter counts, for claims."""
        accuracies = self.cells.assign(domain="held_out", metric="accuracy")
        return join_claim_numbers(accuracies, parameter_counts(self.recorded_numbers))

    def num_held_out(self, data_set: str) -> int:
        """Return the number of environments of an image set that were held out."""
        of_set = self.cells[self.cells["task"] == data_set]
        return int(of_set["eval_task"].nunique())
