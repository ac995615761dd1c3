"""Tune a language model on instructions, fully or with adapters, and evaluate it with lm-eval."""

from __future__ import annotations

import gc
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import lm_eval.evaluator
import lm_eval.models.huggingface  # noqa: F401  (runs use them later; a process that forks for runs imports them once)
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.harness.base import DataError, derive_seed
from benchmarks.harness.config.benchmark import load_benchmark
from benchmarks.harness.config.sets import ALL, SetPart
from benchmarks.harness.config.yaml import parse
from benchmarks.harness.models.build import Trainable, build_language_model, permutations, save_trained, set_trained_
from benchmarks.harness.models.loading import load_tokenizer
from benchmarks.harness.models.prefix import Prefix
from benchmarks.harness.training.callbacks import Probe, Stopwatch
from benchmarks.harness.training.processes import broadcast, destroy_process_group, is_main, is_sharded
from benchmarks.harness.training.progress import Progress
from benchmarks.harness.training.sharding import gather_trained, shard_
from benchmarks.harness.training.trainer import available_precision, evaluate_with_routing
from benchmarks.llama.definition import InstructionSpec, RunInstructionTraining
from benchmarks.llama.encoding import EncodedRows, collator, model_inputs
from benchmarks.llama.evaluation import LoadedTask, generate_answers, held_out_loss, load_task, run_task, task_title
from benchmarks.llama.instructions import load_instructions, refuse_broken
from benchmarks.llama.templates import Template, find_template
from benchmarks.llama.training import TrainingResult, train
from emoe.layer import routed_layers

_CALIBRATION_ROWS = 256


def run(spec: Mapping[str, Any], folder: Path, progress: Progress) -> dict[str, Any]:
    """Train and evaluate the language model of one spec.

    Args:
        spec: The content of ``run.json``.
        folder: The run's folder, for checkpoints and kept weights.
        progress: The progress line.

    Returns:
        The content of ``metrics.json`` without the harness's part; empty on all processes but the main one.

    Raises:
        DefinitionError: A template or task does not exist, or settings do not fit the model.
        DataError: Rows are broken or too few, or the model is missing.
    """
    read = parse(spec, InstructionSpec, str(folder / "run.json"))
    training, tokenizer = read.training, load_tokenizer(spec["model"])
    data = read_data(read, tokenizer)
    tasks = [load_task(entry) for entry in read.evaluation.tasks] if is_main() else []
    if is_main() and data.note:
        progress.say(f"warning: {data.note}")
    progress.say(
        f"{len(data.train)} rows to learn, {len(data.held_out)} held out, {data.broken} broken left out, "
        f"{data.train.summary()['truncated_responses']} responses cut at {read.data.max_length} tokens"
    )
    trainable = _build(spec, data)
    data = data.with_prefix(trainable.prefix)
    if routed := routed_layers(trainable.model):
        progress.say(f"experts in layers {', '.join(str(layer.ffn_index) for layer in routed)}")
    probe = Probe()
    probe.observe(trainable.model, collator(tokenizer)([data.train[0]]))
    trained = TrainingResult([], Stopwatch().cost(0))
    if isinstance(training, RunInstructionTraining):
        trained = train(trainable, tokenizer, read, training, data.train, data.held_out, folder, progress, probe)
        trainable = _gather_model(spec, trainable)
    destroy_process_group()
    if not is_main():
        return {}
    if training.keep_weights:
        save_trained(trainable.model, folder / "model")
    evaluated = _evaluate(read, trainable, data, tasks, progress)
    if trained.held_out:
        last = {"step": trained.cost["steps"], "loss": evaluated["scores"]["dev"][read.task.name]["loss"]}
        evaluated["held_out_curve"] = [*trained.held_out, last]
    return evaluated | {
        "curve": trained.curve,
        "probe": probe.summary(),
        "model": trainable.summary,
        "cost": {**trained.cost, "precision": available_precision(training.precision), **trainable.prefix_cost()},
        "data": data.summary(),
    }


@dataclass(frozen=True)
class Data:
    """Hold the training rows of a run (whole steps), the held-out rows, and the number of broken rows.

    ``note`` is a warning about an unexpected row count; None without one.
    """

    template: Template
    train: EncodedRows
    held_out: EncodedRows
    broken: int
    source: str
    note: str | None

    def with_prefix(self, prefix: Prefix | None) -> Data:
        """Return a copy whose rows include the output of the frozen layers; the same data if ``prefix`` is None."""
        train, held_out = (rows.with_prefix(prefix, self.template.tokenizer) for rows in (self.train, self.held_out))
        return replace(self, train=train, held_out=held_out)

    def summary(self) -> dict[str, Any]:
        """Return the counts for ``metrics.json``."""
        shared = {"source": self.source, "template": self.template.name, "broken_rows": self.broken}
        return {"train": shared | self.train.summary(), "held_out": shared | self.held_out.summary()}


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
    random.Random(derive_seed("held out", name)).shuffle(order)  # the same rows for all runs on the set
    held_out, rest = order[: settings.held_out_rows], order[settings.held_out_rows :][: settings.train_rows]
    batch = training.batch_size if isinstance(training, RunInstructionTraining) else 1
    learned = rest[: len(rest) // batch * batch]
    if not learned:
        raise DataError(
            f"{instructions.source} has {len(whole)} usable rows: {len(held_out)} are held out, "
            f"and the rest does not fill a step of {batch}"
        )
    entry = load_benchmark(spec.benchmark).tasks.get(name)
    note = SetPart(name, ALL, len(instructions.rows), len(instructions.broken), entry.rows).note if entry else None
    return Data(template, whole.select(learned), whole.select(held_out), len(broken), instructions.source, note)


def _calibration(data: Data) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the first training rows, each as inputs of a model."""
    collate = collator(data.template.tokenizer)
    return (model_inputs(collate([data.train[row]])) for row in range(min(len(data.train), _CALIBRATION_ROWS)))


def _build(spec: Mapping[str, Any], data: Data) -> Trainable:
    """Build the model; if it is sharded, only the main process loads weights and distributes them."""
    if not is_sharded():
        return build_language_model(spec, _calibration(data))
    built = build_language_model(spec, _calibration(data)) if is_main() else None
    partition = broadcast(None if built is None else permutations(built.model))
    if built is None:
        built = build_language_model(spec, partition=partition or None, empty=True)
    shard_(cast(PreTrainedModel, built.model), available_precision(spec["training"]["precision"]))
    return built


def _gather_model(spec: Mapping[str, Any], trainable: Trainable) -> Trainable:
    """Gather the trained model on the main process; return it unchanged if it is not sharded."""
    if not is_sharded():
        return trainable
    state, partition = gather_trained(trainable.model), permutations(trainable.model)
    if not is_main():
        return trainable
    whole = build_language_model(spec, partition=partition or None)
    set_trained_(whole.model, state, "the trained weights")
    return replace(whole, summary=trainable.summary)


def _evaluate(
    spec: InstructionSpec, trainable: Trainable, data: Data, tasks: Sequence[LoadedTask], progress: Progress
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
        model, lambda: held_out_loss(model, data.held_out, tokenizer, evaluation.batch_size, precision)
    )
    evaluated = {}
    for task in tasks:
        title = task_title(task.entry)
        progress.say(f"evaluating on {title}")
        evaluated[title] = run_task(model, tokenizer, task, evaluation.batch_size, precision, trainable.prefix)
    instructions = [row.source for row in data.held_out.rows[: evaluation.generations]]
    progress.say(f"answering {len(instructions)} instructions")
    return {
        "scores": {
            "dev": {spec.task.name: {"loss": loss}},
            "test": {name: result["scores"] for name, result in evaluated.items()},
        },
        "tasks": evaluated,
        "answers": generate_answers(model, data.template, instructions, evaluation.new_tokens, precision),
        "routing": routing,
    }
