"""Train an encoder-decoder on several tasks at once; evaluate it on each of them and, without training, on others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.harness.config.benchmark import load_benchmark
from benchmarks.harness.config.yaml import parse
from benchmarks.harness.models.build import build_seq2seq
from benchmarks.harness.models.loading import load_seq2seq_tokenizer
from benchmarks.harness.training.progress import Progress
from benchmarks.harness.training.routing import evaluate_with_routing
from benchmarks.multitask.definition import LearnedTask, MultitaskSpec, MultitaskTraining
from benchmarks.multitask.training import MultitaskTrainer
from benchmarks.text.data import TextSplit, load_part


def run(spec: Mapping[str, Any], folder: Path, progress: Progress) -> dict[str, Any]:
    """Train and evaluate the model of one spec.

    Args:
        spec: The content of ``run.json``.
        folder: The folder of the run, for checkpoints.
        progress: The log.

    Returns:
        The content of ``metrics.json``, less the harness's part.
    """
    read = parse(spec, MultitaskSpec, str(folder / "run.json"))
    tasks, training = read.task.tasks, read.training
    load = partial(load_part, entries=load_benchmark(read.benchmark).tasks, say=progress.say)
    splits = {task.name: _splits(task, training, load) for task in tasks}
    ood = {other.name: load(other, "test", training.eval_rows) for other in read.ood}
    train, dev, test = ({name: parts[part] for name, parts in splits.items()} for part in ("train", "dev", "test"))

    tokenizer = load_seq2seq_tokenizer(spec["model"])
    trainable = build_seq2seq(spec)
    trainer = MultitaskTrainer(trainable, tokenizer, read, train, dev, folder, progress)
    epochs, kept = trainer.fit()
    progress.say("evaluating")
    tested, routing = evaluate_with_routing(
        trainable.model, lambda: {task.name: trainer.score(test[task.name], task) for task in tasks}
    )
    return {
        "scores": {
            "dev": trainer.dev_scores(),
            "test": tested,
            "ood": {other.name: trainer.score(ood[other.name], other) for other in read.ood},
        },
        "dev_curve": epochs,
        "kept_epoch": kept["epoch"],
        "routing": routing,
        "probe": trainer.probe.summary(),
        "model": trainable.summary,
        "cost": trainer.cost,
        "data": {f"{part}:{name}": split.summary() for name, parts in splits.items() for part, split in parts.items()}
        | {f"ood:{name}": split.summary() for name, split in ood.items()},
    }


def _splits(task: LearnedTask, training: MultitaskTraining, load: Callable[..., TextSplit]) -> dict[str, TextSplit]:
    """Load the splits of a task: train, dev (for selection) and test (reported).

    A task without a test split reports the dev split, and selects with held-out training rows.
    """
    train, test = load(task, "train", None), load(task, "test", training.eval_rows)
    if task.splits.test:
        dev = load(task, "dev", training.dev_rows)
    else:
        train, dev = train.hold_out(training.validation_fraction, f"{task.name}/held out")
        dev = dev.sample(training.dev_rows, f"{task.name}/held out rows")
    return {"train": train, "dev": dev, "test": test}
