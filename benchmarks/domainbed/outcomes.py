"""What came out, over finished runs: which record each selection chose, and how methods differ."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pandas as pd

from benchmarks.domainbed.definition import ImageDefinition, SetEntry
from benchmarks.domainbed.selection import SELECTIONS, Chosen, Trained
from benchmarks.harness.planning.catalogue import load_models
from benchmarks.harness.planning.kinds import Benchmark
from benchmarks.harness.planning.method_rows import resolve_methods
from benchmarks.harness.planning.runs import Run
from benchmarks.harness.reporting.common_tables import in_order
from benchmarks.harness.results.records import collect_from, read_metrics
from benchmarks.harness.results.statistics import Difference, paired_difference, with_verdicts

CELL = ["selection", "model", "set", "method"]
_CHOICE = ("hparams_seed", "variant")


class Outcomes:
    """The finished runs of a benchmark of domain generalisation.

    Args:
        benchmark: its definition.
        runs: the finished runs, in the order of the grid.

    Attributes:
        methods: their titles and roles.
        baseline: the method that others are compared with.
        cells: a row a selection, model, set, held-out environment, method and trial: ``value`` (the accuracy that is
            reported), ``chosen_by`` (the value by which it was chosen), ``step``, ``hparams_seed`` and ``variant`` of what was chosen.
        records: every number of every run.
    """

    def __init__(self, benchmark: Benchmark[ImageDefinition, SetEntry], runs: list[Run]) -> None:
        self.benchmark, self.runs = benchmark, runs
        self.methods = resolve_methods(benchmark.definition)
        self.baseline = benchmark.definition.baseline
        self._steps: dict[str, list[dict[str, Any]]] = {}
        self.records = collect_from(self._read())
        self.cells = pd.DataFrame(
            self._cells(), columns=[*CELL, "env", "trial", "value", "chosen_by", "step", *_CHOICE]
        )
        self.tests = self._tests()

    def _read(self) -> Iterator[tuple[Run, dict[str, Any]]]:
        """Every run's ``metrics.json``, once; only the records of its steps are kept."""
        for run in self.runs:
            found = read_metrics(run)
            self._steps[run.id] = found["records"]
            yield run, found

    @property
    def sets(self) -> list[str]:
        """The sets that were run."""
        return list(dict.fromkeys(run.spec["task"]["name"] for run in self.runs))

    def environments(self, name: str) -> list[str]:
        """Names of a set's environments, in DomainBed's order."""
        return list(self.benchmark.tasks[name].environments)

    def _cells(self) -> list[dict[str, Any]]:
        groups: dict[tuple[str, str, str, int], list[Run]] = {}
        for run in self.runs:
            spec = run.spec
            key = (spec["model"]["name"], spec["task"]["name"], spec["method"]["name"], spec["seed"])
            groups.setdefault(key, []).append(run)
        found = []
        for (model, name, method, trial), members in groups.items():
            # in the order of DomainBed's hparams_seed, and of one seed in the grid's
            choices = sorted({_choice(run): None for run in members}, key=lambda choice: choice[0])
            trained = [
                Trained(tuple(run.spec["test_envs"]), choices.index(_choice(run)), self._steps[run.id])
                for run in members
            ]
            for selection, (_, choose) in SELECTIONS.items():
                for env, env_name in enumerate(self.environments(name)):
                    chosen: Chosen | None = choose(trained, env)
                    if chosen is None:
                        continue
                    row: dict[str, Any] = dict(zip(CELL, (selection, model, name, method), strict=True))
                    row |= {"env": env_name, "trial": trial, "value": chosen.test_accuracy(env)}
                    row |= {"chosen_by": chosen.value, "step": chosen.record["step"]}
                    found.append(row | dict(zip(_CHOICE, choices[chosen.choice], strict=True)))
        return found

    def trials(self, *, complete: bool = False) -> pd.Series[float]:
        """Mean over the held-out environments of a set, by cell and trial; ``complete``: only where all of the set's were."""
        grouped = self.cells.groupby([*CELL, "trial"], sort=False)["value"]
        means, counts = grouped.mean(), grouped.count()
        if not complete:
            return means
        sizes = [len(self.environments(name)) for name in means.index.get_level_values("set")]
        return means[counts.to_numpy() == sizes]

    def held_out(self, name: str) -> int:
        """How many of a set's environments were held out."""
        return int(self.cells.loc[self.cells["set"] == name, "env"].nunique())

    def _tests(self) -> pd.DataFrame:
        """Paired differences to the baseline by cell: over trials, of the mean over the environments that both have."""
        keys = ["selection", "model", "set"]
        found = []
        for key, group in self.cells.groupby(keys, sort=False):
            values = group.pivot_table(index=["env", "trial"], columns="method", values="value", sort=False)
            for method in [name for name in values if name != self.baseline and self.baseline in values]:
                both = values[[method, self.baseline]].dropna().groupby("trial").mean()
                difference = paired_difference(both[method], both[self.baseline])
                row = dict(zip(keys, key, strict=True)) | {"method": method, "n": difference.n}
                found.append(row | difference.columns())
        tests = pd.DataFrame(found, columns=[*CELL, *Difference.COLUMNS, "n"])
        return with_verdicts(tests, ["selection", "model", "method"])

    def order(self, frame: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
        """Rows by the keys and the method, each in the order of its definition; with titles."""
        places: dict[str, list[str]] = {"selection": list(SELECTIONS), "method": list(self.methods)}
        ran = [run.spec["model"]["name"] for run in self.runs]
        places |= {"model": list(dict.fromkeys([*ran, *load_models()])), "set": list(self.benchmark.tasks)}

        found = in_order(frame, {key: places[key] for key in (*keys, "method")})
        titles: dict[str, Callable[[str], str]] = {
            "selection": lambda name: SELECTIONS[name][0] if name in SELECTIONS else name,
            "model": self.model_title,
            "set": self.set_title,
            "method": self.method_title,
        }
        found = found.assign(**{f"{key}_title": found[key].map(title) for key, title in titles.items() if key in found})
        return found.assign(
            is_method=[name not in self.methods or self.methods[name].role != "control" for name in found["method"]]
        )

    def method_title(self, method: str) -> str:
        return self.methods[method].title if method in self.methods else method

    def set_title(self, name: str) -> str:
        return self.benchmark.tasks[name].title if name in self.benchmark.tasks else name

    def model_title(self, name: str) -> str:
        models = load_models()
        return models[name].title if name in models else name


def _choice(run: Run) -> tuple[int, str]:
    return run.spec["hparams_seed"], run.spec["method"]["variant"]
