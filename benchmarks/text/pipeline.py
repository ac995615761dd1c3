"""Fine-tune a text classifier on one task, fully or with adapters.

It is evaluated on this task and on out-of-distribution (OOD) sets.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.base import derive_seed
from benchmarks.harness.config.benchmark import load_benchmark
from benchmarks.harness.models.build import build_classifier, save_trained
from benchmarks.harness.models.conversion import check_layers, convert_trained_
from benchmarks.harness.models.loading import load_tokenizer
from benchmarks.harness.training.progress import Progress
from benchmarks.text.data import TaskSplits, TextSplit, load_part, load_splits, summarise_splits
from benchmarks.text.definition import TextSpec
from benchmarks.text.tokenization import calibration_batches
from benchmarks.text.training import TextTrainer
from benchmarks.text.usage import RoutingRecorder


def run(spec: TextSpec, folder: Path, progress: Progress) -> dict[str, Any]:
    """Train and evaluate the text classifier of one spec.

    Args:
        spec: The settings of the run.
        folder: The folder of the run, for checkpoints and kept weights.
        progress: The progress line.

    Returns:
        The content of ``metrics.json``, without the sections that the harness adds.
    """
    task = spec.task
    training = spec.training
    # `load_part` checks row counts against the entries of tasks.yaml
    entries = load_benchmark(spec.benchmark).tasks
    load = partial(load_part, entries=entries, warn=progress.warn)
    splits = _load_splits(spec, load)
    ood_rows = training.ood_rows or training.eval_rows
    ood = {other.name: load(other, "test", ood_rows) for other in spec.ood}

    tokenizer = load_tokenizer(spec.model)
    # a partition by co-activation measures the activations of these rows
    calibration = calibration_batches(
        splits.train,
        tokenizer,
        max_length=training.max_length,
        batch_size=training.eval_batch_size,
    )
    classifier = build_classifier(
        spec, labels=len(task.labels), tokenizer=tokenizer, calibration=calibration
    )
    # fail before the training if the trained model could not be converted after it
    if spec.used_as and spec.used_as.config:
        check_layers(classifier.model, spec.used_as.config)
    trainer = TextTrainer(
        classifier=classifier,
        tokenizer=tokenizer,
        spec=spec,
        train=splits.train,
        dev=splits.dev,
        folder=folder,
        progress=progress,
    )
    epochs, kept = trainer.train()

    progress.say("evaluating")
    recorder = RoutingRecorder(classifier.model)
    scores = _evaluate(trainer, spec, splits.test, ood, recorder)
    task_routing = recorder.routing_of_set(task.name)
    # save the weights now, because the conversion below would change the model
    if training.keep_weights:
        save_trained(classifier.model, folder / "model")

    # evaluate the trained model again as another method
    transformed = {}
    if spec.used_as:
        # A diverged model has no loss, and its weights cannot be clustered. So it is not converted,
        # and the other method gets the same scores.
        has_diverged = kept["loss"] is None
        if has_diverged:
            scores_as_other = scores
        else:
            progress.say(f"evaluating as {spec.used_as.name}")
            convert_trained_(classifier.model, spec.used_as.config)
            scores_as_other = _evaluate(trainer, spec, splits.test, ood)
        transformed = {spec.used_as.name: {"scores": scores_as_other}}

    # the scores of the kept epoch, without the number of the epoch
    dev_scores = {name: value for name, value in kept.items() if name != "epoch"}
    return {
        "scores": {"dev": {task.name: dev_scores}, **scores},
        "transformed": transformed,
        "epochs": epochs,
        "kept_epoch": kept["epoch"],
        "routing": {**task_routing.routing, **trainer.routing_trace.summary()},
        "usage": task_routing.usage,
        "probe": trainer.probe.summary(),
        "model": classifier.summary,
        "cost": {**trainer.cost, **classifier.prefix_cost()},
        "data": summarise_splits(splits._asdict(), ood),
    }


def _evaluate(
    trainer: TextTrainer,
    spec: TextSpec,
    test: TextSplit,
    ood: Mapping[str, TextSplit],
    recorder: RoutingRecorder | None = None,
) -> dict[str, dict[str, dict[str, float | None]]]:
    """Evaluate on the test split and the OOD sets; record routing if ``recorder`` is given.

    Returns:
        The scores by part (``test`` or ``ood``), set and metric.
    """
    # Random selection of experts draws from the global generator. After the training, its state
    # depends on whether the run was resumed. No other method depends on it in an evaluation.
    torch.manual_seed(derive_seed("evaluation", spec.seed))
    test_scores = trainer.evaluate(test, recorder=recorder)
    ood_scores = {}
    for other in spec.ood:
        ood_scores[other.name] = trainer.evaluate(ood[other.name], other, recorder)
    return {"test": {spec.task.name: test_scores}, "ood": ood_scores}


def _load_splits(spec: TextSpec, load: Callable[..., TextSplit]) -> TaskSplits:
    """Load the splits of a run with ``load``, which is :func:`.data.load_part`.

    The rows for training are drawn with the run's seed, so they differ between seeds and are the
    same for all methods. The rows for selection and for the report are the same in every run.
    """
    task = spec.task
    training = spec.training
    splits = load_splits(
        task,
        load,
        # the fraction is 0 in a published run, and if the task has a test split; None holds out no
        # rows
        held_out_share=training.validation_fraction or None,
        dev_rows=training.dev_rows or training.eval_rows,
        test_rows=training.eval_rows,
    )
    train = splits.train.sample(training.train_rows, f"{task.name}/train/{spec.seed}")
    if training.train_share:
        train = train.stratified_sample(training.train_share, f"{task.name}/share/{spec.seed}")
    return splits._replace(train=train)
