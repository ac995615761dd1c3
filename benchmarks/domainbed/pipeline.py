"""Train an image classifier on some environments and evaluate it on the held-out ones, with DomainBed's protocol."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import timm  # noqa: F401  (runs use it later; a process that forks for runs imports it once)

from benchmarks.domainbed.batches import (
    EnvironmentBatches,
    EvaluationRows,
    TrainingRows,
    evaluation_transform,
    training_transform,
    with_prefix,
)
from benchmarks.domainbed.definition import ImageSpec
from benchmarks.domainbed.images import Environment, ImageSet, normalize_name
from benchmarks.domainbed.protocol import HOLDOUT_FRACTION, Split, best_record, split_environment
from benchmarks.domainbed.training import ACCURACY, DomainTrainer
from benchmarks.domainbed.validation import count_images, load_set, validate_once
from benchmarks.harness.base import DataError, derive_seed, write_text
from benchmarks.harness.config.benchmark import load_benchmark
from benchmarks.harness.config.sets import ALL, SetPart
from benchmarks.harness.models.build import build_image_classifier
from benchmarks.harness.models.prefix import Prefix
from benchmarks.harness.training.progress import Progress


def run(spec: ImageSpec, folder: Path, progress: Progress) -> dict[str, Any]:
    """Train and evaluate the image classifier of one spec.

    Args:
        spec: The settings of the run.
        folder: The run's folder, for checkpoints and for the records in DomainBed's form (``results.jsonl``).
        progress: The reporter of progress.

    Returns:
        The content of ``metrics.json`` without the harness's part.
    """
    training, hparams, held_out = spec.training, spec.hparams, spec.test_envs
    image_set = load_set(spec.task, spec.data_seed, truncated=training.truncated)
    if not spec.task.source.mnist:
        validate_once(image_set, spec.task, training.truncated)
    envs, classes, size = image_set.environments, image_set.classes, training.image_size
    progress.say(image_set.source)
    for name, count, labels in count_images(image_set):
        progress.say(f"{name}: {count:,} images, {labels}")
    entry = load_benchmark(spec.benchmark).tasks.get(spec.task.name)
    if entry and (
        note := SetPart(spec.task.name, ALL, sum(map(len, envs)), expected=entry.images).note
    ):
        progress.say(f"warning: {note}")
    splits = _split(spec, image_set)
    trained = [env for env in range(len(envs)) if env not in held_out]
    names = [", ".join(envs[env].name for env in chosen) for chosen in (held_out, trained)]
    progress.say(f"held out: {names[0]}; trained on: {names[1]}")
    classifier = build_image_classifier(
        spec, len(classes), size, drop_path=training.drop_path, dropout=hparams.vit_dropout or 0.0
    )
    if classifier.prefix is not None:
        envs = _add_prefixes(classifier.prefix, spec, envs, splits)
    rows = [splits[env].within for env in trained]
    seed = derive_seed("environments", spec.seed, *held_out)  # the same draws for all methods
    transform = (
        training_transform(size) if hparams.data_augmentation else evaluation_transform(size)
    )
    trainer = DomainTrainer(
        classifier,
        spec,
        TrainingRows([envs[env] for env in trained], rows, transform, seed),
        EnvironmentBatches(
            [len(chosen) for chosen in rows], hparams.batch_size, training.steps, seed
        ),
        _evaluation_splits(spec, envs, splits),
        folder,
        progress,
    )
    # DomainBed's epoch: steps through the smallest environment, held out or not
    epoch = min(len(split.within) for split in splits) / hparams.batch_size
    records = [record | {"epoch": record["step"] / epoch} for record in trainer.fit()]
    _write_results(folder / "results.jsonl", spec, records)
    progress.say("predicting the out splits")
    out = [
        EvaluationRows(environment, split.out[: training.eval_rows], evaluation_transform(size))
        for environment, split in zip(envs, splits, strict=True)
    ]
    confusion, routing = trainer.predict_splits(out, len(classes))
    best = best_record(records, held_out)
    return {
        "records": records,
        "scores": {
            "train": {spec.task.name: {"loss": best.record["loss"]}},
            "dev": {spec.task.name: {ACCURACY: best.value}},
            "test": {envs[env].name: {ACCURACY: best.test_accuracy(env)} for env in held_out},
        },
        "confusion": {
            environment.name: matrix.tolist()
            for environment, matrix in zip(envs, confusion, strict=True)
        },
        "classes": classes,
        "routing": routing,
        "probe": trainer.probe.summary(),
        "model": classifier.summary,
        "cost": {**trainer.cost, **classifier.prefix_cost()},
        "data": {
            f"{environment.name} {name}": {
                "source": image_set.source,
                **environment.summary(classes, chosen),
            }
            for environment, split in zip(envs, splits, strict=True)
            for name, chosen in (("in", split.within), ("out", split.out))
        },
    }


def _split(spec: ImageSpec, image_set: ImageSet) -> list[Split]:
    """Split every environment (:class:`DataError` if one is too small)."""
    splits = []
    for env, environment in enumerate(image_set.environments):
        split = split_environment(len(environment), env, spec.seed, is_test=env in spec.test_envs)
        if not split.within or not split.out:
            raise DataError(
                f"{image_set.source}: the environment '{environment.name}' has {len(environment)} images, too few to "
                "split"
            )
        splits.append(split)
    return splits


def _add_prefixes(
    prefix: Prefix, spec: ImageSpec, environments: list[Environment], splits: list[Split]
) -> list[Environment]:
    """Add the outputs of the model's frozen layers for all rows in training or evaluation."""
    training, prefixed = spec.training, list(environments)
    # methods begin with different environments, so that concurrent runs share the work instead of waiting
    begin = derive_seed("first", spec.method.name)
    for number in range(begin, begin + len(environments)):
        env = number % len(environments)
        within, out = splits[env]
        within = within[: training.eval_rows] if env in spec.test_envs else within
        # sorted, so that trials share the cache if they use all rows
        rows = sorted([*within, *out[: training.eval_rows]])
        prefixed[env] = with_prefix(environments[env], prefix, rows, training.image_size)
    return prefixed


def _evaluation_splits(
    spec: ImageSpec, environments: list[Environment], splits: list[Split]
) -> dict[str, EvaluationRows]:
    """Return the evaluated splits by DomainBed's names (``env0_in``, ``env0_out``, …)."""
    training, size, evaluated = spec.training, spec.training.image_size, {}
    for name in ("in", "out"):
        for env, (environment, split) in enumerate(zip(environments, splits, strict=True)):
            is_test = env in spec.test_envs
            if name == "in" and not is_test and training.evaluate == "needed":
                continue
            augments = spec.hparams.data_augmentation and training.val_augment and not is_test
            transform = training_transform(size) if augments else evaluation_transform(size)
            rows = split.within if name == "in" else split.out
            evaluated[f"env{env}_{name}"] = EvaluationRows(
                environment, rows[: training.eval_rows], transform
            )
    return evaluated


def _write_results(path: Path, spec: ImageSpec, records: list[dict[str, Any]]) -> None:
    """Write the records with the run's arguments, in the format of DomainBed's scripts.

    The scripts group by data set, algorithm, held-out environments, draw and trial. The algorithm's name contains all
    other settings: their digest, the variant, the model, and the set if it is a variant of DomainBed's.
    """
    method, task = spec.method, spec.task
    variant = task.name if normalize_name(task.name) != normalize_name(task.domainbed) else ""
    names = (f"{method.name}-{spec.sweep}", method.variant, spec.model.name, variant)
    arguments = {
        "dataset": task.domainbed,
        "algorithm": "@".join(filter(None, names)),
        "test_envs": spec.test_envs,
        "hparams_seed": spec.hparams_seed,
        "trial_seed": spec.seed,
        "seed": spec.data_seed,
        "holdout_fraction": HOLDOUT_FRACTION,
        "task": "domain_generalization",
        "steps": spec.training.steps,
    }
    more = {"args": arguments, "hparams": spec.hparams.model_dump()}
    write_text(
        path, "".join(json.dumps({**record, **more}, sort_keys=True) + "\n" for record in records)
    )
