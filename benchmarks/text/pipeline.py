"""Fine-tune a text classifier on one task, fully or with adapters, and evaluate it.

It is evaluated on this task and on OOD sets.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

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
    task = spec.task
    training = spec.training
    load = partial(load_part, entries=load_benchmark(spec.benchmark).tasks, say=progress.say)
    splits = _load_splits(task, training, load)
    ood_rows = training.ood_rows or training.eval_rows
    ood = {other.name: load(other, "test", ood_rows) for other in spec.ood}

    tokenizer = load_tokenizer(spec.model)
    # a co-activation partition is made with training rows
    calibration = calibration_batches(
        splits.train, tokenizer, training.max_length, training.eval_batch_size
    )
    classifier = build_classifier(spec, len(task.labels), tokenizer, calibration)
    trainer = TextTrainer(classifier, tokenizer, spec, splits.train, splits.dev, folder, progress)
    epochs, kept = trainer.train()

    progress.say("evaluating")
    routing = RoutingRecorder(classifier.model)
    evaluated = _evaluate(trainer, spec, splits.test, ood, routing)
    routed, usage = routing.set_routing(task.name)
    # before the model may be converted to another method
    if training.keep_weights:
        save_trained(classifier.model, folder / "model")

    transformed = {}
    if spec.used_as:
        as_other = evaluated
        # weights of a diverged model cannot be clustered; keep its scores
        if kept["loss"] is not None:
            progress.say(f"evaluating as {spec.used_as.name}")
            convert_trained_(classifier.model, spec.used_as.config)
            as_other = _evaluate(trainer, spec, splits.test, ood)
        transformed = {spec.used_as.name: {"scores": as_other}}

    # all numbers of the kept epoch but its own
    dev_scores = {name: value for name, value in kept.items() if name != "epoch"}
    return {
        "scores": {"dev": {task.name: dev_scores}, **evaluated},
        "transformed": transformed,
        "epochs": epochs,
        "kept_epoch": kept["epoch"],
        "routing": {**routed, **trainer.routing_trace.summary()},
        "usage": usage,
        "probe": trainer.probe.summary(),
        "model": classifier.summary,
        "cost": {**trainer.cost, **classifier.prefix_cost()},
        "data": {
            **{part: split.summary() for part, split in splits._asdict().items()},
            **{f"ood:{name}": split.summary() for name, split in ood.items()},
        },
    }


def _evaluate(
    trainer: TextTrainer,
    spec: TextSpec,
    test: TextSplit,
    ood: Mapping[str, TextSplit],
    routing: RoutingRecorder | None = None,
) -> dict[str, dict[str, dict[str, float | None]]]:
    """Return the scores on the test split and the OOD sets, by part, set and metric."""
    tested = trainer.evaluate(test, routing=routing)
    by_set = {}
    for other in spec.ood:
        by_set[other.name] = trainer.evaluate(ood[other.name], other, routing)
    return {"test": {spec.task.name: tested}, "ood": by_set}


class _Splits(NamedTuple):
    """The splits of a run."""

    train: TextSplit
    dev: TextSplit  # for selection
    test: TextSplit  # reported


def _load_splits(task: RunTask, training: TextTraining, load: Callable[..., TextSplit]) -> _Splits:
    """Load the splits of a run.

    A task without a test split reports the dev split. A clean run of such a task selects with
    held-out training rows, and a published run with the reported split.
    """
    train = load(task, "train", training.train_rows)
    test = load(task, "test", training.eval_rows)
    if training.validation_fraction:
        train, dev = train.hold_out(training.validation_fraction, f"{task.name}/held out")
    elif task.splits.test:
        dev = load(task, "dev", training.dev_rows or training.eval_rows)
    else:
        dev = test
    # after the dev rows are held out, so that these are the same for every share
    if training.train_share:
        train = train.stratified_sample(training.train_share, f"{task.name}/train")
    return _Splits(train, dev, test)
