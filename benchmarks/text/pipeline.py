"""Fine-tune a text classifier on one task, fully or with adapters, and evaluate it on this and other tasks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.harness.config.benchmark import load_benchmark
from benchmarks.harness.models.build import build_classifier, save_trained
from benchmarks.harness.models.conversion import convert_trained_
from benchmarks.harness.models.loading import load_tokenizer
from benchmarks.harness.training.progress import Progress
from benchmarks.text.data import TextSplit, load_part
from benchmarks.text.definition import RunTask, TextSpec, TextTraining
from benchmarks.text.tokenization import calibration_batches
from benchmarks.text.training import TextTrainer
from benchmarks.text.usage import RoutingRecorder


def run(spec: TextSpec, folder: Path, progress: Progress) -> dict[str, Any]:
    """Train and evaluate the text classifier of one spec.

    Args:
        spec: The settings of the run.
        folder: The run's folder, for checkpoints and kept weights.
        progress: The progress line.

    Returns:
        The content of ``metrics.json`` without the harness's part.
    """
    task, training = spec.task, spec.training
    load = partial(load_part, entries=load_benchmark(spec.benchmark).tasks, say=progress.say)
    splits = _splits(task, training, load)
    ood = {
        other.name: load(other, "test", training.ood_rows or training.eval_rows)
        for other in spec.ood
    }

    tokenizer = load_tokenizer(spec.model)
    calibration = calibration_batches(
        splits["train"], tokenizer, training.max_length, training.eval_batch_size
    )
    classifier = build_classifier(spec, len(task.labels), tokenizer, calibration)
    trainer = TextTrainer(
        classifier, tokenizer, spec, splits["train"], splits["dev"], folder, progress
    )
    epochs, kept = trainer.train()
    progress.say("evaluating")
    scores = {"dev": {task.name: {name: value for name, value in kept.items() if name != "epoch"}}}
    routing = RoutingRecorder(classifier.model)
    scores |= _evaluate(trainer, spec, splits["test"], ood, routing)
    routed, usage = routing.set_routing(task.name)
    if training.keep_weights:
        save_trained(classifier.model, folder / "model")
    transformed = {}
    if spec.used_as:
        as_other = {part: scores[part] for part in ("test", "ood")}
        # weights of a diverged model cannot be clustered; keep its scores
        if kept["loss"] is not None:
            progress.say(f"evaluating as {spec.used_as.name}")
            convert_trained_(classifier.model, spec.used_as.config)
            as_other = _evaluate(trainer, spec, splits["test"], ood)
        transformed = {spec.used_as.name: {"scores": as_other}}
    return {
        "scores": scores,
        "transformed": transformed,
        "epochs": epochs,
        "kept_epoch": kept["epoch"],
        "routing": routed | trainer.routing_trace.summary(),
        "usage": usage,
        "probe": trainer.probe.summary(),
        "model": classifier.summary,
        "cost": {**trainer.cost, **classifier.prefix_cost()},
        "data": {part: split.summary() for part, split in splits.items()}
        | {f"ood:{name}": split.summary() for name, split in ood.items()},
    }


def _evaluate(
    trainer: TextTrainer,
    spec: TextSpec,
    test: TextSplit,
    ood: Mapping[str, TextSplit],
    routing: RoutingRecorder | None = None,
) -> dict[str, dict[str, dict[str, float | None]]]:
    """Return the scores on the test split and the OOD sets, by part, set and metric."""
    return {
        "test": {spec.task.name: trainer.evaluate(test, routing=routing)},
        "ood": {
            other.name: trainer.evaluate(ood[other.name], other, routing) for other in spec.ood
        },
    }


def _splits(
    task: RunTask, training: TextTraining, load: Callable[..., TextSplit]
) -> dict[str, TextSplit]:
    """Load the splits of a run: train, dev (for selection) and test (reported).

    A task without a test split reports the dev split, and a clean run selects with held-out training rows.
    """
    train = load(task, "train", training.train_rows)
    test = load(task, "test", training.eval_rows)
    if training.validation_fraction:
        train, dev = train.hold_out(training.validation_fraction, f"{task.name}/held out")
    else:
        dev = (
            load(task, "dev", training.dev_rows or training.eval_rows) if task.splits.test else test
        )
    if training.train_share:
        train = train.stratified_sample(training.train_share, f"{task.name}/train")
    return {"train": train, "dev": dev, "test": test}
