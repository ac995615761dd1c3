"""Made-up ``metrics.json`` files for real plans: tables, mirrors and checks without training."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from benchmarks.harness.runs import Run, plan

ENVIRONMENT = {
    "packages": {"torch": "2"},
    "python": "3",
    "platform": "Linux",
    "git_commit": "abc",
    "git_dirty": False,
    "processor": "CPU",
    "cores": 2,
    "threads": 1,
    "memory_gb": 4.0,
    "gpus": [],
}


def metrics(run: Run, gain: float = 0.0) -> dict[str, Any]:
    """Plausible numbers; the same for the same run."""
    draw = random.Random(run.id)
    metric, task = run.spec["task"]["metric"], run.spec["task"]["name"]

    def one(base: float, metrics: tuple[str, ...] = (metric,)) -> dict[str, float]:
        return {name: min(base + gain + draw.uniform(-0.02, 0.02), 1.0) for name in metrics} | {"loss": 0.5}

    config = run.spec["method"]["config"]
    summary = {"rows": 10, "dropped": 1, "labels": {"0": 4, "1": 6}}
    ood = {other["name"]: one(0.75, tuple(other["ood_metrics"])) for other in run.spec["ood"]}
    data = {f"ood:{other['name']}": summary for other in run.spec["ood"]}
    if "candidates" in run.spec:
        return {
            "run_id": run.id,
            "scores": {"ood": ood},
            "chosen": {"run": run.spec["candidates"][0], "learning_rate": 0.1, "variant": ""},
            "cost": {"evaluation_seconds": 1.0, "startup_seconds": 0.2, "job_seconds": 2.0, "peak_memory_mb": 100.0},
            "data": data,
            "environment": ENVIRONMENT,
        }
    same = {"parameters": 10, "names": "same"}
    return {
        "run_id": run.id,
        "scores": {
            "dev": {task: one(0.9)},
            "test": {task: one(0.88)},
            "ood": ood,
        },
        "epochs": [{"epoch": 1.0, **one(0.85)}, {"epoch": 2.0, **one(0.9)}],
        "kept_epoch": 2.0,
        "routing": {"load_entropy": 0.9, "load_max_over_mean": 2.0, "drop_rate": 0.0} if config else {},
        "model": {
            "parameters": 1000,
            "dense_parameters": 1000,
            "trainable_parameters": 1000,
            "trained": {"adapters": same, "head": same} if run.spec["training"]["lora"] else {},
            "active_neurons": 0.5,
            "conversion": [],
        },
        "cost": {
            "steps": 2,
            "step_seconds": 0.5,
            "train_seconds": 1.0,
            "evaluation_seconds": 0.7,
            "startup_seconds": 0.2,
            "job_seconds": 2.0,
            "peak_memory_mb": 100.0,
        },
        "data": {
            "train": summary,
            "dev": summary,
            "test": summary,
            **data,
        },
        "environment": ENVIRONMENT,
    }


def measured(run: Run) -> dict[str, Any]:
    """Plausible measurements; the same for the same run."""
    draw = random.Random(run.id)
    found = {}
    for candidate in ("dense", *run.spec["settings"]["candidates"]):
        ratio = 1.0 if candidate == "dense" else draw.uniform(0.3, 2.0)
        found[candidate] = {"ratio": ratio, "ratio_low": 0.9 * ratio, "ratio_high": 1.1 * ratio, "seconds": 0.1 * ratio}
        found[candidate] |= {"inertia": 0.9} if run.spec["task"]["name"] == "partition" else {"memory_ratio": 0.3}
        if candidate == "sparse":
            found[candidate]["expected_ratio"] = 0.4
    return {"run_id": run.id, "measured": found, "cost": {"job_seconds": 1.0}, "environment": ENVIRONMENT}


def write(
    folder: Path, suite: str = "mini", gains: dict[str, float] | None = None, benchmarks: tuple[str, ...] = ("glue",)
) -> list[Run]:
    """Write the runs of a suite below ``folder``; ``gains`` shifts all scores of a method."""
    runs = plan(list(benchmarks), suite)
    for run in runs:
        path = folder / run.folder / "metrics.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        gain = (gains or {}).get(run.spec["method"]["name"], 0.0)
        path.write_text(json.dumps(measured(run) if "settings" in run.spec else metrics(run, gain)))
    return runs
