"""Plan instruction-tuning runs: one per model, set, fine-tuning, method, learning rate and seed."""

from __future__ import annotations

import copy
import functools
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

from benchmarks.harness.base import BENCHMARKS, DataError, DefinitionError, RunError, first_line
from benchmarks.harness.config.benchmark import COUNTS, Benchmark, Domain, Part
from benchmarks.harness.config.catalogue import load_models, model_names
from benchmarks.harness.config.method_specs import (
    VARIANT_KEYS,
    MethodSpec,
    check_frozen,
    method_spec,
)
from benchmarks.harness.config.overlay import merge
from benchmarks.harness.config.runs import Run
from benchmarks.harness.config.sets import ALL, SetPart, SetReader, missing_set
from benchmarks.harness.config.yaml import check_names, parse, read
from benchmarks.llama.definition import (
    CHAT,
    HELD_OUT,
    NATS,
    QUESTIONS,
    RANDOM,
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

_AXES = (*VARIANT_KEYS, "learning_rate", "seed")


class InstructionBenchmark(Benchmark[InstructionDefinition, InstructionSet, InstructionPart]):
    """Plan runs of language models that are tuned on instructions and evaluated with lm-eval."""

    package = "benchmarks.llama"
    spec_model = InstructionSpec
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
        settings = functools.cache(functools.partial(self.settings, "training", part))
        for where, point in part.grid_points(names, (*names, *_AXES)):
            if point["set"] in exclude:
                continue
            tuning = tunings[point["finetuning"]]
            method = method_spec(methods, point, point["seed"], None, where) | {
                "tune": tuning.tune_spec()
            }
            yield self.spec(
                "-".join(filter(None, (point["finetuning"], method["variant"]))),
                model={**load_models()[point["model"]].spec(point["model"]), **tuning.model_spec()},
                task=self.tasks[point["set"]].spec(point["set"]),
                ood=[],
                method=method,
                finetuning=point["finetuning"],
                **copy.deepcopy(usual),
                **_training(settings(point["model"]), tuning, method, point, where),
                seed=point["seed"],
            )

    def sets(self, spec: Mapping[str, Any]) -> list[SetReader]:
        name = spec["task"]["name"]
        return [
            SetReader(name, ALL, functools.partial(self._describe, name, spec["task"]["source"]))
        ]

    def _describe(
        self, name: str, source: Mapping[str, Any], _open_files: bool
    ) -> Iterator[SetPart]:
        entry = self.tasks[name]
        try:
            yield load_instructions(name, InstructionSource.model_validate(source)).describe(
                name, entry.rows
            )
        except DataError as error:
            yield missing_set(name, first_line(error), entry.download_instructions, entry.rows)

    def check_processes(self, spec: Mapping[str, Any], processes: int, parallel: str) -> None:
        run = InstructionSpec.model_validate(spec)
        training = run.training
        if not isinstance(training, RunInstructionTraining):
            super().check_processes(spec, processes, parallel)
            return
        accumulation(training, processes)
        if processes > 1 and training.frozen_layers:
            raise RunError("a run with training.frozen_layers needs a single process")
        if processes > 1 and parallel == "fsdp" and run.model.quantize:
            raise RunError("weights in 4 bits cannot be sharded; use --parallel ddp")


def _templates(name: str, where: str) -> dict[str, dict[str, str]]:
    """Return the templates that ``data.template`` selects from ``templates.yaml``, by name."""
    templates = read(BENCHMARKS / "llama" / "templates.yaml", TemplateFile).templates
    check_names(where, "template", [name], [*templates, CHAT, RANDOM])
    chosen = (
        templates
        if name == RANDOM
        else {key: text for key, text in templates.items() if key == name}
    )
    return {key: text.model_dump() for key, text in chosen.items()}


def _training(
    settings: InstructionTraining,
    tuning: Finetuning,
    method: Mapping[str, Any],
    point: Mapping[str, Any],
    where: str,
) -> dict[str, Any]:
    """Return ``training`` and ``learning_rate`` of a spec; an untrained model has only settings with an effect."""
    if tuning.train == "nothing":
        untrained = {"lora": None, "precision": settings.precision, "keep_weights": False}
        return {"training": untrained, "learning_rate": 0.0}
    if not point.get("learning_rate"):
        raise DefinitionError(
            f"{where}': the finetuning '{point['finetuning']}' trains, so it needs 'learning_rate'"
        )
    training = settings.spec() | tuning.model_dump(include={"lora"})
    check_frozen(training.get("frozen_layers"), MethodSpec(**method), f"{where}'")
    return {"training": training, "learning_rate": float(point["learning_rate"])}


def _tunings(benchmark: InstructionBenchmark, part: Part[InstructionPart]) -> dict[str, Finetuning]:
    """Return the fine-tuning methods by name, with a suite's changes."""
    usual, changes = benchmark.definition.finetuning, part.settings.finetuning
    check_names(part.where(), "finetuning", changes, usual)
    where = (part.file, "benchmarks", benchmark.name, "finetuning")
    return {
        name: parse(
            merge(tuning.model_dump(exclude_unset=True), changes.get(name, {})),
            Finetuning,
            *where,
            name,
        )
        for name, tuning in usual.items()
    }
