"""What came out, over finished runs: losses, accuracies, and how methods differ from the dense model tuned the same way."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pandas as pd

from benchmarks.harness.planning.catalogue import load_models
from benchmarks.harness.planning.kinds import Benchmark
from benchmarks.harness.planning.method_rows import resolve_methods
from benchmarks.harness.planning.runs import Run
from benchmarks.harness.reporting.common_tables import in_order
from benchmarks.harness.results.records import collect_from, read_metrics
from benchmarks.harness.results.statistics import Difference, paired_difference, with_verdicts
from benchmarks.llama.definition import InstructionDefinition, InstructionSet
from benchmarks.llama.grid import is_trained

GROUP = ["model", "set", "tuning"]
CELL = [*GROUP, "method", "variant"]
BASELINE, UNTUNED = "baseline", "untuned"
_LOSS = "loss"


class Outcomes:
    """The finished runs of a benchmark of instruction tuning.

    Where several learning rates were tried, the one with the lowest held-out loss, as a mean over its seeds, stands for a cell.

    Args:
        benchmark: its definition.
        runs: the finished runs, in the order of the grid.

    Attributes:
        metrics: ``metrics.json`` of every run that stands for its cell, by its id.
        runs: those runs.
        records: every number of them, a row a number, with the columns of :data:`CELL`.
        tasks: evaluated tasks by title, in order.
        tests: paired differences of accuracy to the baseline tuned the same way, and to the same method not tuned.
        rates_chosen: whether there was a learning rate to choose.
        untuned: the tuning that trains nothing; empty where no run is of it.
    """

    def __init__(self, benchmark: Benchmark[InstructionDefinition, InstructionSet], runs: list[Run]) -> None:
        self.benchmark = benchmark
        self.methods = resolve_methods(benchmark.definition)
        self.tunings = benchmark.definition.finetuning
        self.baseline = benchmark.definition.baseline
        read = {run.id: read_metrics(run) for run in runs}
        self.runs = _chosen(runs, read)
        self.rates_chosen = len(self.runs) < len(runs)
        self.untuned = next((run.spec["finetuning"] for run in runs if not is_trained(run.spec)), "")
        self.metrics = {run.id: read[run.id] for run in self.runs}
        records = collect_from((run, self.metrics[run.id]) for run in self.runs)
        cells = pd.DataFrame([{"run_id": run.id, **cell_of(run)} for run in self.runs], columns=["run_id", *CELL])
        self.records = records.drop(columns=["model", "method", "variant"]).merge(cells, on="run_id", sort=False)
        self.tasks = list(dict.fromkeys(name for found in self.metrics.values() for name in found["tasks"]))
        self.tests = self._tests()

    def numbers(self, part: str, metric: str, name: str | None = None) -> pd.Series[float]:
        """One number of every run, by cell and seed; of the part's task of that name, where it has several."""
        chosen = self.records[(self.records["part"] == part) & (self.records["metric"] == metric)]
        if name is not None:
            chosen = chosen[chosen["eval_task"] == name]
        return chosen.set_index([*CELL, "seed"])["value"]

    @property
    def losses(self) -> pd.Series[float]:
        """Held-out loss, by cell and seed."""
        return self.numbers("dev", _LOSS)

    def cells(self) -> pd.DataFrame:
        """One row a cell, with the number of its runs."""
        rows = pd.DataFrame([cell_of(run) for run in self.runs], columns=CELL)
        return rows.groupby(CELL, sort=False).size().rename("n").reset_index()

    def _tests(self) -> pd.DataFrame:
        """By cell, what it is compared with, and task: paired differences over questions, each question's a mean over seeds."""
        correct: dict[tuple[str, ...], dict[int, pd.Series[float]]] = {}
        for run in self.runs:
            for task, tested in self.metrics[run.id]["tasks"].items():
                if tested["correct"]:
                    place = (task, *cell_of(run).values())
                    correct.setdefault(place, {})[run.spec["seed"]] = _by_question(tested["correct"])
        found = []
        for ((task, *cell), ours), against in itertools.product(correct.items(), (BASELINE, UNTUNED)):
            theirs = correct.get((task, *self._reference(cell, against)), {})
            if against == BASELINE:
                ours, theirs = ({seed: one[seed] for seed in ours if seed in theirs} for one in (ours, theirs))
            if theirs:
                means = [pd.concat(list(one.values()), axis=1).mean(axis=1) for one in (ours, theirs)]
                difference = paired_difference(*means)
                counts = {"against": against, "task": task, "questions": difference.n, "seeds": len(ours)}
                found.append(dict(zip(CELL, cell, strict=True)) | counts | difference.columns())
        row = [*CELL, "against", "task", "questions", "seeds", *Difference.COLUMNS]
        return with_verdicts(pd.DataFrame(found, columns=row), [*CELL, "against"])

    def _reference(self, cell: Sequence[str], against: str) -> tuple[str, ...]:
        """What a cell is compared with: the baseline tuned the same way, or the same method not tuned; nothing with itself."""
        model, name, _, method, variant = cell
        if against == BASELINE:
            other = (*cell[: len(GROUP)], self.baseline, "")
        else:
            other = (model, name, self.untuned, method, variant)
        return () if other == tuple(cell) else other

    def loss_differences(self, against: str = BASELINE) -> pd.DataFrame:
        """By cell: the difference of the held-out loss to the baseline's or to that of the same method not tuned.

        The former is paired by seed; a model that is not tuned has no seed, and is the same for all of them.
        """
        by_cell = {cell: values.droplevel(CELL) for cell, values in self.losses.groupby(CELL, sort=False)}
        found = []
        for cell, values in by_cell.items():
            base = by_cell.get(self._reference(cell, against))
            if base is not None:
                if against == UNTUNED:
                    base = pd.Series(base.mean(), index=values.index)
                found.append(dict(zip(CELL, cell, strict=True)) | paired_difference(values, base).columns())
        return pd.DataFrame(found, columns=[*CELL, *Difference.COLUMNS])

    def order(self, frame: pd.DataFrame) -> pd.DataFrame:
        """Rows by cell, each key in the order of its definition; with titles."""
        ran = [run.spec["model"]["name"] for run in self.runs]
        places: dict[str, list[str]] = {
            "model": list(dict.fromkeys([*ran, *load_models()])),
            "set": list(self.benchmark.tasks),
            "tuning": list(self.tunings),
            "method": list(self.methods),
            "variant": sorted(frame["variant"].unique()) if "variant" in frame else [],
        }
        found = in_order(frame, {key: places[key] for key in CELL if key in frame})
        return found.assign(
            model_title=[self.model_title(name) for name in found["model"]],
            set_title=[self.set_title(name) for name in found["set"]],
            tuning_title=[self.tunings[name].title for name in found["tuning"]],
            method_title=[
                self.method_title(method, variant)
                for method, variant in zip(found["method"], found.get("variant", [""] * len(found)), strict=True)
            ],
            is_method=[self.methods[name].role != "control" for name in found["method"]],
        )

    def model_title(self, name: str) -> str:
        return load_models()[name].title

    @property
    def several_sets(self) -> bool:
        """Whether rows have to name their set."""
        return len({run.spec["task"]["name"] for run in self.runs}) > 1

    def row_title(self, cell: Mapping[str, str]) -> str:
        """What tells a cell from the others, in one line."""
        several_models = len({run.spec["model"]["name"] for run in self.runs}) > 1
        parts = (
            self.model_title(cell["model"]) if several_models else "",
            self.set_title(cell["set"]) if self.several_sets else "",
            self.tunings[cell["tuning"]].title,
            self.method_title(cell["method"], cell["variant"]),
        )
        return ", ".join(filter(None, parts))

    def set_title(self, name: str) -> str:
        return self.benchmark.tasks[name].title if name in self.benchmark.tasks else name

    def method_title(self, method: str, variant: str = "") -> str:
        """A method's title, with what of it is varied."""
        return " ".join(filter(None, (self.methods[method].title, variant)))


def cell_of(run: Run) -> dict[str, str]:
    """The cell of a run."""
    spec = run.spec
    return {
        "model": spec["model"]["name"],
        "set": spec["task"]["name"],
        "tuning": spec["finetuning"],
        "method": spec["method"]["name"],
        "variant": spec["method"]["variant"],
    }


def task_words(task: str) -> str:
    """The title of a task as people write it."""
    name, _, shots = task.partition(" ")
    return " ".join(({"mmlu": "MMLU", "mmlu_dev": "MMLU-dev"}.get(name, name), shots)).strip()


def _chosen(runs: list[Run], read: dict[str, dict[str, Any]]) -> list[Run]:
    """The runs of the best learning rate of each cell."""
    by_cell: dict[tuple[str, ...], dict[float, list[Run]]] = {}
    for run in runs:
        rates = by_cell.setdefault(tuple(cell_of(run).values()), {})
        rates.setdefault(run.spec["learning_rate"], []).append(run)

    def mean_loss(members: list[Run]) -> float:
        losses = [read[run.id]["scores"]["dev"][run.spec["task"]["name"]][_LOSS] for run in members]
        return sum(float("inf") if loss is None else loss for loss in losses) / len(losses)

    return [run for rates in by_cell.values() for run in min(rates.values(), key=mean_loss)]


def _by_question(correct: dict[str, str]) -> pd.Series[float]:
    def pairs() -> Iterator[tuple[tuple[str, int], float]]:
        for subject, digits in correct.items():
            for number, digit in enumerate(digits):
                yield (subject, number), float(digit)

    return pd.Series(dict(pairs()))
