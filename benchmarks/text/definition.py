"""Define the files of a text benchmark: its training, its part of a suite, and its tasks."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from benchmarks.harness.base import DefinitionError
from benchmarks.harness.config.benchmark import (
    Entry,
    MethodsDefinition,
    Precision,
    Training,
    TrainingPart,
)
from benchmarks.harness.config.methods import LoRA, VariantAxes
from benchmarks.harness.config.overlay import Changes
from benchmarks.harness.config.runs import RunSpec
from benchmarks.harness.config.sets import PublishedRows
from benchmarks.harness.config.yaml import (
    UNIQUE,
    Count,
    Key,
    Names,
    NotNegative,
    Number,
    Positive,
    Positives,
    Rate,
    Share,
    Shares,
    Strict,
    Whole,
    Wholes,
    optional,
    optional_zero,
)

Protocol = Literal["published", "clean"]
PUBLISHED = "published"
CLEAN = "clean"
# domains: in distribution and out of distribution
ID = "id"
OOD = "ood"
# further domains, which only claims compare
ROUTING = "routing"
TRAINING = "training"
MEMORY = "memory"
# metrics that claims compare, besides scores
LOSSES = ("loss", "loss_calibrated")
INFORMATION = ("class_information", "task_information")
MEMORY_RATIO = "memory_ratio"

# columns of published numbers, before value, status and source
PAPER_COLUMNS = ("model", "scope", "method")
ABLATION_COLUMNS = (*PAPER_COLUMNS, "setting")


class EpochTraining(Training):
    """Training settings of a run with epochs; a suite may override them."""

    epochs: Positive
    """Passes over the training set."""
    batch_size: Count
    """Training rows per batch."""
    eval_batch_size: Count
    """Rows per evaluation batch."""
    max_length: Annotated[int, Field(ge=4)]
    """Maximum tokens of a row; longer rows are cut."""
    sampling: Literal["random", "group_by_length"]
    """Order of the training rows: shuffled, or shuffled in groups of similar length, which need
    less padding."""
    eval_rows: Count | None
    """Rows of every evaluation split; null for all."""
    weight_decay: NotNegative
    """AdamW's weight decay."""
    warmup: Rate
    """Share of the steps over which the learning rate rises."""
    checkpoint_selection: Literal["last", "best"]
    """The epoch whose weights are evaluated."""
    gradient_accumulation_steps: Count
    """Batches per step; their gradients are averaged."""
    precision: Precision
    """Arithmetic on accelerators: float32 or mixed. A CPU always computes in float32, and the
    record says so."""
    validation_fraction: Rate
    """Share of the training rows that a clean run holds out for selection, if the task has no test
    split."""


class TextTraining(EpochTraining):
    """Training settings of a classifier; a suite may override them."""

    in_no_spec: ClassVar = {"by_model", "by_task", "evaluate_ood"}

    train_rows: Count | None
    """Training rows, drawn with the run's seed from those that are not held out; null for all."""
    train_share: Share | None = optional()
    """Share of the training rows, drawn per class with the run's seed. A larger share contains the
    rows of a smaller one. Default: all."""
    dev_rows: Count | None = optional()
    """Number of rows that choose epoch and hyper-parameters, the same rows in every run. They come
    from the dev split if the task has a test split, else from the held-out training rows. Null or
    omitted: `eval_rows`. Ignored if a published run chooses with the reported split."""
    ood_rows: Count | None = optional()
    """Rows of every OOD set; null or omitted: `eval_rows`."""
    patience: Count | None
    """Stop after this many epochs without a new best score above 0; null: never stop. A number
    needs `checkpoint_selection: best`."""
    frozen_layers: Whole | None = optional_zero()
    """Number of first layers that are frozen with the embeddings, without dropout and stochastic
    depth. Their output for a row is computed once and kept (`resources/prefixes/`). Only later
    layers have adapters, and no method converts or trains a frozen layer. 0 or omitted: none."""
    lora: LoRA | None
    """Train adapters and the head only; null trains everything."""
    keep_weights: bool
    """Keep the trained weights in the run's folder, for benchmarks that evaluate them."""
    evaluate_ood: bool | Names | None = optional()
    """Evaluate all runs, or the runs of these methods, on the task's OOD sets at the end. This key
    is not part of a run's spec. For large sets, use a benchmark that evaluates only chosen runs."""
    by_task: dict[str, dict[str, Any]] | None = optional()
    """Settings for single tasks, by the task's name. They override the other settings and those of
    `by_model`. This key is not part of a run's spec."""


class TextBlock(VariantAxes):
    """One block of a grid: every combination of its lists is a run.

    Method settings that a block varies are part of a run's name, such as ``N16``.
    """

    model: Names
    """Names in models.yaml."""
    task: Names
    """Names in the task file."""
    method: Names
    """Names of methods."""
    learning_rate: Positives
    """Peak learning rates."""
    seed: Wholes
    """Seeds."""
    train_share: Shares | None = optional()
    """Shares of the training rows. Only methods with `role: ablation` may vary them."""
    epochs_factor: Positives | None = optional()
    """Factors by which the usual epochs are multiplied. Only methods with `role: ablation` may vary
    them."""
    protocol: Annotated[list[Protocol], Field(min_length=1), UNIQUE] | None = optional()
    """Selection of epoch and hyper-parameters. published: with the dev split, which is also
    reported. clean: with a split that is not reported. Left out: clean for tasks with a test split,
    else published."""


class TextPart(TrainingPart):
    """A text benchmark's part of a suite."""

    training: Annotated[dict[str, Any], Changes(TextTraining)] = Field({})
    """Settings that differ in this suite."""
    grid: Annotated[list[TextBlock], Field(min_length=1)]
    """Blocks of runs. Every combination of the lists of a block is a run."""


class Transformed(Strict):
    """A row of a table for models that are trained as one method and evaluated as another."""

    title: str
    """Label in tables and figures."""
    trained: str
    """The row whose trained runs are evaluated."""
    used_as: str
    """The row whose method the trained models are converted to before evaluation: dense, or EMoE
    with experts from the trained weights. Both rows must train the same parameters."""


class Ablation(Strict):
    """An ablation, with a table and optionally a figure of the same name."""

    title: str
    """Heading of the table."""
    question: str
    """Question of the ablation, and the paper's answer."""
    rows: Annotated[Names, UNIQUE]
    """Names of the compared methods; the first is the baseline. If a method has `role: ablation` or
    several variants, each of its settings is a separate row."""
    steps: Literal[True] | None = optional()
    """Compare each row with the row above it, instead of with the baseline."""
    paper: str | None = optional()
    """CSV with the paper's numbers, in the benchmark's folder: one row per model, scope (task),
    method and setting."""


class Ablated(Strict):
    """The settings of a text benchmark for its ablations."""

    ablations: dict[Key, Ablation] = Field({})
    """Ablations by name. The lists `tables` and `figures` name the ablations that are shown."""
    transformed: dict[Key, Transformed] = Field({})
    """Rows for ablations that are trained as one method and evaluated as another, by name."""


class PublishedTraces(Strict):
    """The paper's expert loads over training."""

    task: str
    """Training task."""
    rows: dict[str, str]
    """CSV of each method, in the benchmark's folder. A row has the shares of all experts in one
    window of training steps, one column per expert."""


class TextDefinition(MethodsDefinition, Ablated):
    """The content of a text benchmark's ``benchmark.yaml``."""

    tasks: str
    """File with the task definitions, in the benchmark's folder."""
    published_traces: PublishedTraces | None = optional()
    """The paper's expert loads over training, for comparison with ours."""
    training: TextTraining
    """The training of every run; a suite may change it."""


class TextSource(Strict):
    """Source of rows: a set on the hub, a folder of the user's, a csv, or a set that ships inside a
    package."""

    exactly_one_of = ("folder", "csv", "vader_sentiment")
    key_requirements = (("vader_label", "vader_sentiment"),)
    hub: str | None = optional()
    """Repository on the hub."""
    config: str | None = None
    """Configuration of the hub's set."""
    revision: str | None = None
    """Commit (or branch) on the hub; null for the newest commit."""
    folder: str | None = optional()
    """Name of the set's folder below data_root."""
    csv: str | None = optional()
    """A csv in this project. Its column `split` names the split of each row. Without this column, a
    hash of the text chooses the split."""
    vader_sentiment: str | None = optional()
    """A domain, such as tweets, of the human-rated sentiment set in the package vaderSentiment."""
    vader_label: Literal["strength"] | None = optional()
    """The label is the strength of the rating (weak or strong). By default, it is the sign of the
    rating."""


class Splits(Strict):
    """Split names by part. The name `a+b` stands for the rows of `a`, followed by those of `b`."""

    train: str | None = None
    """Training split."""
    dev: str | None = None
    """Split that selects epochs and learning rates."""
    test: str | None = None
    """Split that is reported."""


class FileLayout(Strict):
    """The names, format and columns of the files that the makers of a data set publish."""

    format: Literal["tsv", "csv", "jsonl", "folders"] = "tsv"
    """Tab-separated without quoting, comma-separated with quoting, JSON lines, or a folder of text
    files for each label."""
    files: dict[str, str]
    """File names by split name; for `folders`, the parent of the labels' folders."""
    columns: dict[str, str | int] = Field({})
    """Column of each field and of the label: its header, or its index in files without header."""
    encoding_errors: Literal["strict", "replace"] = "strict"
    """Treatment of bytes that are not UTF-8: raise an error, or replace them."""
    header: bool = True
    """True if the first line names the columns."""
    where: dict[str, Any] | None = optional()
    """How to separate the splits, if one file holds several. `column` is the column that names the
    split, and `values` has its value for each split."""
    label_names: dict[str, str] = Field({})
    """Class names by the labels of these files; other labels are errors."""


class RunTask(Strict):
    """The settings of a task that determine a run's numbers, and so are part of the run's spec."""

    name: str
    """Key in tasks.yaml."""
    source: TextSource
    """Source of the rows."""
    fields: Annotated[list[str], Field(min_length=1, max_length=2)]
    """One or two columns with texts, with the hub's names."""
    label: str = "label"
    """Column with the label."""
    column_aliases: dict[str, str] = Field({})
    """Names of columns in other copies of the set, each with the name that is used here."""
    labels: list[str] = Field([])
    """Names of the classes in the order of their numbers; empty for a regression. Class i of a
    model corresponds to class i of any other set with as many classes."""
    range: Annotated[list[Number], Field(min_length=2, max_length=2)] | None = optional()
    """Lowest and highest score of a regression; other scores are errors."""
    label_names: dict[str, str] = Field({})
    """Class names by other spellings in files."""
    unlabelled: list[str | int | float] = Field([])
    """Label values that mark a row without a gold label, in addition to -1, null, nan and an empty
    cell. These rows are dropped and counted, as are rows without text."""
    label_map: dict[Annotated[str, Field(pattern="^[0-9]+$")], list[Whole]] = Field({})
    """How classes are merged, for models or sets with fewer classes. The key is this smaller number
    of classes. The value is a list with the new class number of each class."""
    metric: str
    """Metric for selection and report, if a model is trained on the task; a name in
    metrics.yaml."""
    ood_metrics: Names = Field(default_factory=lambda data: [data["metric"]])
    """Metrics if the model was trained on another task; the first is the paper's. Default:
    metric."""
    splits: Splits
    """Split names by part. The dev part is for selection, and the test part is reported. Without a
    test part, the dev part is reported. Sets without train and dev are only for evaluation."""
    raw_formats: Annotated[list[FileLayout], Field(min_length=1)] | None = optional()
    """Layouts of the makers' files, for `tools/convert_glue_x.py`, which uses the first one whose
    file exists."""


def merged_classes(larger: RunTask, smaller: RunTask) -> list[int]:
    """Map the classes of a task to the classes of a task that has fewer.

    Args:
        larger: The task with more classes. Its ``label_map`` has the mapping.
        smaller: The task with fewer classes.

    Returns:
        A list with an entry for each class of the larger task: the number of the class of the
        smaller task into which it is merged.

    Raises:
        DefinitionError: The larger task has no such mapping, or the smaller task is a regression.
    """
    num_larger = len(larger.labels)
    num_smaller = len(smaller.labels)
    if num_smaller == 0:
        raise DefinitionError(
            f"'{larger.name}' has classes, but '{smaller.name}' is a regression; their labels do "
            "not fit"
        )
    # `label_map` has a list for each smaller number of classes
    merged_into = larger.label_map.get(str(num_smaller), [])
    maps_all_classes = len(merged_into) == num_larger
    uses_all_smaller_classes = set(merged_into) == set(range(num_smaller))
    if not maps_all_classes or not uses_all_smaller_classes:
        raise DefinitionError(
            f"'{larger.name}' has {num_larger} classes, '{smaller.name}' {num_smaller}: the larger "
            f"one needs 'label_map' with \"{num_smaller}\": {num_larger} numbers, each class from "
            f"0 to {num_smaller - 1} among them"
        )
    return merged_into


class TaskEntry(RunTask, Entry):
    """One task of ``tasks.yaml``: the settings of a run, and others for display and checks."""

    rows: dict[Annotated[str, Field(pattern="^(train|dev|test)$")], int] = Field({})
    """Row counts of each part according to the makers, including rows without a gold label; for
    sets of GLUE-X's authors, the counts in their result files."""
    published_rows: PublishedRows | None = optional()
    """Row count of the test part in the paper's evaluation, if it differs, with source and
    reason."""
    download_instructions: str | None = optional()
    """Source and file name, for sets that must be downloaded by hand."""
    ood: list[str] = Field([])
    """Tasks that a model trained on this one is also evaluated on, without further training."""

    def spec(self) -> dict[str, Any]:
        """Return the settings of the task that determine a run's numbers."""
        return self.model_dump(include=set(RunTask.model_fields))


class TaskFile(Strict):
    """The content of a file with task definitions, such as ``tasks.yaml``."""

    tasks: Annotated[dict[Key, TaskEntry], Field(min_length=1)]
    """The tasks, by name."""

    @model_validator(mode="before")
    @classmethod
    def _add_names(cls, content: Any) -> Any:
        """Give each task its key as its name.

        Content of another form stays as it is, and is refused by a later check.
        """
        match content:
            # a dictionary whose key `tasks` has a dictionary of tasks
            case {"tasks": dict(tasks)}:
                named = dict(tasks)
                for name, task in tasks.items():
                    if isinstance(task, dict):
                        named[name] = {**task, "name": name}
                return {**content, "tasks": named}
        return content


class UsedAs(Strict):
    """The method that a trained model is converted to for a second evaluation."""

    name: str
    """Name of the row."""
    config: dict[str, Any] | None
    """Configuration of EMoE; null for the dense model."""


class TextSpec(RunSpec):
    """The settings that determine the numbers of a run that trains a text classifier."""

    protocol: Protocol
    """The protocol that chooses epoch and hyper-parameters."""
    task: RunTask
    """Training task."""
    ood: list[RunTask]
    """OOD evaluation sets."""
    training: TextTraining
    """The training."""
    used_as: UsedAs | None = optional()
    """Method that the trained model is converted to for a second evaluation; by default none."""
