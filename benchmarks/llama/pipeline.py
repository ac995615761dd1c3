"""Tune a language model on instructions, fully or with adapters, and evaluate it with lm-eval."""

from __future__ import annotations

import gc
import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.harness.base import DataError, derive_seed
from benchmarks.harness.config.benchmark import load_benchmark
from benchmarks.harness.models.build import build_language_model, permutations, save_trained
from benchmarks.harness.models.loading import load_tokenizer
from benchmarks.harness.models.trainable import Trainable, load_trained_state_, trained_state
from benchmarks.harness.training.callbacks import Probe, Stopwatch
from benchmarks.harness.training.processes import (
    broadcast,
    destroy_process_group,
    is_main,
    is_sharded,
    shard_,
)
from benchmarks.harness.training.progress import Progress
from benchmarks.harness.training.routing import evaluate_with_routing
from benchmarks.harness.training.trainer import available_precision
from benchmarks.llama.definition import EvaluationTask, InstructionSpec, RunInstructionTraining
from benchmarks.llama.encoding import EncodedRows, collator, model_inputs
from benchmarks.llama.evaluation import generate_answers, held_out_loss, load_task, run_task
from benchmarks.llama.instructions import load_instructions, refuse_broken
from benchmarks.llama.templates import Template, find_template
from benchmarks.llama.training import train
from emoe.layer import routed_layers

_CALIBRATION_ROWS = 256


def run(spec: InstructionSpec, folder: Path, progress: Progress) -> dict[str, Any]:
    """Train and evaluate the language model of one spec.

    Args:
        spec: The settings of the run.
        folder: The run's folder, for checkpoints and kept weights.
        progress: The progress line.

    Returns:
        The content of ``metrics.json`` without the harness's part; empty on all other processes.

    Raises:
        DefinitionError: A template or task does not exist, or settings do not fit the model.
        DataError: Rows are broken or too few, or the model is missing.
    """
    training, tokenizer = spec.training, load_tokenizer(spec.model)
    data = read_data(spec, tokenizer)
    tasks = {entry: load_task(entry) for entry in spec.evaluation.tasks} if is_main() else {}
    if is_main() and data.note:
        progress.say(f"warning: {data.note}")
    counts = data.summary["train"]
    progress.say(
        f"{len(data.train)} rows to learn, {len(data.held_out)} held out, {counts['broken_rows']} broken left out, "
        f"{counts['truncated_responses']} responses cut at {spec.data.max_length} tokens"
    )
    trainable = _build(spec, data)
    if trainable.prefix:
        train_rows, held_out = (
            rows.with_prefix(trainable.prefix, tokenizer) for rows in (data.train, data.held_out)
        )
        data = replace(data, train=train_rows, held_out=held_out)
    if routed := routed_layers(trainable.model):
        progress.say(f"experts in layers {', '.join(str(layer.ffn.index) for layer in routed)}")
    probe = Probe()
    probe.observe(trainable.model, collator(tokenizer)([data.train[0]]))
    trained: dict[str, Any] = {"curve": [], "cost": Stopwatch().cost(0)}
    if isinstance(training, RunInstructionTraining):
        trained = train(
            trainable, tokenizer, spec, training, data.train, data.held_out, folder, progress, probe
        )
        trainable = _gather_model(spec, trainable)
    destroy_process_group()
    if not is_main():
        return {}
    if training.keep_weights:
        save_trained(trainable.model, folder / "model")
    evaluated = _evaluate(spec, trainable, data, tasks, progress)
    cost = {
        **trained["cost"],
        "precision": available_precision(training.precision),
        **trainable.prefix_cost(),
    }
    if curve := trained.get("held_out_curve"):
        curve.append(
            {"step": cost["steps"], "loss": evaluated["scores"]["dev"][spec.task.name]["loss"]}
        )
    model = {"probe": probe.summary(), "model": trainable.summary}
    return {**evaluated, **trained, **model, "cost": cost, "data": data.summary}


@dataclass(frozen=True)
class Data:
    """Hold the training rows of a run (whole steps), and the held-out rows.

    ``summary`` has the counts for ``metrics.json``; ``note`` is a warning about an unexpected row count, or None.
    """

    template: Template
    train: EncodedRows
    held_out: EncodedRows
    summary: dict[str, dict[str, Any]]
    note: str | None


def read_data(spec: InstructionSpec, tokenizer: PreTrainedTokenizerBase) -> Data:
    """Read, check, split and encode the rows of a run (:class:`DataError` if rows are broken or too few)."""
    settings, training, name = spec.data, spec.training, spec.task.name
    instructions = load_instructions(name, spec.task.source)
    template = find_template(settings.template, spec.templates, tokenizer, spec.seed)
    whole = EncodedRows(instructions.rows, template, settings.max_length)
    broken = [*instructions.broken, *whole.broken]
    if settings.broken_rows == "refuse":
        refuse_broken(broken, instructions.source)
    order = list(range(len(whole)))
    random.Random(derive_seed("held out", name)).shuffle(
        order
    )  # the same rows for all runs on the set
    held_out, rest = (
        order[: settings.held_out_rows],
        order[settings.held_out_rows :][: settings.train_rows],
    )
    batch = training.batch_size if isinstance(training, RunInstructionTraining) else 1
    learned = rest[: len(rest) // batch * batch]
    if not learned:
        raise DataError(
            f"{instructions.source} has {len(whole)} usable rows: {len(held_out)} are held out, "
            f"and the rest does not fill a step of {batch}"
        )
    entry = load_benchmark(spec.benchmark).tasks.get(name)
    note = instructions.describe(name, entry.rows).note if entry else None
    train_rows, held_out_rows = whole.select(learned), whole.select(held_out)
    shared = {"source": instructions.source, "template": template.name, "broken_rows": len(broken)}
    summary = {"train": shared | train_rows.summary(), "held_out": shared | held_out_rows.summary()}
    return Data(template, train_rows, held_out_rows, summary, note)


def _build(spec: InstructionSpec, data: Data) -> Trainable:
    """Build the model; if it is sharded, only the main process loads weights and distributes them."""
    collate, count = collator(data.template.tokenizer), min(len(data.train), _CALIBRATION_ROWS)
    calibration = (model_inputs(collate([data.train[row]])) for row in range(count))
    if not is_sharded():
        return build_language_model(spec, calibration)
    built = build_language_model(spec, calibration) if is_main() else None
    partition = broadcast(None if built is None else permutations(built.model))
    if built is None:
        built = build_language_model(spec, partition=partition or None, empty=True)
    shard_(cast(PreTrainedModel, built.model), available_precision(spec.training.precision))
    return built


def _gather_model(spec: InstructionSpec, trainable: Trainable) -> Trainable:
    """Gather the trained model on the main process; return it unchanged if it is not sharded."""
    if not is_sharded():
        return trainable
    state, partition = trained_state(trainable.model), permutations(trainable.model)
    if not is_main():
        return trainable
    whole = build_language_model(spec, partition=partition or None)
    load_trained_state_(whole.model, state, "the trained weights")
    return replace(whole, summary=trainable.summary)


def _evaluate(
    spec: InstructionSpec,
    trainable: Trainable,
    data: Data,
    tasks: Mapping[EvaluationTask, dict[str, Any]],
    progress: Progress,
) -> dict[str, Any]:
    evaluation, precision = spec.evaluation, available_precision(spec.training.precision)
    model, tokenizer = cast(PreTrainedModel, trainable.model), data.template.tokenizer
    if torch.cuda.is_available():
        gc.collect()  # memory of the training
        torch.cuda.empty_cache()
        cast(Any, model).to("cuda")
    model.eval()
    model.config.use_cache = True
    progress.say("evaluating on held-out instructions")
    loss, routing = evaluate_with_routing(
        model,
        lambda: held_out_loss(model, data.held_out, tokenizer, evaluation.batch_size, precision),
    )
    evaluated = {}
    for entry, loaded in tasks.items():
        progress.say(f"evaluating on {entry.title}")
        result = run_task(
            model, tokenizer, entry, loaded, evaluation.batch_size, precision, trainable.prefix
        )
        evaluated[entry.title] = result
    instructions = [row.source for row in data.held_out.rows[: evaluation.generations]]
    progress.say(f"answering {len(instructions)} instructions")
    return {
        "scores": {
            "dev": {spec.task.name: {"loss": loss}},
            "test": {name: result["scores"] for name, result in evaluated.items()},
        },
        "tasks": evaluated,
        "answers": generate_answers(
            model, data.template, instructions, evaluation.new_tokens, precision
        ),
        "routing": routing,
    }
