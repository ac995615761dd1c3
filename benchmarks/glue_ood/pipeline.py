"""Evaluate the chosen run of another benchmark on its task, and on OOD sets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

import emoe
from benchmarks.glue_ood.definition import EvaluationSpec
from benchmarks.harness.base import RUNS, DataError
from benchmarks.harness.config.benchmark import load_benchmark
from benchmarks.harness.config.runs import Run, read_run
from benchmarks.harness.config.yaml import parse
from benchmarks.harness.models.build import build_classifier, reopen
from benchmarks.harness.models.conversion import convert_trained_
from benchmarks.harness.models.loading import load_tokenizer
from benchmarks.harness.models.trainable import Trainable
from benchmarks.harness.results.content import Metrics
from benchmarks.harness.results.records import read_record, tabulate_numbers
from benchmarks.harness.training.callbacks import Probe
from benchmarks.harness.training.progress import Progress
from benchmarks.text.data import TextSplit, load_part, summarise_splits
from benchmarks.text.definition import RunTask, TextSpec
from benchmarks.text.outcomes import select_runs
from benchmarks.text.training import TextEvaluator
from benchmarks.text.usage import RoutingRecorder
from emoe.errors import CheckpointError


def run(spec: EvaluationSpec, folder: Path, progress: Progress) -> dict[str, Any]:
    """Choose among the candidate runs of one spec, and evaluate the chosen one.

    Args:
        spec: The settings of the run.
        folder: The folder of the run.
        progress: The progress line, which also shows messages.

    Returns:
        The content of ``metrics.json``, without the sections that the harness adds. ``chosen``
        names the evaluated run, with its learning rate and variant.
    """
    settings = spec.evaluation
    load = partial(
        load_part,
        num_rows=settings.rows,
        entries=load_benchmark(spec.benchmark).tasks,
        warn=progress.warn,
    )
    # load all sets first: a missing one is reported before the model is loaded
    test = load(spec.task, "test")
    ood_splits = {other.name: _load_ood(other, load) for other in spec.ood}
    candidates = [read_run(RUNS / candidate / "run.json") for candidate in spec.candidates]
    chosen = _choose_run(spec, spec.trained, candidates)
    chosen_spec = parse(chosen.spec, TextSpec, chosen.folder)
    recorded = read_record(chosen).metrics
    tokenizer = load_tokenizer(chosen_spec.model)
    classifier = _reopen(chosen, chosen_spec, recorded, tokenizer)
    # evaluate the trained weights with the experts of another method, or without experts
    if spec.used_as is not None:
        target = _choose_run(spec, spec.used_as, candidates)
        target_spec = parse(target.spec, TextSpec, target.folder)
        convert_trained_(classifier.model, target_spec.method.config)
    evaluator = TextEvaluator(
        classifier=classifier,
        tokenizer=tokenizer,
        task=chosen_spec.task,
        batch_size=settings.batch_size,
        max_length=settings.max_length,
        precision=chosen_spec.training.precision,
        folder=folder,
    )
    probe = Probe()
    recorder = RoutingRecorder(classifier.model)
    first_set = ood_splits[spec.ood[0].name]
    probe.observe(classifier.model, evaluator.first_batch(first_set))

    # The training run may already have the test score. But a model with experts is evaluated again,
    # to record its routing.
    is_dense = not emoe.is_converted(classifier.model)
    can_reuse_score = is_dense and _has_recorded_score(spec, chosen_spec)
    if can_reuse_score:
        recorded_scores = recorded.scores or {}  # a finished run always has scores
        test_scores = recorded_scores["test"][spec.task.name]
    else:
        progress.say(f"evaluating on {spec.task.name}, {len(test):,} rows")
        test_scores = evaluator.evaluate(test, recorder=recorder)
    ood_scores = {}
    for other in spec.ood:
        split = ood_splits[other.name]
        progress.say(f"evaluating on {other.name}, {len(split):,} rows")
        ood_scores[other.name] = evaluator.evaluate(split, other, recorder)
    task_routing = recorder.routing_of_set(spec.task.name)
    return {
        "scores": {"test": {spec.task.name: test_scores}, "ood": ood_scores},
        "routing": task_routing.routing,
        "usage": task_routing.usage,
        "probe": probe.summary(),
        "chosen": {
            "run": chosen.folder,
            "learning_rate": chosen_spec.learning_rate,
            "variant": chosen_spec.method.variant,
        },
        "cost": evaluator.cost,
        "data": summarise_splits({"test": test}, ood_splits),
    }


def _reopen(
    chosen: Run, trained: TextSpec, recorded: Metrics, tokenizer: PreTrainedTokenizerBase
) -> Trainable:
    """Load the classifier that the chosen run trained.

    Args:
        chosen: The chosen run.
        trained: The spec of the chosen run.
        recorded: The content of ``metrics.json`` of the chosen run.
        tokenizer: The tokenizer of the model.

    Raises:
        DataError: The trained weights are missing or damaged, or the pre-trained weights have
            changed.
    """
    build = partial(build_classifier, labels=len(trained.task.labels), tokenizer=tokenizer)
    try:
        return reopen(build, trained, recorded.weights, RUNS / chosen.folder / "model")
    except (DataError, CheckpointError) as error:
        raise DataError(
            f"{error}; delete {chosen.metrics_file} and let Snakemake train the run again"
        ) from error


def _has_recorded_score(spec: EvaluationSpec, trained: TextSpec) -> bool:
    """Return True if the training run has a test score for the same model on the same rows."""
    training = trained.training
    settings = spec.evaluation
    has_same_rows = training.eval_rows == settings.rows
    has_same_lengths = training.max_length == settings.max_length
    # a conversion before the evaluation changes the model
    has_same_model = spec.used_as is None
    return has_same_rows and has_same_lengths and has_same_model


def _load_ood(other: RunTask, load: Callable[..., TextSplit]) -> TextSplit:
    """Load an OOD set with ``load``. If that fails, the error also says how to exclude the set."""
    try:
        return load(other, "test")
    except DataError as error:
        raise DataError(
            f"{error}; to go on without it: `--config exclude=[{other.name}]`"
        ) from error


def _choose_run(spec: EvaluationSpec, method: str, candidates: Sequence[Run]) -> Run:
    """Return the candidate run of a method with the seed of the spec and the best hyper-parameters.

    The best variant and learning rate have the highest dev score, averaged over seeds.

    Raises:
        DataError: No candidate with this seed has the chosen variant and learning rate.
    """
    of_method = [run for run in candidates if run.method == method]
    numbers = tabulate_numbers(read_record(candidate) for candidate in of_method)
    # These candidates share model, task, protocol and method, so only one choice is made. All
    # selected records have its hyper-parameters, and the first one shows them.
    selected = select_runs(numbers, spec.protocol)
    variant = selected["variant"].iloc[0]
    learning_rate = selected["learning_rate"].iloc[0]
    for candidate in of_method:
        has_choice = (
            candidate.method_variant == variant and candidate.learning_rate == learning_rate
        )
        if has_choice and candidate.seed == spec.seed:
            return candidate
    raise DataError(
        f"{spec.benchmark}: seed {spec.seed} did not train {method} with the chosen variant "
        f"{variant} learning_rate {learning_rate}; give every seed the same grid"
    )
