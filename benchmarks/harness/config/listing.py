"""What there is: suites, benchmarks, methods, tasks, models, metrics, claims, a row each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.harness.config.catalogue import load_metrics, load_models
from benchmarks.harness.config.claims import load_claims, suites_with
from benchmarks.harness.config.definition import benchmark_names, load_benchmark
from benchmarks.harness.config.method_rows import load_methods
from benchmarks.harness.config.suite import plain_suite, suite_names

Row = dict[str, Any]


def overview() -> list[Row]:
    """How much there is of each, and what it is called."""
    names: dict[str, list[str]] = {
        "suites": suite_names(),
        "benchmarks": benchmark_names(),
        "methods": list(load_methods()),
        "tasks": [task for name in benchmark_names() for task in load_benchmark(name).tasks],
        "models": list(load_models()),
        "metrics": list(load_metrics()),
        "claims": list(load_claims()),
    }
    return [{"kind": kind, "how many": len(found), "names": _some(found)} for kind, found in names.items()]


def _some(names: list[str], length: int = 50) -> str:
    """As many of the names as a line has room for."""
    shown = list(dict.fromkeys(names))
    while len(", ".join(shown)) > length:
        shown.pop()
    return ", ".join(shown) + (", …" if len(shown) < len(set(names)) else "")


def _suites() -> list[Row]:
    found = []
    for name in suite_names():
        suite = plain_suite(name)
        found.append({"name": name, "runs": len(suite.runs), "benchmarks": suite.settings.benchmarks})
    return found


def _benchmarks() -> list[Row]:
    found = []
    for name in benchmark_names():
        loaded = load_benchmark(name)
        definition = loaded.definition
        methods = len(getattr(definition, "methods", ()))
        more = {"tasks": len(loaded.tasks), "methods": methods, "suites": sorted(definition.suites)}
        found.append({"name": name, "title": definition.title, **more})
    return found


def _methods() -> list[Row]:
    used: dict[str, list[str]] = {}
    for name in benchmark_names():
        for row, settings in getattr(load_benchmark(name).definition, "methods", {}).items():
            used.setdefault(settings.method or row, []).append(name)
    return [
        {
            "name": name,
            "title": method.title,
            "kind": method.kind,
            "role": method.role,
            "benchmarks": list(dict.fromkeys(used.get(name, ()))),
        }
        for name, method in load_methods().items()
    ]


def _tasks() -> list[Row]:
    return [
        {"benchmark": name, "name": task, "title": entry.title}
        for name in benchmark_names()
        for task, entry in load_benchmark(name).tasks.items()
    ]


def _models() -> list[Row]:
    return [
        {
            "name": name,
            "title": model.title,
            "for": model.modality or "text",
            "from": model.hub or model.package or model.rebuilt or model.timm or "random weights",
        }
        for name, model in load_models().items()
    ]


def _metrics() -> list[Row]:
    return [
        {
            "name": name,
            "label": metric.label,
            "unit": metric.unit,
            "better": metric.direction,
            "tolerance": metric.tolerance,
        }
        for name, metric in load_metrics().items()
    ]


def _claims() -> list[Row]:
    found = []
    for name, claim in load_claims().items():
        compared = [test.compare for test in claim.tests if test.compare]
        suites = sorted({suite for compare in compared for suite in suites_with(compare)})
        tests = f"{len(compared)} of {len(claim.tests)}" if len(compared) < len(claim.tests) else str(len(compared))
        found.append({"name": name, "title": claim.title, "tests": tests, "suites": suites})
    return found


LISTS: dict[str, Callable[[], list[Row]]] = {
    "suites": _suites,
    "benchmarks": _benchmarks,
    "methods": _methods,
    "tasks": _tasks,
    "models": _models,
    "metrics": _metrics,
    "claims": _claims,
}
