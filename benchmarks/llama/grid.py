"""Plan instruction-tuning runs: one per model, set, fine-tuning, method, learning rate and seed."""

from __future__ import annotations

import copy
import functools
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
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
from benchmarks.harness.config.yaml import Location, check_names, parse, read
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
from benchmarks.llama.questions import MMLU, MMLU_ROWS, describe_mmlu, is_mmlu
from emoe.config import resolve_layers
from emoe.errors import ConfigError

_MOST_LAYERS = 200  # more than the models have


class InstructionBenchmark(Benchmark[InstructionDefinition, InstructionSet, InstructionPart]):
    """A benchmark of language models that are tuned on instructions and evaluated with lm-eval."""

    package = "benchmarks.llama"
    spec_model = InstructionSpec
    definition_model = InstructionDefinition
    part_model = InstructionPart
    recorded = ("scores", "data", "model", "routing", "tasks", "answers")
    task_files: ClassVar = {"instruction_sets": SetFile, "templates": TemplateFile}
    paper_columns = ("model", "tuning", "method", "num_experts", "top_k")

    @classmethod
    def load(cls, name: str, content: object, file: Path) -> Self:
        definition = parse(content, InstructionDefinition, str(file))
        # comparisons of losses pair seeds, comparisons of answers pair questions
        domains = {
            HELD_OUT: Domain(("loss",)),
            QUESTIONS: Domain(("accuracy", NATS), "question"),
            "model": COUNTS,
        }
        sets = read(file.parent / definition.sets, SetFile).sets
        return cls(name, definition, sets, domains)

    def specs(
        self, part: Part[InstructionPart], exclude: Collection[str], others: Sequence[Run]
    ) -> Iterator[dict[str, Any]]:
        methods = self.methods(part)
        tunings = _finetuning_methods(self, part)
        data = self.settings("data", part)
        evaluation = self.settings("evaluation", part)
        templates = _templates(data.template, part.where("data", "template"))

        @functools.cache  # most points have the model of an earlier point
        def training_of_model(name: str) -> Any:
            """Return the training settings, with the suite's changes for this model."""
            return self.settings("training", part, model=name)

        # by key of a block
        valid_names = {
            "model": model_names("language"),
            "task": self.tasks,
            "finetuning": tunings,
            "method": methods,
        }
        # the keys of a point; runs are in the order of the first key, then of the second, …
        axes = (*valid_names, *VARIANT_KEYS, "learning_rate", "seed")
        for where, point in part.grid_points(valid_names, axes):
            task_name = point["task"]
            if task_name in exclude:
                continue
            model_name = point["model"]
            finetuning = point["finetuning"]
            seed = point["seed"]

            tuning = tunings[finetuning]
            model = load_models()[model_name].spec(model_name)
            own_method = method_spec(methods, point, seed, lora=None, where=where)
            # the fine-tuning decides what is trained, not the method
            method = {**own_method, "tune": tuning.tune_spec()}
            # such as `lora`, or `lora-N16` if the block varies settings of the method
            variant = finetuning
            if method["variant"]:
                variant = f"{finetuning}-{method['variant']}"
            learning_rate = _learning_rate(tuning, point, where)
            settings = training_of_model(model_name)
            training = _training(settings, tuning, method, where)
            _check_layers(tuning, point, method["config"], where)
            yield self.spec(
                variant,
                model={**model, **tuning.model_spec()},
                task=self.tasks[task_name].spec(task_name),
                ood=[],
                method=method,
                finetuning=finetuning,
                data=data.model_dump(),
                evaluation=evaluation.model_dump(),
                templates=copy.deepcopy(templates),  # specs share no dictionaries
                training=training,
                learning_rate=learning_rate,
                seed=seed,
            )

    def sets(self, run: Run) -> list[SetReader]:
        spec = InstructionSpec.model_validate(run.spec)
        describe = functools.partial(self._describe, spec.task.name, spec.task.source)
        readers = [SetReader(spec.task.name, ALL, describe)]
        if any(is_mmlu(entry.task) for entry in spec.evaluation.tasks):
            for split in MMLU_ROWS:
                readers.append(SetReader(MMLU, split, functools.partial(describe_mmlu, split)))
        return readers

    def _describe(
        self, name: str, source: InstructionSource, _open_files: bool
    ) -> Iterator[SetPart]:
        """Read a set, and yield its description.

        If the set is missing or damaged, the description has the reason.
        """
        entry = self.tasks[name]
        try:
            instructions = load_instructions(name, source)
            yield instructions.describe(name, entry.rows)
        except DataError as error:
            yield missing_set(name, first_line(error), entry.download_instructions, entry.rows)

    def check_processes(self, spec: Mapping[str, Any], processes: int, parallel: str) -> None:
        validated = InstructionSpec.model_validate(spec)
        training = validated.training
        if not isinstance(training, RunInstructionTraining):
            # an evaluation uses one process
            super().check_processes(spec, processes, parallel)
            return
        # raises an error if the processes cannot share a step's rows equally
        accumulation(training, processes)
        if processes > 1 and training.frozen_layers:
            raise RunError("a run with training.frozen_layers needs a single process")
        if processes > 1 and parallel == "fsdp" and validated.model.quantize:
            raise RunError("weights in 4 bits cannot be sharded; use --parallel ddp")


def _templates(name: str, where: Location) -> dict[str, dict[str, str]]:
    """Return the texts of the prompt templates that ``data.template`` selects, by name.

    Args:
        name: A name in ``templates.yaml``, ``random`` for all of them, or ``chat`` for none.
        where: The location of ``data.template`` in the suite, for messages.

    Raises:
        DefinitionError: There is no such template.
    """
    templates = read(BENCHMARKS / "llama" / "templates.yaml", TemplateFile).templates
    check_names(where, [name], [*templates, CHAT, RANDOM])
    if name == CHAT:
        return {}
    chosen = templates if name == RANDOM else {name: templates[name]}
    return {key: template.model_dump() for key, template in chosen.items()}


def _learning_rate(tuning: Finetuning, point: Mapping[str, Any], where: Location) -> float:
    """Return the learning rate of a point of the grid; 0 if nothing is trained.

    Raises:
        DefinitionError: The point lacks a learning rate.
    """
    if tuning.train == "nothing":
        return 0.0
    if not point.get("learning_rate"):
        raise DefinitionError(
            f"{where}: the finetuning '{point['finetuning']}' trains, so it needs 'learning_rate'"
        )
    return float(point["learning_rate"])


def _check_layers(
    tuning: Finetuning, point: Mapping[str, Any], config: Mapping[str, Any] | None, where: Location
) -> None:
    """Check that a fine-tuning method fits the layers that a method converts.

    With ``train: blocks``, it has to train exactly these layers. With ``quantize``, it has to leave
    all of them unquantised. The number of layers of a model is unknown before it is loaded, so this
    has to hold for every number.

    Args:
        tuning: The fine-tuning method.
        point: The point of the grid.
        config: The configuration of the experts; None for a dense model.
        where: The location of the grid's block, for messages.

    Raises:
        DefinitionError: The layers do not fit.
    """
    # without `layers`, the fine-tuning is the same for all layers
    if config is None or tuning.layers is None:
        return
    # sets of layer numbers by depth, which is the number of layers of a model
    converted_by_depth = _layers_by_depth(config["layers"])
    # the layers that are trained (``train: blocks``), or that stay unquantised (``quantize``)
    tuning_by_depth = _layers_by_depth(tuning.layers)
    # the depths at which both requests are valid
    depths = converted_by_depth.keys() & tuning_by_depth.keys()
    if tuning.train == "blocks":
        fits = all(converted_by_depth[depth] == tuning_by_depth[depth] for depth in depths)
        verb = "trains the blocks"
    else:
        # `<=` of sets: every converted layer is one of the unquantised layers
        fits = all(converted_by_depth[depth] <= tuning_by_depth[depth] for depth in depths)
        verb = "leaves unquantised only"
    # without a common depth, no model can be converted and tuned in this way
    if not depths or not fits:
        finetuning = point["finetuning"]
        raise DefinitionError(
            f"{where}: method '{point['method']}' converts the layers {config['layers']!r}, but "
            f"the finetuning '{finetuning}' {verb} {tuning.layers!r}; set 'layers' of the method "
            f"to {tuning.layers!r}, or 'finetuning.{finetuning}.layers' to {config['layers']!r}; "
            "the layers have to fit for every number of layers, because that of the model is not "
            "known yet"
        )


def _layers_by_depth(layers: str | Sequence[int]) -> dict[int, set[int]]:
    """Return the numbers of the requested layers, for each number of layers of a model.

    Numbers of layers with which the request is invalid are left out.
    """
    by_depth = {}
    for depth in range(1, _MOST_LAYERS + 1):
        with suppress(ConfigError):
            by_depth[depth] = set(resolve_layers(layers, depth))
    return by_depth


def _training(
    settings: InstructionTraining, tuning: Finetuning, method: Mapping[str, Any], where: Location
) -> dict[str, Any]:
    """Make the ``training`` section of a run's spec.

    If nothing is trained, the section has only the settings that affect an evaluation.

    Args:
        settings: The training settings.
        tuning: The fine-tuning method.
        method: The ``method`` section of the spec.
        where: The location of the grid's block, for messages.

    Raises:
        DefinitionError: The method converts or trains a frozen layer.
    """
    if tuning.train == "nothing":
        return {"lora": None, "precision": settings.precision, "keep_weights": False}
    training = {**settings.spec(), **tuning.model_dump(include={"lora"})}
    check_frozen(training.get("frozen_layers"), MethodSpec(**method), where)
    return training


def _finetuning_methods(
    benchmark: InstructionBenchmark, part: Part[InstructionPart]
) -> dict[str, Finetuning]:
    """Return the benchmark's fine-tuning methods by name, with the changes of a suite."""
    changes = part.settings.finetuning
    check_names(part.where("finetuning"), changes, benchmark.definition.finetuning)
    tunings = {}
    for name, tuning in benchmark.definition.finetuning.items():
        # a change may replace a single key of a fine-tuning method
        settings_of_benchmark = tuning.model_dump(exclude_unset=True)
        settings = merge(settings_of_benchmark, changes.get(name, {}))
        key_path = ("benchmarks", benchmark.name, "finetuning", name)
        tunings[name] = parse(settings, Finetuning, part.file, *key_path)
    return tunings
