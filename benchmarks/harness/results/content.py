"""The content of a ``metrics.json``, for runs of all kinds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Sized
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from benchmarks.harness.config.yaml import refusal


class Recorded(BaseModel):
    """A part of a ``metrics.json``. A key that may be missing cannot be null."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _refuse_null(cls, content: Any) -> Any:
        """Refuse a null under a key that may be missing."""
        # pydantic itself refuses what is not a mapping
        if not isinstance(content, dict):
            return content
        for key, field in cls.model_fields.items():
            may_be_missing = not field.is_required() and field.default is None
            is_null = key in content and content[key] is None
            if may_be_missing and is_null:
                raise refusal(f"'{key}' is null")
        return content


def _check_number(text: str) -> str:
    """Refuse a text that is not a number."""
    try:
        float(text)
    except ValueError:
        raise refusal(f"'{text:.50}' is not a number") from None
    return text


def _check_same_lengths(rows: Sequence[Sized]) -> Any:
    """Refuse lists of different lengths."""
    lengths = {len(row) for row in rows}
    if len(lengths) > 1:
        raise refusal("its lists have different lengths")
    return rows


Count = Annotated[int, Field(ge=0, lt=2**63)]
Loss = float | None  # null if the model diverged
NumberText = Annotated[str, AfterValidator(_check_number)]  # a number with all its digits
Digits = Annotated[str, Field(pattern="^[0-9]+$")]
Layer = Digits  # the number of a layer
Loads = Annotated[list[Count], Field(min_length=1)]  # choices by expert
Shares = Annotated[list[float], Field(min_length=1)]  # shares of the choices by expert
LoadRows = Annotated[list[Loads], Field(min_length=1), AfterValidator(_check_same_lengths)]
ByMetric = Annotated[dict[str, Loss], Field(min_length=1)]
Scores = dict[str, dict[str, ByMetric]]  # by part, set and metric


class Cost(Recorded):
    """What a run took. A kind that trains has the times of its training, too."""

    job_seconds: float
    """The whole job, from the start of its process."""
    startup_seconds: float
    """The part before the first row is read."""
    peak_memory_mb: float
    precision: str | None = None
    steps: Count | None = None
    """Optimizer steps."""
    step_seconds: float | None = None
    train_seconds: float | None = None
    evaluation_seconds: float | None = None
    prefix_seconds: float | None = None
    """Time in frozen layers whose outputs are kept."""


class Environment(Recorded):
    """The machine, the packages and the commit of a run."""

    packages: dict[str, str]
    """Versions by package."""
    python: str
    platform: str
    git_commit: str | None
    """Null outside a checkout, as is `git_dirty`."""
    git_dirty: bool | None
    processor: str
    cores: Count | None
    """Null if the system does not say."""
    threads: Annotated[int, Field(ge=1)]
    memory_gb: float
    gpus: list[str]
    fingerprint: dict[str, str]
    """Packages and hardware. If all are equal, numbers are equal to the last digit."""


class Logits(Recorded):
    """A summary of logits.

    The order of the fields is that of a written file: `check` compares them as one text.
    """

    deviation: float
    mean: float
    projection: float
    rms: float


class Probe(Recorded):
    """Numbers of the first steps, which barely differ between machines."""

    losses: list[NumberText]
    loads: dict[Layer, Loads]
    """Choices of a fixed batch by layer and expert; empty for a dense model."""
    logits: Logits | None = None
    """Of the same batch. Sharded models record none."""


class ConvertedLayer(Recorded):
    """A layer whose FFN was converted, see :class:`emoe.convert.LayerReport`."""

    index: Count
    name: str
    neurons: Count
    experts: Count
    expert_size: Count
    top_k: Count
    explained: float | None
    """Share of the keys' variance that the partition explains; null for GMoE."""
    seconds: float | None


class TrainedGroup(Recorded):
    """The trained parameters of a group, such as adapters."""

    parameters: Count
    names: str
    """Digest of their names."""


class Source(Recorded):
    """The origin of the pre-trained weights."""

    origin: str = Field(alias="from")
    weights: str
    """Digest of the weights; empty if they were quantised."""


class ModelNumbers(Recorded):
    """The source and the sizes of a run's model.

    A kind that trains nothing may record only its source and its conversion.
    """

    source: Source
    conversion: list[ConvertedLayer]
    """Empty for a dense model."""
    trained: dict[str, TrainedGroup] = {}
    """By group; empty if all parameters were trained."""
    parameters: Count | None = None
    dense_parameters: Count | None = None
    trainable_parameters: Count | None = None
    active_parameters: Count | None = None
    flops_per_token: Count | None = None
    active_neurons: float | None = None


# the keys of a summary of instructions
_OF_INSTRUCTIONS = (
    "template",
    "broken_rows",
    "tokens",
    "learned_tokens",
    "longest",
    "truncated_responses",
    "truncated_tokens",
)


class DataSummary(Recorded):
    """The rows of one split of a set.

    Texts and images have labels or scores, and instructions have tokens.
    """

    source: str
    rows: Count
    digest: str | None = None
    """Of texts."""
    dropped: Count | None = None
    """Rows without a clear label or text."""
    labels: dict[str, Count] = {}
    """Rows by class."""
    range: Annotated[list[float], Field(min_length=2, max_length=2)] | None = None
    """The lowest and highest score of a regression."""
    template: str | None = None
    """Of instructions, as are all following keys."""
    broken_rows: Count | None = None
    tokens: Count | None = None
    learned_tokens: Count | None = None
    longest: Count | None = None
    truncated_responses: Count | None = None
    truncated_tokens: Count | None = None

    @property
    def content(self) -> str:
        """Return the counts, labels and digest in one text, which ``check`` compares."""
        texts = []
        for key, value in sorted(self):
            if isinstance(value, int):
                texts.append(f"{key} {value}")
        for label, count in self.labels.items():
            texts.append(f"{label}: {count}")
        if self.digest is not None:
            texts.append(self.digest)
        return ", ".join(texts)

    def model_post_init(self, _context: Any, /) -> None:
        """Refuse a summary that lacks a key of its kind of data."""
        has_instructions = any(getattr(self, key) is not None for key in _OF_INSTRUCTIONS)
        if has_instructions:
            self._check_given(_OF_INSTRUCTIONS)
            return
        self._check_given(["dropped"])
        # classes have labels, and scores of a regression have a range
        if not self.labels and self.range is None:
            raise refusal("'labels' is missing")

    def _check_given(self, keys: Sequence[str]) -> None:
        """Refuse the summary if it lacks one of some keys."""
        for key in keys:
            if getattr(self, key) is None:
                raise refusal(f"'{key}' is missing")


class Windows(Recorded):
    """Expert loads during the training, window by window."""

    ends: list[Count]
    """The last step of each window."""
    loads: dict[Layer, LoadRows]
    """By layer, window and expert."""

    def model_post_init(self, _context: Any, /) -> None:
        """Refuse a layer with more or fewer windows than ``ends``."""
        for layer, rows in self.loads.items():
            if len(rows) != len(self.ends):
                raise refusal(
                    f"'loads.{layer}' has {len(rows)} windows, but 'ends' has {len(self.ends)}"
                )


class Chance(Recorded):
    """The mutual information of expert and label by chance, in bits.

    Each pair has the mean and the 95 % quantile of shuffles.
    """

    by_class: Annotated[list[float], Field(min_length=2, max_length=2, alias="class")]
    environment: Annotated[list[float], Field(min_length=2, max_length=2)]


class Routing(Recorded):
    """A summary of the evaluated tokens' routing; empty for a dense model.

    Statistics are means over the layers. Kinds measure the information of different labels.
    """

    active_neurons: float | None = None
    drop_rate: float | None = None
    experts_per_token: float | None = None
    load_entropy: float | None = None
    load_max_over_mean: float | None = None
    class_information: float | None = None
    class_information_chance: float | None = None
    class_information_chance_95: float | None = None
    task_information: float | None = None
    task_information_chance: float | None = None
    task_information_chance_95: float | None = None
    environment_information: float | None = None
    environment_information_chance: float | None = None
    environment_information_chance_95: float | None = None
    shares: dict[Layer, Shares] = {}
    """Shares of the choices by layer and expert."""
    windows: Windows | None = None
    """Of text benchmarks' training."""
    loads: dict[
        Layer, Annotated[list[LoadRows], Field(min_length=1), AfterValidator(_check_same_lengths)]
    ] = {}
    """Of images, by layer, environment, class and expert."""
    chance: dict[Layer, Chance] = {}
    """Of images, by layer."""

    def model_post_init(self, _context: Any, /) -> None:
        """Refuse loads and chance of different layers."""
        if self.loads.keys() != self.chance.keys():
            raise refusal("'loads' and 'chance' have different layers")


class SetUsage(Recorded):
    """The use of experts by the rows of one set."""

    shares: Shares
    """By expert."""
    marks: list[Annotated[int, Field(ge=-1, le=1)]]
    """1 for experts that are used more than by chance, -1 for less, by expert."""
    classes: dict[Digits, Shares]
    """Shares by class; empty for a regression."""

    def model_post_init(self, _context: Any, /) -> None:
        """Refuse lists of different numbers of experts."""
        _check_same_lengths([self.shares, self.marks, *self.classes.values()])


class Usage(Recorded):
    """The use of experts by set; all is empty for a dense model, and for runs on a single set."""

    tasks: dict[str, SetUsage] = {}
    """By set."""
    shared: list[Count] = []
    specialised: list[Count] = []

    def model_post_init(self, _context: Any, /) -> None:
        """Refuse a summary with only some of the keys, or with an expert that does not exist."""
        given = self.model_fields_set
        if given:
            for key in type(self).model_fields:
                if key not in given:
                    raise refusal(f"'{key}' is missing")

        shares = [use.shares for use in self.tasks.values()]
        _check_same_lengths(shares)
        num_experts = len(shares[0]) if shares else 0
        for expert in (*self.shared, *self.specialised):
            if expert >= num_experts:
                raise refusal(
                    f"'shared' or 'specialised' names an expert beyond the {num_experts} of 'tasks'"
                )


class Matrix(Recorded):
    """The active neurons of some tokens.

    ``tokens``, ``places`` and ``values`` have one entry per active neuron: its token, its place in
    the order of the experts, and its value.
    """

    neurons: Annotated[int, Field(ge=1)]
    tasks: Annotated[list[str], Field(min_length=1)]
    """The set of each token."""
    tokens: list[Count]
    places: list[Count]
    values: list[float]

    def model_post_init(self, _context: Any, /) -> None:
        """Refuse places without a token or a value."""
        _check_same_lengths([self.tokens, self.places, self.values])


class QuestionResult(Recorded):
    """The result of a task of lm-eval."""

    scores: Annotated[dict[str, Loss], Field(min_length=1)]
    metric: str
    questions: Count
    categories: dict[str, dict[str, float]]
    """Metrics and number of questions by subgroup."""
    subjects: dict[str, dict[str, float]]
    """The same by subject."""
    correct: dict[str, Annotated[str, Field(pattern="^[01]*$")]]
    """A digit for each question by subject; empty without a binary accuracy."""
    nats_per_byte: dict[str, list[Loss]] = {}
    """For each right answer by subject; empty if questions have no several answers."""
    source: list[str] = []
    """Origin of the questions."""


class Answer(Recorded):
    """A generated answer."""

    instruction: str
    input: str
    reference: str
    answer: str


class Chosen(Recorded):
    """The run that an evaluation chose."""

    run: str
    """Folder below results/runs."""
    learning_rate: float
    variant: str


class Transformed(Recorded):
    """What a model scores after its conversion to another method."""

    scores: Scores


class Epoch(Recorded):
    """An epoch of text training, with its loss and scores under the names of metrics or sets."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Loss]
    epoch: float

    def numbers(self) -> Mapping[str, Loss]:
        """Return the loss and the scores by name."""
        return self.__pydantic_extra__


class HeldOutLoss(Recorded):
    """The loss on held-out instructions at a step of the training."""

    step: Count
    loss: Loss


class StepRecord(Recorded):
    """A record of DomainBed, with accuracies under names such as ``env0_in_acc``."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, float]
    step: Count
    epoch: float
    loss: Loss

    def numbers(self) -> Mapping[str, float]:
        """Return the accuracies by name."""
        return self.__pydantic_extra__


def _check_same_numbers(records: list[StepRecord]) -> list[StepRecord]:
    """Refuse records with different accuracies."""
    names = {frozenset(record.numbers()) for record in records}
    if len(names) > 1:
        raise refusal("its records have different accuracies")
    return records


class Metrics(Recorded):
    """The parts of a ``metrics.json``; ``Benchmark.recorded`` lists a benchmark's required parts.

    A new kind may record further parts.
    """

    model_config = ConfigDict(extra="allow")

    run_id: str
    cost: Cost
    environment: Environment
    scores: Scores | None = None
    measured: (
        Annotated[dict[str, Annotated[dict[str, float], Field(min_length=1)]], Field(min_length=1)]
        | None
    ) = None
    """By candidate."""
    transformed: dict[str, Transformed] = {}
    """By method."""
    data: dict[str, DataSummary] | None = None
    """By set and part."""
    model: ModelNumbers | None = None
    probe: Probe | None = None
    routing: Routing | None = None
    usage: Usage | None = None
    matrix: Matrix | None = None
    tasks: dict[str, QuestionResult] | None = None
    """By title of the evaluated task."""
    answers: list[Answer] | None = None
    chosen: Chosen | None = None
    epochs: list[Epoch] = []
    kept_epoch: float | None = None
    dev_curve: list[Epoch] = []
    held_out_curve: list[HeldOutLoss] = []
    records: (
        Annotated[list[StepRecord], Field(min_length=1), AfterValidator(_check_same_numbers)] | None
    ) = None
    curve: list[Loss] = []
    """Training losses by step."""
    confusion: dict[str, list[list[Count]]] | None = None
    """Images by environment, true and predicted class."""
    classes: list[str] | None = None

    @property
    def weights(self) -> str:
        """Return the digest of the pre-trained weights."""
        if self.model is None:
            raise ValueError("the run recorded no model")
        return self.model.source.weights


def rerun_advice(path: Path) -> str:
    """Return the advice how to make a damaged ``metrics.json`` anew."""
    return f"delete it and run `snakemake --cores all {path}`"
