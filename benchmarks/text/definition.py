"""Define the files of a text benchmark: how it trains, what its suites run, and its tasks."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

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
    KEEP_INTEGER,
    UNIQUE,
    Count,
    Key,
    Names,
    NotNegative,
    Number,
    Positive,
    Positives,
    Rate,
    Strict,
    Whole,
    Wholes,
    optional,
    optional_zero,
)

Protocol = Literal["published", "clean"]
PUBLISHED, CLEAN = "published", "clean"
ID, OOD = "id", "ood"  # domains: the sets that a model is trained on, and others

PAPER_COLUMNS = ("model", "scope", "method")  # of published numbers, before value, status and source
ABLATION_COLUMNS = (*PAPER_COLUMNS, "setting")


class TextTraining(Training):
    """The training of a run; a suite may change the benchmark's."""

    in_no_spec: ClassVar = {"by_model", "evaluate_ood", "epochs_by_task"}

    epochs: Positive
    """Passes over the training set."""
    batch_size: Count
    """Sentences per step."""
    eval_batch_size: Count
    """Sentences per evaluation batch."""
    max_length: Annotated[int, Field(ge=4)]
    """Tokens kept of a sentence or pair."""
    sampling: Literal["random", "group_by_length"]
    """Order of the training rows: shuffled, or shuffled in groups of like length (less padding)."""
    train_rows: Count | None
    """Training rows, taken from the shuffled training split; null for all."""
    train_share: Annotated[float, Field(gt=0, lt=1), KEEP_INTEGER] | None = optional()
    """A share of these rows only, every class in proportion; a smaller share is a part of a larger one. Left out:
    all."""
    eval_rows: Count | None
    """Rows of every evaluation split; null for all."""
    dev_rows: Count | None = optional()
    """Rows of the split that selects, of tasks that have one beside a test split, where it is evaluated on fewer; left
    out, or null: as many as of the others."""
    ood_rows: Count | None = optional()
    """Rows of every set that the task is not trained on, where they are not as many as `eval_rows` says; left out, or
    null: as many."""
    weight_decay: NotNegative
    """AdamW's weight decay."""
    warmup: Rate
    """Share of the steps with a rising rate."""
    checkpoint_selection: Literal["last", "best"]
    """The epoch whose weights are evaluated."""
    patience: Count | None
    """Stop after that many epochs without a new best, which must be above 0 (needs checkpoint_selection: best); null
    never."""
    gradient_accumulation_steps: Count
    """Batches whose gradients one step adds up."""
    precision: Precision
    """Arithmetic on accelerators: float32 or mixed. A CPU always computes in float32, and the record says so."""
    validation_fraction: Rate
    """Share of the training rows that a clean run holds out to choose by, if the task has no split for that."""
    frozen_layers: Whole | None = optional_zero()
    """Embeddings and so many first layers stay as they are, dropout and stochastic depth left out: what they make of a
    row is computed once and kept
    (`resources/prefixes/`). Adapters then sit only in the layers above, and no method converts or trains a layer below.
    0, or left out: none."""
    lora: LoRA | None
    """Train adapters and the head only; null trains everything."""
    keep_weights: bool
    """Keep what was trained below the run's folder, for benchmarks that evaluate it."""
    evaluate_ood: bool | Names | None = optional()
    """Evaluate every run on the task's OOD sets at its end, or those of some methods; in no run's spec. Large sets are
    for a benchmark that evaluates the chosen runs only."""
    epochs_by_task: dict[str, Positive] | None = optional()
    """Epochs of single tasks; in no run's spec."""


class TextBlock(VariantAxes):
    """A product of lists. Lists of method settings become part of the method's variant."""

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
    train_share: Annotated[list[Annotated[float, Field(gt=0, lt=1), KEEP_INTEGER]], Field(min_length=1)] | None = (
        optional()
    )
    """Shares of the training rows, for rows with `role: ablation`."""
    epochs_factor: Positives | None = optional()
    """Times the usual epochs, for rows with `role: ablation`."""
    protocol: Annotated[list[Protocol], Field(min_length=1), UNIQUE] | None = optional()
    """Selection of epoch and hyper-parameters. published: by the dev split, which is also reported. clean: by a split
    that is not reported.
    Left out: clean for tasks with a test split, else published."""


class TextPart(TrainingPart):
    """A text benchmark's part of a suite."""

    training: Annotated[dict[str, Any], Changes(TextTraining)] = Field({})
    """Settings that differ in this suite."""
    grid: Annotated[list[TextBlock], Field(min_length=1)]
    """Blocks of runs; each is the product of its lists."""


class Transformed(Strict):
    """A row that is trained as one method and evaluated as another."""

    title: str
    """Label in tables and figures."""
    trained: str
    """The row whose runs are evaluated."""
    used_as: str
    """The row as whose model they are evaluated: without experts where that is dense, else with its experts, made of
    the trained weights. Both train the same."""


class Ablation(Strict):
    """A comparison within a comparison, with a table and perhaps a figure of its own name."""

    title: str
    """Heading of the table."""
    question: str
    """Its question, and the paper's answer."""
    rows: Annotated[Names, UNIQUE]
    """Rows that are compared with the baseline, which stands first. Of rows with `role: ablation`, and of others with
    several variants, every setting is a row."""
    axis: Literal["train_share", "top_k_fraction"] | None = optional()
    """Horizontal axis of the figure; left out: the differences, row by row."""
    steps: Literal[True] | None = optional()
    """Each row is compared with the one above it, of which it differs in one thing more, and not with the baseline."""
    paper: str | None = optional()
    """CSV with the paper's numbers, in the benchmark's folder: a row a model, scope (task), method, setting."""


class Ablated(Strict):
    """The ablations of a benchmark of texts."""

    ablations: dict[Key, Ablation] = Field({})
    """Tables of their own for rows with `role: ablation`, by name; `tables` and `figures` name those that are made."""
    transformed: dict[Key, Transformed] = Field({})
    """Rows that are trained as one thing and evaluated as another, by name; they stand in ablations."""


class PublishedTraces(Strict):
    """The paper's loads of experts over training."""

    task: str
    """The task that was trained on."""
    rows: dict[str, str]
    """By method, a CSV in the benchmark's folder: a row a window, a column an expert's share."""


class TextDefinition(MethodsDefinition, Ablated):
    """One benchmark and its methods."""

    tasks: str
    """File with the task definitions, in the benchmark's folder."""
    published_traces: PublishedTraces | None = optional()
    """The paper's loads of experts over training, which are shown beside ours."""
    training: TextTraining
    """The training of every run; a suite may change it."""


class TextSource(Strict):
    """Source of rows: a set on the hub, a folder of the user's, a csv, or a set that ships inside a package."""

    hub: str | None = optional()
    """Repository on the hub."""
    config: str | None = None
    """Configuration of the hub's set."""
    revision: str | None = None
    """Commit (or branch) of the hub's set; null is its newest."""
    folder: str | None = optional()
    """Name of the set's folder below data_root."""
    csv: str | None = optional()
    """One csv in this project. Its column `split` names the split of each row; without it the hash of the text draws
    it."""
    vader_sentiment: str | None = optional()
    """A domain of the human-rated sentiment set."""
    vader_label: Literal["strength"] | None = optional()
    """Take the strength of the rating (weak, strong) as the label; left out: its sign."""

    def model_post_init(self, _context: Any, /) -> None:
        self.need_one_of("folder", "csv", "vader_sentiment")
        self.need_together("vader_label", "vader_sentiment")


class Splits(Strict):
    """Split names by part; `a+b` is both."""

    train: str | None = None
    """Training split."""
    dev: str | None = None
    """Split that selects epochs and learning rates."""
    test: str | None = None
    """Split that is reported."""


class WhereRows(Strict):
    """Rows of one file that belong to a split, if one file holds several."""

    column: str
    """Column that names the split."""
    values: dict[str, str]
    """Its value by split."""


class FileLayout(Strict):
    """One form of the set's own files."""

    format: Literal["tsv", "csv", "jsonl", "folders"] = "tsv"
    """Tab-separated without quoting, comma-separated with quoting, JSON lines, or a folder of text files for each
    label."""
    files: dict[str, str]
    """File names (of folders, the folder that holds those of the labels) by split name."""
    columns: dict[str, str | int] = Field({})
    """Column of each field and of the label: its header, or its place for files without header."""
    encoding_errors: Literal["strict", "replace"] = "strict"
    """Treatment of bytes that are no UTF-8: end with an error, or replace them by a sign."""
    header: bool = True
    """True if the first line names the columns."""
    where: WhereRows | None = optional()
    """Rows of one file that belong to a split, if one file holds several."""
    label_names: dict[str, str] = Field({})
    """Class names by the labels of these files; nothing else is then a label."""


class Rows(Strict):
    """Rows of each part as their makers count them."""

    train: int | None = optional()
    """Rows of the training split."""
    dev: int | None = optional()
    """Rows of the split that selects."""
    test: int | None = optional()
    """Rows of the split that is reported."""


class RunTask(Strict):
    """A task as a run's spec has it: what shapes its numbers."""

    name: str
    """Name in tasks.yaml, where the key gives it."""
    source: TextSource
    """Source of the rows."""
    fields: Annotated[list[str], Field(min_length=1, max_length=2)]
    """Columns with the text, one or two, under the hub's names."""
    label: str = "label"
    """Column with the label."""
    column_aliases: dict[str, str] = Field({})
    """Names that columns have in other copies of the set, to the names here."""
    labels: list[str] = Field([])
    """Names of the classes in the order of their numbers; empty for a regression. A model's class i is read as class i
    of any other set with as many classes."""
    range: Annotated[list[Number], Field(min_length=2, max_length=2)] | None = optional()
    """Lowest and highest score of a regression; a row with another is refused."""
    label_names: dict[str, str] = Field({})
    """Other spellings of the labels that files use, to the class names."""
    unlabelled: list[str | int | float] = Field([])
    """Label values that mark a row without a gold label, beside -1, null, nan and an empty cell; such rows are dropped
    and counted, as are rows without any text."""
    label_map: dict[Annotated[str, Field(pattern="^[0-9]+$")], list[Whole]] = Field({})
    """Classes as read if a model or a set has fewer of them: by that number of classes, the new number of each
    class."""
    metric: str
    """Name in metrics.yaml: what training on the task selects by and reports."""
    ood_metrics: Names
    """Metrics of a model that was trained on another task: the paper's first, others beside it. Left out in
    tasks.yaml: metric."""
    splits: Splits
    """Split names by part. The dev part selects; the test part is reported (dev where there is none). Sets without
    train and dev are for evaluation only."""
    raw_formats: Annotated[list[FileLayout], Field(min_length=1)] | None = optional()
    """Layouts of the makers' own files, for `tools/convert_glue_x.py`; it takes the first whose file is there."""


class TaskEntry(RunTask, Entry):
    """One task of ``tasks.yaml``: a run's, and what is shown and checked of it."""

    rows: Rows = Rows()
    """Rows of each part as their makers count them, those without a gold label included; of sets that GLUE-X's authors
    made, as their result files count them."""
    published_rows: PublishedRows | None = optional()
    """Another number of rows of the test part that the paper's authors score: how many, who says
    so, and why."""
    download_instructions: str | None = optional()
    """For sets that must be fetched by hand: which file, from whom."""
    ood: list[str] = Field([])
    """Tasks that a model trained on this one is also evaluated on, without further training."""

    def spec(self) -> dict[str, Any]:
        """Return the part of the task that shapes a run's numbers."""
        return self.model_dump(include=set(RunTask.model_fields))


class TaskFile(Strict):
    """Task definitions; a task is data, not code."""

    tasks: Annotated[dict[Key, TaskEntry], Field(min_length=1)]
    """The tasks, by name."""

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, content: Any) -> Any:
        """Give each task its name, and its metric as that of models trained on another task."""
        tasks = content.get("tasks") if isinstance(content, dict) else None
        if not isinstance(tasks, dict):
            return content
        return {**content, "tasks": {name: _completed(name, task) for name, task in tasks.items()}}


def _completed(name: object, task: Any) -> Any:
    if not isinstance(task, dict) or "metric" not in task:
        return task
    return {"ood_metrics": [task["metric"]], **task, "name": name}


class UsedAs(Strict):
    """The method that a run's model is also evaluated as."""

    name: str
    """The row whose numbers these are."""
    config: dict[str, Any] | None
    """The configuration of its EMoE; null for the dense model."""


class TextSpec(RunSpec):
    """The settings that shape the numbers of a run that trains a text classifier."""

    protocol: Protocol
    """The protocol that chooses epoch and hyper-parameters."""
    task: RunTask
    """The task that it is trained on."""
    ood: list[RunTask]
    """The other sets that it is evaluated on."""
    training: TextTraining
    """The training."""
    used_as: UsedAs | None = optional()
    """The method that its model is turned into and evaluated as at the end; left out: none."""
