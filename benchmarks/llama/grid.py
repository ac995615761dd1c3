"""Plan runs of instruction tuning: one per model, set, way of tuning, method, learning rate and seed."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.harness.base import DataError, DefinitionError, RunError, first_line
from benchmarks.harness.config.benchmark import (
    ALL,
    COUNTS,
    Benchmark,
    Domain,
    Offer,
    SetPart,
    WholeSets,
    missing_set,
    resolve_methods,
    text_tokens,
)
from benchmarks.harness.config.catalogue import load_models, model_names
from benchmarks.harness.config.methods import (
    TUNINGS,
    VARIANT_KEYS,
    Method,
    check_frozen,
    method_spec,
    needs_layers,
    tuning_spec,
)
from benchmarks.harness.config.overlay import overlay
from benchmarks.harness.config.yaml import check_names, parse, read
from benchmarks.harness.sources.packages import PackageFile, packaged
from benchmarks.llama.definition import (
    Finetuning,
    InstructionDefinition,
    InstructionSet,
    InstructionSource,
    InstructionSpec,
    InstructionTraining,
    RunInstructionTraining,
    SetFile,
)
from benchmarks.llama.instructions import ALPACA_DEMO, load_instructions
from benchmarks.llama.questions import is_mmlu_dev, mmlu_dev_file

_AXES = (*VARIANT_KEYS, "learning_rate", "seed")
_UNTRAINED = "nothing"
HELD_OUT, QUESTIONS = "held_out", "questions"


class InstructionKind(WholeSets[InstructionDefinition, InstructionSet]):
    """Language models, tuned on instructions and evaluated by lm-eval: a run per point of the grid."""

    files = (("llama", InstructionDefinition), ("instruction_sets", SetFile))
    counts_labels = False
    optimizer = "AdamW"
    paper_columns = ("model", "tuning", "method")
    late_imports = ("lm_eval.evaluator", "lm_eval.models.huggingface")

    def load(self, content: object, file: Path) -> tuple[InstructionDefinition, Mapping[str, InstructionSet]]:
        definition = parse(content, InstructionDefinition, str(file))
        return definition, read(file.parent / definition.sets, SetFile).sets

    def specs(
        self,
        benchmark: Benchmark[InstructionDefinition, InstructionSet],
        suite: str,
        exclude: Collection[str],
        specs_of: Callable[[str], Mapping[str, Mapping[str, Any]]],
    ) -> Iterator[dict[str, Any]]:
        definition = benchmark.definition
        methods, tunings = resolve_methods(definition, suite), _tunings(benchmark, suite)
        usual = {key: benchmark.settings(key, suite).model_dump() for key in ("data", "evaluation")}
        names = {
            "model": model_names("language"),
            "set": benchmark.tasks,
            "finetuning": tunings,
            "method": methods,
        }
        training = functools.cache(functools.partial(benchmark.settings, "training", suite))
        for where, point in benchmark.grid_points(suite, names, (*names, *_AXES)):
            if point["set"] not in exclude:
                tuning = tunings[point["finetuning"]]
                yield _spec(benchmark, usual, training(point["model"]), methods, tuning, point, where)

    def check_processes(self, spec: Mapping[str, Any], processes: int, parallel: str) -> None:
        read = InstructionSpec.model_validate(spec)
        training = read.training
        if not isinstance(training, RunInstructionTraining):
            super().check_processes(spec, processes, parallel)
            return
        accumulation(training, processes)
        if processes > 1 and training.frozen_layers:
            raise RunError("a run with training.frozen_layers is not spread over several processes; start it on one")
        if processes > 1 and parallel == "fsdp" and read.model.quantize:
            raise RunError("weights in 4 bits are not sharded; take --parallel ddp")

    def compared_domains(self, definition: InstructionDefinition) -> Mapping[str, Domain]:
        return {
            HELD_OUT: Domain(("loss",)),
            QUESTIONS: Domain(("accuracy", "nats_per_byte"), "question"),
            "model": COUNTS,
        }

    def offer(self, benchmark: Benchmark[InstructionDefinition, InstructionSet], suite: str) -> Offer:
        tunings = (name for block in benchmark.definition.suites[suite].grid for name in block.finetuning)
        return replace(super().offer(benchmark, suite), tunings=frozenset(tunings))

    def variant(self, spec: Mapping[str, Any]) -> str:
        return "-".join(filter(None, (spec["finetuning"], spec["method"]["variant"])))

    def package_files(self, task: Mapping[str, Any]) -> list[PackageFile]:
        return [packaged(ALPACA_DEMO)] if "package" in task["source"] else []

    def inputs(self, spec: Mapping[str, Any]) -> list[str]:
        tasks = [entry["task"] for entry in spec["evaluation"]["tasks"]]
        return sorted({str(mmlu_dev_file(task)) for task in tasks if is_mmlu_dev(task)})

    def describe(
        self, spec: Mapping[str, Any], name: str, part: str, tasks: Mapping[str, InstructionSet], *, open_files: bool
    ) -> Iterator[SetPart]:
        """A set of instructions; rows that are broken without regard to their length count as dropped."""
        known = tasks[name]
        try:
            instructions = load_instructions(name, InstructionSource.model_validate(spec["task"]["source"]))
        except DataError as error:
            yield missing_set(name, first_line(error), known.download_instructions, known.rows)
            return
        inputs = f"{sum(bool(row.input) for row in instructions.rows):,} with an input"
        yield SetPart(
            name, ALL, len(instructions.rows), len(instructions.broken), known.rows, inputs, instructions.source
        )

    def training_tokens(self, spec: Mapping[str, Any], tasks: Mapping[str, InstructionSet]) -> float | None:
        data, training = spec["data"], spec["training"]
        # MMLU's 57 subjects have about 250 questions each, of about 100 tokens
        asked = [(task["limit"] or 250) * (1 + task["num_fewshot"]) for task in spec["evaluation"]["tasks"]]
        read = 57 * 100 * sum(asked) / 3
        rows, epochs = data["train_rows"] or tasks[spec["task"]["name"]].rows, training.get("epochs", 0)
        if training.get("steps"):
            rows, epochs = training["steps"] * training["batch_size"], 1
        trained = text_tokens(rows, data["max_length"], epochs)
        return None if trained is None else trained + read

    def unpinned(self, spec: Mapping[str, Any]) -> Iterator[str]:
        for entry in spec["evaluation"]["tasks"]:
            if not is_mmlu_dev(entry["task"]):
                yield f"what lm-eval reads for {entry['task']}"


KIND = InstructionKind()


def accumulation(training: InstructionTraining, processes: int) -> int:
    """Return the micro-batches of a step on each process (:class:`DefinitionError` if the batch cannot be divided)."""
    at_once = training.per_device_train_batch_size * processes
    if training.batch_size % at_once:
        raise DefinitionError(
            f"training.batch_size {training.batch_size} is no multiple of training.per_device_train_batch_size "
            f"{training.per_device_train_batch_size} times {processes} processes"
        )
    return training.batch_size // at_once


def is_trained(spec: Mapping[str, Any]) -> bool:
    """Return True if a run trains."""
    return "batch_size" in spec["training"]


def _spec(
    benchmark: Benchmark[InstructionDefinition, InstructionSet],
    usual: Mapping[str, Any],
    settings: InstructionTraining,
    methods: Mapping[str, Method],
    tuning: Finetuning,
    point: Mapping[str, Any],
    where: str,
) -> dict[str, Any]:
    untrained = tuning.train == _UNTRAINED
    if not untrained and not point.get("learning_rate"):
        raise DefinitionError(f"{where}': the finetuning '{point['finetuning']}' trains, so it needs 'learning_rate'")
    training = settings.spec() | tuning.model_dump(include={"lora"})
    method = method_spec(methods, point, point["seed"], None, where)
    method |= {"tune": _tuned(tuning, f"{where}': finetuning '{point['finetuning']}'")}
    if settings.frozen_layers and not untrained:
        check_frozen(training, method, where)
        if tuning.quantize:
            raise DefinitionError(
                f"{benchmark.file}: 'training.frozen_layers' does not go with weights in 4 bits ('quantize'); take "
                "one of them"
            )
    return {
        **benchmark.of_every_spec,
        "model": {**load_models()[point["model"]].spec(point["model"]), **_form(tuning)},
        "task": benchmark.tasks[point["set"]].spec(point["set"]),
        "ood": [],
        "method": method,
        "finetuning": point["finetuning"],
        **copy.deepcopy(dict(usual)),
        # what shapes no number of an untrained model must not make it a new run
        "training": {"lora": None, "precision": settings.precision, "keep_weights": False} if untrained else training,
        "learning_rate": 0.0 if untrained else float(point["learning_rate"]),
        "seed": point["seed"],
    }


def _tunings(benchmark: Benchmark[InstructionDefinition, InstructionSet], suite: str) -> dict[str, Finetuning]:
    """Return the ways of tuning as a suite changes them."""
    usual, changes = benchmark.definition.finetuning, benchmark.definition.suites[suite].finetuning
    check_names(f"{benchmark.file}: 'suites.{suite}", "finetuning", changes, usual)
    return {
        name: overlay(
            Finetuning,
            str(benchmark.file),
            (("finetuning", name), tuning.model_dump(exclude_unset=True)),
            (("suites", suite, "finetuning", name), changes.get(name, {})),
        )
        for name, tuning in usual.items()
    }


def _form(tuning: Finetuning) -> dict[str, Any]:
    """Return the form of the weights, if it is not float32."""
    form: dict[str, Any] = {"weights": tuning.weights} if tuning.weights != "fp32" else {}
    return form | ({"quantize": tuning.quantize, "whole": tuning.layers} if tuning.quantize else {})


def _tuned(tuning: Finetuning, named: str) -> dict[str, Any] | None:
    """Return the trained parts; None for everything."""
    if (tuning.train == "adapters") != (tuning.lora is not None):
        raise DefinitionError(
            f"{named}: 'lora' says which adapters there are, and 'train: adapters' that they are trained; give both "
            "or none"
        )
    if tuning.quantize and tuning.train != "adapters":
        raise DefinitionError(f"{named}: weights in 4 bits cannot be trained; 'quantize' needs 'train: adapters'")
    if (needs_layers(tuning.train) or tuning.quantize is not None) != (tuning.layers is not None):
        raise DefinitionError(
            f"{named}: 'layers' says which blocks 'train: blocks' trains, or which FFNs 'quantize' leaves whole; it "
            "goes with one of them"
        )
    if tuning.train == "all":
        return None
    return tuning_spec(tuning.train if tuning.train in TUNINGS else None, tuning.layers) | {"head": False}
