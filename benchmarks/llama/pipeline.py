"""Tune a language model on instructions, fully or with adapters, and evaluate it with lm-eval."""

from __future__ import annotations

import gc
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.harness.base import DataError, derive_seed
from benchmarks.harness.config.benchmark import load_benchmark
from benchmarks.harness.models.build import build_language_model, permutations, save_trained
from benchmarks.harness.models.loading import load_tokenizer
from benchmarks.harness.models.prefix import Prefix
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
from benchmarks.llama.evaluation import (
    LoadedTask,
    generate_answers,
    held_out_loss,
    load_task,
    run_task,
)
from benchmarks.llama.instructions import Instructions, load_instructions, refuse_broken
from benchmarks.llama.templates import Template, find_template
from benchmarks.llama.training import Trained, train
from emoe.layer import routed_layers

_CALIBRATION_ROWS = 256  # the maximum number of rows to calibrate a conversion with


def run(spec: InstructionSpec, folder: Path, progress: Progress) -> dict[str, Any]:
    """Train and evaluate the language model of one spec.

    Args:
        spec: The settings of the run.
        folder: The run's folder, for checkpoints and kept weights.
        progress: The progress line.

    Returns:
        The content of ``metrics.json`` without the harness's part. Only the main process returns
        it; the others return an empty dictionary.

    Raises:
        DefinitionError: A template or task does not exist, or settings do not fit the model.
        DataError: Rows are broken or too few, or the model is missing.
    """
    training = spec.training
    tokenizer = load_tokenizer(spec.model)
    rows = read_data(spec, tokenizer)
    tasks: dict[EvaluationTask, LoadedTask] = {}
    if is_main():
        # loaded before the training, so that an unknown task ends the run early
        tasks = {entry: load_task(entry) for entry in spec.evaluation.tasks}
        _print_warnings(rows, tasks, progress)
    _report_rows(rows, spec.data.max_length, progress)

    trainable = _build(spec, rows)
    if trainable.prefix:
        rows = rows.with_prefix(trainable.prefix)
    _report_experts(trainable, progress)
    # the probe records the model's output on a fixed batch, to compare machines
    probe = Probe()
    collate = collator(tokenizer)
    fixed_batch = collate([rows.train[0]])
    probe.observe(trainable.model, fixed_batch)

    if isinstance(training, RunInstructionTraining):
        trained = train(
            trainable=trainable,
            tokenizer=tokenizer,
            spec=spec,
            training=training,
            rows=rows.train,
            held_out=rows.held_out,
            folder=folder,
            progress=progress,
            probe=probe,
        )
        trainable = _gather_model(spec, trainable)
    else:
        # the run only evaluates, so its cost is that of 0 steps
        trained = Trained(curve=[], cost=Stopwatch().cost(0))
    # the main process evaluates alone
    destroy_process_group()
    if not is_main():
        return {}
    if training.keep_weights:
        save_trained(trainable.model, folder / "model")
    evaluated = _evaluate(spec, trainable, rows, tasks, progress)
    # the section is left out if the training computed no held-out loss
    curve_section = {}
    if trained.held_out_curve:
        # the training does not compute the loss of the last step, so take it from the evaluation
        final_loss = evaluated["scores"]["dev"][spec.task.name]["loss"]
        last_point = {"step": trained.cost["steps"], "loss": final_loss}
        curve_section = {"held_out_curve": [*trained.held_out_curve, last_point]}
    return {
        **evaluated,
        **curve_section,
        "curve": trained.curve,
        "cost": {
            **trained.cost,
            "precision": available_precision(training.precision),
            **trainable.prefix_cost(),
        },
        "probe": probe.summary(),
        "model": trainable.summary,
        "data": rows.summary,
    }


@dataclass(frozen=True)
class RunRows:
    """The rows of a run.

    Attributes:
        template: The template of the prompts.
        train: The training rows, which fill whole steps.
        held_out: The rows of the held-out loss.
        summary: The counts for ``metrics.json``.
        note: A warning about an unexpected row count, or None.
    """

    template: Template
    train: EncodedRows
    held_out: EncodedRows
    summary: dict[str, dict[str, Any]]
    note: str | None

    def with_prefix(self, prefix: Prefix) -> RunRows:
        """Return a copy whose rows include the output of the frozen layers ``prefix``."""
        tokenizer = self.template.tokenizer
        return replace(
            self,
            train=self.train.with_prefix(prefix, tokenizer),
            held_out=self.held_out.with_prefix(prefix, tokenizer),
        )


def _print_warnings(
    rows: RunRows, tasks: Mapping[EvaluationTask, LoadedTask], progress: Progress
) -> None:
    """Print a warning for each unexpected number of rows or questions."""
    notes = [rows.note]
    notes.extend(loaded.note for loaded in tasks.values())
    printed: set[str] = set()
    for note in notes:
        # two forms of the same questions have the same note
        if note and note not in printed:
            progress.warn(note)
            printed.add(note)


def _report_rows(rows: RunRows, max_length: int, progress: Progress) -> None:
    """Print how many rows are learned, held out, broken and cut."""
    counts = rows.summary["train"]
    progress.say(
        f"{len(rows.train)} rows to learn, {len(rows.held_out)} held out, "
        f"{counts['broken_rows']} broken left out, "
        f"{counts['truncated_responses']} responses cut at {max_length} tokens"
    )


def _report_experts(trainable: Trainable, progress: Progress) -> None:
    """Print which layers have experts, if any."""
    routed = routed_layers(trainable.model)
    if routed:
        layers = ", ".join(str(layer.ffn.index) for layer in routed)
        progress.say(f"experts in layers {layers}")


def read_data(spec: InstructionSpec, tokenizer: PreTrainedTokenizerBase) -> RunRows:
    """Read, check, split and encode the rows of a run.

    Raises:
        DefinitionError: The template does not fit the tokenizer.
        DataError: The set is missing, or its rows are broken or too few.
    """
    settings = spec.data
    instructions = load_instructions(spec.task.name, spec.task.source)
    template = find_template(settings.template, spec.templates, tokenizer, spec.seed)
    encoded = EncodedRows(instructions.rows, template, settings.max_length)
    broken = [*instructions.broken, *encoded.broken]
    if settings.broken_rows == "refuse":
        refuse_broken(broken, instructions.source)

    batch_size = 1  # without training, there are no steps to fill
    if isinstance(spec.training, RunInstructionTraining):
        batch_size = spec.training.batch_size
    learned, held_out = _split_rows(len(encoded), spec, batch_size)
    if not learned:
        taken = "all of it"
        if spec.data.train_rows is not None:
            taken = f"at most data.train_rows: {spec.data.train_rows}"
        raise DataError(
            f"{instructions.source} has {len(encoded)} usable rows: {len(held_out)} are held out, "
            f"and the rest ({taken}) does not fill a step of {batch_size}"
        )

    train_rows = encoded.select(learned)
    held_out_rows = encoded.select(held_out)
    shared = {"source": instructions.source, "template": template.name, "broken_rows": len(broken)}
    summary = {
        "train": {**shared, **train_rows.summary()},
        "held_out": {**shared, **held_out_rows.summary()},
    }
    note = _count_note(spec, instructions)
    return RunRows(
        template=template, train=train_rows, held_out=held_out_rows, summary=summary, note=note
    )


def _count_note(spec: InstructionSpec, instructions: Instructions) -> str | None:
    """Describe a difference between the number of rows and the number that the makers published.

    The result is None if the numbers are equal or no number is published.
    """
    name = spec.task.name
    entry = load_benchmark(spec.benchmark).tasks.get(name)
    # the file of sets may lack the set of an older run
    if entry is None:
        return None
    return instructions.describe(name, entry.rows).note


def _split_rows(
    num_rows: int, spec: InstructionSpec, batch_size: int
) -> tuple[list[int], list[int]]:
    """Split shuffled row indices into learned and held-out ones.

    ``num_rows`` counts the usable rows, and the draw depends on this count. So runs hold out the
    same rows if they have the same set, template, tokenizer and lengths. The learned rows are drawn
    from the others with the run's seed, and fill whole steps of ``batch_size``.
    """
    shuffled = list(range(num_rows))
    # the seed is the name of the set, not the run's seed
    random.Random(derive_seed("held out", spec.task.name)).shuffle(shuffled)
    held_out = shuffled[: spec.data.held_out_rows]
    remaining = shuffled[spec.data.held_out_rows :]
    random.Random(derive_seed("learned", spec.task.name, spec.seed)).shuffle(remaining)
    available = remaining[: spec.data.train_rows]  # None takes all
    steps = len(available) // batch_size
    learned = available[: steps * batch_size]
    return learned, held_out


def _build(spec: InstructionSpec, rows: RunRows) -> Trainable:
    """Build the model of a run.

    If the model is sharded, the main process loads the weights, and :func:`shard_` sends them to
    the others.
    """
    if not is_sharded():
        return build_language_model(spec, _calibration_batches(rows))
    # The weights determine the partition of the neurons into experts. At this point only the main
    # process has weights, so the other processes get the partition from it.
    if is_main():
        built = build_language_model(spec, _calibration_batches(rows))
        broadcast(permutations(built.model))
    else:
        partition = broadcast(None)  # receives
        # a dense model and GMoE have no partition; then it is empty
        built = build_language_model(spec, partition=partition or None, empty=True)
    shard_(cast(PreTrainedModel, built.model), available_precision(spec.training.precision))
    return built


def _calibration_batches(rows: RunRows) -> Iterator[dict[str, Tensor]]:
    """Yield the model inputs of the first training rows, one row a batch, to calibrate with."""
    collate = collator(rows.template.tokenizer)
    count = min(len(rows.train), _CALIBRATION_ROWS)
    for number in range(count):
        yield model_inputs(collate([rows.train[number]]))


def _gather_model(spec: InstructionSpec, trainable: Trainable) -> Trainable:
    """Return the whole trained model on the main process.

    A model that is not sharded is returned unchanged. Other processes than the main one return
    their shards.
    """
    if not is_sharded():
        return trainable
    # all processes take part in the gathering, but only the main one gets whole tensors
    state = trained_state(trainable.model)
    # the partition of the neurons into experts; empty for a dense model and GMoE
    partition = permutations(trainable.model)
    if not is_main():
        return trainable
    whole = build_language_model(spec, partition=partition or None)
    load_trained_state_(whole.model, state, "the trained weights")
    return replace(whole, summary=trainable.summary)


def _evaluate(
    spec: InstructionSpec,
    trainable: Trainable,
    rows: RunRows,
    tasks: Mapping[EvaluationTask, LoadedTask],
    progress: Progress,
) -> dict[str, Any]:
    """Compute the held-out loss, the scores of lm-eval's tasks, and some answers.

    Args:
        spec: The settings of the run.
        trainable: The model.
        rows: The rows of the run.
        tasks: The loaded task of lm-eval for each task of the spec.
        progress: The progress line.

    Returns:
        The sections ``scores``, ``tasks``, ``answers`` and ``routing`` of ``metrics.json``.
    """
    evaluation = spec.evaluation
    precision = available_precision(spec.training.precision)
    model = cast(PreTrainedModel, trainable.model)
    tokenizer = rows.template.tokenizer
    _move_to_accelerator(model)
    model.eval()
    model.config.use_cache = True  # Trainer sets it to False
    progress.say("evaluating on held-out instructions")
    compute_loss = partial(
        held_out_loss,
        model=model,
        rows=rows.held_out,
        tokenizer=tokenizer,
        batch_size=evaluation.batch_size,
        precision=precision,
    )
    loss, routing = evaluate_with_routing(model, compute_loss)
    results = {}
    for entry, loaded in tasks.items():
        progress.say(f"evaluating on {entry.title}")
        results[entry.title] = run_task(
            model=model,
            tokenizer=tokenizer,
            entry=entry,
            loaded=loaded,
            batch_size=evaluation.batch_size,
            precision=precision,
            prefix=trainable.prefix,
        )

    instructions = [row.source for row in rows.held_out.rows[: evaluation.generations]]
    progress.say(f"answering {len(instructions)} instructions")
    answers = generate_answers(
        model=model,
        template=rows.template,
        instructions=instructions,
        new_tokens=evaluation.new_tokens,
        precision=precision,
    )
    return {
        "scores": {
            "dev": {spec.task.name: {"loss": loss}},
            "test": {name: result["scores"] for name, result in results.items()},
        },
        "tasks": results,
        "answers": answers,
        "routing": routing,
    }


def _move_to_accelerator(model: PreTrainedModel) -> None:
    """Move a model to the GPU, if there is one, and free the memory that the training used."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()
        # a gathered or untrained model is still on the CPU
        cast(Any, model).to("cuda")
