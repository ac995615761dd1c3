"""List suites, benchmarks, methods, tasks, models, metrics and claims, one per row."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from tabulate import tabulate

from benchmarks.harness.base import DefinitionError, distinct
from benchmarks.harness.config.benchmark import benchmark_names, load_benchmark
from benchmarks.harness.config.catalogue import load_metrics, load_models
from benchmarks.harness.config.methods import load_methods
from benchmarks.harness.config.runs import Run
from benchmarks.harness.config.suite import plain_suite, suite_names, suite_parts
from benchmarks.harness.report.claims import load_claims
from emoe.errors import nearest_name

Row = dict[str, Any]  # the cells of a row, by heading

_MOST_VALUES = 12  # a cell with more values shows only the first ones
_FIRST_VALUES = 4


def suite_rows(runs: Iterable[Run]) -> list[Row]:
    """Summarize the runs of a suite, one row per benchmark and model."""
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.benchmark, run.model), []).append(run)

    rows = []
    for (benchmark, model), members in groups.items():
        # an evaluation trains nothing, so its learning rate of 0 is not listed
        trained = [run for run in members if run.trains_model]
        row = {
            "benchmark": benchmark,
            "model": model,
            # a measurement has no method, and many runs have no variant
            "methods": distinct(run.method for run in members if run.method),
            "tasks": distinct(run.task for run in members),
            "settings": distinct(run.variant for run in members if run.variant),
            "learning_rates": distinct(f"{run.learning_rate:g}" for run in trained),
            "seeds": distinct(str(run.seed) for run in members),
            "runs": len(members),
        }
        rows.append(row)
    return rows


def format_rows(rows: Sequence[Row]) -> str:
    """Format rows as a table for the terminal. All rows have the headings of the first."""
    headings = [name.replace("_", " ") for name in rows[0]]
    lines = []
    for row in rows:
        lines.append([_cell(value) for value in row.values()])
    return tabulate(lines, headers=headings, tablefmt="simple")


def _cell(value: object) -> object:
    """Format a table cell. A long list is shortened to its first values and its length."""
    if not isinstance(value, list):
        return value
    if len(value) <= _MOST_VALUES:
        return ", ".join(value)
    first_values = ", ".join(value[:_FIRST_VALUES])
    return f"{first_values}, … ({len(value)})"


def _suites() -> list[Row]:
    """List the suites with their benchmarks."""
    rows = []
    for name in suite_names():
        suite = plain_suite(name)
        rows.append({"name": suite.name, "benchmarks": list(suite.settings.benchmarks)})
    return rows


def _benchmarks() -> list[Row]:
    """List the benchmarks with the suites that run them."""
    rows = []
    for name in benchmark_names():
        title = load_benchmark(name).definition.title
        rows.append({"name": name, "title": title, "suites": sorted(suite_parts(name))})
    return rows


def _methods() -> list[Row]:
    """List the methods with their kind (dense, emoe or gmoe) and role (baseline, control, …)."""
    rows = []
    for name, method in load_methods().items():
        rows.append({"name": name, "title": method.title, "kind": method.kind, "role": method.role})
    return rows


def _tasks() -> list[Row]:
    """List the tasks (data sets or measures) of all benchmarks."""
    rows = []
    for benchmark in benchmark_names():
        for name, task in load_benchmark(benchmark).tasks.items():
            rows.append({"benchmark": benchmark, "name": name, "title": task.title})
    return rows


def _models() -> list[Row]:
    """List the models with their modality and where their weights come from."""
    rows = []
    for name, model in load_models().items():
        row = {
            "name": name,
            "title": model.title,
            "modality": model.modality,
            "hub": model.hub,
            "package": model.package,
            "rebuilt": model.rebuilt,
            "timm": model.timm,
        }
        rows.append(row)
    return rows


def _metrics() -> list[Row]:
    """List the metrics with unit, better direction, and tolerance between machines."""
    rows = []
    for name, metric in load_metrics().items():
        row = {
            "name": name,
            "label": metric.label,
            "unit": metric.unit,
            "direction": metric.direction,
            "tolerance": metric.tolerance,
        }
        rows.append(row)
    return rows


def _claims() -> list[Row]:
    """List the claims with the number of their tests."""
    rows = []
    for name, claim in load_claims().items():
        rows.append({"name": name, "title": claim.title, "tests": len(claim.tests)})
    return rows


LISTS: dict[str, Callable[[], list[Row]]] = {
    "suites": _suites,
    "benchmarks": _benchmarks,
    "methods": _methods,
    "tasks": _tasks,
    "models": _models,
    "metrics": _metrics,
    "claims": _claims,
}


def list_names() -> dict[str, list[str]]:
    """Return the words that the command ``list`` takes, by heading."""
    return {"Kinds": ["paper", *LISTS], "Suites": suite_names()}


def check_list(word: str) -> None:
    """Check that ``word`` is a valid argument of the command ``list``: a kind or a suite.

    Raises:
        DefinitionError: It is not. The message suggests the most similar word, then lists all.
    """
    names = list_names()
    words = [*names["Kinds"], *names["Suites"]]
    if word in words:
        return
    near = nearest_name(word, words)
    hint = f"did you mean '{near}'? " if near else ""
    kinds = ", ".join(names["Kinds"])
    suites = ", ".join(names["Suites"])
    raise DefinitionError(
        f"there is no kind or suite '{word:.100}'; {hint}Kinds: {kinds}; suites: {suites}"
    )
