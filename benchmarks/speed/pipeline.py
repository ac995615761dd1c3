"""Measure one thing under one setting, all candidates in turn in one process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.base.seeds import derive_seed
from benchmarks.harness.training.progress import Progress
from benchmarks.speed import decode, layer, partition, step
from benchmarks.speed.definition import RunModel, read_spec

_MEASURES: dict[str, Callable[[RunModel, Any], dict[str, dict[str, float]]]] = {
    "layer": layer.measure,
    "step": step.measure,
    "decode": decode.measure_ffns,
    "prompt": decode.measure_prompt,
    "generate": decode.measure_generate,
    "partition": partition.measure,
}


def run(spec: Mapping[str, Any], folder: Path, progress: Progress) -> dict[str, Any]:
    """Run one spec.

    Args:
        spec: the content of ``run.json``.
        folder: the run's folder; nothing is written there.
        progress: where to say what is going on.

    Returns:
        The content of ``metrics.json``, less what the harness adds: ``measured`` by candidate.
    """
    measure, (model, settings) = spec["task"]["name"], read_spec(spec, str(folder / "run.json"))
    torch.set_num_threads(settings.threads)
    torch.manual_seed(derive_seed("speed", spec["seed"]))
    progress.say(f"measuring the {measure}")
    return {"measured": _MEASURES[measure](model, settings), "cost": {}}
