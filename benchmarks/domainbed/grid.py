"""Plan the runs of domain generalisation.

There is one run for each model, image set, method, combination of held-out environments, draw of
hyper-parameters, and seed (DomainBed's trial).
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

from benchmarks.domainbed.definition import (
    HParams,
    ImageBlock,
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
from benchmarks.harness.base import DataError, DefinitionError, first_line, short_digest
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

# the keys of a block besides model, set and method; a run has one value of each
_AXES = (*VARIANT_KEYS, "test_envs", "hparams_seed", "seed")


class DomainBenchmark(Benchmark[ImageDefinition, SetEntry, ImagePart]):
    """A benchmark of image classifiers.

    A run trains on some environments of an image set, and evaluates on the held-out ones.
    """

    package = "benchmarks.domainbed"
    spec_model = ImageSpec
    definition_model = ImageDefinition
    part_model = ImagePart
    recorded = ("scores", "data", "model", "routing", "records", "confusion", "classes")
    task_files: ClassVar = {"image_sets": SetFile}
    paper_columns = ("model", "task", "method", "selection")

    @classmethod
    def load(cls, name: str, content: object, file: Path) -> Self:
        definition = parse(content, ImageDefinition, str(file))
        set_file = read(file.parent / definition.sets, SetFile)
        held_out = Domain(("accuracy",), pair="trial", selections=tuple(SELECTIONS))
        return cls(name, definition, set_file.sets, {"held_out": held_out, "model": COUNTS})

    def specs(
        self, part: Part[ImagePart], exclude: Collection[str], others: Sequence[Run]
    ) -> Iterator[dict[str, Any]]:
        methods = self.methods(part)
        for number, block in enumerate(part.settings.grid):
            where = part.where("grid", number)
            check_names(where.at("model"), block.model, model_names("image"))
            check_names(where.at("task"), block.task, self.tasks)
            check_names(where.at("method"), block.method, methods)
            # the training settings, with the suite's changes for each model
            training_of_model = {
                model: self.settings("training", part, model=model) for model in block.model
            }
            for model, data_set, method in itertools.product(block.model, block.task, block.method):
                if data_set in exclude:
                    continue
                names = {"model": model, "task": data_set, "method": method}
                for values in self._combinations(block, data_set, where):
                    point = {**names, **values}
                    yield self._spec(part, training_of_model[model], methods, point, where)

    def _combinations(
        self, block: ImageBlock, data_set: str, where: Location
    ) -> Iterator[dict[str, Any]]:
        """Yield every combination of a block's values on one image set.

        A combination has a value for each key of :data:`_AXES` that the block has. The value of the
        last key changes first.
        """
        lists = block.model_dump()
        # replace the names of held-out environments by their numbers, which depend on the set
        environments = list(self.tasks[data_set].environments)
        lists["test_envs"] = _test_env_tuples(block.test_envs, environments, where.at("test_envs"))
        # model_dump leaves out the keys that the block leaves out
        keys = [key for key in _AXES if key in lists]
        lists_of_keys = [lists[key] for key in keys]
        for values in itertools.product(*lists_of_keys):
            yield dict(zip(keys, values, strict=True))

    def _spec(
        self,
        part: Part[ImagePart],
        settings: ImageTraining,
        methods: Mapping[str, Method],
        point: Mapping[str, Any],
        where: Location,
    ) -> dict[str, Any]:
        """Return the spec of one run.

        Args:
            part: The benchmark's section of the suite.
            settings: The training settings of the model.
            methods: The methods of the benchmark, by name.
            point: The names of the run's ``model``, ``task`` (image set) and ``method``, and its
                value for each key of :data:`_AXES` that the block has.
            where: The location of the block in the suite's file, for messages.

        Raises:
            DefinitionError: A setting of the method or a hyper-parameter is not valid, or frozen
                layers do not fit the method or the augmentation.
        """
        task_name = point["task"]
        task = self.tasks[task_name]
        test_envs = point["test_envs"]
        hparams_seed = point["hparams_seed"]
        seed = point["seed"]

        hparams = self._hyper_parameters(part, settings, task, hparams_seed, seed)
        method = method_spec(methods, point, seed, settings.lora, where)
        check_frozen(settings.frozen_layers, MethodSpec(**method), where)
        if settings.frozen_layers:
            _check_not_augmented(hparams, task, part.where("training", "frozen_layers"))

        environments = list(task.environments)
        variant = _variant(method["variant"], environments, test_envs, hparams_seed)
        eval_every = settings.eval_every or task.eval_every
        # all methods share the baseline's seed, so they get the same MNIST digits
        data_seed = sweep_seed(task.domainbed, BASELINE, test_envs, hparams_seed, seed)
        model_name = point["model"]
        return self.spec(
            variant,
            model=load_models()[model_name].spec(model_name),
            task=task.spec(task_name),
            ood=[],
            method=method,
            test_envs=list(test_envs),
            hparams_seed=hparams_seed,
            hparams=hparams,
            # the digest of the settings that all runs of the method share
            sweep=_sweep(self.definition.version, methods[point["method"]], settings),
            training={**settings.spec(), "eval_every": eval_every},
            learning_rate=float(hparams["lr"]),
            data_seed=data_seed,
            seed=seed,
        )

    def _hyper_parameters(
        self,
        part: Part[ImagePart],
        settings: ImageTraining,
        task: SetEntry,
        hparams_seed: int,
        seed: int,
    ) -> dict[str, Any]:
        """Return a run's hyper-parameters, from DomainBed or from the EMoE authors' fork of it.

        Values in ``settings.hparams`` replace them.

        Raises:
            DefinitionError: A name or a value in ``settings.hparams`` is not valid.
        """
        registry = settings.registry or "domainbed"
        of_registry = hyper_parameters(registry, task.domainbed, hparams_seed, seed)
        overrides = settings.hparams or {}
        hparams = {**of_registry, **overrides}
        # refuses unknown names and wrong values
        parse(hparams, HParams, part.file, "benchmarks", self.name, "training", "hparams")
        return hparams

    def sets(self, run: Run) -> list[SetReader]:
        spec = ImageSpec.model_validate(run.spec)
        truncated = spec.training.truncated
        describe = functools.partial(self._describe, spec.task.name, spec.data_seed, truncated)
        return [SetReader(spec.task.name, ALL, describe)]

    def _describe(
        self, name: str, data_seed: int, truncated: str, open_files: bool
    ) -> Iterator[SetPart]:
        """Yield the number of images of each environment, then of the whole set.

        If the set is missing or damaged, only the instructions to get it are yielded.

        Args:
            name: The name of the set.
            data_seed: DomainBed's seed of the run.
            truncated: ``refuse`` to reject image files that end early, ``load`` to fill them.
            open_files: True to open every image.
        """
        # this module imports PyTorch, and planning is faster without PyTorch
        from benchmarks.domainbed.validation import count_images, load_set, validate_images

        entry = self.tasks[name]
        task = RunImageSet(**entry.spec(name))
        try:
            image_set = load_set(task, data_seed, truncated=truncated)
            if open_files:
                validate_images(image_set)
        except DataError as error:
            problem = error if open_files else first_line(error)
            yield missing_set(name, problem, entry.download_instructions, entry.images)
            return
        for counts in count_images(image_set):
            yield SetPart(
                name,
                counts.name,
                rows=counts.images,
                labels=counts.labels,
                source=image_set.source,
            )
        yield SetPart(
            name,
            ALL,
            rows=image_set.num_images,
            expected=entry.images,
            source=image_set.source,
        )


def _check_not_augmented(hparams: Mapping[str, Any], task: SetEntry, where: Location) -> None:
    """Raise a DefinitionError if a run with frozen layers augments its images.

    The output of frozen layers is computed once per image, but augmented images differ at every
    step.

    Args:
        hparams: The hyper-parameters of the run.
        task: The image set.
        where: The location of ``frozen_layers`` in the suite's file, for the message.
    """
    # MNIST's digits are never augmented
    is_augmented = hparams["data_augmentation"] and not task.source.mnist
    if is_augmented:
        raise DefinitionError(
            f"{where} needs hparams.data_augmentation: false, because augmented images "
            "differ at every step"
        )


def _test_env_tuples(
    requested: str | list[list[str]], environments: list[str], where: Location
) -> list[tuple[int, ...]]:
    """Return the held-out environments of each run, as sorted numbers.

    Args:
        requested: ``single``, ``all``, or lists of names.
        environments: The names of all environments, in the order of their numbers.
        where: The location of ``requested`` in the suite's file, for messages.
    """
    if isinstance(requested, str):
        combinations = list(held_out_combinations(len(environments)))
        if requested == "all":
            return combinations
        return [envs for envs in combinations if len(envs) == 1]
    tuples = []
    for names in requested:
        check_names(where, names, environments)
        numbers = [environments.index(name) for name in names]
        tuples.append(tuple(sorted(numbers)))
    return tuples


def _variant(
    method_variant: str, environments: list[str], test_envs: Sequence[int], hparams_seed: int
) -> str:
    """Name the settings of a run, such as ``N24-TA+C-h2``, without model, set, method and seed.

    The example has the method's variant ``N24``, holds out the environments A and C, and has
    ``hparams_seed`` 2.
    """
    held_out = "+".join(environments[env] for env in test_envs)
    parts = [method_variant, f"T{held_out}"]
    # 0 stands for the default hyper-parameters, which need no name
    if hparams_seed:
        parts.append(f"h{hparams_seed}")
    # the method's variant may be empty
    return "-".join(part for part in parts if part)


def _sweep(version: int, method: Method, training: ImageTraining) -> str:
    """Return a digest of the settings that all runs of a method share: six hexadecimal digits."""
    settings = [
        version,
        method.model_dump(exclude={"title", "role"}),
        training.model_dump(exclude={"by_model"}),
    ]
    text = json.dumps(settings, sort_keys=True)
    return short_digest(text, 6)
