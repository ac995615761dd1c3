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
from benchmarks.harness.training.trainer import evaluate_with_routing
from benchmarks.multitask.definition import MultitaskSpec, MultitaskTraining, WrittenTask
from benchmarks.multitask.training import MultitaskTrainer
from benchmarks.text.data import TextSplit, load_part


def run(spec: Mapping[str, Any], folder: Path, progress: Progress) -> dict[str, Any]:
    """Run one spec.

    Args:
        spec: The content of ``run.json``.
        folder: The folder of the run, for checkpoints.
        progress: The log.

    Returns:
        The content of ``metrics.json``, less the harness's part.
    """
    read = parse(spec, MultitaskSpec, str(folder / "run.json"))
    tasks, training = read.task.tasks, read.training
    load = partial(load_part, known=load_benchmark(read.benchmark).tasks, say=progress.say)
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


def _splits(task: WrittenTask, training: MultitaskTraining, load: Callable[..., TextSplit]) -> dict[str, TextSplit]:
    """Load train, dev (which chooses) and test (which is reported) of a task.

    Without a test split the dev split is reported, and a share of the training rows is held out to choose by.
    """
    train, test = load(task, "train", None), load(task, "test", training.eval_rows)
    if task.splits.test:
        dev = load(task, "dev", training.dev_rows)
    else:
        train, dev = train.divided(training.validation_fraction, f"{task.name}/held out")
        dev = dev.head(training.dev_rows, f"{task.name}/held out rows")
    return {"train": train, "dev": dev, "test": test}
