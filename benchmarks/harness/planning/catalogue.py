"""The models and metrics that benchmarks may name."""

from __future__ import annotations

import functools
from typing import Any

from benchmarks.harness.base.paths import BENCHMARKS
from benchmarks.harness.planning.schema import read_checked


@functools.cache
def load_models() -> dict[str, Any]:
    """The models that benchmarks may name: ``benchmarks/models.yaml``."""
    models: dict[str, Any] = read_checked(BENCHMARKS / "models.yaml", "models")["models"]
    return models


@functools.cache
def load_metrics() -> dict[str, dict[str, Any]]:
    """Label, unit, direction, decimals and tolerances of every metric: ``benchmarks/metrics.yaml``."""
    metrics: dict[str, dict[str, Any]] = read_checked(BENCHMARKS / "metrics.yaml", "metrics")["metrics"]
    return metrics
