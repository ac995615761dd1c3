"""Plan runs of text classification: one for each model, task, method, learning rate, protocol and seed."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

from benchmarks.harness.base import DataError, DefinitionError, first_line
from benchmarks.harness.config.benchmark import (
    COUNTS,
    OOD_MEAN,
    AnyBenchmark,
    Benchmark,
    D,
    Domain,
    MethodsDefinition,
    P,
    Part,
    check_rows,
    resolve_methods,
)
from benchmarks.harness.config.catalogue import load_metrics, load_models, model_names
from benchmarks.harness.config.method_specs import (
    TRAINING_KEYS,
    VARIANT_KEYS,
    MethodSpec,
    check_frozen,
    method_spec,
)
from benchmarks.harness.config.methods import ABLATION, Method
from benchmarks.harness.config.runs import Run, trained_sets
from benchmarks.harness.config.sets import SetPart, SetReader
from benchmarks.harness.config.yaml import Location, check_file, check_names, parse, read
from benchmarks.harness.sources.local import expected_path, local_path
from benchmarks.text.definition import (
    ABLATION_COLUMNS,
    CLEAN,
    ID,
    OOD,
    PAPER_COLUMNS,
    PUBLISHED,
    TaskEntry,
    TaskFile,
    TextDefinition,
    TextPart,
    TextSpec,
    TextTraining,
    Transformed,
    merged_classes,
)

_SCORES = Domain(("score",), selections=(CLEAN, PUBLISHED))
DOMAINS = {ID: _SCORES, OOD: _SCORES, OOD_MEAN: _SCORES, "model": COUNTS}
_OTHER_AXES = (*TRAINING_KEYS, "protocol", "learning_rate", "seed")


class TextSets(Benchmark[D, TaskEntry, P]):
    """List and describe the sets of a benchmark on texts."""

    task_files: ClassVar = {"tasks": TaskFile}
    paper_columns: ClassVar[tuple[str, ...]] = PAPER_COLUMNS

    def sets(self, spec: Mapping[str, Any]) -> list[SetReader]:
        from benchmarks.text.data import resolve_part

        trained = ("train", "dev", "test") if "training" in spec else ("test",)
        named = [(task["name"], part) for task in trained_sets(spec) for part in trained]
        named += [(other["name"], "test") for other in spec["ood"]]
        parts = [(name, resolve_part(self.tasks[name].splits, part)) for name, part in named]
        return [SetReader(*part, functools.partial(self._describe, *part)) for part in parts]

    def _describe(self, name: str, part: str, open_files: bool) -> Iterator[SetPart]:
        from benchmarks.text.data import describe_rows, load_split

        task = self.tasks[name]
        try:
            split = load_split(task, part)
        except DataError as error:
            advice = _advice(name, task, first_line(error))
            yield SetPart(name, part, None, expected=task.rows.get(part), advice=advice)
        else:
            yield describe_rows(name, part, split, task)


class TextBenchmark(TextSets[TextDefinition, TextPart]):
    """Plan runs of text classifiers that are fine-tuned on one task, and evaluated on it and on OOD sets."""

    package = "benchmarks.text"
    spec_model = TextSpec
    definition_model, part_model = TextDefinition, TextPart
    recorded = ("scores", "data", "model", "routing", "usage")

    @classmethod
    def load(cls, name: str, content: object, file: Path) -> Self:
        definition = parse(content, TextDefinition, str(file))
        rows = transformed_rows(definition.transformed, definition, file)
        trained = [row.trained for row in definition.transformed.values()]
        if twice := [row for row in trained if trained.count(row) > 1]:
            raise DefinitionError(
                f"{file}: 'transformed' has '{twice[0]}' twice; a run is converted only once"
            )
        definition = definition.model_copy(update={"methods": {**definition.methods, **rows}})
        benchmark = cls(
            name, definition, read(file.parent / definition.tasks, TaskFile).tasks, DOMAINS
        )
        check_ablations(benchmark)
        for task in benchmark.tasks:
            _check_task(
                Location(benchmark.folder / definition.tasks, f"tasks.{task}"),
                task,
                benchmark.tasks,
            )
        return benchmark

    def specs(
        self, part: Part[TextPart], exclude: Collection[str], others: Sequence[Run]
    ) -> Iterator[dict[str, Any]]:
        self._check_training(part)
        methods = self.methods(part)
        trained = [name for name in methods if name not in self.definition.transformed]
        trainable = [
            name for name, task in self.tasks.items() if task.splits.train and task.splits.dev
        ]
        names = {"model": model_names(None), "task": trainable, "method": trained}
        training = functools.cache(functools.partial(self.settings, "training", part))
        for where, point in part.grid_points(names, (*names, *VARIANT_KEYS, *_OTHER_AXES)):
            for key in TRAINING_KEYS:
                if key in point and methods[point["method"]].role != ABLATION:
                    raise DefinitionError(
                        f"{where.at(key)} is for rows with role: {ABLATION}, not '{point['method']}'"
                    )
            if point["task"] in exclude:
                continue
            settings, task = training(point["model"]), self.tasks[point["task"]]
            shaped = self._method_specs(methods, point, settings, where)
            protocol = _protocol(task, point, where)
            run_settings = run_training(settings, task, point, protocol)
            check_frozen(
                run_settings.get("frozen_layers"), MethodSpec(**shaped["method"]), str(where)
            )
            asked = settings.evaluate_ood
            evaluated = asked if isinstance(asked, bool) else point["method"] in (asked or ())
            yield self.spec(
                shaped["method"]["variant"],
                protocol=protocol,
                model=load_models()[point["model"]].spec(point["model"]),
                task=task.spec(),
                ood=[
                    self.tasks[name].spec()
                    for name in task.ood
                    if evaluated and name not in exclude
                ],
                training=run_settings,
                learning_rate=float(point["learning_rate"]),
                seed=point["seed"],
                **shaped,
            )

    def _method_specs(
        self,
        methods: Mapping[str, Method],
        point: Mapping[str, Any],
        settings: TextTraining,
        where: Location,
    ) -> dict[str, Any]:
        """Return ``method`` of a run's spec, and ``used_as`` if the model is also evaluated as another method."""

        def resolved(name: str) -> dict[str, Any]:
            return method_spec(
                methods, {**point, "method": name}, point["seed"], settings.lora, where
            )

        specs: dict[str, Any] = {"method": resolved(point["method"])}
        for name, row in self.definition.transformed.items():
            if row.trained == point["method"]:
                specs["used_as"] = {"name": name, "config": resolved(row.used_as)["config"]}
        return specs

    def _check_training(self, part: Part[TextPart]) -> None:
        """Check the training settings of a suite."""
        training: TextTraining = self.settings("training", part)
        where = part.where("training")
        check_names(where.at("epochs_by_task"), training.epochs_by_task or (), self.tasks)
        if not isinstance(training.evaluate_ood, bool):
            methods = training.evaluate_ood or ()
            check_names(where.at("evaluate_ood"), methods, self.definition.methods)
        if not training.validation_fraction:
            raise DefinitionError(
                f"{where.at('validation_fraction')} is 0, but clean runs need rows for selection"
            )
        if training.patience is not None and training.checkpoint_selection != "best":
            raise DefinitionError(
                f"{where.at('patience')} needs checkpoint_selection: best; set patience: null"
            )


def transformed_rows(
    transformed: Mapping[str, Transformed], definition: MethodsDefinition, file: Path
) -> dict[str, Method]:
    """Return a method for each row that is trained as one method of ``definition`` and evaluated as another.

    Raises:
        DefinitionError: A row does not exist, or one row's weights cannot be used in the other's model.
    """
    check_rows(definition, file)
    resolved = resolve_methods(definition)
    usual = [name for name, method in resolved.items() if method.role != ABLATION]
    rows: dict[str, Method] = {}
    for name, row in transformed.items():
        where = Location(file, f"transformed.{name}")
        if name in definition.methods:
            raise DefinitionError(f"{where} has the name of a method; choose another name")
        for key, used in (("trained", row.trained), ("used_as", row.used_as)):
            check_names(where.at(key), [used], usual)
            if not _has_portable_weights(resolved[used]):
                raise DefinitionError(
                    f"{where.at(key)} is '{resolved[used].title}', whose weights fit no other row"
                )
        trained = definition.methods[row.trained].given()
        rows[name] = Method(
            **{"method": row.trained, **trained, "title": row.title, "role": ABLATION}
        )
    return rows


def _has_portable_weights(method: Method) -> bool:
    """Return False if a method has a learned router, experts from its run's data, or other trained parameters."""
    settings = method.given()
    learned = (
        settings.get("router", "avg_k") != "avg_k" or settings.get("partition") == "coactivation"
    )
    return not (learned or method.kind == "gmoe" or method.tune or method.also_train)


def check_ablations(benchmark: AnyBenchmark) -> None:
    """Check that ablations compare existing rows with the baseline.

    Raises:
        DefinitionError: A check failed; the error names the file, the key and the nearest valid value.
    """
    definition = benchmark.definition
    for name, ablation in definition.ablations.items():
        where = Location(benchmark.file, f"ablations.{name}")
        check_names(where.at("rows"), ablation.rows, definition.methods)
        if ablation.rows[0] != definition.baseline:
            raise DefinitionError(
                f"{where.at('rows')} must begin with the baseline, '{definition.baseline}'"
            )
        if ablation.paper:
            check_file(where.at("paper"), ablation.paper, benchmark.folder, ABLATION_COLUMNS)


def _check_task(where: Location, name: str, tasks: Mapping[str, TaskEntry]) -> None:
    task = tasks[name]
    check_names(where.at("metric"), [task.metric], load_metrics())
    check_names(where.at("ood_metrics"), task.ood_metrics, load_metrics())
    check_names(where.at("ood"), task.ood, tasks)
    for other in task.ood:
        smaller, larger = sorted((task, tasks[other]), key=lambda each: len(each.labels))
        if len(smaller.labels) < len(larger.labels):
            try:
                merged_classes(larger, smaller)
            except DefinitionError as error:
                raise DefinitionError(f"{where.at('ood')}: {error}") from error
    check_names(where.at("label_names"), task.label_names.values(), task.labels)
    if not (
        task.source.hub
        or task.source.csv
        or task.source.vader_sentiment
        or task.download_instructions
    ):
        raise DefinitionError(
            f"{where} is neither on the hub nor in a package, so it needs 'download_instructions'"
        )


def _protocol(task: TaskEntry, point: Mapping[str, Any], where: Location) -> str:
    """Return the protocol of a run: its grid point's, or the task's default."""
    has_test = task.splits.test is not None
    if has_test and point.get("protocol") == PUBLISHED:
        raise DefinitionError(
            f"{where.at('protocol')}: '{PUBLISHED}' is for tasks without a test split"
        )
    return str(point.get("protocol", CLEAN if has_test else PUBLISHED))


def run_training(
    settings: TextTraining, task: TaskEntry, point: Mapping[str, Any], protocol: str
) -> dict[str, Any]:
    """Return the training settings of a run's spec: ``settings``, adapted to task, protocol and grid point."""
    training = settings.spec()
    epochs = (settings.epochs_by_task or {}).get(point["task"], settings.epochs)
    training["epochs"] = epochs * point.get("epochs_factor", 1)
    if protocol == PUBLISHED or task.splits.test is not None:  # no rows are held out
        training["validation_fraction"] = 0.0
    if "train_share" in point:
        training["train_share"] = point["train_share"]
    return training


def _advice(name: str, task: TaskEntry, problem: str) -> str:
    """Return a message on a missing set, with instructions to get it."""
    source = task.source.model_dump()
    if task.source.vader_sentiment or task.source.csv or local_path(name, source) is not None:
        return f"{name}: {problem}"
    if task.download_instructions:
        solution = f"by hand. {task.download_instructions.strip()}"
    else:
        hub = f"{task.source.hub} ({task.source.config})"
        solution = f"on the hub as {hub}; `python -m benchmarks data` or the first run downloads it"
    files = dict.fromkeys(
        file for layout in task.raw_formats or () for file in layout.files.values()
    )
    columns = ", ".join([*task.fields, task.label])
    folder = f"{expected_path(source)} ({', '.join(files) or 'its files'}; hub columns {columns})"
    return f"{name}: {solution}.\n    Folder: {folder}. Without it: `exclude: [{name}]`"
