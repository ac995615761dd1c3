"""List suites, benchmarks, methods, tasks, models, metrics and claims, one per row."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from tabulate import tabulate

from benchmarks.harness.config.benchmark import benchmark_names, load_benchmark
from benchmarks.harness.config.catalogue import load_metrics, load_models
from benchmarks.harness.config.methods import load_methods
from benchmarks.harness.config.runs import Run
from benchmarks.harness.config.suite import plain_suite, suite_names, suite_parts
from benchmarks.harness.report.claims import load_claims

Row = dict[str, Any]


def _tasks() -> list[Row]:
    return [
        {"benchmark": name, **row}
        for name in benchmark_names()
        for row in _rows(load_benchmark(name).tasks)
    ]


def _rows(entries: Mapping[str, object], *keys: str) -> list[Row]:
    return [
        {"name": name} | {key: getattr(entry, key) for key in ("title", *keys)}
        for name, entry in entries.items()
    ]


def suite_rows(runs: Iterable[Run]) -> list[Row]:
    """Tabulate a suite: a row per benchmark and model, with the methods, tasks and settings of its runs."""
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.benchmark, run.model), []).append(run)
    return [
        {
            "benchmark": benchmark,
            "model": model,
            "methods": _values(run.method for run in members),
            "tasks": _values(run.task for run in members),
            "settings": _values(run.variant for run in members),
            "learning_rates": _values(
                f"{run.learning_rate:g}" for run in members if run.is_trained
            ),
            "seeds": _values(str(run.seed) for run in members),
            "runs": len(members),
        }
        for (benchmark, model), members in groups.items()
    ]


def format_rows(rows: Sequence[Row]) -> str:
    """Format rows as a table for the terminal."""
    cells = [[_cell(value) for value in row.values()] for row in rows]
    return tabulate(cells, headers=[name.replace("_", " ") for name in rows[0]], tablefmt="simple")


def _cell(value: object) -> object:
    """Format a table cell: join a list; shorten a long one to its first values and length."""
    if not isinstance(value, list):
        return value
    return ", ".join(value) if len(value) <= 12 else f"{', '.join(value[:4])}, … ({len(value)})"


def _values(values: Iterable[str]) -> list[str]:
    """Return the distinct values in order of first occurrence."""
    return [value for value in dict.fromkeys(values) if value]


LISTS: dict[str, Callable[[], list[Row]]] = {
    "suites": lambda: [
        {"name": suite.name, "benchmarks": list(suite.settings.benchmarks)}
        for suite in map(plain_suite, suite_names())
    ],
    "benchmarks": lambda: [
        {
            "name": name,
            "title": load_benchmark(name).definition.title,
            "suites": sorted(suite_parts(name)),
        }
        for name in benchmark_names()
    ],
    "methods": lambda: _rows(load_methods(), "kind", "role"),
    "tasks": _tasks,
    "models": lambda: _rows(load_models(), "modality", "hub", "package", "timm"),
    "metrics": lambda: [
        {"name": name, **metric.model_dump(include={"label", "unit", "direction", "tolerance"})}
        for name, metric in load_metrics().items()
    ],
    "claims": lambda: [
        {**row, "tests": len(load_claims()[row["name"]].tests)} for row in _rows(load_claims())
    ],
}
