"""Fine-tune a text classifier on one task; evaluate it there and, untouched, on others."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import emoe
from benchmarks.harness.methods import apply_method_
from benchmarks.harness.models import describe, load_classifier, load_tokenizer, weights_digest
from benchmarks.harness.progress import Progress
from benchmarks.harness.seeds import derive_seed
from benchmarks.harness.text import TextSplit, load_split
from benchmarks.harness.training import TextTrainer, calibration_batches
from emoe.layer import routed_layers


def run(spec: Mapping[str, Any], folder: Path, progress: Progress) -> dict[str, Any]:
    """Run one spec.

    Args:
        spec: the content of ``run.json``.
        folder: the run's folder, for checkpoints.
        progress: where to say what is going on.

    Returns:
        The content of ``metrics.json``, less what the harness adds.
    """
    task, training = spec["task"], spec["training"]
    splits = {part: _load(task, part, training) for part in ("train", "dev", "test")}
    ood = {other["name"]: _load(other, "test", training) for other in spec["ood"]}

    tokenizer = load_tokenizer(spec["model"])
    model = load_classifier(
        spec["model"], max(len(task["labels"]), 1), derive_seed("head", spec["seed"]), tokenizer.pad_token_id
    )
    dense_parameters = model.num_parameters()
    source = {"from": describe(spec["model"], model), "weights": weights_digest(model.base_model)}
    calibration = calibration_batches(splits["train"], tokenizer, training)
    report = apply_method_(model, spec["method"], spec["seed"], calibration)

    trainer = TextTrainer(model, tokenizer, spec, splits["train"], splits["dev"], folder, progress)
    result = trainer.train()
    progress.say("evaluating")
    scores = {"dev": {task["name"]: {name: value for name, value in result.kept.items() if name != "epoch"}}}
    routing: dict[str, Any] = {}
    if routed_layers(model):
        with emoe.record_routing(model) as record:
            scores["test"] = {task["name"]: trainer.evaluate(splits["test"])}
        routing = record.summary() | {
            "shares": {str(layer): found.shares.tolist() for layer, found in record.layers.items()}
        }
    else:
        scores["test"] = {task["name"]: trainer.evaluate(splits["test"])}
    scores["ood"] = {name: trainer.evaluate(split) for name, split in ood.items()}
    return {
        "scores": scores,
        "epochs": result.epochs,
        "kept_epoch": result.kept["epoch"],
        "routing": routing,
        "model": {
            "source": source,
            "parameters": model.num_parameters(),
            "dense_parameters": dense_parameters,
            "trainable_parameters": model.num_parameters(only_trainable=True),
            "active_neurons": report.active_neurons if report else 1.0,
            "conversion": [dataclasses.asdict(layer) for layer in report.layers] if report else [],
        },
        "cost": {
            "steps": result.steps,
            "step_seconds": result.step_seconds,
            "train_seconds": result.step_seconds * result.steps,
            "evaluation_seconds": trainer.evaluation_seconds,
        },
        "data": {part: split.summary() for part, split in splits.items()}
        | {f"ood:{name}": split.summary() for name, split in ood.items()},
    }


def _load(task: Mapping[str, Any], part: str, training: Mapping[str, Any]) -> TextSplit:
    """One part of a task, cut to the rows that the run uses. Without a test split the dev split is reported."""
    if part == "test" and task["splits"]["test"] is None:
        part = "dev"
    rows = training["train_rows" if part == "train" else "eval_rows"]
    return load_split(task, part).head(rows, f"{task['name']}/{part}")
