"""Write, execute and kill runs, and read the part of their numbers that is the same every time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from benchmarks.harness.base import RUNS
from benchmarks.harness.config.benchmark import load_benchmark
from benchmarks.harness.config.runs import Run
from benchmarks.harness.models.build import build_classifier, reopen
from benchmarks.harness.models.loading import load_tokenizer
from benchmarks.harness.models.trainable import Trainable
from benchmarks.harness.run.execution import execute
from benchmarks.harness.training.progress import Progress


def prepare(run: Run, folder: str = "runs") -> Path:
    """Write a run's ``run.json``."""
    path = Path(folder) / run.folder / "run.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(run.to_json())
    return path


def finish(path: Path) -> dict[str, Any]:
    """Execute a run, and return its :func:`numbers`."""
    execute(path, threads=1, log=path.parent / "log.txt")
    return numbers(path)


def recorded(run: Run) -> dict[str, Any]:
    """Execute a run below ``results/runs``, and return its metrics."""
    path = prepare(run, str(RUNS))
    metrics_file = execute(path, threads=1, log=path.parent / "log.txt")
    metrics: dict[str, Any] = json.loads(metrics_file.read_text())
    return metrics


def typed(run: Run) -> Any:
    """Return the validated spec of a run."""
    return load_benchmark(run.benchmark).read_spec(run)


def reopened(run: Run, metrics: dict[str, Any]) -> tuple[Trainable, Any]:
    """Return the model that a recorded run kept, and its tokenizer."""
    spec = typed(run)
    tokenizer = load_tokenizer(spec.model)
    num_labels = len(run.spec["task"]["labels"])
    build = partial(build_classifier, labels=num_labels, tokenizer=tokenizer)
    weights = metrics["model"]["source"]["weights"]
    model = reopen(build, spec, weights, RUNS / run.folder / "model")
    return model, tokenizer


def numbers(path: Path) -> dict[str, Any]:
    """Return the numbers of a finished run that must be the same every time: no costs, no machine.

    ``path`` is that of its ``run.json``.
    """
    metrics: dict[str, Any] = json.loads((path.parent / "metrics.json").read_text())
    del metrics["cost"]
    del metrics["environment"]
    # only runs with a converted model have this list
    for layer in metrics.get("model", {}).get("conversion", ()):
        del layer["seconds"]
    return metrics


@contextmanager
def killed_at(step: int) -> Iterator[None]:
    """Kill the run that is executed inside when a step ends."""

    def die(
        self: Progress,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        if state.global_step == step:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Progress, "on_step_end", die)
        with pytest.raises(KeyboardInterrupt):
            yield


def killed_and_resumed(run: Run, step: int) -> dict[str, Any]:
    """Kill a run when a step ends, execute it again, and return its numbers."""
    path = prepare(run, "killed")
    with killed_at(step):
        finish(path)
    assert not (path.parent / "metrics.json").exists()
    return finish(path)
