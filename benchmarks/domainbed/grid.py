"""Plan runs of domain generalisation: one per set, method, held-out environments, draw and trial."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

from benchmarks.domainbed.definition import (
    HParams,
    ImageDefinition,
    ImagePart,
    ImageSpec,
    ImageTraining,
    RunImageSet,
    SetEntry,
    SetFile,
)
from benchmarks.domainbed.protocol import (
    BASELINE,
    SELECTIONS,
    held_out_combinations,
    hyper_parameters,
    sweep_seed,
)
from benchmarks.harness.base import DataError, DefinitionError, first_line
from benchmarks.harness.config.benchmark import COUNTS, Benchmark, Domain, Part
from benchmarks.harness.config.catalogue import load_models, model_names
from benchmarks.harness.config.method_specs import (
    VARIANT_KEYS,
    MethodSpec,
    check_frozen,
    method_spec,
)
from benchmarks.harness.config.methods import Method
from benchmarks.harness.config.runs import Run
from benchmarks.harness.config.sets import ALL, SetPart, SetReader, missing_set
from benchmarks.harness.config.yaml import Location, check_names, parse, read

_AXES = (*VARIANT_KEYS, "test_envs", "hparams_seed", "trial")


class DomainBenchmark(Benchmark[ImageDefinition, SetEntry, ImagePart]):
    """Plan runs of image classifiers, trained on some environments of a set and evaluated on the held-out ones."""

    package = "benchmarks.domainbed"
    spec_model = ImageSpec
    definition_model, part_model = ImageDefinition, ImagePart
    recorded = ("scores", "data", "model", "routing", "records", "confusion", "classes")
    task_files: ClassVar = {"image_sets": SetFile}
    paper_columns = ("model", "task", "method", "selection")

    @classmethod
    def load(cls, name: str, content: object, file: Path) -> Self:
        definition = parse(content, ImageDefinition, str(file))
        domains = {"held_out": Domain(("accuracy",), "trial", tuple(SELECTIONS)), "model": COUNTS}
        return cls(name, definition, read(file.parent / definition.sets, SetFile).sets, domains)

    def specs(
        self, part: Part[ImagePart], exclude: Collection[str], others: Sequence[Run]
    ) -> Iterator[dict[str, Any]]:
        methods = self.methods(part)
        for number, block in enumerate(part.settings.grid):
            where = part.where("grid", number)
            check_names(where.at("model"), block.model, model_names("image"))
            check_names(where.at("set"), block.set, self.tasks)
            check_names(where.at("method"), block.method, methods)
            training = {model: self.settings("training", part, model) for model in block.model}
            for model, name, method in itertools.product(block.model, block.set, block.method):
                if name in exclude:
                    continue
                values = block.model_dump()
                values["test_envs"] = _test_env_tuples(
                    block.test_envs, list(self.tasks[name].environments), where.at("test_envs")
                )
                axes = {key: values[key] for key in _AXES if key in values}
                for chosen in itertools.product(*axes.values()):
                    point = {
                        "model": model,
                        "set": name,
                        "method": method,
                        **dict(zip(axes, chosen, strict=True)),
                    }
                    yield self._spec(part, training[model], methods, point, where)

    def _spec(
        self,
        part: Part[ImagePart],
        settings: ImageTraining,
        methods: Mapping[str, Method],
        point: Mapping[str, Any],
        where: Location,
    ) -> dict[str, Any]:
        """Return the spec of one point of the grid; ``where`` is the location of its block in the file."""
        task, trial, draw = self.tasks[point["set"]], point["trial"], point["hparams_seed"]
        drawn = hyper_parameters(settings.registry or "domainbed", task.domainbed, draw, trial)
        hparams = {**drawn, **(settings.hparams or {})}
        parse(hparams, HParams, part.file, "benchmarks", self.name, "training", "hparams")
        training = settings.spec() | {"eval_every": settings.eval_every or task.eval_every}
        method = method_spec(methods, point, trial, settings.lora, where)
        check_frozen(training.get("frozen_layers"), MethodSpec(**method), str(where))
        if settings.frozen_layers and hparams["data_augmentation"] and not task.source.mnist:
            raise DefinitionError(
                f"{part.where('training', 'frozen_layers')} needs hparams.data_augmentation: false, because augmented "
                "images differ at every step"
            )
        envs = list(task.environments)
        draws = [
            f"T{'+'.join(envs[env] for env in point['test_envs'])}",
            f"h{draw}" if draw else "",
        ]
        return self.spec(
            "-".join(filter(None, (method["variant"], *draws))),
            model=load_models()[point["model"]].spec(point["model"]),
            task=task.spec(point["set"]),
            ood=[],
            method=method,
            test_envs=list(point["test_envs"]),
            hparams_seed=draw,
            hparams=hparams,
            sweep=_sweep(self.definition.version, methods[point["method"]], settings),
            training=training,
            learning_rate=float(hparams["lr"]),
            # DomainBed's seed of the baseline, so that all methods see the same digits
            data_seed=sweep_seed(task.domainbed, BASELINE, point["test_envs"], draw, trial),
            seed=trial,
        )

    def sets(self, spec: Mapping[str, Any]) -> list[SetReader]:
        name = spec["task"]["name"]
        return [SetReader(name, ALL, functools.partial(self._describe, name, spec["data_seed"]))]

    def _describe(self, name: str, data_seed: int, open_files: bool) -> Iterator[SetPart]:
        from benchmarks.domainbed.validation import count_images, load_set, validate_images

        entry = self.tasks[name]
        try:
            image_set = load_set(RunImageSet(**entry.spec(name)), data_seed, truncated="refuse")
            if open_files:
                validate_images(image_set)
        except DataError as error:
            problem = error if open_files else first_line(error)
            yield missing_set(name, problem, entry.download_instructions, entry.images)
            return
        for environment, rows, labels in count_images(image_set):
            yield SetPart(name, environment, rows, labels=labels, source=image_set.source)
        total = sum(map(len, image_set.environments))
        yield SetPart(name, ALL, total, expected=entry.images, source=image_set.source)


def _test_env_tuples(
    asked: str | list[list[str]], environments: list[str], where: Location
) -> list[tuple[int, ...]]:
    """Return the tuples of numbers of environments that are held out together."""
    if isinstance(asked, str):
        return [
            envs
            for envs in held_out_combinations(len(environments))
            if asked == "all" or len(envs) == 1
        ]
    for names in asked:
        check_names(where, names, environments)
    return [tuple(sorted(environments.index(name) for name in names)) for names in asked]


def _sweep(version: int, method: Method, training: ImageTraining) -> str:
    """Hash the settings that are equal in all runs of a method."""
    settings = [
        method.model_dump(exclude={"title", "role"}),
        training.model_dump(exclude={"by_model"}),
    ]
    text = json.dumps([version, *settings], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:6]
