"""Train an image classifier on some environments, and evaluate it on the held-out ones.

The protocol is DomainBed's.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm  # noqa: F401  (runs use it; a process that forks for each run imports it once)

from benchmarks.domainbed.batches import (
    EnvironmentBatches,
    EvaluationRows,
    TrainingRows,
    Transform,
    evaluation_transform,
    training_transform,
    with_prefix,
)
from benchmarks.domainbed.definition import ImageSpec
from benchmarks.domainbed.images import Environment, ImageSet, normalize_name
from benchmarks.domainbed.protocol import HOLDOUT_FRACTION, Split, best_record, split_environment
from benchmarks.domainbed.training import ACCURACY, DomainTrainer
from benchmarks.domainbed.validation import count_images, digest_images, load_set, validate_once
from benchmarks.harness.base import DataError, derive_seed, write_text
from benchmarks.harness.config.benchmark import load_benchmark
from benchmarks.harness.config.sets import ALL, SetPart
from benchmarks.harness.models.build import build_image_classifier
from benchmarks.harness.models.prefix import Prefix
from benchmarks.harness.models.trainable import Trainable
from benchmarks.harness.training.progress import Progress


def run(spec: ImageSpec, folder: Path, progress: Progress) -> dict[str, Any]:
    """Train and evaluate the image classifier of one spec.

    Args:
        spec: The settings of the run.
        folder: The run's folder, for checkpoints and for ``results.jsonl``, the records in the
            format of DomainBed.
        progress: The reporter of progress.

    Returns:
        The content of ``metrics.json``, except for what the harness adds to every run.
    """
    data = _load_data(spec, progress)
    splits = data.splits
    classes = data.image_set.classes
    classifier = build_image_classifier(
        spec,
        len(classes),
        spec.training.image_size,
        drop_path=spec.training.drop_path,
        dropout=spec.hparams.vit_dropout or 0.0,
    )
    environments = data.image_set.environments
    # the output of frozen layers never changes, so it is computed once, before the training
    if classifier.prefix is not None:
        environments = _add_prefixes(classifier.prefix, spec, environments, splits)

    trainer = _make_trainer(
        classifier=classifier,
        spec=spec,
        environments=environments,
        splits=splits,
        folder=folder,
        progress=progress,
    )
    # a checkpoint is used only if it comes from the same images and pre-trained weights
    origin = {"images": digest_images(data.image_set), "weights": classifier.weights_id}
    evaluated_steps = trainer.fit(origin)
    records = _add_epochs(evaluated_steps, spec, splits)
    _write_results(folder / "results.jsonl", spec, records)

    # the confusion and the routing are of the last step, not of the selected one
    progress.say("predicting the out splits")
    out_rows = _out_rows(spec, environments, splits)
    confusion, routing = trainer.predict_splits(out_rows, len(classes))
    names = [environment.name for environment in environments]
    return {
        "records": records,
        "scores": _scores(spec, names, records),
        "confusion": dict(zip(names, confusion.tolist(), strict=True)),
        "classes": classes,
        "routing": routing,
        "probe": trainer.probe.summary(),
        "model": classifier.summary,
        "cost": {**trainer.cost, **classifier.prefix_cost()},
        "data": _summarise_data(data),
    }


@dataclass(frozen=True)
class _Data:
    """An image set, and the splits of its environments."""

    image_set: ImageSet
    splits: list[Split]


def _load_data(spec: ImageSpec, progress: Progress) -> _Data:
    """Load, check and split the image set, and report its size.

    Raises:
        DataError: The set is missing or damaged, or an environment is too small to split.
    """
    training = spec.training
    image_set = load_set(spec.task, spec.data_seed, truncated=training.truncated)
    # MNIST's digits are not separate files, so no single digit can be damaged
    if not spec.task.source.mnist:
        validate_once(image_set, spec.task, training.truncated)
    progress.say(image_set.source)
    for counts in count_images(image_set):
        progress.say(f"{counts.name}: {counts.images:,} images, {counts.labels}")
    note = _count_note(spec, image_set)
    if note:
        progress.warn(note)

    splits = _split(spec, image_set)
    environments = image_set.environments
    held_out = ", ".join(environments[env].name for env in spec.test_envs)
    trained = ", ".join(environments[env].name for env in _trained_envs(spec, environments))
    progress.say(f"held out: {held_out}; trained on: {trained}")
    return _Data(image_set, splits)


def _count_note(spec: ImageSpec, image_set: ImageSet) -> str | None:
    """Describe a difference between the number of images and the number that the makers published.

    The result is None if the numbers are equal or no number is published.
    """
    name = spec.task.name
    entry = load_benchmark(spec.benchmark).tasks.get(name)
    # the file of sets may lack the set of an older run
    if entry is None:
        return None
    return SetPart(name, ALL, rows=image_set.num_images, expected=entry.images).note


def _trained_envs(spec: ImageSpec, environments: Sequence[Environment]) -> list[int]:
    """Return the numbers of the environments that are not held out."""
    return [env for env in range(len(environments)) if env not in spec.test_envs]


def _make_trainer(
    classifier: Trainable,
    spec: ImageSpec,
    environments: Sequence[Environment],
    splits: Sequence[Split],
    folder: Path,
    progress: Progress,
) -> DomainTrainer:
    """Make the trainer of a classifier, with its training rows and evaluated splits."""
    training = spec.training
    hparams = spec.hparams
    # the seed does not depend on the method, so all methods draw the same rows
    seed = derive_seed("environments", spec.seed, *spec.test_envs)
    env_numbers = _trained_envs(spec, environments)
    train = TrainingRows(
        environments=[environments[env] for env in env_numbers],
        rows=[splits[env].within for env in env_numbers],
        transform=_transform(spec, augments=hparams.data_augmentation),
        seed=seed,
    )
    draws = EnvironmentBatches(
        row_counts=[len(rows) for rows in train.rows],
        batch_size=hparams.batch_size,
        steps=training.steps,
        seed=seed,
    )
    return DomainTrainer(
        classifier=classifier,
        spec=spec,
        train=train,
        draws=draws,
        splits=_evaluation_splits(spec, environments, splits),
        folder=folder,
        progress=progress,
    )


def _transform(spec: ImageSpec, *, augments: bool) -> Transform:
    """Return the transform of images; ``augments`` adds random augmentation."""
    if augments:
        return training_transform(spec.training.image_size)
    return evaluation_transform(spec.training.image_size)


def _add_epochs(
    records: Sequence[dict[str, Any]], spec: ImageSpec, splits: Sequence[Split]
) -> list[dict[str, Any]]:
    """Add the ``epoch`` to each record of an evaluated step."""
    # DomainBed's epoch is one pass through the *in* split of the smallest environment, even if this
    # environment is held out
    num_rows = min(len(split.within) for split in splits)
    steps_per_epoch = num_rows / spec.hparams.batch_size
    return [{**record, "epoch": record["step"] / steps_per_epoch} for record in records]


def _out_rows(
    spec: ImageSpec, environments: Sequence[Environment], splits: Sequence[Split]
) -> list[EvaluationRows]:
    """Return the evaluated rows of the *out* split of every environment, without augmentation."""
    transform = _transform(spec, augments=False)
    evaluated = []
    for environment, split in zip(environments, splits, strict=True):
        rows = split.out[: spec.training.eval_rows]
        evaluated.append(EvaluationRows(environment, rows, transform))
    return evaluated


def _scores(
    spec: ImageSpec, names: Sequence[str], records: Sequence[dict[str, Any]]
) -> dict[str, dict[str, dict[str, Any]]]:
    """Return the scores at the step that training-domain validation selects.

    Args:
        spec: The settings of the run.
        names: The names of the environments, in the order of their numbers.
        records: The accuracies and the loss at every evaluated step.

    Returns:
        - ``train``: the loss, by name of the image set.
        - ``dev``: the validation accuracy, by name of the image set.
        - ``test``: the accuracy on each held-out environment, by its name.
    """
    best = best_record(records, spec.test_envs)
    test = {names[env]: {ACCURACY: best.test_accuracy(env)} for env in spec.test_envs}
    return {
        "train": {spec.task.name: {"loss": best.record["loss"]}},
        "dev": {spec.task.name: {ACCURACY: best.value}},
        "test": test,
    }


def _summarise_data(data: _Data) -> dict[str, dict[str, Any]]:
    """Describe the images of every split, for the section ``data`` of ``metrics.json``.

    Returns:
        The source and the counts of :meth:`.Environment.summary`, by name of the split, which is
        ``A in`` or ``A out`` for an environment A.
    """
    image_set = data.image_set
    summaries = {}
    for environment, split in zip(image_set.environments, data.splits, strict=True):
        for split_name, rows in [("in", split.within), ("out", split.out)]:
            counts = environment.summary(image_set.classes, rows)
            summaries[f"{environment.name} {split_name}"] = {"source": image_set.source, **counts}
    return summaries


def _split(spec: ImageSpec, image_set: ImageSet) -> list[Split]:
    """Split every environment.

    Raises:
        DataError: An environment is too small.
    """
    splits = []
    for env, environment in enumerate(image_set.environments):
        is_test = env in spec.test_envs
        split = split_environment(len(environment), env, spec.seed, is_test=is_test)
        if not split.within or not split.out:
            raise DataError(
                f"{image_set.source}: the environment '{environment.name}' has "
                f"{len(environment)} images, too few to split"
            )
        splits.append(split)
    return splits


def _add_prefixes(
    prefix: Prefix, spec: ImageSpec, environments: Sequence[Environment], splits: Sequence[Split]
) -> list[Environment]:
    """Return copies of the environments with the output of the model's frozen layers (the prefix).

    It is computed for all images that training or evaluation reads.
    """
    training = spec.training
    extended = list(environments)
    # Runs share the files of outputs. Methods begin with different environments, so that concurrent
    # runs compute different files instead of waiting for the same one.
    num_envs = len(environments)
    first_env = derive_seed("first", spec.method.name) % num_envs
    for offset in range(num_envs):
        env = (first_env + offset) % num_envs
        within = splits[env].within
        # a held-out environment is only evaluated, and an evaluation reads only the first rows
        if env in spec.test_envs:
            within = within[: training.eval_rows]
        out = splits[env].out[: training.eval_rows]
        # Trials shuffle the rows differently, and a file depends on their order. Sorted rows let
        # trials that use all rows share one file.
        rows = sorted([*within, *out])
        extended[env] = with_prefix(environments[env], prefix, rows, training.image_size)
    return extended


def _evaluation_splits(
    spec: ImageSpec, environments: Sequence[Environment], splits: Sequence[Split]
) -> dict[str, EvaluationRows]:
    """Return the evaluated splits by DomainBed's names: *in* splits first, then *out* splits.

    ``training.evaluate`` decides whether the *in* splits of training environments are evaluated.
    """
    in_splits: dict[str, EvaluationRows] = {}
    out_splits: dict[str, EvaluationRows] = {}
    training = spec.training
    for env, (environment, split) in enumerate(zip(environments, splits, strict=True)):
        is_test = env in spec.test_envs
        # held-out environments are never augmented
        augments = spec.hparams.data_augmentation and training.val_augment and not is_test
        transform = _transform(spec, augments=augments)
        # selections and tables read the in splits of held-out environments only
        if is_test or training.evaluate == "all":
            in_rows = split.within[: training.eval_rows]
            in_splits[f"env{env}_in"] = EvaluationRows(environment, in_rows, transform)
        out_rows = split.out[: training.eval_rows]
        out_splits[f"env{env}_out"] = EvaluationRows(environment, out_rows, transform)
    return {**in_splits, **out_splits}


def _write_results(path: Path, spec: ImageSpec, records: list[dict[str, Any]]) -> None:
    """Write a JSON line for each record, in the format that DomainBed's scripts read.

    A line has the record, and the arguments and hyper-parameters of the run.
    """
    arguments = {
        "dataset": spec.task.domainbed,
        "algorithm": _algorithm(spec),
        "test_envs": spec.test_envs,
        "hparams_seed": spec.hparams_seed,
        "trial_seed": spec.seed,
        "seed": spec.data_seed,
        "holdout_fraction": HOLDOUT_FRACTION,
        "task": "domain_generalization",
        "steps": spec.training.steps,
    }
    shared = {"args": arguments, "hparams": spec.hparams.model_dump()}
    lines = [json.dumps({**record, **shared}, sort_keys=True) for record in records]
    write_text(path, "".join(f"{line}\n" for line in lines))


def _algorithm(spec: ImageSpec) -> str:
    """Name the algorithm for DomainBed's scripts, such as ``emoe-1a2b3c@N24@deit-small``.

    The scripts group by data set, algorithm, held-out environments, hyper-parameters and trial. So
    the name contains all other settings: their digest, the varied settings of the method, the
    model, and the image set if it is a variant of DomainBed's.
    """
    # spec.sweep is the digest of the settings that all runs of the method share
    names = [f"{spec.method.name}-{spec.sweep}"]
    # empty if the method has its usual settings
    if spec.method.variant:
        names.append(spec.method.variant)
    names.append(spec.model.name)
    # DomainBed's name of the set is already in the record
    is_variant = normalize_name(spec.task.name) != normalize_name(spec.task.domainbed)
    if is_variant:
        names.append(spec.task.name)
    return "@".join(names)
