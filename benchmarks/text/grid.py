"""Plan runs of text classification.

A run has a model, a task, a method, a learning rate, a protocol and a seed.
"""

from __future__ import annotations

import csv
import functools
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

from benchmarks.harness.base import DataError, DefinitionError, distinct, first_line
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
from benchmarks.harness.config.runs import Run
from benchmarks.harness.config.sets import SetPart, SetReader
from benchmarks.harness.config.yaml import Location, check_csv, check_names, parse, read
from benchmarks.harness.sources.local import expected_path, local_path
from benchmarks.text.definition import (
    ABLATION_COLUMNS,
    CLEAN,
    ID,
    INFORMATION,
    LOSSES,
    MEMORY,
    MEMORY_RATIO,
    OOD,
    PAPER_COLUMNS,
    PUBLISHED,
    ROUTING,
    TRAINING,
    EpochTraining,
    TaskEntry,
    TaskFile,
    TextDefinition,
    TextPart,
    TextSpec,
    TextTraining,
    Transformed,
    merged_classes,
)
from emoe.errors import did_you_mean

_SELECTIONS = (CLEAN, PUBLISHED)
_SCORES_AND_LOSSES = Domain(("score", *LOSSES), selections=_SELECTIONS)
# the domains of benchmarks that evaluate text classifiers
DOMAINS = {
    ID: _SCORES_AND_LOSSES,
    OOD: Domain(("score",), selections=_SELECTIONS),
    OOD_MEAN: _SCORES_AND_LOSSES,
    ROUTING: Domain(INFORMATION, selections=_SELECTIONS),
    "model": COUNTS,
}
# and of those that train them; a ratio of memory compares all runs, not only the selected ones
_TRAINING_DOMAINS = {
    **DOMAINS,
    TRAINING: Domain(("load_change",), selections=_SELECTIONS),
    MEMORY: Domain((MEMORY_RATIO, f"{MEMORY_RATIO}_low", f"{MEMORY_RATIO}_high"), pair="setting"),
}
# the built-in metrics: for any classes, for two classes only, and for a regression
_CLASS_METRICS = ["accuracy", "balanced_accuracy", "mcc"]
_TWO_CLASS_METRICS = ["accuracy_f1", "f1"]
_REGRESSION_METRICS = ["pearson_spearman"]
# the keys of a grid point, except model, task, method and the method settings (VARIANT_KEYS)
_OTHER_AXES = (*TRAINING_KEYS, "protocol", "learning_rate", "seed")


class TextSets(Benchmark[D, TaskEntry, P]):
    """A benchmark on text tasks, which can list and describe the data sets of its runs."""

    task_files: ClassVar = {"tasks": TaskFile}
    paper_columns: ClassVar[tuple[str, ...]] = PAPER_COLUMNS

    def sets(self, run: Run) -> list[SetReader]:
        """Return a reader for each part of a task or OOD set that a run reads."""
        # imported here, because it imports `datasets`, which would slow down planning
        from benchmarks.text.data import resolve_part

        # a run that trains nothing only evaluates
        parts = ["test"]
        if run.trains_model:
            parts = ["train", "dev", "test"]
        names_and_parts = []
        for task in run.trained_sets:
            for part in parts:
                names_and_parts.append((task["name"], part))
        for other in run.ood_sets:
            names_and_parts.append((other["name"], "test"))

        readers = []
        for name, wanted_part in names_and_parts:
            # a set without a test part is tested on its dev part
            part = resolve_part(self.tasks[name].splits, wanted_part)
            describe = functools.partial(self._describe, name, part)
            readers.append(SetReader(name, part, describe))
        return readers

    def _describe(self, name: str, part: str, open_files: bool) -> Iterator[SetPart]:
        """Describe the ``train``, ``dev`` or ``test`` part of a task, or say how to get the set.

        The part is always read as a whole, so ``open_files`` is not used.
        """
        from benchmarks.text.data import describe_rows, load_whole_part

        task = self.tasks[name]
        try:
            split = load_whole_part(task, part)
        except DataError as error:
            advice = _advice(name, task, first_line(error))
            yield SetPart(name, part, rows=None, expected=task.rows.get(part), advice=advice)
        else:
            yield describe_rows(name, part, split, task)


class TextBenchmark(TextSets[TextDefinition, TextPart]):
    """A benchmark of text classifiers.

    Each classifier is fine-tuned on one task, and evaluated on this task and on
    out-of-distribution (OOD) sets.
    """

    package = "benchmarks.text"
    spec_model = TextSpec
    definition_model = TextDefinition
    part_model = TextPart
    recorded = ("scores", "data", "model", "routing", "usage")

    @classmethod
    def load(cls, name: str, content: object, file: Path) -> Self:
        parsed = parse(content, TextDefinition, str(file))
        methods_of_rows = transformed_rows(parsed.transformed, parsed, file)
        _check_trained_once(parsed.transformed, file)
        # tables show a transformed row like a method, so it is added to the methods
        methods = {**parsed.methods, **methods_of_rows}
        definition = parsed.model_copy(update={"methods": methods})
        tasks = read(file.parent / definition.tasks, TaskFile).tasks
        benchmark = cls(name, definition, tasks, _TRAINING_DOMAINS)
        check_ablations(benchmark)
        task_file = benchmark.folder / definition.tasks
        for task_name in benchmark.tasks:
            where = Location(task_file, f"tasks.{task_name}")
            _check_task(where, task_name, benchmark.tasks)
        return benchmark

    def specs(
        self, part: Part[TextPart], exclude: Collection[str], others: Sequence[Run]
    ) -> Iterator[dict[str, Any]]:
        methods = self.methods(part)
        allowed_names = {
            "model": model_names(None),
            "task": self._trainable_tasks(),
            # a transformed row is trained as another method
            "method": [name for name in methods if name not in self.definition.transformed],
        }
        # the keys that a block of the grid may have
        axes = (*allowed_names, *VARIANT_KEYS, *_OTHER_AXES)

        # cached, because all points with the same model and task have the same settings
        @functools.cache
        def training_settings(model: str, task: str) -> TextTraining:
            return self._training_settings(part, model, task)

        for where, point in part.grid_points(allowed_names, axes):
            _check_training_keys(point, methods, where)
            # an excluded task has no runs, but its block is checked
            if point["task"] in exclude:
                continue
            task = self.tasks[point["task"]]
            settings = training_settings(point["model"], point["task"])
            method_sections = self._method_sections(methods, point, settings, where)
            protocol = _protocol(task, point, where)
            training = run_training(settings, task, point, protocol)
            method = MethodSpec(**method_sections["method"])
            # no method may convert or train a frozen layer
            check_frozen(training.get("frozen_layers"), method, where)
            ood = []
            if _evaluates_ood(settings, point["method"]):
                ood = [self.tasks[name].spec() for name in task.ood if name not in exclude]
            model = load_models()[point["model"]]
            yield self.spec(
                method.variant,
                protocol=protocol,
                model=model.spec(point["model"]),
                task=task.spec(),
                ood=ood,
                training=training,
                learning_rate=float(point["learning_rate"]),
                seed=point["seed"],
                **method_sections,
            )

    def _trainable_tasks(self) -> list[str]:
        """List the tasks that have a training split and a dev split."""
        tasks = self.tasks.items()
        return [name for name, task in tasks if task.splits.train and task.splits.dev]

    def _method_sections(
        self,
        methods: Mapping[str, Method],
        point: Mapping[str, Any],
        settings: TextTraining,
        where: Location,
    ) -> dict[str, Any]:
        """Return the keys ``method`` and ``used_as`` of a run's spec.

        ``used_as`` is the method that the trained model is converted to for a second evaluation.
        This key is missing if the model is not converted.

        Args:
            methods: The methods of the suite.
            point: The point of the grid: one value for each key of a block.
            settings: The training settings of the suite for the run's model and task.
            where: The place of the point in the file, for messages.
        """

        def spec_of(method: str) -> dict[str, Any]:
            """Return the spec of a method at this point of the grid."""
            point_of_method = {**point, "method": method}
            return method_spec(methods, point_of_method, point["seed"], settings.lora, where)

        sections: dict[str, Any] = {"method": spec_of(point["method"])}
        # `_check_trained_once` ensures that at most one transformed row is trained as this method
        for name, row in self.definition.transformed.items():
            if row.trained == point["method"]:
                new_method = spec_of(row.used_as)
                sections["used_as"] = {"name": name, "config": new_method["config"]}
        return sections

    def _training_settings(self, part: Part[TextPart], model: str, task: str) -> TextTraining:
        """Return the training settings of a suite for a model and a task.

        Raises:
            DefinitionError: A setting names a method that does not exist, or two settings do not
                fit together.
        """
        training: TextTraining = self.settings("training", part, model=model, task=task)
        where = part.where("training")
        # `evaluate_ood` is True, False, None, or a list of methods
        if isinstance(training.evaluate_ood, list):
            check_names(where.at("evaluate_ood"), training.evaluate_ood, self.definition.methods)
        # a block of the grid may ask for clean runs of a task without a test split
        check_validation_rows(training, where)
        if training.patience is not None and training.checkpoint_selection != "best":
            raise DefinitionError(
                f"{where.at('patience')} needs checkpoint_selection: best; set patience: null"
            )
        return training


def check_validation_rows(training: EpochTraining, where: Location) -> None:
    """Raise a DefinitionError if the training settings at ``where`` hold out no rows."""
    if not training.validation_fraction:
        raise DefinitionError(
            f"{where.at('validation_fraction')} is 0, but clean runs need rows for selection"
        )


def _check_trained_once(transformed: Mapping[str, Transformed], file: Path) -> None:
    """Raise a DefinitionError if two transformed rows are trained as the same method."""
    trained = [row.trained for row in transformed.values()]
    for name in trained:
        if trained.count(name) > 1:
            raise DefinitionError(
                f"{file}: two rows of 'transformed' are trained as '{name}', but a run is "
                "converted only once"
            )


def _check_training_keys(
    point: Mapping[str, Any], methods: Mapping[str, Method], where: Location
) -> None:
    """Raise a DefinitionError if a point of a grid varies training settings of a main method.

    Only methods with the role ``ablation`` may vary them.
    """
    name = point["method"]
    for key in TRAINING_KEYS:
        if key in point and methods[name].role != ABLATION:
            raise DefinitionError(
                f"{where.at(key)} is for rows with role: {ABLATION}, not '{name}'"
            )


def _evaluates_ood(settings: TextTraining, method: str) -> bool:
    """Return True if the suite evaluates the runs of a method on OOD sets."""
    if settings.evaluate_ood is None:
        return False
    if isinstance(settings.evaluate_ood, bool):
        return settings.evaluate_ood
    return method in settings.evaluate_ood


def transformed_rows(
    transformed: Mapping[str, Transformed], definition: MethodsDefinition, file: Path
) -> dict[str, Method]:
    """Return a method for each row of ``transformed``, so that tables can show the row.

    A row shows models that are trained as one method and evaluated as another. Its method has the
    settings of the trained method, the title of the row, and the role ``ablation``.

    Args:
        transformed: The rows by name.
        definition: The methods of the benchmark.
        file: The file of the rows, for messages.

    Raises:
        DefinitionError: A row has the name of a method. Or one of its two methods does not exist,
            is only for ablations, or has weights that do not fit other methods.
    """
    check_rows(definition, file)
    resolved = resolve_methods(definition)
    usual_methods = {name: method for name, method in resolved.items() if method.role != ABLATION}
    methods: dict[str, Method] = {}
    for name, row in transformed.items():
        where = Location(file, f"transformed.{name}")
        if name in definition.methods:
            raise DefinitionError(f"{where} has the name of a method; choose another name")
        _check_transformed_row(row, usual_methods, where)
        settings = definition.methods[row.trained].given()
        # The key `method` names an entry of methods.yaml. By default, this is the entry with the
        # method's own name. The row has another name, so its method needs the key.
        entry = settings.get("method", row.trained)
        settings_of_row = {**settings, "method": entry, "title": row.title, "role": ABLATION}
        methods[name] = Method(**settings_of_row)
    return methods


def _check_transformed_row(
    row: Transformed, usual_methods: Mapping[str, Method], where: Location
) -> None:
    """Check that the two methods of a row exist and can exchange weights.

    Args:
        row: The row.
        usual_methods: The methods that a row may name. Those for ablations only are left out.
        where: The location of the row, for messages.

    Raises:
        DefinitionError: A check failed.
    """
    for key, name in (("trained", row.trained), ("used_as", row.used_as)):
        check_names(where.at(key), [name], usual_methods)
        method = usual_methods[name]
        if not _has_portable_weights(method):
            raise DefinitionError(
                f"{where.at(key)} is '{method.title}', whose weights fit no other row"
            )


def _has_portable_weights(method: Method) -> bool:
    """Return True if a method's trained weights fit a dense model, and EMoE with other experts."""
    settings = method.given()
    # GMoE's experts have weights of their own, not slices of a dense layer
    if method.kind == "gmoe":
        return False
    # a learned router has weights that the other model lacks, and the choice of the router `fixed`
    # depends on the run's data
    if settings.get("router", "avg_k") != "avg_k":
        return False
    # a partition by co-activation depends on the activations of the run's data, not only on the
    # weights
    if settings.get("partition") == "coactivation":
        return False
    # both rows must train the same parameters
    trains_other_parameters = bool(method.tune or method.also_train)
    return not trains_other_parameters


def check_ablations(benchmark: AnyBenchmark) -> None:
    """Check the ablations of a benchmark.

    The rows of an ablation must exist, and the first one must be the baseline. If an ablation names
    a csv with the paper's numbers, the csv must exist and have the right columns, and its methods
    must be rows of the ablation.

    Raises:
        DefinitionError: A check failed. The error names the file and the key.
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
            check_csv(where.at("paper"), ablation.paper, benchmark.folder, ABLATION_COLUMNS)
            _check_methods_of_csv(benchmark.folder / ablation.paper, ablation.rows, where)


def _check_methods_of_csv(file: Path, rows: Sequence[str], where: Location) -> None:
    """Check that the methods in a csv of the paper's numbers are rows of the ablation.

    The table has no place for other methods.

    Args:
        file: The csv.
        rows: The rows of the ablation.
        where: The location of the ablation, for messages.

    Raises:
        DefinitionError: A method is not a row.
    """
    # spreadsheets begin a file with a byte order mark, which utf-8-sig drops
    with file.open(encoding="utf-8-sig", errors="replace", newline="") as lines:
        methods = [line["method"] for line in csv.DictReader(lines)]
    for method in methods:
        if method not in rows:
            near = did_you_mean(method, rows)
            raise DefinitionError(f"{file}: '{method}' is not in {where.at('rows')}{near}")


def _check_task(where: Location, name: str, tasks: Mapping[str, TaskEntry]) -> None:
    """Check that the names in a task exist, and that its metrics and OOD sets fit its classes.

    A task that is neither on the hub nor in a package or csv must say how to get it.

    Raises:
        DefinitionError: A check failed; the error begins with ``where``.
    """
    task = tasks[name]
    check_names(where.at("metric"), [task.metric], load_metrics())
    check_names(where.at("ood_metrics"), task.ood_metrics, load_metrics())
    # a set on which no model is trained is only scored as an OOD set
    if task.splits.train and task.splits.dev:
        _check_metric(where.at("metric"), task.metric, len(task.labels))
    check_names(where.at("ood"), task.ood, tasks)
    for other in task.ood:
        try:
            _check_classes_fit(task, tasks[other])
        except DefinitionError as error:
            raise DefinitionError(f"{where.at('ood')}: {error}") from error
        # predictions or labels are merged, so the scored classes are those of the smaller task
        classes = min(len(task.labels), len(tasks[other].labels))
        for metric in tasks[other].ood_metrics:
            _check_metric(f"{where.at('ood')}: 'ood_metrics' of '{other}'", metric, classes)
    check_names(where.at("label_names"), task.label_names.values(), task.labels)
    source = task.source
    is_available = bool(source.hub or source.csv or source.vader_sentiment)
    if not is_available and not task.download_instructions:
        raise DefinitionError(
            f"{where} is not on the hub, in a package or in a csv, so it needs "
            "'download_instructions'"
        )


def _check_metric(where: Location | str, metric: str, classes: int) -> None:
    """Check that a metric can score a task with this number of classes.

    Metrics of plugins are not checked.

    Args:
        where: The place of the metric, for messages.
        metric: The name of the metric.
        classes: The number of classes; 0 for a regression.

    Raises:
        DefinitionError: The metric cannot score such a task.
    """
    if classes == 0:
        scored = "a regression"
        valid = _REGRESSION_METRICS
        invalid = _CLASS_METRICS + _TWO_CLASS_METRICS
    elif classes == 2:
        scored = "2 classes"
        valid = _CLASS_METRICS + _TWO_CLASS_METRICS
        invalid = _REGRESSION_METRICS
    else:
        scored = f"{classes} classes"
        valid = _CLASS_METRICS
        invalid = _TWO_CLASS_METRICS + _REGRESSION_METRICS
    if metric in invalid:
        choices = ", ".join(valid)
        raise DefinitionError(
            f"{where} is '{metric}', which cannot score {scored}; choose from {choices}"
        )


def _check_classes_fit(task: TaskEntry, other: TaskEntry) -> None:
    """Raise a DefinitionError if classes must be merged, and no ``label_map`` says how."""
    # With equal numbers of classes, class i of one task is class i of the other. Otherwise
    # merged_classes raises an error if the task with more classes has no fitting label_map.
    if len(task.labels) > len(other.labels):
        merged_classes(task, other)
    elif len(other.labels) > len(task.labels):
        merged_classes(other, task)


def _protocol(task: TaskEntry, point: Mapping[str, Any], where: Location) -> str:
    """Return the protocol of a run: the one of its grid point, or the default of its task.

    Raises:
        DefinitionError: The point has a protocol that the task does not allow.
    """
    has_test = task.splits.test is not None
    if has_test and point.get("protocol") == PUBLISHED:
        raise DefinitionError(
            f"{where.at('protocol')}: '{PUBLISHED}' is for tasks without a test split"
        )
    # if a task has a test split, its dev split is not reported, so selection with it is clean
    default = CLEAN if has_test else PUBLISHED
    return str(point.get("protocol", default))


def run_training(
    settings: TextTraining, task: TaskEntry, point: Mapping[str, Any], protocol: str
) -> dict[str, Any]:
    """Return the training settings of a run's spec.

    Args:
        settings: The settings of the suite for the run's model and task.
        task: The training task.
        point: The point of the grid, which may vary epochs and rows.
        protocol: The protocol of the run.
    """
    training = settings.spec()
    training["epochs"] = settings.epochs * point.get("epochs_factor", 1)
    # These runs hold out no training rows, because they select with the dev split. Only a clean run
    # of a task without a test split holds out rows, because it reports the dev split.
    selects_with_dev_split = protocol == PUBLISHED or task.splits.test is not None
    if selects_with_dev_split:
        training["validation_fraction"] = 0.0
    if "train_share" in point:
        training["train_share"] = point["train_share"]
    return training


def _advice(name: str, task: TaskEntry, problem: str) -> str:
    """Return a message on a set that cannot be loaded.

    If the set is missing, the message says how to get it. Otherwise it says what the ``problem``
    is.
    """
    source = task.source.model_dump()
    # the set is not missing: it is in a package, in a csv or in the user's folder
    if task.source.vader_sentiment or task.source.csv or local_path(name, source) is not None:
        return f"{name}: {problem}"
    # the set is missing: say where to get it, and into which folder to put it
    if task.download_instructions:
        solution = f"by hand. {task.download_instructions.strip()}"
    else:
        hub = str(task.source.hub)
        if task.source.config:
            hub = f"{hub} ({task.source.config})"
        solution = f"on the hub as {hub}; `python -m benchmarks data` or the first run downloads it"
    # without known names, say only "its files"
    files = ", ".join(_raw_files(task)) or "its files"
    columns = ", ".join([*task.fields, task.label])
    folder = f"{expected_path(source)} ({files}; hub columns {columns})"
    return f"{name}: {solution}.\n    Folder: {folder}. Without it: `exclude: [{name}]`"


def _raw_files(task: TaskEntry) -> list[str]:
    """List the names of the makers' files in all their layouts, each once."""
    files: list[str] = []
    for layout in task.raw_formats or ():
        files.extend(layout.files.values())
    return distinct(files)
