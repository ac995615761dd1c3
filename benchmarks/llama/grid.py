"""Plan instruction-tuning runs: one per model, set, fine-tuning, method, learning rate and seed."""

from __future__ import annotations

import copy
import functools
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

from benchmarks.harness.base import BENCHMARKS, DataError, DefinitionError, RunError, first_line
from benchmarks.harness.config.benchmark import COUNTS, Benchmark, Domain, Part, text_tokens
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
from benchmarks.harness.config.overlay import merge
from benchmarks.harness.config.runs import Run
from benchmarks.harness.config.sets import ALL, SetPart, SetReader, missing_set
from benchmarks.harness.config.yaml import check_names, parse, read
from benchmarks.llama.definition import (
    HELD_OUT,
    QUESTIONS,
    Finetuning,
    InstructionDefinition,
    InstructionPart,
    InstructionSet,
    InstructionSource,
    InstructionSpec,
    InstructionTraining,
    RunInstructionTraining,
    SetFile,
    TemplateFile,
    accumulation,
)
from benchmarks.llama.instructions import load_instructions
from benchmarks.llama.likelihood import NATS
from benchmarks.llama.templates import CHAT, RANDOM

_AXES = (*VARIANT_KEYS, "learning_rate", "seed")
_UNTRAINED = "nothing"


class InstructionBenchmark(Benchmark[InstructionDefinition, InstructionSet, InstructionPart]):
    """Plan runs of language models that are tuned on instructions and evaluated with lm-eval."""

    definition_model, part_model = InstructionDefinition, InstructionPart
    recorded = ("scores", "data", "model", "routing", "tasks", "answers")
    task_files: ClassVar = {"instruction_sets": SetFile, "templates": TemplateFile}
    paper_columns = ("model", "tuning", "method")

    @classmethod
    def load(cls, name: str, content: object, file: Path) -> Self:
        definition = parse(content, InstructionDefinition, str(file))
        domains = {
            HELD_OUT: Domain(("loss",)),
            QUESTIONS: Domain(("accuracy", NATS), "question"),
            "model": COUNTS,
        }
        return cls(name, definition, read(file.parent / definition.sets, SetFile).sets, domains)

    def specs(
        self, part: Part[InstructionPart], exclude: Collection[str], others: Sequence[Run]
    ) -> Iterator[dict[str, Any]]:
        methods, tunings = self.methods(part), _tunings(self, part)
        usual = {key: self.settings(key, part).model_dump() for key in ("data", "evaluation")}
        usual["templates"] = _templates(usual["data"]["template"], part.where("data"))
        names = {
            "model": model_names("language"),
            "set": self.tasks,
            "finetuning": tunings,
            "method": methods,
        }
        training = functools.cache(functools.partial(self.settings, "training", part))
        for where, point in part.grid_points(names, (*names, *_AXES)):
            if point["set"] not in exclude:
                tuning = tunings[point["finetuning"]]
                yield _spec(self, usual, training(point["model"]), methods, tuning, point, where)

    def sets(self, spec: Mapping[str, Any]) -> list[SetReader]:
        name = spec["task"]["name"]
        return [SetReader(name, ALL, functools.partial(self._describe, name, spec["task"]["source"]))]

    def _describe(self, name: str, source: Mapping[str, Any], _open_files: bool) -> Iterator[SetPart]:
        """Describe a set. Broken rows count as dropped, except those with too long prompts."""
        entry = self.tasks[name]
        try:
            instructions = load_instructions(name, InstructionSource.model_validate(source))
        except DataError as error:
            yield missing_set(name, first_line(error), entry.download_instructions, entry.rows)
            return
        inputs = f"{sum(bool(row.input) for row in instructions.rows):,} with an input"
        yield SetPart(
            name, ALL, len(instructions.rows), len(instructions.broken), entry.rows, inputs, instructions.source
        )

    def tokens(self, spec: Mapping[str, Any]) -> float | None:
        data, training = spec["data"], spec["training"]
        # MMLU's 57 subjects have about 250 questions each, of about 100 tokens
        asked = [(task["limit"] or 250) * (1 + task["num_fewshot"]) for task in spec["evaluation"]["tasks"]]
        read = 57 * 100 * sum(asked) / 3
        rows, epochs = data["train_rows"] or self.tasks[spec["task"]["name"]].rows, training.get("epochs", 0)
        if training.get("steps"):
            rows, epochs = training["steps"] * training["batch_size"], 1
        trained = text_tokens(rows, data["max_length"], epochs)
        return None if trained is None else trained + read

    def check_processes(self, spec: Mapping[str, Any], processes: int, parallel: str) -> None:
        run = InstructionSpec.model_validate(spec)
        training = run.training
        if not isinstance(training, RunInstructionTraining):
            super().check_processes(spec, processes, parallel)
            return
        accumulation(training, processes)
        if processes > 1 and training.frozen_layers:
            raise RunError("a run with training.frozen_layers needs a single process")
        if processes > 1 and parallel == "fsdp" and run.model.get("quantize"):
            raise RunError("weights in 4 bits cannot be sharded; use --parallel ddp")


def _templates(name: str, where: str) -> dict[str, dict[str, str]]:
    """Return the templates that ``data.template`` selects from ``templates.yaml``, by name."""
    templates = read(BENCHMARKS / "llama" / "templates.yaml", TemplateFile).templates
    check_names(where, "template", [name], [*templates, CHAT, RANDOM])
    chosen = templates if name == RANDOM else {key: text for key, text in templates.items() if key == name}
    return {key: text.model_dump() for key, text in chosen.items()}


def _spec(
    benchmark: InstructionBenchmark,
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
    method |= {"tune": _partial_tuning_spec(tuning, f"{where}': finetuning '{point['finetuning']}'")}
    if settings.frozen_layers and not untrained:
        check_frozen(training, method, f"{where}'")
        if tuning.quantize:
            raise DefinitionError(
                f"{benchmark.file}: 'training.frozen_layers' cannot be combined with weights in 4 bits ('quantize')"
            )
    return benchmark.spec(
        "-".join(filter(None, (point["finetuning"], method["variant"]))),
        model={**load_models()[point["model"]].spec(point["model"]), **_weight_settings(tuning)},
        task=benchmark.tasks[point["set"]].spec(point["set"]),
        ood=[],
        method=method,
        finetuning=point["finetuning"],
        **copy.deepcopy(dict(usual)),
        # settings without effect on an untrained model must not change its id
        training={"lora": None, "precision": settings.precision, "keep_weights": False} if untrained else training,
        learning_rate=0.0 if untrained else float(point["learning_rate"]),
        seed=point["seed"],
    )


def _tunings(benchmark: InstructionBenchmark, part: Part[InstructionPart]) -> dict[str, Finetuning]:
    """Return the fine-tuning methods by name, with a suite's changes."""
    usual, changes = benchmark.definition.finetuning, part.settings.finetuning
    check_names(part.where(), "finetuning", changes, usual)
    where = (part.file, "benchmarks", benchmark.name, "finetuning")
    return {
        name: parse(merge(tuning.model_dump(exclude_unset=True), changes.get(name, {})), Finetuning, *where, name)
        for name, tuning in usual.items()
    }


def _weight_settings(tuning: Finetuning) -> dict[str, Any]:
    """Return the model settings for weights that are not float32; empty otherwise."""
    form: dict[str, Any] = {"weights": tuning.weights} if tuning.weights != "fp32" else {}
    return form | ({"quantize": tuning.quantize, "whole": tuning.layers} if tuning.quantize else {})


def _partial_tuning_spec(tuning: Finetuning, named: str) -> dict[str, Any] | None:
    """Return the parameters trained in addition to adapters, head and routers; None for full fine-tuning."""
    if (tuning.train == "adapters") != (tuning.lora is not None):
        raise DefinitionError(f"{named}: 'lora' and 'train: adapters' need each other; set both or none")
    if tuning.quantize and tuning.train != "adapters":
        raise DefinitionError(f"{named}: weights in 4 bits cannot be trained; 'quantize' needs 'train: adapters'")
    if (needs_layers(tuning.train) or tuning.quantize is not None) != (tuning.layers is not None):
        raise DefinitionError(
            f"{named}: 'layers' needs 'train: blocks' (the trained blocks) or 'quantize' (the FFNs that are not "
            "quantised), and they need 'layers'"
        )
    if tuning.train == "all":
        return None
    return tuning_spec(tuning.train if tuning.train in TUNINGS else None, tuning.layers) | {"head": False}
